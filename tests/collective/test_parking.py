"""A group is left at once whatever its peers do: closing one with a stopped peer took as long as its time limit."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from ray_ep.collective import EpochGroup, SoloGroup, gloo
from ray_ep.errors import GroupError

PEER = """
import sys, time, torch.distributed as dist
from ray_ep.collective import gloo
group = gloo(dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, False), 1, 2, 0, "127.0.0.1")
group._here = None  # as on another host: gloo carries all
group.barrier()
print("there", flush=True)
time.sleep(60)
"""


def test_a_group_with_a_stopped_peer_is_left_at_once_and_closed_once_that_is_gone():
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    peer = subprocess.Popen([sys.executable, "-c", PEER, str(store.port)], stdout=subprocess.PIPE, text=True)
    try:
        held = EpochGroup()
        held.form(0, {"gloo": lambda: gloo(store, 0, 2, 0, "127.0.0.1")}, 60)
        held.present._here = None
        held.barrier()
        assert peer.stdout.readline() == "there\n"
        os.kill(peer.pid, signal.SIGSTOP)
        stuck = threading.Timer(0.4, held.abort, [0])
        stuck.start()
        began = time.monotonic()
        with pytest.raises(GroupError, match="aborted"):
            held.all_reduce(torch.ones(1))
        held.form(1, {"memory": lambda: SoloGroup(1)}, 10)
        held.barrier()
        assert time.monotonic() - began < 20, "not the time limit of 60 s"
        assert (held.epoch, held.size) == (1, 1)
        left = [t for t in threading.enumerate() if t.name == "close-epoch-0"]
        os.kill(peer.pid, signal.SIGKILL)
        [t.join(10) for t in left]
        assert not any(t.is_alive() for t in left)
    finally:
        peer.kill()
        peer.wait()
        peer.stdout.close()
