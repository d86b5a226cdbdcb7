"""The page of a run: from a whole run directory, a damaged one and an empty one."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir
from ray_ep.observe import figures
from ray_ep.observe.report import write_report
from ray_ep.observe.routing import expected_pairs, strongest_coactivation
from ray_ep.observe.state import RunState
from tests.records import record

LAYERS, EXPERTS, TOP_K, TOKENS = 4, 16, 2, 4000
FILES = ("config.yaml", "metrics.jsonl", "events.jsonl", "statistics/routing.npz", "placements/0000.json",
         "exchange.json")  # fmt: skip
VOID = {"meta", "link", "br", "img", "input", "use", "path"}


class Page(HTMLParser):
    """Tags, ids and loaded addresses of a page; every opened tag must be closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.loads, self.words, self._open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(" ".join(data.split()))

    @property
    def text(self):
        return " ".join(word for word in self.words if word)


def route(rng):
    """Expert sets [L, T, K] with hot experts and, in layer 2, experts 3 and 7 fond of each other."""
    sets = np.empty((LAYERS, TOKENS, TOP_K), dtype=np.int64)
    for layer in range(LAYERS):
        weights = rng.dirichlet(np.full(EXPERTS, 2.0))
        sets[layer] = [rng.choice(EXPERTS, TOP_K, replace=False, p=weights) for _ in range(TOKENS)]
    sets[2, : TOKENS // 4] = (3, 7)
    return sets


def save_statistics(folder, sets):
    one_hot = np.eye(EXPERTS, dtype=np.int64)[sets].sum(axis=2)  # [L, T, E]
    pairs = np.einsum("lti,ltj->lij", one_hot, one_hot)
    folder.mkdir(parents=True)
    transitions = np.einsum("lti,ltj->lij", one_hot[:-1], one_hot[1:])
    sample = sets[:, :0].astype(np.int32)
    np.savez(folder / "routing.npz", load=one_hot.sum(1), coactivation=pairs, transitions=transitions, sample=sample)


def metrics(step, rng):
    seconds = 0.3 * rng.uniform(0.9, 1.1) * (6 if step == 1 else 1)
    line = {"step": step, "loss": 1.6 + 4 * np.exp(-step / 20) + rng.normal(0, 0.03), "grad_norm": 1.0, "lr": 1e-3}
    line |= {"tokens": 4096, "step_seconds": seconds, "tokens_per_second": 4096 / seconds, "world_size": 4, "epoch": 0}
    line |= {"exchange_seconds": 0.12 * seconds, "expert_seconds": 0.5 * seconds, "placement_version": 0}
    line |= {"balancedness": 0.8, "max_expert_load": list(1 + rng.uniform(0, 1, LAYERS))}
    return line | ({"eval_loss": 1.8 + 4 * np.exp(-step / 20)} if step % 25 == 0 else {})


def config(force="none"):
    overrides = {"hidden_size": 128, "num_hidden_layers": 4, "num_experts_per_tok": 2}
    model = {"type": "qwen3_moe", "overrides": overrides, "path": "", "dtype": "float32"}
    files = ["s3://reader:hunter2@bucket/a.jsonl", "https://bucket/b.jsonl?token=hunter2&part=1"]
    data = {"files": files, "tokenizer": "bytes", "password": "hunter2 again"}
    return {"seed": 0, "model": model, "data": data, "optim": {"steps": 150}, "router": {"force": force}}


def placement(ranks=4):
    share = max(EXPERTS // ranks, 1)
    first = [r * share % EXPERTS for r in range(ranks)]
    slots = [[[*range(e, e + share), 3 if r == ranks - 1 else -1] for r, e in enumerate(first)]] * LAYERS
    return {"version": 1, "slots": slots, "primary": None}


@pytest.fixture(scope="module")
def routes():
    return route(np.random.default_rng(0))


def write_run(folder, routes):
    """A whole run."""
    rng = np.random.default_rng(0)
    save_statistics(folder / "statistics", routes)
    (folder / "config.yaml").write_text(yaml.safe_dump(config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(metrics(s, rng)) + "\n" for s in range(1, 151)))
    events = [
        {"time": "2026-05-01T12:00:01.123456", "kind": "placement", "message": "contiguous, version 0"},
        {"time": "2026-05-01T12:00:09", "kind": "warning", "message": "<script>alert(1)</script> & co", "step": 40},
        {"time": "2026-05-01T12:00:20", "kind": "rank_lost", "message": "rank 1 died; steps go on with 3", "step": 90},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    timings = [
        {"kind": "flat", "transport": "gloo", "seconds": 0.004, "rounds": 9},
        {"kind": "two_level", "transport": "gloo", "seconds": 0.002, "rounds": 9},
    ]
    choice = {"kind": "two_level", "transport": "gloo", "words": "two_level over gloo, measured", "timings": timings}
    (folder / "exchange.json").write_text(json.dumps(choice))
    (folder / "placements").mkdir()
    (folder / "placements" / "0000.json").write_text(json.dumps(placement()))
    return folder


@pytest.fixture
def run_dir(tmp_path, routes):
    """A whole run, to change."""
    return write_run(tmp_path / "run-7", routes)


@pytest.fixture(scope="module")
def text(tmp_path_factory, routes):
    """The page of a whole run."""
    return write_report(write_run(tmp_path_factory.mktemp("report") / "run-7", routes)).read_text()


def test_the_page_of_a_whole_run_shows_every_figure(text):
    page = Page(text)
    assert page.tags.count("svg") == 6
    for words in ("Final loss", "Held-out loss", "Tokens/s", "Balancedness", "Exchange 12%", "Ranks 4", "Steps 150"):
        assert words in page.text
    assert "qwen3_moe, 4 layers, hidden size 128, 4 MoE layers of 16 experts, top-2, float32" in page.text
    assert "router.force=" not in page.text


def test_of_a_page_that_cannot_be_written_nothing_is_left(run_dir):
    (run_dir / "report.html").mkdir()
    with pytest.raises(OSError):
        write_report(run_dir)
    assert list(run_dir.glob(".report*")) == []


def test_no_figure_at_the_head_of_the_page_stands_alone_in_a_row(text):
    ((whole, half),) = re.findall(r'<dl class="headlines" style="--all: (\d+); --half: (\d+)">', text)
    assert int(whole) == text.count("<dt>") > 4
    assert int(half) == (int(whole) + 1) // 2
    assert text.count("repeat(var(--all)") == text.count("repeat(var(--half)") == 1


def test_the_page_loads_nothing_from_outside(text):
    page = Page(text)
    assert page.loads
    assert all(address.startswith(("#", "data:")) for address in page.loads)
    assert "script" not in page.tags


def test_the_ids_of_the_figures_do_not_collide(text):
    ids = Page(text).ids
    assert len(ids) == len(set(ids))


def test_text_of_the_run_is_escaped(text):
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text


def test_passwords_in_addresses_are_masked(text):
    assert "hunter2" not in text
    for kept in ("s3://***@bucket/a.jsonl", "token=***&amp;part=1", "tokenizer: bytes", "password: ***"):
        assert kept in text


def test_the_placement_table_marks_replicas_and_joins_neighbours(text):
    assert text.count('<span class="replica" title="replica">3</span>') == 2 * LAYERS
    page = Page(text).text
    assert "Placement, version 1" in page
    assert "4-7 8-11 3 12-15" in page
    assert "4 further replicas, 12 empty slots" in page


def test_the_ways_of_the_exchange_are_listed_from_the_fastest_and_the_taken_one_marked(text):
    page = Page(text)
    assert "two_level over gloo, measured" in page.text
    assert "two_level gloo 2.00 1.00 9 taken flat gloo 4.00 2.00 9 " in page.text


def test_the_one_way_of_an_exchange_is_said_in_a_sentence_without_a_table(run_dir):
    for timings in ([], [{"kind": "flat", "transport": "gloo", "seconds": 0.0, "rounds": 1}]):
        choice = {"kind": "flat", "transport": "gloo", "words": "flat over gloo (the only way here)"}
        (run_dir / "exchange.json").write_text(json.dumps({**choice, "timings": timings}))
        page = Page(write_report(run_dir).read_text())
        assert "Tokens travel flat over gloo (the only way here)." in page.text
        assert "to the fastest" not in page.text


def test_what_the_driver_tells_is_marked_at_its_step_on_the_curves(tmp_path):
    def dotted():
        return figures.loss(RunState(tmp_path)).count("stroke-dasharray")

    run = RunDir(tmp_path)
    run.start(Event("start", "a model"))
    for step in range(1, 6):
        run.step(record(step, loss=2.0))
        if step == 1:
            plain = dotted()
        if step in (3, 4):
            run.event(Event("balance", "twice at one step is one line", step=step))
            run.event(Event("balance", "twice at one step is one line", step=step))
    assert dotted() == plain + 2


def test_a_placement_on_many_ranks_is_summed_up(run_dir):
    (run_dir / "placements" / "0001.json").write_text(json.dumps(placement(ranks=65)))
    page = Page(write_report(run_dir).read_text())
    assert "4 layers on 65 ranks" in page.text
    assert "Too many ranks for a table" in page.text


def test_the_newest_placement_is_that_of_the_highest_version(run_dir):
    for version, ranks in ((9999, 2), (10000, 65)):
        (run_dir / "placements" / f"{version:04d}.json").write_text(json.dumps(placement(ranks)))
    assert "4 layers on 65 ranks" in Page(write_report(run_dir).read_text()).text


def test_a_forced_router_is_announced(run_dir):
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config("balanced")))
    page = Page(write_report(run_dir).read_text())
    assert "router.force=balanced: the router's choice is replaced; for benchmarks only" in page.text


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_costs_only_its_sections(run_dir, name):
    (run_dir / name).unlink()
    page = Page(write_report(run_dir).read_text())
    assert "run-7" in page.text
    assert page.tags.count("svg") >= 2


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "other"])
def test_damaged_files_are_no_error(run_dir, damage):
    for path in (run_dir / name for name in FILES):
        whole = path.read_bytes()
        left = {"empty": b"", "cut": whole[: len(whole) * 2 // 3], "noise": b"\x80\x00{[:", "other": b'{"slots": 3}\n'}
        path.write_bytes(left[damage])
    page = Page(write_report(run_dir).read_text())
    assert "run-7" in page.text
    assert ("Steps 1" in page.text) == (damage == "cut")


def test_a_run_without_a_step_says_so(tmp_path):
    page = Page(write_report(tmp_path).read_text())
    assert "This run has not finished a single step" in page.text
    assert "svg" not in page.tags


def test_a_run_of_one_step_without_any_figure_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "Steps 1" in Page(write_report(tmp_path).read_text()).text


def test_a_loss_that_is_not_finite_is_shown_as_such(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    assert "Final loss nan" in Page(write_report(tmp_path).read_text()).text


def test_a_long_run_is_thinned_and_quick(tmp_path):
    rng = np.random.default_rng(0)
    lines = [json.dumps({**metrics(1, rng), "step": step}) for step in range(20_000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert write_report(tmp_path).stat().st_size < 400_000


def test_of_a_repeated_step_the_last_line_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n{"step": 2, "loss": 8}\n{"step": 1, "loss": 7}\n')
    run = RunState(tmp_path)
    assert run.steps.column("step").tolist() == [1, 2]
    assert run.steps.column("loss").tolist() == [7, 8]


def test_an_expert_that_always_fires_is_no_deviation():
    # top-2 of 4 experts; 0 fires for each of 90 tokens, beside 1, 2 or 3 in turn: its pairs follow from the loads alone
    observed = np.zeros((4, 4))
    observed[0, 1:] = observed[1:, 0] = 30
    np.testing.assert_allclose(expected_pairs(observed), observed, atol=1.0)


def test_equal_loads_expect_equal_pairs():
    # top-2 of 4 experts; 0 and 1 always together (6 tokens), 2 and 3 too: each row's 6 spread over 3 partners
    observed = np.kron(np.eye(2), np.array([[0, 6], [6, 0]]))
    np.testing.assert_allclose(expected_pairs(observed), 2.0 * (1 - np.eye(4)))
    found = strongest_coactivation(observed[None])
    assert [(p.experts, p.observed, round(p.ratio, 6)) for p in found.top] == [((0, 1), 6, 3.0), ((2, 3), 6, 3.0)]


def test_the_layer_with_the_fond_pair_is_shown(run_dir):
    found = strongest_coactivation(RunState(run_dir).load.pairs("coactivation"))
    assert found.layer == 2
    assert found.top[0].experts == (3, 7)


def test_top_1_routing_has_no_pairs():
    assert strongest_coactivation(np.eye(3)[None] * 5) is None
