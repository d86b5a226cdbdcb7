"""`ray-ep bench layer`: the MoE layers side by side, interleaved round by round in one process group.

Every figure of a row comes from the same run; ratios hold between machines, seconds do not. One thread a rank.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import spawn as spawn_processes

from ray_ep.bench.contenders import LAYER_PEERS, WORKS, floor
from ray_ep.collective import from_torch
from ray_ep.config.process import ALLOCATOR
from ray_ep.errors import BadInput
from ray_ep.moe import PHASES

WARM_ROUNDS = 2
"""Rounds that are not counted."""

STEPS = {"C": 8}
"""Steps of a contender in one round, where one is too short to be timed: their mean is the round's figure."""


@dataclass(frozen=True, slots=True)
class LayerCase:
    """One row of the table."""

    work: str
    dtype: str
    backward: bool
    ranks: int
    malloc: str  # default, or tuned: glibc keeps freed memory, for everybody
    rounds: int


@dataclass(slots=True)
class LayerResult:
    """Medians over rounds of one case. Seconds are of one forward (and backward) of the layer over all ranks."""

    case: LayerCase
    seconds: dict[str, float]
    floor_seconds: float
    phases: dict[str, float]  # share of our seconds by phase (ray_ep.moe.PHASES); waiting for peers is exchange
    bytes_sent: int  # by all ranks to other ranks in one step of ours
    peak_mib: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> dict[str, float]:
        """By contender."""
        total = WORKS[self.case.work].tokens * self.case.ranks
        return {name: total / s for name, s in self.seconds.items()}

    @property
    def ratio(self) -> float | None:
        """Our tokens/s over the best peer's."""
        peers = [s for n, s in self.seconds.items() if n != "ray_ep"]
        return min(peers) / self.seconds["ray_ep"] if peers else None

    @property
    def share_of_floor(self) -> float:
        """The floor's seconds over ours: 1 would be GEMMs at torch's best rate and nothing else."""
        return self.floor_seconds / self.seconds["ray_ep"]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        derived = {"tokens_per_second": self.tokens_per_second, "ratio": self.ratio, "share": self.share_of_floor}
        return {**asdict(self), **derived}


def run(case: LayerCase, peers: list[str] | None = None, memory: bool = False) -> LayerResult:
    """Measure one case in fresh processes.

    Args:
        peers: contenders beside ray_ep; None: all that are installed.
        memory: also measure each contender's peak memory, in processes of its own.

    Raises:
        BadInput: an unknown work or peer, or one that is not installed.
    """
    names = ["ray_ep", *(installed() if peers is None else peers)]
    for name in names:
        if name not in LAYER_PEERS or (name == "deepspeed" and name not in installed()):
            raise BadInput(f"peer {name!r}: allowed here are {', '.join(installed())} (pip install 'ray_ep[bench]')")
    if case.work not in WORKS:
        raise BadInput(f"work {case.work!r}: allowed are {', '.join(WORKS)}")
    result: LayerResult = spawn(case, _rank, names, False)
    if memory:
        result.peak_mib = {name: spawn(case, _rank, [name], True) for name in names}
    return result


def installed() -> list[str]:
    """Peers that can run here."""
    return [n for n in LAYER_PEERS if n == "transformers" or (n != "ray_ep" and importlib.util.find_spec(n))]


class Processes(Protocol):
    """How many processes `spawn` starts, and with which allocator."""

    @property
    def ranks(self) -> int:
        """One process each."""

    @property
    def malloc(self) -> str:
        """As of `LayerCase`."""


def spawn(case: Processes, main: Any, *args: Any) -> Any:
    """Run main(rank, case, *args, store, queue) in a fresh process for each rank; what rank 0 put into the queue."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    kept = dict(os.environ)
    os.environ.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    os.environ.update(ALLOCATOR if case.malloc == "tuned" else {})
    try:
        with tempfile.TemporaryDirectory() as tmp:
            spawn_processes(main, (case, *args, f"file://{tmp}/store", queue), nprocs=case.ranks)  # type: ignore[no-untyped-call]
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return queue.get()


def _rank(rank: int, case: LayerCase, names: list[str], peak: bool, store: str, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(case.ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.ranks)
    group, dtype, work = from_torch(), getattr(torch, case.dtype), WORKS[case.work]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # DeepSpeed talks
        built = {n: LAYER_PEERS[n](work, group, dtype, case.backward) for n in names}
    if peak:
        for _ in range(4):
            built[names[0]][0]()
        if rank == 0:
            queue.put(_peak_mib())
    else:
        result = _measure(case, built, floor(work, group, dtype), group)
        if rank == 0:
            queue.put(result)
    dist.barrier()
    os._exit(0)  # DeepSpeed's exit hooks hang without a launcher


def _measure(case: LayerCase, built: dict[str, Any], lower: Any, group: Any) -> LayerResult:
    """Interleave the contenders; every rank returns the same medians."""
    seconds: dict[str, list[float]] = {n: [] for n in built}
    floors, spent = [], []
    ep, steps = built["ray_ep"][1].ray_ep, STEPS.get(case.work, 1)
    for number in range(WARM_ROUNDS + case.rounds):
        floors.append(sum(lower() for _ in range(steps)) / steps * (3 if case.backward else 1))
        for name, (step, _) in built.items():
            before = [*ep.meter.seconds.values(), ep.meter.sent.sum()]
            group.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            group.barrier()
            took = (time.perf_counter() - start) / steps
            if number >= WARM_ROUNDS:
                seconds[name].append(took)
                if name == "ray_ep":
                    after = [*ep.meter.seconds.values(), ep.meter.sent.sum()]
                    spent.append([(b - a) / steps for a, b in zip(before, after, strict=True)])
    median = {n: statistics.median(s) for n, s in seconds.items()}
    *phases, sent = np.median(spent, 0).tolist()
    shares = {name: s / median["ray_ep"] for name, s in zip(PHASES, phases, strict=True)}
    total = torch.tensor([float(sent)], dtype=torch.float64)
    group.all_reduce(total)
    best = statistics.median(floors[WARM_ROUNDS:])
    return LayerResult(case, median, best, shares, int(total.item()))


def _peak_mib() -> int:
    """Peak resident memory of this process."""
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith("VmHWM")).split()[1]) // 1024
