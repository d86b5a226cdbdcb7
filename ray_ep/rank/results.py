"""What a rank says of its work, as plain values that travel to the driver. Imports nothing of the package.

L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np


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
    """What one rank says about one step. All but `usage` is global and equal on every rank.

    `note` is what there is to say of the balance inside the step, `warning` of random draws; seldom anything.
    """

    step: int
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
