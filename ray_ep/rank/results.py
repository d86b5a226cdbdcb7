"""What a rank says of its work, as plain values that travel to the driver. Imports recorded.py alone.

L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

import numpy as np
import torch

from ray_ep.rank.recorded import Recorded


@dataclass(frozen=True, slots=True)
class Usage:
    """What one rank spent; `later - earlier` is what it spent in between."""

    seconds: float
    exchange_seconds: float  # waiting for peers included
    expert_seconds: float
    statistics_seconds: float
    sent: np.ndarray  # [R] bytes sent to each rank
    pairs: np.ndarray  # [L] (token, expert) pairs computed here
    balance: np.ndarray  # the fields of ray_ep.moe.Balance in order, as numbers
    phases: np.ndarray  # seconds of train steps by STEP_PHASES

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one rank says about one step. All but `usage` and `recorded` is global and equal on every rank.

    `note` is what there is to say of the balance inside the step, `warning` of random draws; seldom anything.
    """

    step: int
    epoch: int  # of the group that made it
    loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    lr: float
    tokens: int
    load: np.ndarray  # [L, E] tokens each expert received in the step
    usage: Usage
    peak_mib: int = 0  # memory that this rank's process has had at most; of its GPU, on one
    note: str = ""
    warning: str = ""
    recorded: Recorded | None = None  # of this rank's sampled tokens


@dataclass(frozen=True, slots=True)
class Reduced:
    """All that the update of a step needs beside the gradients: summed over ranks, equal on every rank."""

    step: int
    norm: float  # of the whole gradient
    main: float  # losses
    aux: float
    z: float
    seconds: float  # sum over ranks of their seconds up to here
    load: torch.Tensor  # int64 [L, E] on the device

    @property
    def finite(self) -> bool:
        """Whether the step may be applied."""
        return all(map(isfinite, (self.norm, self.main, self.aux, self.z)))


@dataclass(frozen=True, slots=True)
class RankState:
    """Where a rank is, so that after a failure all can be brought to one step.

    If `updates` is one more on any rank, those with a `ready` step finish it; if on none, all discard.
    """

    updates: int  # steps done, those of a restored run included
    ready: int | None  # step whose reductions are done, its update is not
    unpublished: bool  # replicas may have old weights
    torn: bool  # it failed in an update: some weights are new, some old; it must be given up
