"""Guests: weights that a rank borrows for one layer of one step, and whose gradients go home; where tokens go then.

While weights do not change (inference) guests stay, and are replicas from then on. Who has which guests is the plan of
ray_ep.placement.in_step.rules. E experts, R ranks, S experts held, G guests of this rank, T tokens, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch

from ray_ep.moe.exchange.meter import MeteredGroup
from ray_ep.moe.exchange.segments import order_of
from ray_ep.placement.in_step.rules import StepPlan, StepRules

_SERVES = 8
"""Steps that a guest which stays is expected to be of use in: its price is spread over them."""

_UNEVEN = 1.05
"""Imbalance that guests which fill their room must not leave."""

_UINT8 = torch.zeros(0, dtype=torch.uint8)

Take = Callable[..., torch.Tensor]
"""Gives memory: take(*shape, like=tensor), as `Pool.take` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guests:
    """The guests of one layer of one step, from one rank's side: whose weights it gives and takes."""

    traffic: MeteredGroup = field(repr=False)
    give_rows: list[int]  # local rows of the weights given, by rank that takes, experts ascending
    give: list[int]  # [R] how many to each
    experts: list[int]  # [G] experts taken, by rank that gives, experts ascending
    take: list[int]  # [R]
    pairs: int  # that go through the experts taken
    keep: bool  # until backward, else fetched again there

    @staticmethod
    def of(plan: StepPlan, row_of: np.ndarray, traffic: MeteredGroup, keep: bool) -> Guests | None:
        """None if no rank has guests."""
        if not len(plan.guests):
            return None
        me, size = traffic.rank, traffic.size
        expert, source, to = (plan.guests[:, i] for i in range(3))
        given, taken = source == me, to == me
        by_source = np.lexsort((expert[taken], source[taken]))
        give = np.bincount(to[given], minlength=size).tolist()
        take = np.bincount(source[taken], minlength=size).tolist()
        return Guests(
            traffic=traffic,
            give_rows=row_of[expert[given]].tolist(),
            give=give,
            experts=expert[taken][by_source].tolist(),
            take=take,
            pairs=int(plan.quota[expert[taken], me].sum()),
            keep=keep,
        )

    def fetch(
        self, weights: Sequence[torch.Tensor], take: Take | None = None, resident: ResidentGuests | None = None
    ) -> ExpertMessage:
        """weights [S, ...] of this rank's experts -> its guests' [...] each, all in one message (collective).

        It travels beside what follows: `unpack` it before it is read. Rows from S on are of guests that stayed.

        Args:
            take: copy what arrives into memory of its own; None: it is read where its sender wrote it.
        """
        message = self.traffic.group.take(len(self.give_rows), _size(weights), like=_UINT8.to(weights[0].device))
        stayed: Sequence[list[torch.Tensor]] = [[] for _ in weights] if resident is None else resident.rows
        for part, weight, more in zip(side_by_side(message, weights), weights, stayed, strict=True):
            for row, r in zip(part, self.give_rows, strict=True):
                row.copy_(weight.detach()[r] if r < len(weight) else more[r - len(weight)])
        return self._lend(message, weights, self.give, self.take, take)

    def send_home(self, of_guests: torch.Tensor, own: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Gradients of the guests, a message of `new_rows`, set out for where they came from (collective).

        What is returned adds those that arrive to `own` [S, ...], by ascending rank.
        """
        received = self._lend(of_guests, own, self.take, self.give)

        def add() -> None:
            gradients: list[list[torch.Tensor]] = [[] for _ in own]
            received.unpack(*gradients)
            for total, rows in zip(own, gradients, strict=True):
                for row, gradient in zip(self.give_rows, rows, strict=True):
                    total[row] += gradient

        return add

    def new_rows(self, own: Sequence[torch.Tensor]) -> torch.Tensor:
        """uint8 [G, bytes] for gradients of the guests that are like `own` [S, ...], unwritten."""
        return self.traffic.group.take(len(self.experts), _size(own), like=_UINT8.to(own[0].device))

    def _lend(
        self, message: torch.Tensor, like: Sequence[torch.Tensor], give: list[int], take: list[int],
        copy: Take | None = None,
    ) -> ExpertMessage:  # fmt: skip
        end = self.traffic.begin_loan(message, give, take)

        def arrive() -> list[torch.Tensor]:
            blocks = end()
            if copy is None:
                return blocks
            phase = self.traffic.meter.enter("exchange")
            blocks = [copy(*block.shape, like=block).copy_(block) for block in blocks]
            self.traffic.meter.enter(phase)
            return blocks

        return ExpertMessage(message, like, arrive)


class ExpertMessage:
    """Weights, or gradients, of some experts on their way, side by side in one message.

    Args:
        sent: what this rank sends; while it is kept, what others sent in turn stays too.
        like: [S, ...] of the same kind, all of one dtype.
        arrive: uint8 [n, bytes] of each rank, once they are here; None: nothing travels.
    """

    def __init__(
        self,
        sent: torch.Tensor | None = None,
        like: Sequence[torch.Tensor] = (),
        arrive: Callable[[], list[torch.Tensor]] | None = None,
    ):
        self.sent, self._like, self._arrive = sent, like, arrive

    def unpack(self, *onto: list[torch.Tensor]) -> None:
        """Once it is here, append its rows to the lists, one of each kind; the second time there is nothing left."""
        if self._arrive is None:
            return
        blocks, self._arrive = self._arrive(), None
        for block in blocks:
            for rows, more in zip(onto, side_by_side(block, self._like), strict=True):
                rows.extend(more)


def side_by_side(message: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """message uint8 [n, bytes] -> views [n, ...] of it for each of `like` [S, ...]."""
    parts = zip(message.split([_bytes(w) for w in like], 1), like, strict=True)  # type: ignore[no-untyped-call]
    return [m.view(w.dtype).view(len(m), *w.shape[1:]) for m, w in parts]


def _size(like: Sequence[torch.Tensor]) -> int:
    return sum(_bytes(w) for w in like)


def _bytes(weight: torch.Tensor) -> int:
    return prod(weight.shape[1:]) * weight.element_size()


class ResidentGuests:
    """Guests of one layer that stay while weights do not change: from the next step on replicas like any other.

    Every rank knows of all of them, for they follow from the plans.

    Args:
        rules: without them.
        slots: most of them on a rank.
        row_of: [E] row of the rank's own experts, -1 elsewhere; held: how many they are.
    """

    def __init__(self, rules: StepRules, slots: int, row_of: np.ndarray, held: int):
        cheaper = rules.expert_seconds / _SERVES
        self._base, self._slots = replace(rules, guest_slots=slots, expert_seconds=cheaper), slots
        self._own = row_of, held
        self._forget()

    def _forget(self) -> None:
        self.rules = self._base
        self.row_of, self.held = self._own[0].copy(), self._own[1]
        self.rows: tuple[list[torch.Tensor], ...] = ([], [])  # of each weight
        self._count = np.zeros(len(self._base.node_of), np.int64)  # [R]

    def settle(self, plan: StepPlan, guests: Guests | None, arrived: Sequence[list[torch.Tensor]]) -> bool:
        """The guests of a step that is over stay, their weights being `arrived`; False: all are given up.

        That is when there is no room for another one and the ranks are uneven.
        """
        if guests is None:
            if self.rules.guest_slots or plan.after < _UNEVEN:
                return True
            self._forget()
            return False
        holds = self.rules.holds.copy()
        expert, _, to = plan.guests.T
        holds[expert, to] = True
        np.add.at(self._count, to, 1)
        self.row_of[guests.experts] = self.held + np.arange(len(guests.experts))
        self.held += len(guests.experts)
        for rows, new in zip(self.rows, arrived, strict=True):
            rows.extend(new)
        self.rules = replace(self._base, holds=holds, guest_slots=self._slots - int(self._count.max()))
        return True


class BorrowedRows(torch.autograd.Function):
    """Weights of the guests, for the general layer: rows, params [S, ...] each -> rows, params, guests' [G, ...] each.

    Rows and parameters pass through: so gradients go home at the same point of backward on every rank, and those that
    come home are added to the parameters' own.
    """

    @staticmethod
    def forward(ctx: Any, guests: Guests, rows: torch.Tensor, *params: torch.Tensor) -> Any:
        ctx.guests = guests
        arrived: list[list[torch.Tensor]] = [[] for _ in params]
        guests.fetch(params).unpack(*arrived)
        # A copy of their own: what was lent is good until the next loan only.
        theirs = (torch.stack(a) if a else p.new_empty(0, *p.shape[1:]) for a, p in zip(arrived, params, strict=True))
        return (rows.view_as(rows), *(p.view_as(p) for p in params), *theirs)

    @staticmethod
    def backward(ctx: Any, d_rows: torch.Tensor, *grads: torch.Tensor) -> Any:
        guests: Guests = ctx.guests
        guests.traffic.meter.enter("pack")  # the experts' backward ends here
        half = len(grads) // 2
        own = grads[:half]
        if guests.give_rows:  # they are changed below, and others may read them
            own = tuple(g.clone() for g in own)
        message = guests.new_rows(own)
        for part, g in zip(side_by_side(message, own), grads[half:], strict=True):
            part.copy_(g)
        guests.send_home(message, own)()
        return (None, d_rows, *own)


def destinations(index: torch.Tensor, sends: torch.Tensor, rank: int) -> torch.Tensor:
    """to [T, K]: the rank of each pair of index [T, K] (-1: none) so that `sends` [E, R] are met: itself first."""
    experts, ranks = sends.shape
    place = torch.arange(ranks, device=index.device)
    order = torch.where(place == 0, rank, place - (place <= rank).long())  # rank, 0, 1, ... without it
    ends = sends[:, order].cumsum(1)  # [E, R]
    flat = index.reshape(-1)
    by_expert = order_of(flat, experts)
    expert = flat[by_expert]
    first = torch.searchsorted(expert, expert)
    number = torch.arange(len(flat), device=index.device) - first  # of the pair among its expert's
    at = (ends[expert.clamp_min(0)] <= number[:, None]).sum(1).clamp_max(ranks - 1)
    to = torch.empty_like(flat)
    to[by_expert] = torch.where(expert >= 0, order[at], -1)
    return to.view_as(index)
