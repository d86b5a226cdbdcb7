"""What routing statistics say: which experts are hot, and which fire together more often than chance.

Pure NumPy over counts of a whole run; drawing is in figures.py. L MoE layers, E experts.
Imports NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """Two experts of one layer that fired for the same tokens."""

    experts: tuple[int, int]
    observed: int  # tokens
    expected: float  # tokens, if the two were independent
    ratio: float


@dataclass(frozen=True, slots=True)
class Coactivation:
    """The layer whose pairs of experts deviate most from independence."""

    layer: int
    ratio: np.ndarray  # [E, E] observed / expected; NaN on the diagonal and where nothing is expected
    deviation: np.ndarray  # [L] nats a pair
    top: list[ExpertPair]


def load_ratio(load: np.ndarray) -> np.ndarray:
    """Load of each expert over the mean of its layer; load and result [L, E], 0 for a layer without tokens."""
    mean = load.mean(axis=1, keepdims=True)
    ratio: np.ndarray = np.divide(load, mean, out=np.zeros(load.shape), where=mean > 0)
    return ratio


def expected_pairs(observed: np.ndarray, rounds: int = 100) -> np.ndarray:
    """Pair counts of experts that choose each other by their loads alone; observed and result [E, E], diagonal 0.

    A token cannot choose one expert twice, so load x load is biased where one expert is hot. This is the quasi-
    independence model (Goodman 1968): weights w with w_i w_j = expected_ij for i != j and the observed row sums.
    """
    rows = observed.sum(axis=1)
    weights = rows / np.sqrt(max(rows.sum(), 1.0))
    for _ in range(rounds):
        others = np.maximum(weights.sum() - weights, 1e-12)
        weights = np.sqrt(weights * rows / others)  # the geometric mean of old and new damps oscillation
    expected = np.outer(weights, weights)
    np.fill_diagonal(expected, 0.0)
    return expected


def strongest_coactivation(coactivation: np.ndarray, top: int = 5) -> Coactivation | None:
    """The layer of coactivation [L, E, E] that is furthest from independence; None if no two experts ever co-fired."""
    observed = np.maximum(coactivation, coactivation.transpose(0, 2, 1)).astype(np.float64)
    observed[:, np.eye(observed.shape[1], dtype=bool)] = 0.0
    if not observed.any():
        return None
    expected = np.stack([expected_pairs(layer) for layer in observed])
    ratio = np.divide(observed, expected, out=np.full(observed.shape, np.nan), where=expected > 1e-9)
    # O log(O / E): few tokens weigh little, so that a rare pair does not win by noise
    surplus = observed * np.log(np.where(ratio > 0, ratio, 1.0))
    deviation = surplus.sum(axis=(1, 2)) / np.maximum(observed.sum(axis=(1, 2)), 1.0)
    layer = int(deviation.argmax())
    pairs = _top_pairs(surplus[layer], observed[layer], expected[layer], top)
    return Coactivation(layer, ratio[layer], deviation, pairs)


def _top_pairs(surplus: np.ndarray, observed: np.ndarray, expected: np.ndarray, top: int) -> list[ExpertPair]:
    rows, columns = np.triu_indices(len(surplus), k=1)
    best = np.argsort(-surplus[rows, columns], kind="stable")[:top]
    found = [(i, j) for i, j in zip(rows[best].tolist(), columns[best].tolist(), strict=True) if surplus[i, j] > 0]
    return [ExpertPair(p, int(observed[p]), float(expected[p]), float(observed[p] / expected[p])) for p in found]
