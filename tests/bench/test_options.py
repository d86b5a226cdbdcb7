"""`ray-ep bench options`: a run beside itself with other options."""

import json
import tempfile

import pytest
from click.testing import CliRunner

from ray_ep.bench.options import AS_IT_IS, OptionsCase, OptionsResult
from ray_ep.bench.own_run import OwnRun
from ray_ep.cli import main

TINY = [
    "model.overrides={hidden_size: 32, num_hidden_layers: 2, num_experts: 4, moe_intermediate_size: 16}",
    "batch={sequences: 4, length: 16}",
    "data.max_bytes=200000",
]


def test_a_steps_seconds_are_those_between_records_and_records_seen_together_count_each():
    run = OwnRun([], [(1, 5.0), (3, 6.0), (4, 6.5), (7, 9.0)])
    assert run.seconds(0) == pytest.approx(4 / 6)
    assert run.seconds(2) == pytest.approx(3 / 4)


def test_ratios_are_those_within_a_round():
    result = OptionsResult(OptionsCase({}, 2, 2), {AS_IT_IS: [1.0, 2.0, 3.0], "a=1": [1.1, 2.0, 3.6]})
    assert result.ratios("a=1") == pytest.approx([1.1, 1.0, 1.2])
    head, first, second, _ = result.lines()
    assert first.split()[-6:] == ["is", "2000.0", "1.000", "1.000", "1.000", "1.000"]
    assert second.split() == ["a=1", "2000.0", "1.100", "1.100", "1.000", "1.200"]
    assert len(head[: head.index("  of")]) == len(second[: second.index("  1.1")])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --try OPTIONS at least once"),
        (["--try", "snapshot.evry=0"], "did you mean 'snapshot.every'?"),
        (["--try", "snapshot.every=0", "--try", " snapshot.every=0"], "--try 'snapshot.every=0' is given twice"),
        (["--try", "run_dir=x"], "run_dir=x: leave it out"),
        (["--try", "snapshot.every=0", "resume=auto"], "resume=auto: leave it out"),
        (["--try", "cluster.ranks=0"], "cluster.ranks=0"),
    ],
)
def test_bad_input_is_named_before_anything_starts(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["bench", "options", *TINY, *arguments])
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_take_turns_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = ["--try", "snapshot.every=0", "--steps=30", "--rounds=1", "--json", *TINY]
    done = CliRunner().invoke(main, ["bench", "options", *arguments])
    assert done.exit_code == 0, done.stderr
    assert [line.rpartition(": ")[2] for line in done.stderr.splitlines() if "round 1 of 1" in line] == [
        "as it is ...", "snapshot.every=0 ...",
    ]  # fmt: skip
    runs = json.loads(done.stdout)["runs"]
    assert runs["as it is"]["ratios"] == [1.0]
    (other,) = runs["snapshot.every=0"]["step_ms"]
    assert 1 < other < 5000
    assert not list(tmp_path.iterdir())
