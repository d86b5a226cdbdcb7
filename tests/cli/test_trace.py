"""`ray-ep trace`: what was recorded, a token's path, its page, what an expert prefers, and what is refused."""

import json
import re

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from ray_ep.cli import main
from ray_ep.config.sections.observing import ProvenanceConfig
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir
from ray_ep.observe.provenance.files import ProvenanceFiles, parts_of
from ray_ep.placement import contiguous
from ray_ep.rank.data.tokenizer import load_decoder
from tests.browser import data_of
from tests.records import provenance, record

PROSE = "In 1984 it was a bright cold day in April, and 13 clocks were striking 13. "
DIGITS = 3
"""The expert that answers for digits."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose expert 3 answers for digits, in every one of 6 documents."""
    path = tmp_path_factory.mktemp("run")
    (path / "config.yaml").write_text(yaml.safe_dump({"data": {"tokenizer": "bytes"}}))
    directory = RunDir(path)
    (path / "placements").mkdir()
    directory.placement(contiguous(2, 4, 2))
    rng = np.random.default_rng(0)
    with ProvenanceFiles(path, ProvenanceConfig(), lambda: load_decoder("bytes"), print) as files:
        files.start(Event("start", "x"))
        for step in range(1, 7):
            text = PROSE * 8
            positions = np.sort(rng.choice(len(text), 300, replace=False))
            digit = np.array([text[p].isdigit() for p in positions])
            its = np.where(digit | (rng.random(300) < 0.1), DIGITS, rng.integers(0, 3, 300))
            choices = np.stack([its, np.where(its == 0, 1, 0)], 1)
            where = {"first": 1000 * step, "document": step, "choices": choices}
            files.step(record(step, provenance=provenance(text, positions, **where)))
    return path


