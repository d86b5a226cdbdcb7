"""What pair counts say: how often two experts fire together, against what their loads alone would give.

Pure NumPy over counts of a whole run. E experts.
"""

from __future__ import annotations

import numpy as np


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


def pair_ratios(pairs: np.ndarray) -> np.ndarray:
    """[E, E] tokens for which two experts fired over what is expected; NaN on the diagonal and where nothing is."""
    observed = np.maximum(pairs, pairs.T).astype(np.float64)
    np.fill_diagonal(observed, 0.0)
    expected = expected_pairs(observed)
    ratios: np.ndarray = np.divide(observed, expected, out=np.full(observed.shape, np.nan), where=expected > 1e-9)
    return ratios
