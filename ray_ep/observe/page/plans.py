"""The heat maps of a plan: expert load of ranks, traffic of links, before and after. NumPy and the placement layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ray_ep.observe.page.sheet import Heat, Lines
from ray_ep.placement.compare import PLAN, Candidate, Case, link_bytes

_EACH = 128  # ranks up to which links are drawn one by one; beyond, between nodes


def heat_maps(case: Case, found: Sequence[Candidate], now: str) -> list[Heat]:
    """Heat maps of what runs now and of the plan, the colours of a kind meaning the same in both."""
    shown = [c for c in found if c.name in (now, PLAN)]
    ratios = {c.name: _over_mean(c.prediction.rank_load / case.costs.speeds(case.topology.num_ranks)) for c in shown}
    loads = [_load(name, ratio, None) for name, ratio in ratios.items()]
    maps = [_load(name, ratio, max(m.reach for m in loads)) for name, ratio in ratios.items()]
    if not case.statistics.tells_visits:
        return maps
    traffic = {c.name: link_bytes(case, c.placement) for c in shown}
    drawn = {name: _by_node(case, sent) / 1e6 for name, sent in traffic.items()}
    top = max(float(sent.max(initial=1e-9)) for sent in drawn.values())
    far = case.topology.node_of[:, None] != case.topology.node_of
    for name, sent in traffic.items():
        title = f"Traffic, {name}: {sent.sum() / 1e6:,.0f} MB a step, {sent[far].sum() / 1e6:,.0f} MB between nodes"
        unit = "rank" if len(drawn[name]) == case.topology.num_ranks else "node"
        edges = np.flatnonzero(np.diff(case.topology.node_of)) + 1 if unit == "rank" else np.zeros(0, np.int64)
        maps.append(
            Heat(
                f"traffic-{name}", title, drawn[name], "MB a step", False, f"from {unit}", f"to {unit}", top,
                edges.tolist(),
            )
        )  # fmt: skip
    return maps


def growth(lines: Mapping[str, Sequence[tuple[int, float]]]) -> Lines:
    """Tokens/s of a GPU over the number of GPUs, (GPUs, tokens/s) of each line by its name."""
    curves = {name: sorted(points) for name, points in lines.items()}
    return Lines("What a GPU brings in clusters of many", curves, "GPUs", "tokens/s a GPU", log=True, low=0.0)


def _load(name: str, ratio: np.ndarray, top: float | None) -> Heat:
    return Heat(f"load-{name}", f"Load of ranks, {name}", ratio, "of the mean", True, "MoE layer", "rank", top)


def _over_mean(load: np.ndarray) -> np.ndarray:
    """load [L, R] over its layer's mean; 1 where a layer has none."""
    mean = load.mean(1, keepdims=True)
    ratio: np.ndarray = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    return ratio


def _by_node(case: Case, sent: np.ndarray) -> np.ndarray:
    """[R, R] as it is, or summed to [N, N] where ranks are too many to see; what stays on a node is left out then."""
    if len(sent) <= _EACH:
        return sent
    node_of = np.unique(case.topology.node_of, return_inverse=True)[1]
    member = np.eye(int(node_of.max()) + 1)[node_of]  # [R, N]
    nodes = member.T @ sent @ member
    np.fill_diagonal(nodes, 0.0)
    return np.asarray(nodes)
