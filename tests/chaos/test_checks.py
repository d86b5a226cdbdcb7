"""What `ray-ep chaos` refuses before anything starts."""

import json

import pytest
from click.testing import CliRunner
from omegaconf import OmegaConf

from ray_ep.chaos.checks import recorded
from ray_ep.cli import main
from ray_ep.config import load_config
from ray_ep.errors import BadInput


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--faults kil", "did you mean 'kill'"),
        ("--faults cut", "cut is not possible here: links are cut and slowed on a network lab"),
        ("--faults add --lab LAB", "add is not possible here: a lab has the hosts"),
        ("--faults node --address h:1", "node is not possible here: a cluster that was joined"),
        ("--minutes 0", "--minutes 0: expected more than 0"),
        ("--minutes nan", "--minutes nan: expected more than 0"),
        ("--every -1", "--every -1: expected more than 0"),
        ("--minutes 0.1 --every 30", "--minutes 0.1 --every 30: no fault comes in that time"),
        ("--tolerance inf", "--tolerance inf: expected more than 0"),
        ("--address h:1 --nodes 2", "give one of them"),
        ("--nodes 5", "--nodes 5: more than cluster.ranks=4"),
        ("--nodes 4", "--nodes 4: each has room for 1 ranks of 0.5 CPUs, and Ray gives nodes whole CPUs"),
        ("--lab nowhere.yaml", "--lab nowhere.yaml: no such file"),
        ("cluster.address=h:1", "give it as --address h:1"),
        ("cluster.ranks=1", "of one rank nothing is left"),
        ("cluster.device=cuda", "raylets that are started here have no GPUs"),
        ("elastic.min_ranks=4", "leaves no rank to lose"),
        ("--faults add elastic.policy=fixed", "--faults add: a run of elastic.policy=fixed"),
        ("--faults add elastic.max_ranks=4", "takes no more than cluster.ranks=4"),
        ("snapshot.every=0", "--faults kill,node,stop: snapshot.every=0 ends a run with a lost rank"),
        ("resume=auto", "a disturbed run starts anew"),
        ("optim.stepz=1", "unknown key 'optim.stepz'"),
        ("--against nowhere", "--against nowhere: expected a run directory"),
        ("run_dir=FILLED", "already holds files"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, arguments, words):
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "x").touch()
    (tmp_path / "lab.yaml").touch()
    given = arguments.replace("FILLED", str(tmp_path / "filled")).replace("LAB", str(tmp_path / "lab.yaml"))
    with CliRunner().isolated_filesystem(tmp_path):
        done = CliRunner().invoke(main, ["chaos", *given.split()])
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert "Traceback" not in done.output
    assert sorted(p.name for p in (tmp_path / "filled").iterdir()) == ["x"]


def run(path, overrides=(), losses=(3.0, 2.0, 1.0), events=()):
    path.mkdir()
    (path / "config.yaml").write_text(OmegaConf.to_yaml(load_config(None, overrides)))
    lines = [json.dumps({"step": n, "loss": x, "step_seconds": 0.1 * n}) for n, x in enumerate(losses, 1)]
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    (path / "events.jsonl").write_text("\n".join(json.dumps({"kind": e}) for e in events))
    return path


def test_a_recorded_curve_is_read_whatever_cluster_it_was_made_on(tmp_path):
    path = run(tmp_path / "run", ["cluster.ranks=2", "snapshot.every=3"], events=["start"])
    curve = recorded(path, load_config(None, ["cluster.ranks=4", "eval.every=0"]))
    assert curve.loss == {1: 3.0, 2: 2.0, 3: 1.0}
    assert curve.step_s == pytest.approx(0.25)


@pytest.mark.parametrize(
    "override",
    ["seed=1", "optim.steps=7", "batch.length=64", "model.overrides={hidden_size: 64}", "router.aux_loss=off"],
)
def test_a_recorded_curve_of_another_configuration_is_refused_with_the_key_and_both_values(tmp_path, override):
    path = run(tmp_path / "run", [override])
    key = override.partition("=")[0]
    with pytest.raises(BadInput, match=f"a run with {key}=.*, here it is .*: give --config"):
        recorded(path, load_config())


@pytest.mark.parametrize(
    ("what", "words"),
    [({"losses": ()}, "made no steps"), ({"events": ["start", "recovered"]}, "ranks were lost in that run")],
)
def test_a_run_without_a_curve_of_its_own_is_refused(tmp_path, what, words):
    with pytest.raises(BadInput, match=words):
        recorded(run(tmp_path / "run", **what), load_config())
