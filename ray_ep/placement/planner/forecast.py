"""The load to plan for: counted, and shrunk towards a more even mix of topics, whose shares regress to the mean.

Tokens of a topic choose the same experts. What makes a plan miss its balance on later tokens is a change of topics'
shares, and the best guess of shares that change is that the large ones fall and the small ones grow. Nobody names the
topics, so each sampled token is weighted by how rare its kind is: by how much more often than by chance its experts
are chosen together (a kernel density of sets). Pure numba. T tokens, K top_k, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel
from ray_ep.placement.placement import Floats, Ints

DRIFT = 0.1
"""Share of the later tokens. The forecast takes this share from a more even mix of topics than the one counted."""
FLOOR = 0.3
"""Share of the density that pairs of experts have by chance. No set counts as rarer, so no token's weight explodes."""


@kernel
def _rare_first(sets: Any, cov: Any, chance: float) -> Any:
    """[E] share of experts among tokens sets [T, K], each weighted by 1 / density; cov [E, E] of choices."""
    tokens, k = sets.shape
    out, total, pairs = np.zeros(cov.shape[0]), 0.0, max(k * (k - 1) / 2, 1.0)
    for t in range(tokens):
        together = 0.0
        for i in range(k):
            for j in range(i):
                together += cov[sets[t, i], sets[t, j]]
        weight = 1.0 / (chance + max(together / pairs, 1.0 / tokens))
        total += weight
        for i in range(k):
            out[sets[t, i]] += weight
    return out / max(total, 1e-300)


def expected_load(load: Floats, sets: Ints, cov: Floats) -> Floats:
    """[E] tokens of each expert, per token, that are expected later.

    Args:
        load: [E] counted, per token. sets: [T, K] sampled tokens. cov: [E, E] covariance of choices, per token.
    """
    if not sets.size:
        return load
    typical = float(load @ load) / float(load.sum())  # share of tokens that the mean choice's expert has
    return (1 - DRIFT) * load + DRIFT * np.asarray(_rare_first(sets, cov, FLOOR * typical**2), np.float64)
