"""report.html: from a whole run directory, a damaged one and an empty one, and of which parts it is made."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir
from ray_ep.observe.page.report import write_report
from ray_ep.observe.routing import expected_pairs, pair_ratios
from tests.observe.page.runs import Size, write_run
from tests.records import record

FILES = (
    "config.yaml", "metrics.jsonl", "events.jsonl", "statistics/routing.npz", "statistics/load-0003.npz",
    "placements/0000.json", "placements/0003.json", "exchange.json", "topology.json",
)  # fmt: skip


class Page(HTMLParser):
    """What a page is made of: scripts by their kind, addresses that it loads, and the data that it shows."""

    def __init__(self, path):
        super().__init__()
        self.scripts, self.loads, self._now = [], [], None
        self.feed(path.read_text())
        self.close()
        (held,) = [text for attributes, text in self.scripts if attributes.get("id") == "data"]
        self.data = json.loads(held)
        (imports,) = [text for attributes, text in self.scripts if attributes.get("type") == "importmap"]
        self.imports = json.loads(imports)["imports"]

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "script":
            self.scripts.append([attributes, ""])
        self._now = tag
        self.loads += [v for n, v in attrs if n in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        if self._now == "script":
            self.scripts[-1][1] += data

    def handle_endtag(self, tag):
        self._now = None

    @property
    def headlines(self):
        return {h["label"]: h["value"] for h in self.data["summary"]["headlines"]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run-7"
    write_run(folder)
    return write_report(folder)


@pytest.fixture
def run_dir(tmp_path):
    write_run(tmp_path / "run-7", Size(layers=2, experts=8, steps=30))
    return tmp_path / "run-7"


def test_the_page_holds_everything_that_it_shows_and_loads_nothing(path):
    page = Page(path)
    assert page.loads
    assert all(address.startswith(("#", "data:")) for address in page.loads)
    assert "ray_ep/main.js" in page.imports
    assert all(address.startswith("data:text/javascript") for address in page.imports.values())
    assert sum("Bokeh Contributors" in text for _, text in page.scripts) == 2
    assert set(page.data["layers"]) == {"0", "1", "2", "3"}
    assert [entry["version"] for entry in page.data["placements"]["kept"]] == [0, 1, 2, 3]


def test_every_module_that_another_imports_is_there(path):
    from base64 import b64decode

    page = Page(path)
    for name, address in page.imports.items():
        code = b64decode(address.partition(",")[2]).decode()
        assert {f"ray_ep/{wanted}" for wanted in re.findall(r'from "ray_ep/(\w+\.js)"', code)} <= set(page.imports), (
            name
        )


def test_the_figures_at_its_head_are_the_runs(path):
    page = Page(path)
    last = json.loads((path.parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert page.headlines["Final loss"] == f"{last['loss']:.4f}"
    assert page.headlines["Steps"] == "240"
    assert page.headlines["Exchange"] == "18%"
    assert page.headlines["Peak memory"] == "900 MiB"
    assert (
        page.data["summary"]["model"]
        == "qwen3_moe, 4 layers, hidden size 128, 4 MoE layers of 16 experts, top-2, float32"
    )
    assert page.data["summary"]["force"] == ""


def test_the_page_of_a_run_in_progress_says_so(run_dir):
    page = Page(write_report(run_dir, running=True))
    assert page.data["state"]["run"]["alive"] is True
    assert "Final loss" not in page.headlines
    assert "Loss" in page.headlines
    assert Page(write_report(run_dir)).data["state"]["run"]["alive"] is False


def test_text_of_the_run_can_neither_end_the_data_nor_begin_a_script(run_dir):
    run = RunDir(run_dir)
    run.event(Event("warning", "</script><script>alert(1)</script> <!-- & co"))
    path = write_report(run_dir)
    assert "alert(1)</script>" not in path.read_text()
    assert Page(path).data["state"]["events"]["newest"][-1]["message"] == "</script><script>alert(1)</script> <!-- & co"


def test_passwords_in_addresses_are_masked(path):
    assert "hunter2" not in path.read_text()
    assert "s3://***@bucket/a.jsonl" in Page(path).data["summary"]["config"]


def test_a_forced_router_is_announced(run_dir):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**config, "router": {"force": "balanced"}}))
    assert Page(write_report(run_dir)).data["summary"]["force"] == "balanced"


def test_links_that_are_not_what_is_said_of_the_nodes_are_told(path):
    links = Page(path).data["summary"]["links"]
    assert links["nodes"] == 2
    assert any("node 0" in row[0] for row in links["rows"])


def test_of_a_page_that_cannot_be_written_nothing_is_left(run_dir):
    (run_dir / "report.html").mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(run_dir)
    assert list(run_dir.glob(".report*")) == []


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_costs_only_what_it_told(run_dir, name):
    (run_dir / name).unlink()
    page = Page(write_report(run_dir))
    assert page.data["state"]["run"]["name"] == "run-7"
    assert bool(page.headlines) == (name != "metrics.jsonl")
    assert bool(page.data["layers"]) == (name != "statistics/routing.npz")


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "other"])
def test_damaged_files_are_no_error(run_dir, damage):
    for path in (run_dir / name for name in FILES):
        whole = path.read_bytes()
        left = {"empty": b"", "cut": whole[: len(whole) * 2 // 3], "noise": b"\x80\x00{[:", "other": b'{"slots": 3}\n'}
        path.write_bytes(left[damage])
    assert bool(Page(write_report(run_dir)).headlines) == (damage == "cut")


def test_a_run_without_a_step_and_one_without_any_figure_have_a_page(tmp_path):
    assert Page(write_report(tmp_path)).headlines == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert Page(write_report(tmp_path)).headlines["Steps"] == "1"


def test_a_loss_that_is_not_finite_is_shown_as_such(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    (tmp_path / "events.jsonl").write_text('{"step": 2, "kind": "x", "fields": {"loss": Infinity}}\n')
    page = Page(write_report(tmp_path))
    assert page.headlines["Final loss"] == "nan"
    assert page.data["state"]["steps"]["columns"]["loss"] == [2.0, None]


def test_a_long_run_has_a_page_of_few_megabytes(tmp_path):
    run = RunDir(tmp_path)
    lines = [json.dumps({**record(1, loss=2.0).line(), "step": step}) for step in range(1, 20_001)]
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert write_report(tmp_path).stat().st_size < 4_000_000


def test_an_expert_that_always_fires_is_no_deviation():
    # top-2 of 4 experts; 0 fires for each of 90 tokens, beside 1, 2 or 3 in turn: its pairs follow from the loads alone
    observed = np.zeros((4, 4))
    observed[0, 1:] = observed[1:, 0] = 30
    np.testing.assert_allclose(expected_pairs(observed), observed, atol=1.0)


def test_equal_loads_expect_equal_pairs():
    # top-2 of 4 experts; 0 and 1 always together (6 tokens), 2 and 3 too: each row's 6 spread over 3 partners
    observed = np.kron(np.eye(2), np.array([[0, 6], [6, 0]]))
    np.testing.assert_allclose(expected_pairs(observed), 2.0 * (1 - np.eye(4)))
    ratios = pair_ratios(observed)
    assert ratios[0, 1] == pytest.approx(3.0)
    assert ratios[0, 2] == 0.0
    assert np.isnan(np.diagonal(ratios)).all()
