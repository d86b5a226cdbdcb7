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
    run = OwnRun([], [(1, 5.0), (3, 6.0), (4, 6.5), (7, 9.0), (8, 9.1)])
    assert run.seconds(0, 2) == pytest.approx([1 / 2, 3 / 4])
    assert run.seconds(2, 1) == pytest.approx([1 / 2, 2.5 / 3, 0.1])
    assert run.seconds(3, 50) == pytest.approx([3.1 / 5])


def test_ratios_are_those_of_medians_of_lower_quartiles_and_of_each_round():
    base, other = [[1.0, 2.0, 3.0], [2.0, 2.0, 9.0]], [[1.1, 2.2, 3.0], [2.0, 4.0, 4.0]]
    result = OptionsResult(OptionsCase({}, 3, 2), {AS_IT_IS: base, "a=1": other})
    assert result.ratio("a=1") == pytest.approx(2.6 / 2.0)
    assert result.undisturbed("a=1") == pytest.approx((1.1 * 0.25 + 2.0 * 0.75) / (1.0 * 0.25 + 2.0 * 0.75))
    assert result.ratios("a=1") == pytest.approx([1.1, 2.0])
    head, first, second, *_ = result.lines()
    assert first.split()[-6:] == ["is", "2000.0", "1.000", "1.000", "1.000", "1.000"]
    assert second.split() == ["a=1", "2600.0", "1.300", "1.014", "1.100", "2.000"]
    assert head.index("  of") == second.index("  1.100")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --try OPTIONS at least once"),
        (["--try", "snapshot.evry=0"], "did you mean 'snapshot.every'?"),
        (["--try", "snapshot.every=0", "--try", " snapshot.every=0"], "--try 'snapshot.every=0' is given twice"),
        (["--try", "run_dir=x"], "/x: leave it out"),
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
    other = runs["snapshot.every=0"]
    assert 1 < other["step_ms"] < 5000
    assert 1 <= len(other["windows_ms"][0]) <= 3
    assert not list(tmp_path.iterdir())
