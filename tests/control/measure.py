"""What watchers cost a run: `python -m tests.control.measure [WATCHERS] [key=value ...]`.

Starts `ray-ep train` and has it step by turns alone and under WATCHERS streams of its status, at most one a second
each. The streams are one process at the lowest priority (SCHED_IDLE): it stands for other machines, whose processors
are their own. Prints the milliseconds of a step, with all between two steps, and their ratio.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process, Value
from pathlib import Path

import grpc

from ray_ep.control.address import target_of
from ray_ep.control.v1 import control_pb2 as pb

TURNS, TURN_S, SETTLE_S = 8, 12.0, 3.0
METHOD = "/ray_ep.control.v1.ControlService/WatchStatus"


def main(watchers=200, *overrides):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            Path(sys.executable).with_name("ray-ep"),
            "train",
            f"run_dir={run}",
            "optim.steps=1000000",
            "eval.every=0",
        ]
        with subprocess.Popen([*command, *overrides], stdout=subprocess.DEVNULL, cwd=folder) as train:
            try:
                wait_for(run, 60)
                turns(run, watchers)
            finally:
                train.terminate()


def turns(run, watchers):
    took = {0: [], watchers: []}
    for turn in range(TURNS):
        count, came = (0, watchers)[turn % 2], Value("i", 0)
        crowd = Process(target=lambda n=count, c=came: asyncio.run(watch(run, n, c)), daemon=True)
        crowd.start()
        time.sleep(SETTLE_S)
        wait_for(run, steps(run) + 1)
        size, first, before = (run / "metrics.jsonl").stat().st_size, steps(run), came.value
        began, last, done = time.monotonic(), time.monotonic(), first
        while time.monotonic() < began + TURN_S:
            time.sleep(0.02)
            if (run / "metrics.jsonl").stat().st_size > size:
                size, done, last = (run / "metrics.jsonl").stat().st_size, steps(run), time.monotonic()
        took[count].append((last - began) / (done - first))
        print(
            f"{count:4} watchers: {1e3 * took[count][-1]:.1f} ms a step, {came.value - before} statuses came",
            flush=True,
        )
        crowd.kill()
        crowd.join()
    alone, watched = (statistics.median(took[n]) for n in (0, watchers))
    print(
        f"alone {1e3 * alone:.1f} ms a step, under {watchers} {1e3 * watched:.1f}: {alone / watched:.1%} of its speed"
    )


async def watch(run, count, came):
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    target = target_of(str(run))

    async def one():
        async with grpc.aio.insecure_channel(
            target.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            call = channel.unary_stream(METHOD)(
                pb.WatchStatusRequest(every_seconds=1.0).SerializeToString(),
                metadata=(("authorization", f"Bearer {target.token}"),),
            )
            async for _ in call:
                came.value += 1

    await asyncio.gather(*(one() for _ in range(count)), asyncio.sleep(3600))


def steps(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(run, count):
    while steps(run) < count:
        time.sleep(0.02)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
