"""Simulated rows -> one plain sentence: how many GPUs of which kind, and where more of them stop paying. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ray_ep.placement.whatif.gpus import Gpu
from ray_ep.placement.whatif.simulate import Row

PAYS = 0.5
"""More ranks pay while each that is added brings this share of what a rank brought before."""


@dataclass(frozen=True, slots=True)
class Option:
    """A simulated cluster of one kind of GPU; gpu None: no kind was named."""

    gpu: Gpu | None
    row: Row

    @property
    def fits(self) -> bool:
        """Whether experts and their optimizer state fit the GPU's memory, as far as it is known."""
        memory = None if self.gpu is None else self.gpu.memory_gb
        return memory is None or self.row.memory_bytes <= memory * 1e9

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens/s of one rank."""
        return self.row.tokens_per_second / self.row.cluster.ranks

    @property
    def tokens_per_price(self) -> float | None:
        """Tokens for one unit of the price; None: no price is known."""
        price = None if self.gpu is None else self.gpu.price
        return None if price is None else self.tokens_per_gpu * 3600 / price

    def name(self) -> str:
        """For a sentence: "16 nodes (128 h100) with 4 slots"."""
        row, kind = self.row, "ranks" if self.gpu is None else self.gpu.name
        nodes = f"{row.cluster.nodes} node" + ("s" if row.cluster.nodes > 1 else "")
        slots = f"{row.slots_per_rank} slot" + ("s" if row.slots_per_rank > 1 else "")
        return f"{nodes} ({row.cluster.ranks} {kind}) with {slots} a rank, placed by {row.placement.replace('_', '-')}"


def answer(options: Sequence[Option]) -> str:
    """What to take of the simulated clusters, and what more of it would bring; at least one option."""
    fitting = [o for o in options if o.fits]
    if not fitting:
        least = min(options, key=lambda o: o.row.memory_bytes)
        return (
            f"Nothing fits: the experts of {least.name()} take {least.row.memory_bytes / 1e9:.3g} GB a GPU, its memory "
            f"is {least.gpu.memory_gb if least.gpu else 0:g} GB: more ranks or fewer slots would do."
        )
    priced = all(o.tokens_per_price is not None for o in fitting)
    best = max(fitting, key=lambda o: (o.tokens_per_price or 0.0) if priced else o.tokens_per_gpu)
    worth = (
        f"most tokens for the price, {best.tokens_per_price:,.0f} for 1 of it, {best.tokens_per_gpu:,.0f}/s a GPU"
        if priced
        else f"most tokens a GPU, {best.tokens_per_gpu:,.0f}/s"
    )
    parts = [f"Best is {best.name()}: {worth}"]
    fastest = max(fitting, key=lambda o: o.row.tokens_per_second)
    if fastest is not best:
        parts.append(f"fastest is {fastest.name()}: {fastest.row.tokens_per_second:,.0f} tokens/s in all")
    parts += _growth(fitting, fastest)
    return "; ".join(parts) + "."


def _growth(options: Sequence[Option], of: Option) -> list[str]:
    """Where more ranks stop paying, in the best clusters of each size of the kind of `of`; nothing to say of one size.

    From one size to the next, what an added rank brings is compared with what a rank brought before.
    """
    largest: dict[int, Option] = {}
    for o in options:
        ranks = o.row.cluster.ranks
        if o.gpu == of.gpu and (ranks not in largest or o.row.tokens_per_second > largest[ranks].row.tokens_per_second):
            largest[ranks] = o
    sizes = [largest[r] for r in sorted(largest)]
    for a, b in pairwise(sizes):
        more = (b.row.tokens_per_second - a.row.tokens_per_second) / (b.row.cluster.ranks - a.row.cluster.ranks)
        if more < PAYS * a.tokens_per_gpu:
            brings = (
                f"brings {more / a.tokens_per_gpu:.0%} of what one brought before" if more > 0 else "brings nothing"
            )
            return [
                f"more than {a.row.cluster.ranks} GPUs do not pay: up to {b.row.cluster.ranks}, each added {brings}"
            ]
    if len(sizes) > 1:
        return [f"adding GPUs pays up to {sizes[-1].row.cluster.ranks}, the largest that was tried"]
    return []
