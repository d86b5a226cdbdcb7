"""Rows of tokens that a pass computes on, with what is known of each token. NumPy alone.

B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

IGNORED = -100
"""Target of a token that predicts nothing which counts; torch's losses pass over it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens and what each of them predicts.

    Args:
        ids: int64 [B, T]. targets: int64 [B, T] the token after each, or `IGNORED`.
        offsets: int64 [B, T] where each token stands in its split of the data; -1: it is padding.
        positions: int64 [B, T] of each in its document, and documents do not see each other; None: a row is one.
    """

    ids: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.ids)

    @property
    def length(self) -> int:
        """T."""
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens that the model computes on; padding is none."""
        return int((self.offsets >= 0).sum())

    @property
    def predictions(self) -> int:
        """How many of them predict what counts."""
        return int((self.targets != IGNORED).sum())

    def rows(self, low: int, high: int) -> Batch:
        """Rows [low, high)."""
        positions = None if self.positions is None else self.positions[low:high]
        return Batch(self.ids[low:high], self.targets[low:high], self.offsets[low:high], positions)

    def parts(self, number: int) -> Iterator[Batch]:
        """Its rows in so many parts, as np.array_split cuts them."""
        edges = np.cumsum([0, *(len(x) for x in np.array_split(np.arange(len(self)), number))]).tolist()
        return (self.rows(a, b) for a, b in pairwise(edges))
