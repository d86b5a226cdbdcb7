"""The loss on held-out rows, in passes of bounded size. T tokens of this rank, K top_k."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from ray_ep.config.schema import BatchConfig
from ray_ep.moe.passes import Trace
from ray_ep.rank.data.batch import Batch
from ray_ep.rank.step.before import unseen
from ray_ep.rank.step.forward import Forward

PART = 64
"""Sequences of one pass of an evaluation, unless a pass of a step has more."""


@torch.no_grad()
def evaluate(forward: Forward, batch: Batch, trace: bool = False) -> tuple[float, list[dict[str, np.ndarray]]] | None:
    """Mean loss on `batch`, equal on every rank (collective); `Trainer.evaluate` says the rest."""
    rank, ep = forward.rank, forward.ep
    total, left = torch.zeros(2, dtype=torch.float64, device=rank.device), False
    tracing: AbstractContextManager[Trace] = ep.tracing() if trace else nullcontext([])
    with unseen(rank.model), tracing as traces:
        mine = forward.share(batch)
        first, total[1] = ep.routing.first_token, mine.predictions
        for number, (row, rows) in enumerate(evaluation_parts(mine, len(batch), rank.cfg.batch)):
            if left := bool(number) and forward.leaving():
                break
            ep.routing.first_token = first + row * rank.cfg.batch.length
            total[0] += forward.cross_entropy(rows)
    if left:
        return None
    rank.group.all_reduce(total)
    found = [_answers(*(torch.cat(kind).cpu().numpy() for kind in zip(*x, strict=True))) for x in traces if x]
    return float(total[0] / total[1].clamp_min(1)), found


def _answers(experts: np.ndarray, ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Both [T, K] without padding."""
    there = (experts >= 0).all(1)
    return {"experts": experts[there], "ranks": ranks[there]}


def evaluation_parts(mine: Batch, rows: int, batch: BatchConfig) -> Iterator[tuple[int, Batch]]:
    """This rank's rows of an evaluation over `rows` in passes, as many on every rank: (number of the first, rows).

    A rank may have none in a pass. What fits into one pass is one.
    """
    parts = max(1, -(-rows // max(PART, batch.sequences // batch.accumulation)))
    number = 0
    for part in mine.parts(parts):
        yield number, part
        number += len(part)
