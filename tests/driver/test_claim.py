"""A run directory belongs to one living process; what cannot be written to is refused at once, and nothing is left."""

import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

import ray_ep
from ray_ep.cli import main
from ray_ep.driver.run.claim import LOCK, Claim, holder
from ray_ep.driver.run.rundir import claimed
from ray_ep.errors import ConfigError

NOW = datetime(2026, 7, 1, 12, 30, 5)
HOLD = """
import subprocess, sys
from datetime import datetime
from pathlib import Path
from ray_ep.driver.run.claim import Claim

claim = Claim(Path("r"), datetime(2026, 7, 1, 12, 30, 5))
claim.began = True
child = subprocess.Popen(["sleep", "600"], start_new_session=True)  # as a raylet that outlives its driver
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def claim(*overrides):
    return claimed(ray_ep.load_config(None, overrides), NOW)


def begun(*overrides):
    run = claim(*overrides)
    run.create(ray_ep.load_config(None, overrides))
    return run


def tree(path):
    return {p.relative_to(path): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def test_runs_that_start_at_once_get_directories_of_their_own():
    runs, gate = [], threading.Barrier(8)

    def start():
        gate.wait(60)
        runs.append(claim())

    threads = [threading.Thread(target=start) for _ in range(8)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert sorted(r.path.name for r in runs) == sorted(
        ["20260701-123005", *(f"20260701-123005-{n}" for n in range(2, 9))]
    )
    [r.release() for r in runs]


@pytest.mark.parametrize("second", [["run_dir=r"], ["run_dir=r", "resume=auto"], ["resume=auto"]])
def test_a_second_run_in_the_same_directory_is_refused_with_who_has_it(second, place):
    run = begun("run_dir=r")
    before = tree(place)
    with pytest.raises(ConfigError) as e:
        claim(*second)
    words = f"/r' is in use by process {os.getpid()} on host {os.uname().nodename} since 2026-07-01 12:30:05"
    assert words in str(e.value)
    assert tree(place) == before
    run.release()
    claim("run_dir=r", "resume=auto").release()


def test_of_two_that_resume_at_once_one_gets_the_run():
    begun("run_dir=r").release()
    runs, refused, gate = [], [], threading.Barrier(4)

    def start():
        cfg = ray_ep.load_config(None, ["resume=auto"])
        gate.wait(60)
        try:
            runs.append(claimed(cfg, NOW))
        except ConfigError as e:
            refused.append(str(e))

    threads = [threading.Thread(target=start) for _ in range(4)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert len(runs) == 1
    assert [m for m in refused if "is in use by process" not in m] == []


def test_runs_do_not_share_a_directory_of_checkpoints_either(place):
    run = begun("checkpoint.dir=kept")
    before = tree(place)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir='.*/kept' is in use by process"):
        claim("run_dir=other", "checkpoint.dir=kept")
    with pytest.raises(ConfigError, match=r"checkpoint\.dir='/proc/x': cannot write there"):
        claim("run_dir=other", "checkpoint.dir=/proc/x")
    assert tree(place) == before
    run.release()
    claim("run_dir=other", "checkpoint.dir=kept").release()
    claim("run_dir=other", "checkpoint.dir=other").release()
    claim("run_dir=other", "checkpoint.dir=s3://bucket/x").release()


def test_a_killed_process_leaves_no_lock_behind_though_its_child_lives_on(place):
    holding = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(holding.stdout.readline())
    try:
        assert holder(place / "r")["pid"] == holding.pid
        with pytest.raises(ConfigError, match=f"in use by process {holding.pid}"):
            claim("run_dir=r", "resume=auto")
        holding.kill()
        holding.wait(60)
        os.kill(child, 0)  # it is there
        assert holder(place / "r") is None
        claim("run_dir=r", "resume=auto").release()
    finally:
        os.kill(child, signal.SIGKILL)
        holding.communicate()


def test_of_a_run_that_never_began_nothing_is_left(place):
    (place / "empty").mkdir()
    before = tree(place)
    for overrides in ([], ["run_dir=a/b/c"], ["run_dir=empty"]):
        run = claim(*overrides)
        assert holder(run.path)["pid"] == os.getpid()
        run.release()
        run.release()
        assert tree(place) == before


def test_a_refused_resume_leaves_the_run_as_it_was(place):
    begun("run_dir=r").release()
    before = tree(place)
    run = claimed(ray_ep.load_config(None, ["resume=auto"]), datetime(2027, 1, 1))
    assert tree(place) != before
    run.release()
    assert tree(place) == before


def test_a_directory_that_only_a_killed_start_has_used_is_as_good_as_empty(place):
    (place / "r").mkdir()
    (place / "r" / LOCK).write_text("{}")
    claim("run_dir=r").release()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("run_dir", "reason"),
    [
        ("/proc/foo", "No such file or directory"),
        ("/proc/self/x/y", "No such file or directory"),
        ("/sys/kernel/x", ""),
        ("file", "is a file"),
        ("file/below", "Not a directory"),
        ("dangling", "is not a directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_directory_that_cannot_be_written_to_is_refused_in_one_sentence(place, run_dir, reason):
    (place / "file").touch()
    (place / "dangling").symlink_to("/nowhere/at/all")
    before = tree(place)
    with pytest.raises(ConfigError) as e:
        claim(f"run_dir={run_dir}")
    assert f"{run_dir}'" in str(e.value)
    assert reason in str(e.value)
    assert "\n" not in str(e.value)
    assert tree(place) == before


def test_a_file_called_runs_is_refused(place):
    (place / "runs").touch()
    with pytest.raises(ConfigError, match=r"/runs/2026.*give another run_dir"):
        claim()


def test_a_full_disk_is_told_with_the_directory_and_nothing_is_left(place, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"/r': cannot write there: No space left on device"):
            claim("run_dir=r")
    assert list(place.iterdir()) == []
    run = claim("run_dir=r")
    monkeypatch.setattr(os, "replace", lambda a, b: full() if str(b).endswith(".yaml") else Path(a).rename(b))
    with pytest.raises(ConfigError, match=r"/r': cannot write there: No space left on device"):
        run.create(ray_ep.load_config())
    run.release()
    assert list(place.iterdir()) == []


def test_a_file_system_without_locks_is_no_obstacle(place, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    run = begun("run_dir=r")
    assert not run.claims[0].locked
    assert holder(place / "r") is None
    assert holder(place / "r", unknown={}) == {}
    claim("run_dir=r", "resume=auto").release()
    assert "this run has no control" in CliRunner().invoke(main, ["rebalance", "r"]).stderr  # it may be alive


def test_a_run_directory_is_ignored_by_git(place):
    run = begun()
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / "weights").write_text("x")
    subprocess.run(["git", "init", "-q"], check=True)
    said = subprocess.run(["git", "status", "--porcelain", "-uall"], capture_output=True, text=True, check=True).stdout
    assert said == ""
    run.release()


def test_what_is_asked_of_a_run_that_has_ended_or_is_none_is_refused(place):
    run = begun("run_dir=r")
    forming = CliRunner().invoke(main, ["rebalance", "r"])
    assert (forming.exit_code, "this run has no control: it is forming still" in forming.stderr) == (2, True)
    run.release()
    ended = CliRunner().invoke(main, ["rebalance", "r"])
    assert ended.exit_code == 2
    assert f"'r': this run has ended (it was process {os.getpid()} on host" in ended.stderr
    assert "ray-ep train run_dir=r resume=auto" in ended.stderr
    (place / "r" / LOCK).unlink()
    assert "'r': this run has ended: nobody is there" in CliRunner().invoke(main, ["rebalance", "r"]).stderr
    assert "expected a run directory" in CliRunner().invoke(main, ["rebalance", "nowhere"]).stderr


def test_the_command_that_goes_on_with_an_ended_run_can_be_pasted(place):
    begun("run_dir=my run").release()
    ended = CliRunner().invoke(main, ["rebalance", "my run"]).stderr
    assert shlex.split(ended.partition("go on with it: ")[2]) == ["ray-ep", "train", "run_dir=my run", "resume=auto"]


def test_what_is_in_the_lock_can_be_read_by_people(place):
    run = Claim(place / "r", NOW)
    assert json.loads((place / "r" / LOCK).read_text()).keys() == {"pid", "host", "since"}
    run.release()
