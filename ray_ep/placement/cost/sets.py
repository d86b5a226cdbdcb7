"""Expert sets of tokens, as predictions and plans want them: the recorded sample, or sets drawn to fit the counts.

Pure NumPy. L layers, E experts, T tokens, K top_k.
"""

from __future__ import annotations

import numpy as np

from ray_ep.placement.placement import Ints
from ray_ep.placement.statistics import RoutingStatistics


def token_sets(statistics: RoutingStatistics, limit: int = 4096, top_k: int | None = None, seed: int = 0) -> Ints:
    """[L, T, K] expert sets of tokens: the sample, at most `limit` of it, or sets drawn to fit the counts."""
    if statistics.sample is not None and statistics.sample.shape[1]:
        have = statistics.sample.shape[1]
        pick = slice(None) if have <= limit else np.linspace(0, have - 1, limit).astype(np.int64)
        return np.ascontiguousarray(statistics.sample[:, pick], np.int64)
    return _drawn_sets(statistics, min(limit, 2048), top_k, seed)


def _drawn_sets(statistics: RoutingStatistics, tokens: int, top_k: int | None, seed: int) -> Ints:
    """Sets whose experts are drawn one after the other, each in proportion to its counts with those before."""
    load = np.asarray(statistics.load, np.float64)
    layers, experts = load.shape
    pairs = statistics.coactivation
    if top_k is None:
        chosen = load.sum()
        together = 0.0 if pairs is None else float(np.sum(pairs)) - chosen
        top_k = int(np.clip(round(1 + together / max(chosen, 1)), 1, experts))
    rng = np.random.default_rng(seed)
    out = np.empty((layers, tokens, top_k), np.int64)
    rows = np.arange(tokens)
    for layer in range(layers):
        alone = load[layer] + 1e-9 * max(load[layer].max(), 1)
        odds = np.tile(np.log(alone), (tokens, 1))
        for k in range(top_k):
            pick = np.argmax(odds + rng.gumbel(size=odds.shape), axis=1)  # a draw in proportion to exp(odds)
            out[layer, :, k] = pick
            if pairs is not None:
                lift = np.log((pairs[layer] + 1e-3) / np.outer(alone, alone) * alone.sum())
                odds = odds + lift[pick]
            odds[rows, pick] = -np.inf
    return out
