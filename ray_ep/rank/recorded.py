"""What was recorded of the sampled tokens of one step: plain values that travel from a rank to the driver. NumPy only.

n tokens of one rank, L MoE layers, K top_k, W tokens of context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("primary", "replica", "guest")
"""What an expert was on the rank that computed with it; a guest was lent for one layer of one step."""

BEFORE, AFTER = 24, 8
"""Tokens of context that are kept before a sampled token, and after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One rank's sampled tokens of one step; -1 where there is nothing.

    Args:
        rank: that had the tokens.
        position: int64 [n] row x batch.length + column in the global batch.
        context: int64 [n, BEFORE + 1 + AFTER] ids of the tokens around each one, and at BEFORE its own.
        document: int64 [n] number of the training document, in reading order.
        offset: int64 [n] of the token among all that are trained on.
        experts, ranks: int32 [L, n, K] chosen, and who computed. weights: float32 [L, n, K]. kinds: int8, into KINDS.
        version: of the placement. epoch: of the membership that the ranks are numbered in.
    """

    rank: int
    position: np.ndarray
    context: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    ranks: np.ndarray
    kinds: np.ndarray
    version: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank is: a Ray node by its id, its host's name, and the device there."""

    node: str
    host: str
    device: str


@dataclass(frozen=True, slots=True)
class StepProvenance:
    """All that was recorded of one step. seats: [R] of its ranks. length: tokens of a row of the batch."""

    parts: tuple[Recorded, ...]
    seats: tuple[Seat, ...]
    length: int
