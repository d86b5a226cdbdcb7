"""Ranks as threads of one process over real gloo: the exchange is the real one, without starting processes.

And a Ray of the tests' own: whatever Ray runs on this machine, or once ran and was killed, is not theirs.
"""

import gc
import os
import shutil
import signal
import tempfile
import threading
import uuid
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ray_ep.collective import SoloGroup, gloo
from tests import least
from tests.browser import browser, opened  # noqa: F401
from tests.faults import Faults

torch.set_num_threads(1)

ANOTHER = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_NAMESPACE")
"""Variables that name a cluster, which is not the tests'."""


def pytest_configure(config):
    """Here and in what tests start: no cluster to join, and a temporary directory without traces of another Ray."""
    for name in ANOTHER:
        os.environ.pop(name, None)
    # Given before any Ray is started here, which would make one up and keep it: this process joins several.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    least.count(config)
    gc.disable()
    # Short: sockets lie deep in it, and their paths have at most 107 characters.
    config.ray_dir = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="r-", dir="/tmp")


def pytest_sessionstart(session):
    """SIGTERM and SIGHUP end the run as Ctrl-C does: fixtures clear up."""

    def end(number, frame):
        session.shouldstop = signal.Signals(number).name  # should a command under test take it for its own
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


def pytest_collection_finish(session):
    """What torch and transformers are made of stays: no collection in a test looks at it again, which takes 0.3 s."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config):
    gc.unfreeze()  # modules written in C complain at the exit of what is never taken back
    shutil.rmtree(config.ray_dir, ignore_errors=True)


def slow(*values):
    """Values of a parametrized test that only `make test-all` tries."""
    return [pytest.param(v, marks=pytest.mark.slow) for v in values]


def run_ranks(size, work, timeout_s=60.0, groups=None):
    """Call work(group) on `size` ranks; returns their results in rank order, raises the first error."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    results, errors = [None] * size, []

    def main(rank):
        try:
            group = SoloGroup() if size == 1 else gloo(store, rank, size, host="127.0.0.1", timeout_s=timeout_s)
            if groups is not None:
                groups[rank] = group
            results[rank] = work(group)
        except BaseException as e:
            errors.append((rank, e))
            if groups is None and size > 1 and "group" in locals():
                group.abort()

    threads = [threading.Thread(target=main, args=(r,), daemon=True) for r in range(size)]
    [t.start() for t in threads]
    [t.join(timeout_s + 60) for t in threads]
    if errors:
        raise next((e for _, e in errors if "GroupError" not in type(e).__name__), errors[0][1])
    assert not any(t.is_alive() for t in threads), "a rank hangs"
    return results


def in_threads(*calls):
    """Results of calls made at once, each in a thread; raises the first error."""
    results, errors = [None] * len(calls), []

    def run(i):
        try:
            results[i] = calls[i]()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert not any(t.is_alive() for t in threads), "a rank hangs"
    if errors:
        raise errors[0]
    return results


@pytest.fixture
def ranks():
    return run_ranks


@pytest.fixture
def faults(tmp_path):
    """A script of faults for this test; all of them must have happened at its end."""
    script = Faults(tmp_path / "faults.jsonl")
    yield script
    script.disarm()
    script.check()
