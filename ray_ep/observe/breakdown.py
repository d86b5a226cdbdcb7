"""Where the time of a step goes: the medians of its phases, with their colours and what they are in plain words.

The phases are those that the driver writes to metrics.jsonl as `phase_seconds`; one that this file does not know keeps
its name. Imports NumPy and the run's figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_ep.observe.state import RunState

_DENSE, _DISPATCH, _EXCHANGE, _EXPERTS = "model outside the experts", "dispatch", "exchange", "experts"
_UPDATE, _REST = "gradients and optimizer", "rest"
# In the order of the bar. Forward and backward of the same thing are a light and a dark tone of one colour. Neighbours
# differ in lightness or on the axis that is left to protan, deutan and tritan readers (CIE76 distance at least 15).
_KNOWN = {
    "data": ("#78818a", _REST, "cutting the batch"),
    "forward": ("#6cc7a3", _DENSE, "the model outside the experts: attention, router, dense products, the loss"),
    "dispatch_forward": ("#cf9be0", _DISPATCH, "planning the exchange, packing and summing its rows"),
    "exchange_forward": ("#f7b36b", _EXCHANGE, "messages between ranks, waiting for other ranks included"),
    "experts_forward": ("#8ebdfb", _EXPERTS, "the experts' products and activation"),
    "backward": ("#1b8a5f", _DENSE, "the model outside the experts, backward"),
    "dispatch_backward": ("#8e3fa8", _DISPATCH, "packing and summing the rows of the exchange, backward"),
    "exchange_backward": ("#e0761a", _EXCHANGE, "messages between ranks, backward, waiting for other ranks included"),
    "experts_backward": ("#2b66d9", _EXPERTS, "the experts' products and activation, backward"),
    "reduce": ("#f8ec9a", _UPDATE, "gradients summed: dense ones over all ranks, those of replicas over their owners"),
    "norm": ("#e6cc3a", _UPDATE, "the gradient's norm over all ranks"),
    "update": ("#b0930f", _UPDATE, "clipping, the optimizer, the weights that compute"),
    "publish": ("#6e5a05", _UPDATE, "the new weights to their replicas"),
    "rest": ("#b4bbc2", _REST, "other work of the rank: counting, figures"),
    "driver": ("#565f68", _REST, "what the driver's step took beyond the ranks' own time"),
}
_UNKNOWN = ("#c98f7a", "#8a4f3d")  # by turns


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a step: its median, its share of all medians (0 to 1), and how it is shown."""

    name: str
    seconds: float
    share: float
    colour: str
    group: str
    words: str


def breakdown(run: RunState) -> list[Phase]:
    """The phases in the order of the bar, those of no known name last; [] where no step tells of them."""
    told = run.steps.phase_seconds()
    names = [*_KNOWN, *(n for n in told if n not in _KNOWN)]
    seconds = [_median(told[n]) if n in told else 0.0 for n in names]
    whole = sum(seconds)
    if not whole > 0:
        return []
    shown = {n: (_UNKNOWN[i % 2], n, "") for i, n in enumerate(names[len(_KNOWN) :])} | _KNOWN
    return [Phase(n, s, s / whole, *shown[n]) for n, s in zip(names, seconds, strict=True)]


def in_groups(phases: list[Phase]) -> str:
    """What goes together as one share, the greatest first: "Experts 41%, exchange 20%, ..."."""
    shares: dict[str, float] = {}
    for phase in phases:
        shares[phase.group] = shares.get(phase.group, 0.0) + phase.share
    said = ", ".join(f"{group} {share:.0%}" for group, share in sorted(shares.items(), key=lambda s: -s[1]))
    return said[0].upper() + said[1:]


def _median(seconds: np.ndarray) -> float:
    known = seconds[np.isfinite(seconds)]
    return float(np.median(known)) if known.size else 0.0
