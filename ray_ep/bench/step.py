"""`ray-ep bench step`: whole training steps in turn, with balanced routing imposed, without and with in-step balance.

One training: its routing is the model's own, skewed if its balancing losses are off; the balanced ideal are steps of it
whose router is overruled. Ranks are plain processes over gloo, one thread each.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from ray_ep.bench.layer import LayerCase, spawn
from ray_ep.collective import from_torch
from ray_ep.config import from_dict
from ray_ep.config.schema import Config
from ray_ep.driver.start import check_run
from ray_ep.errors import BadInput
from ray_ep.moe import settle
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.pays import uneven, uneven_ranks
from ray_ep.rank.trainer import Trainer

ROUTED = ("balanced", "off", "on")
"""How steps are measured: routing imposed to be even; that of the model without balance; with it."""

TURN = 3
"""Steps of a mode in a round; the first, which finds buffers of the mode before, does not count."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Medians of one mode: balanced (routing imposed), off, on (balance inside the step)."""

    mode: str
    ms: float
    share: float  # of the balanced ideal: the median of its time over this one's in a round
    rank_load: float  # fullest rank's load over the mean if primaries did it all
    expert_load: float  # the same of experts

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def line(self) -> str:
        """One row of the table."""
        return f"{self.mode:9} {self.ms:9.1f} {self.share:6.2f} {self.rank_load:9.2f} {self.expert_load:11.2f}"


TITLE = (
    f"{'routing':9} {'step ms':>9} {'share':>6} {'rank load':>9} {'expert load':>11}\n"
    "balanced: imposed on the router; off, on: the model's own, without and with balance inside the step\n"
    "share: of the balanced ideal; loads: of the fullest over the mean, before balance"
)
"""Head of the table."""


def run_step(cfg: Config, warm: int, rounds: int) -> list[Steps]:
    """Train `warm` steps, then TURN of each mode in `rounds` rounds, in fresh processes with the allocator of ranks.

    Raises:
        BadInput: as a run would; or a single rank, which has nothing to balance.
    """
    if cfg.cluster.ranks < 2:
        raise BadInput(f"bench step: cluster.ranks={cfg.cluster.ranks}: balance is among ranks, at least 2")
    plan = check_run(cfg, datetime.now())
    plan.run.release()  # nothing is written
    case = LayerCase("", cfg.model.dtype, True, cfg.cluster.ranks, "tuned", rounds)
    work = (plan.config, plan.corpus, plan.placement)
    found: list[Steps] = spawn(case, _rank, OmegaConf.to_container(OmegaConf.structured(cfg)), work, warm)
    return found


def _rank(me: int, case: LayerCase, tree: dict[str, Any], work: Any, warm: int, store: str, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=me, world_size=case.ranks)
    tree["balance"]["in_step"] = "always"  # turned off and on here
    cfg, (config, corpus, placement), group = from_dict(tree), work, from_torch()
    rank = Trainer(ModelRank(cfg, config, group, placement), corpus)
    rows = cfg.batch.sequences * cfg.batch.length * rank.rank.top_k // rank.ep.num_experts
    settle(rank.ep, "flat", {"gloo": group}, rows)  # as at the start of a run
    for step in range(warm):
        rank.train_step(step)
    step = warm
    times: dict[str, list[float]] = {mode: [] for mode in ROUTED}
    loads: dict[str, list[tuple[float, float]]] = {mode: [] for mode in ROUTED}
    for number in range(case.rounds):
        for mode in ROUTED[:: 1 if number % 2 else -1]:
            rank.ep.balancer.active = mode == "on"
            rank.ep.routing.force = "balanced" if mode == "balanced" else cfg.router.force
            for turn in range(TURN):
                group.barrier()
                start = time.perf_counter()
                result = rank.train_step(step)
                assert result is not None, "nobody breaks a step off here"
                took, step = time.perf_counter() - start, step + 1
                if turn:
                    times[mode].append(took * 1e3)
                    loads[mode].append((uneven_ranks(result.load, placement.owner, case.ranks), uneven(result.load)))
    if me == 0:
        by_round = {mode: np.reshape(t, (case.rounds, TURN - 1)).mean(1) for mode, t in times.items()}
        share = {mode: float(np.median(by_round["balanced"] / t)) for mode, t in by_round.items()}  # slow whiles cancel
        ms = {mode: statistics.median(t) for mode, t in times.items()}
        queue.put([Steps(m, ms[m], share[m], *np.mean(loads[m], 0).tolist()) for m in ROUTED])
    dist.barrier()
    dist.destroy_process_group()