def trace(*words):
    result = CliRunner().invoke(main, ["trace", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def shown(*words):
    code, out, err = trace(*words)
    assert (code, err) == (0, "")
    return out


def refusal(*words):
    code, out, err = trace(*words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    return err


def test_a_run_alone_shows_which_steps_have_records(run):
    assert "1,800 tokens of 6 steps are recorded, in 1 files." in shown(run)
    assert json.loads(shown(run, "--json"))["steps"] == [{"step": s, "tokens": 300} for s in range(1, 7)]


def test_a_step_shows_its_tokens(run):
    tokens = json.loads(shown(run, "--step", 3, "--json"))["tokens"]
    assert len(tokens) == 300
    assert f"{tokens[0]['position']} ({tokens[0]['row']}:{tokens[0]['column']}) {tokens[0]['text']!r}" in shown(
        run, "--step", 3
    )


def test_a_token_shows_its_path_as_a_tree_as_json_and_as_a_page(run, tmp_path):
    first = json.loads(shown(run, "--step", 3, "--json"))["tokens"][7]
    out = shown(run, "--step", 3, "--token", first["position"])
    assert f"step 3, token {first['position']} (row {first['row']}, column {first['column']})" in out
    path = json.loads(shown(run, "--step", 3, "--token", f"{first['row']}:{first['column']}", "--json"))
    assert list(path["layers"]) == ["0", "1"]
    for hops in path["layers"].values():
        assert [h["choice"] for h in hops] == [0, 1]
        for hop in hops:
            assert hop["place"] == {
                "rank": hop["expert"] // 2, "node": f"node{hop['expert'] // 2}", "host": f"host{hop['expert'] // 2}",
                "device": f"cuda:{hop['expert'] // 2}",
            }  # fmt: skip
            assert f"expert {hop['expert']}, weight {hop['weight']:.3f}: primary on rank {hop['place']['rank']}" in out
    page = tmp_path / "path.html"
    shown(run, "--step", 3, "--token", first["position"], "--html", page)
    html = page.read_text()
    assert re.findall(r"""(?:src|href|url)[=(]["']?([^"')]*)""", html) == ["data:,", "#main"], "it loads nothing"
    drawn = data_of(html)
    assert [(r["rank"], r["home"]) for r in drawn["ranks"]] == [(0, True), (1, False)]
    for layer, hops in path["layers"].items():
        cells = drawn["layers"][int(layer)]["cells"]
        for hop in hops:
            assert {"expert": hop["expert"], "weight": hop["weight"], "kind": "primary", "why": hop["why"]} in cells[
                hop["place"]["rank"]
            ]


def test_an_expert_is_explained_by_what_several_documents_say(run):
    out = shown(run, "--explain", f"1/{DIGITS}")
    assert "layer 1, expert 3: answered for" in out
    assert "of 1,800 recorded tokens" in out
    assert "in 6 of 6 documents" in out
    tree = json.loads(shown(run, "--explain", f"1/{DIGITS}", "--json"))
    assert {"digits", "1"} <= {p["text"] for p in tree["preferences"]}
    assert all(p["text"] == "digits" or p["text"].isdigit() for p in tree["preferences"])
    assert {e["rank"] for e in tree["examples"]} == {1}
    assert len({e["document"] for e in tree["examples"][:6]}) == 6


def test_a_token_that_was_recorded_in_several_steps_counts_once(run, tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "placements").symlink_to(run / "placements")
    with ProvenanceFiles(tmp_path, ProvenanceConfig(), lambda: load_decoder("bytes"), print) as files:
        for step in (1, 2):
            choices = [[step - 1, 2]] * 3
            files.step(record(step, provenance=provenance(PROSE, [1, 5, 9], choices=choices)))
    first, second = (json.loads(shown(tmp_path, "--explain", f"0/{e}", "--json")) for e in (0, 1))
    assert (first["tokens"], first["answered"]) == (3, 0)
    assert (second["tokens"], second["answered"], second["even"]) == (3, 3, 0.5)
    assert "What it prefers is not told: that takes records of 3 documents" in shown(tmp_path, "--explain", "0/1")


def test_what_is_wrong_is_said_in_one_line(run, tmp_path):
    assert "is not a run directory" in refusal(tmp_path)
    assert "was not sampled" in refusal(run, "--step", 3, "--token", 9999)
    assert "step 99: no token of it was recorded" in refusal(run, "--step", 99)
    assert "expected LAYER/EXPERT such as 2/7" in refusal(run, "--explain", "x")
    assert "expert 9: a layer has experts 0 to 3" in refusal(run, "--explain", "0/9")
    assert "layer 7: there are records of MoE layers 0 to 1" in refusal(run, "--explain", "7/0")
    assert "--step and --request are both given" in refusal(run, "--step", 1, "--request", "r")
    assert "--token and --html need --step N" in refusal(run, "--token", 1)
    assert "give --token I" in refusal(run, "--step", 1, "--html", tmp_path / "x.html")
    token = json.loads(shown(run, "--step", 1, "--json"))["tokens"][0]["position"]
    nowhere = tmp_path / "no" / "x.html"
    assert "cannot be written: No such file" in refusal(run, "--step", 1, "--token", token, "--html", nowhere)


def test_a_damaged_file_is_named_and_the_others_are_read(run, tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "provenance").mkdir()
    whole = parts_of(run)[0].path
    (tmp_path / "provenance" / whole.name).write_bytes(whole.read_bytes())
    (tmp_path / "provenance" / "steps-00000007-00000008.parquet").write_bytes(whole.read_bytes()[:1000])
    code, out, err = trace(tmp_path)
    assert code == 0
    assert "1,800 tokens of 6 steps" in out
    left_out = "ray-ep: left out, for they cannot be read: steps-00000007-00000008.parquet\n"
    assert err == left_out
    token = json.loads(shown(run, "--step", 1, "--json"))["tokens"][0]["position"]
    assert "MoE layer 1" in trace(tmp_path, "--step", 1, "--token", token)[1], (
        "there is no placement, and no need of one"
    )
    assert "no placement there can be read" in refusal(tmp_path, "--explain", "0/1")
    (tmp_path / "provenance" / whole.name).unlink()
    (tmp_path / "placements").symlink_to(run / "placements")
    assert "layer 0: no file of records can be read in" in refusal(tmp_path, "--explain", "0/1")
