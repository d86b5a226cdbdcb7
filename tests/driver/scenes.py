"""Routing, links, steps and questions of made-up runs; a clock and a background of the test's own."""

from concurrent.futures import Future

import numpy as np

from ray_ep.driver.rebalance.recent import Facts, MeasuredStep
from ray_ep.placement import RoutingStatistics, StepCosts, Topology, contiguous
from ray_ep.placement.planner.verdict import Question

LAYERS, EXPERTS, RANKS = 2, 8, 2
FACTS = Facts(tokens_per_rank=512, hidden=32, parameters=1000, item_bytes=4, state_bytes=12, passes=2, kind="flat")
NOWHERE = contiguous(LAYERS, EXPERTS, RANKS)


def topology(bandwidth=1e9, node_of=(0, 0)):
    n = len(node_of)
    return Topology(np.full((n, n), float(bandwidth)), np.full((n, n), 1e-5) * (1 - np.eye(n)), np.array(node_of))


def tokens(skewed, count=512):
    """Sets [L, N, 2]; skewed: half of the tokens choose experts 0 and 1, which contiguous puts on one rank."""
    number = np.arange(count)[:, None] * 2 + np.arange(2)
    sets = number % EXPERTS
    if skewed:
        sets = np.where(np.arange(count)[:, None] % 2 == 0, np.arange(2), sets)
    return np.stack([sets] * LAYERS).astype(np.int32)


def statistics(skewed=True):
    sets = tokens(skewed)
    return RoutingStatistics(np.stack([np.bincount(s.ravel(), minlength=EXPERTS) for s in sets]), sample=sets)


def question(skewed=True, **changes):
    costs = StepCosts(512, 256.0, 2e-5, 2e5, 6e5, None, False)
    given = {
        "statistics": statistics(skewed), "topology": topology(), "current": NOWHERE, "slots": 4, "costs": costs,
        "level": "rank", "step_seconds": 0.2, "moe_seconds": 0.1, "horizon_steps": 1000,
    }  # fmt: skip
    return Question(**given | changes)


def step(experts=(0.03, 0.01), pairs=((900, 900), (300, 300)), seconds=0.2, exchange=(0.01, 0.03), load=None, sent=0):
    load = statistics().load if load is None else np.asarray(load)
    sent = np.full((RANKS, RANKS), sent, np.float64)
    return MeasuredStep(load, np.array(pairs), np.array(experts), np.array(exchange), sent, seconds)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Shelf:
    """A background in which decisions wait until the test has them made."""

    def __init__(self):
        self.waiting = []

    def __call__(self, work):
        self.waiting.append((future := Future(), work))
        return future

    def make(self, result=None):
        future, work = self.waiting.pop()
        try:
            future.set_result(work() if result is None else result)
        except Exception as e:
            future.set_exception(e)
