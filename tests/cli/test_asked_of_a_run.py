"""`ray-ep scale` and `drain` reach a living run; what its directory tells to be impossible is refused at once."""

import subprocess
import sys
from datetime import datetime

import pytest
from click.testing import CliRunner

import ray_ep
from ray_ep.cli import main
from ray_ep.driver.requests import RequestKind
from ray_ep.driver.run.rundir import claimed


def typed(*words):
    return CliRunner().invoke(main, list(words))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of this process."""
    monkeypatch.chdir(tmp_path)
    cfg = ray_ep.load_config(None, ["run_dir=r", "cluster.ranks=3", "elastic.min_ranks=2", "elastic.max_ranks=5"])
    run = claimed(cfg, datetime(2026, 7, 1))
    run.create(cfg)
    yield run
    run.release()


def test_scale_and_drain_ask_a_living_run_in_order(run):
    assert [typed(*words.split()).exit_code for words in ("scale r 4", "drain r 10.0.0.7", "scale r auto")] == [0] * 3
    asked = [run.take_request() for _ in range(3)]
    assert [(r.kind, dict(r.fields)) for r in asked] == [
        (RequestKind.SCALE, {"ranks": 4}), (RequestKind.DRAIN, {"node": "10.0.0.7"}), (RequestKind.SCALE, {"ranks": 0}),
    ]  # fmt: skip
    assert asked[0].by.startswith("ray-ep scale, process ")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        ("0", "N='0': expected a number of ranks from 1 on, or auto"),
        ("many", "N='many': expected"),
        ("1", "'r': 1 ranks are too few: allowed are 2 to 5 (elastic.min_ranks=2)"),
        ("6", "'r': 6 ranks are too many: allowed are 2 to 5 (elastic.max_ranks=5)"),
    ],
)
def test_a_number_that_the_run_can_never_have_is_refused_and_nothing_is_asked(run, number, says):
    refused = typed("scale", "r", number)
    assert refused.exit_code == 2
    assert says in refused.stderr
    assert run.take_request() is None


@pytest.mark.parametrize("words", [("scale", "r", "4"), ("drain", "r", "beta")])
def test_a_run_that_has_ended_and_what_is_no_run_are_refused(run, words):
    run.release()
    assert "'r': this run has ended" in typed(*words).stderr
    nowhere = typed(words[0], "nowhere", words[2])
    assert nowhere.exit_code == 2
    assert "'nowhere': expected a run directory" in nowhere.stderr


def test_help_lists_them():
    said = typed("--help").stdout
    assert "ray-ep scale runs/NAME 4" in said
    assert "ray-ep drain runs/NAME NODE" in said


def test_asking_loads_neither_torch_nor_ray(run):
    code = "import sys; from ray_ep.cli import main; main(['scale', 'r', '4'], standalone_mode=False); "
    code += "sys.exit(len({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert run.take_request() is not None
