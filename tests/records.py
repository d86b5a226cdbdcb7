"""Records of made-up steps."""

from dataclasses import fields

import numpy as np

from ray_ep.driver.records import StepRecord, now
from ray_ep.rank.recorded import AFTER, BEFORE, Recorded, Seat, StepProvenance


def record(step=1, **figures):
    """Of one step: what is not given is 0, or was not measured."""
    nothing = {f.name: 0 for f in fields(StepRecord)} | {
        "loss": 2.0, "step_seconds": 0.1, "phase_seconds": {}, "max_expert_load": [], "load": np.ones((1, 4)),
        "rank_load": np.ones((1, 2)), "sent": np.zeros((2, 2)), "migration_seconds": None, "rebalance_seconds": None,
        "eval_loss": None, "eval_seconds": None, "provenance": None, "sample": None, "at": now(),
    }  # fmt: skip
    return StepRecord(**nothing | {"step": step} | figures)


def provenance(text, positions, *, length=16, ranks=2, layers=2, experts=4, first=0, document=0, choices=None):
    """What `ranks` ranks recorded of some tokens of `text`, which begins at `first` of the training text; top-2.

    Args:
        positions: in a batch whose rows follow each other in the text. choices: [n, K] experts in every layer.
    """
    ids, positions = np.frombuffer(text.encode(), np.uint8).astype(np.int64), np.asarray(positions, np.int64)
    if choices is None:
        choices = np.stack([positions % experts, (positions + 1) % experts], 1)
    padded = np.pad(ids, (BEFORE, AFTER), constant_values=-1)
    parts = []
    around = np.arange(BEFORE + 1 + AFTER)
    for rank in range(ranks):
        mine = positions // length % ranks == rank
        its = np.repeat(np.asarray(choices)[mine][None], layers, 0).astype(np.int32)
        parts.append(
            Recorded(
                rank=rank,
                position=positions[mine],
                context=padded[positions[mine][:, None] + around],
                document=np.full(mine.sum(), document),
                offset=first + positions[mine],
                experts=its,
                weights=np.where(np.arange(2) == 0, 0.75, 0.25).astype(np.float32) * np.ones(its.shape, np.float32),
                ranks=its * ranks // experts,
                kinds=np.zeros(its.shape, np.int8),
                version=3,
                epoch=1,
            )
        )
    return StepProvenance(tuple(parts), tuple(Seat(f"node{r}", f"host{r}", f"cuda:{r}") for r in range(ranks)), length)
