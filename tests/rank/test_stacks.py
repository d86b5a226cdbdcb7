"""What a process is at: its own threads, torch's recorder, another process from outside. Real processes, no Ray."""

import os
import re
import signal
import subprocess
import sys
import threading

import torch
import torch.distributed as dist

from ray_ep.rank import stacks

STUCK = "import time\ndef stuck_here():\n    print('here', flush=True)\n    time.sleep(60)\nstuck_here()\n"


def test_every_thread_is_told_by_name_with_its_calls_and_the_one_that_asks_only_if_wanted():
    ended = threading.Event()

    def waits_for_the_end():
        ended.wait()

    thread = threading.Thread(target=waits_for_the_end, name="the-waiting-one")
    thread.start()
    try:
        told = stacks.own()
        assert re.search(r"thread the-waiting-one \(\d+\)\n(.*\n)*.*in waits_for_the_end\n", told)
        assert "in test_every_thread_is_told" not in told
        assert "in test_every_thread_is_told" in stacks.own(asking=True)
    finally:
        ended.set()
        thread.join()


def test_the_flight_recorder_tells_the_newest_calls_of_a_group_with_their_sizes():
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, options)
    for _ in range(stacks.NEWEST + 3):
        group.allreduce([torch.ones(4)], dist.AllreduceOptions()).wait()
    group.barrier(dist.BarrierOptions()).wait()
    lines = stacks.flight_recorder().splitlines()
    assert re.fullmatch(rf"the newest {stacks.NEWEST} of \d+ calls", lines[0])
    assert len(lines) == stacks.NEWEST + 1
    assert "gloo:all_reduce [[4]]" in lines[-2]
    assert "barrier" in lines[-1]


def test_a_process_that_is_stopped_and_one_that_is_gone_are_looked_at_from_outside():
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "here\n"
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        (told,) = stacks.seen([process.pid])
        assert f"process {process.pid}: state T (stopped); its main thread waits in the kernel in " in told
        assert "stuck_here" in told or "py-spy cannot read it" in told  # the latter where tracing is not allowed
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    (told,) = stacks.seen([process.pid])
    assert f"process {process.pid} cannot be looked at: No such" in told
    assert "py-spy cannot read it" in told
