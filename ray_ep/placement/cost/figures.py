"""The figures that the cost model multiplies: bytes, seconds and speeds of one model on one machine. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.placement import Floats


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The figures that the cost model multiplies; the defaults are DeepSeek-V3's layer in bf16 on an H800.

    Args:
        tokens_per_rank: tokens that each rank brings to a layer in a step.
        token_bytes: of one token's hidden state, one way.
        expert_seconds: one token through one expert on a rank of speed 1, forward and backward if the job trains.
        expert_bytes: weights of one expert: what a new replica costs to send.
        optimizer_bytes: master weights and optimizer state of one expert: what a primary costs on top.
        speed: [R] relative compute speed of each rank; None: all 1.
        two_level: one copy a node across nodes, then inside the node; False: one copy a rank; None: the faster.
    """

    tokens_per_rank: int = 4096
    token_bytes: float = 7168 * 2
    expert_seconds: float = 0.22e-6
    expert_bytes: float = 3 * 7168 * 2048 * 2
    optimizer_bytes: float = 3 * 7168 * 2048 * 12
    speed: tuple[float, ...] | None = None
    two_level: bool | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_per_rank", "token_bytes", "expert_seconds", "expert_bytes", "optimizer_bytes"):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0:
                raise PlacementError(f"costs: {name}={value}: expected a finite number, not negative")
        if self.speed is not None and not all(np.isfinite(s) and s > 0 for s in self.speed):
            raise PlacementError(f"costs: speed={self.speed}: expected finite positive numbers, one a rank")

    def speeds(self, ranks: int) -> Floats:
        """[R] relative speed; raises PlacementError when their number is not R."""
        if self.speed is None:
            return np.ones(ranks)
        if len(self.speed) != ranks:
            raise PlacementError(f"costs: speed has {len(self.speed)} entries for {ranks} ranks")
        return np.asarray(self.speed, np.float64)
