"""Ranks of a torch.distributed job over gloo, as torchrun makes them: real processes, kept from test to test."""

import multiprocessing
import os
import traceback
from multiprocessing.connection import wait

import pytest

LIMIT_S = 200
"""Of one call on all ranks: only a hang takes so long."""


class Job:
    """Processes of one job; a call runs a function of a test module on each of them, in lockstep."""

    def __init__(self, size, folder):
        self.size, self.folder = size, folder
        self.jobs, self.processes, self.pipes = 0, [], []

    def __call__(self, work, *args):
        """Results of work(rank, *args) in rank order; the first error of a rank ends the job, and is raised."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((work, args))
        results, waiting = {}, dict(zip(self.pipes, range(self.size), strict=True))
        while waiting:
            ready = wait([*waiting, *(p.sentinel for p in self.processes)], LIMIT_S)
            answered = [pipe for pipe in ready if pipe in waiting]
            problem = "" if answered else "a rank hangs or has died"
            for pipe in answered:
                rank = waiting.pop(pipe)
                try:
                    results[rank], problem = pipe.recv()
                except EOFError:
                    problem = f"rank {rank} has died"
                if problem:
                    break
            if problem:
                self.end()
                pytest.fail(problem)
        return [results[rank] for rank in range(self.size)]

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def _start(self):
        context, self.jobs = multiprocessing.get_context("spawn"), self.jobs + 1
        store = self.folder / f"store-{self.size}-{self.jobs}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)


def _serve(rank, size, store, pipe):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}  # the port is the file's
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((work(rank, *args), ""))
        except BaseException:
            pipe.send((None, f"rank {rank}: {traceback.format_exc()}"))


def _job(size):
    @pytest.fixture(scope="session")
    def job(tmp_path_factory):
        made = Job(size, tmp_path_factory.mktemp("job"))
        yield made
        made.end()

    return job


two = _job(2)
four = _job(4)
