"""`ray-ep bench train`: contenders do the same work, and what the table makes of their seconds."""

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import ray_ep
from ray_ep.bench.train import OWN_MODEL, WARM_OURS, WARM_STEPS, cases, run
from ray_ep.bench.train_rows import TITLE, TrainCase, TrainResult
from ray_ep.cli import main

TINY = [
    "model.overrides={hidden_size: 32, num_hidden_layers: 2, num_experts: 4, moe_intermediate_size: 16}",
    "batch={sequences: 4, length: 16}",
    "data.max_bytes=200000",
    "optim.warmup_steps=2",
    "router.aux_coefficient=0",  # the peers have no router loss
]


def result(**more):
    """Two rounds of two steps each, 32 x 128 tokens."""
    seconds = {"ray_ep": [[1.0, 1.2], [1.0, 1.0]], "plain": [[2.0, 2.4], [1.0, 1.0]], "transformers": [[2.2] * 2] * 2}
    return TrainResult(
        TrainCase("small", ray_ep.load_config(), ("plain", "transformers"), 2, 2, "tuned"), seconds, **more
    )


def test_figures_are_medians_over_steps_then_over_rounds_and_ratios_those_within_rounds():
    found = result()
    assert found.step_seconds == pytest.approx({"ray_ep": 1.05, "plain": 1.6, "transformers": 2.2})
    assert found.tokens_per_second["plain"] == pytest.approx(32 * 128 / 1.6)
    assert found.best == "plain"
    assert found.ratio("plain") == pytest.approx((2.2 / 1.1 + 1.0) / 2)
    assert found.ratio("transformers") == pytest.approx((2.2 / 1.1 + 2.2) / 2)
    row = found.to_dict()
    assert (row["best"], row["ratio_best"]) == ("plain", found.ratio("plain"))
    assert row["rounds_ms"]["ray_ep"] == [[1000.0, 1200.0], [1000.0, 1000.0]]


def test_a_row_has_speed_memory_phases_and_why_a_peer_is_missing_under_their_columns():
    more = {"failed": {"ddp": "no such device"}, "phases": {"forward": [0.5, 0.7], "a-new-phase": [0.42, 0.42]}}
    speed, memory, step, why = result(peak_mib={"ray_ep": 600, "plain": 1700}, **more).lines().splitlines()
    head = TITLE.splitlines()[0]
    assert len(speed) == len(head)
    for name, words in {"ray_ep": "3,901", "plain": "2,560", "ddp": "-", "transformers": "1,862"}.items():
        end = head.index(f" {name} ") + len(name) + 1
        assert speed[:end].split()[-1] == words
        assert memory[:end].split()[-1] == {"ray_ep": "600", "plain": "1,700"}.get(name, "-")
    assert speed.split()[-2:] == ["1.50", "2.10"]
    assert step == "  a step of ray_ep, ms: forward 600.0 (57.1%), a-new-phase 420.0 (40.0%)"
    assert why.split() == ["ddp:", "no", "such", "device"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model=big"], "--model=big: allowed are small, fine, wide"),
        (["--model=fine", *TINY], "the configuration names a model"),
        (["--dtype=float16"], "--dtype=float16: allowed are float32, bfloat16"),
        (["--ranks=two"], "--ranks=two: expected numbers"),
        (["--peers=megatron"], "--peers=megatron: allowed are plain, ddp, transformers, deepspeed"),
        (["--ranks=2,3", "--peers=plain,ddp,transformers"], "16 experts, which transformers cannot share evenly"),
        (["--peers=plain,ddp", "batch.sequences=5"], "batch.sequences=5, which ddp cannot share evenly"),
        (["resume=auto"], "resume=auto: only no is allowed"),
        (["batch.accumulation=2"], "batch.accumulation=2: only 1 is allowed"),
        (["run_dir=/tmp/x"], "only empty is allowed"),
        (["cluster.device=cuda"], "compared on CPUs"),
        (["model.overrides.hiden_size=8"], "did you mean 'hidden_size'?"),
    ],
)
def test_bad_input_is_named_before_anything_starts(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["bench", "train", "data.max_bytes=200000", *arguments])
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_peer_that_is_not_installed_is_refused_if_named_and_else_left_out():
    with pytest.raises(ray_ep.BadInput, match="pip install 'ray_ep\\[bench\\]'"):
        cases(ray_ep.load_config(None, TINY), [OWN_MODEL], [], [], ["deepspeed"])
    (case,) = cases(ray_ep.load_config(None, TINY), [OWN_MODEL], [], [])
    assert case.peers == ("plain", "ddp", "transformers")


@pytest.mark.slow
def test_all_contenders_do_the_same_work_and_one_that_fails_is_left_out(tmp_path, monkeypatch):
    package = tmp_path / "path" / "deepspeed"
    (package / "moe").mkdir(parents=True)
    (package / "__init__.py").write_text("def initialize(**_):\n    raise RuntimeError('no engine here')\n")
    (package / "moe" / "__init__.py").touch()
    (package / "moe" / "utils.py").write_text("split_params_into_different_moe_groups_for_optimizer = None\n")
    monkeypatch.syspath_prepend(package.parent)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)
    (case,) = cases(ray_ep.load_config(None, TINY), [OWN_MODEL], ["float32"], [2], steps=2, rounds=1)
    said = []
    found = run(case, said.append)
    assert [words.rpartition(" ")[2] for words in said[1:]] == ["ray_ep", *case.peers]
    assert found.failed == {"deepspeed": "RuntimeError: no engine here"}
    peers = {"plain", "ddp", "transformers"}
    assert found.losses.keys() == found.seconds.keys() == {"ray_ep", *peers}
    for name in peers:
        assert len(found.losses[name]) == WARM_STEPS + 2
        assert found.losses[name] == pytest.approx(found.losses["plain"], abs=1e-4)
        assert found.losses[name] == pytest.approx(found.losses["ray_ep"][: WARM_STEPS + 2], abs=1e-4)
        assert 100 < found.peak_mib[name] < 4000
    assert found.losses["plain"][0] - found.losses["plain"][-1] > 0.01  # it learns
    assert len(found.losses["ray_ep"]) == WARM_OURS + 2
    assert [len(found.seconds[name][0]) for name in ("ray_ep", *peers)] == [2] * 4
    assert found.ratio(found.best) > 0
    assert not list(temporary.iterdir())
    assert not (tmp_path / "runs").exists()
    assert not processes_of_ray()


def processes_of_ray():
    """Command lines of Ray's daemons that this process's runs have started."""
    mine = os.environ["RAY_TMPDIR"]
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if mine in line:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_does_the_same_work():
    (case,) = cases(ray_ep.load_config(None, TINY), [OWN_MODEL], ["float32"], [2], ["plain", "deepspeed"], 1, 1)
    found = run(case)
    assert found.failed == {}
    assert found.losses["deepspeed"] == pytest.approx(found.losses["plain"], abs=1e-4)
