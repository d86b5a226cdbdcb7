"""The record of a step, made of what every rank says of it: sums, means and maxima over ranks. Pure; no Ray calls.

R ranks, L MoE layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.driver.records import StepRecord
from ray_ep.moe import Balance
from ray_ep.placement import Placement, Topology
from ray_ep.rank.recorded import Seat, StepProvenance
from ray_ep.rank.results import StepResult
from ray_ep.rank.step.clock import STEP_PHASES


def step_record(
    step: int, results: list[StepResult], seconds: float, topology: Topology, placement: Placement
) -> StepRecord:
    """The record of `step` (from 1), which took `seconds`, from each rank's result."""
    first = results[0]
    sent = np.stack([r.usage.sent for r in results])  # [R, R] bytes
    same = topology.node_of[:, None] == topology.node_of[None]
    pairs = np.stack([r.usage.pairs for r in results]).astype(np.float64)  # [R, L]
    mean, most = pairs.mean(0), pairs.max(0)  # [L]; a layer without pairs is even
    balancedness = float(np.divide(mean, most, out=np.ones_like(mean), where=most > 0).mean())
    load = first.load.astype(np.float64)
    experts = float(np.mean([r.usage.expert_seconds for r in results]))
    balance = Balance(*first.usage.balance)
    layers = max(balance.layers, 1)
    return StepRecord(
        step=step,
        loss=first.loss,
        grad_norm=first.grad_norm,
        lr=first.lr,
        tokens=first.tokens,
        step_seconds=seconds,
        tokens_per_second=first.tokens / seconds,
        exchange_seconds=float(np.mean([r.usage.exchange_seconds for r in results])),
        expert_seconds=experts,
        phase_seconds=_phases(results, seconds),
        peak_mib=max(r.peak_mib for r in results),
        statistics_seconds=float(np.mean([r.usage.statistics_seconds for r in results])),
        bytes_intra_node=int(sent[same].sum()),
        bytes_inter_node=int(sent[~same].sum()),
        balancedness=balancedness,
        world_size=len(results),
        epoch=first.epoch,
        placement_version=placement.version,
        aux_loss=first.aux_loss,
        z_loss=first.z_loss,
        imbalance_before=float(balance.before / layers if balance.layers else 1 / balancedness),
        imbalance_after=float(balance.after / layers if balance.layers else 1 / balancedness),
        guests=int(balance.guests),
        guest_bytes=int(balance.guest_bytes),
        balance_saved_predicted=float(balance.saved_seconds),
        balance_saved_measured=float(balance.moved_pairs * experts / max(mean.sum(), 1)),
        max_expert_load=(load.max(1) / np.maximum(load.mean(1), 1e-9)).round(4).tolist(),
        load=first.load,
        rank_load=pairs.T,
        sent=sent,
    )


def provenance_of(results: list[StepResult], where: list[dict[str, Any]], length: int) -> StepProvenance | None:
    """What the ranks recorded of a step; None: nothing.

    Args:
        where: [R] node, host and device of each. length: tokens of a row of the batch.
    """
    parts = tuple(r.recorded for r in results if r.recorded is not None)
    if not parts:
        return None
    seats = tuple(Seat(str(w["node"]), str(w["host"]), str(w.get("device", ""))) for w in where)
    return StepProvenance(parts, seats, length)


def _phases(results: list[StepResult], seconds: float) -> dict[str, float]:
    """Where a step of `seconds` went: means over ranks, and `driver`, what it took beyond them."""
    mean = np.mean([r.usage.phases for r in results], 0).tolist()
    return {**dict(zip(STEP_PHASES, mean, strict=True)), "driver": seconds - sum(mean)}
