"""Routing with topics: tokens of a topic share experts, so that placement has something to find."""

import numpy as np

from ray_ep.placement import RoutingStatistics


def trace(layers, experts, top_k, tokens, seed=0, topics=8, drift=0.0):
    """[L, T, K] expert sets; `drift` is the share of the tokens whose topics come from another mix."""
    rng, later = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    liking = rng.normal(0, 1.5, (layers, topics, experts)) * (rng.random((layers, topics, experts)) < 0.4)
    mix, other = rng.dirichlet(np.ones(topics)), later.dirichlet(np.ones(topics))
    topic = later.choice(topics, tokens, p=(1 - drift) * mix + drift * other)
    logits = liking[:, topic] + later.gumbel(0, 0.6, (layers, tokens, experts))
    return np.argpartition(-logits, top_k, axis=2)[:, :, :top_k]


def statistics(sets, experts):
    load = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in sets])
    return RoutingStatistics(load, sample=sets.astype(np.int32))
