"""Measuring links, the half that sends: every rank of a group calls `measure`, every rank gets the same topology.

Which pairs, sizes and fits is ray_ep.placement.links.probe's; here are messages, clocks and failures. No Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ray_ep.collective.group import Group
from ray_ep.errors import GroupError, PlacementError
from ray_ep.placement.links.groups import find_groups
from ray_ep.placement.links.probe import (
    LinkFit,
    Pair,
    assemble,
    company_rounds,
    disjoint_rounds,
    fit,
    in_company,
    probe_rounds,
    round_budget,
    time_link,
    with_fits,
    with_lanes,
)
from ray_ep.placement.topology import Topology

PARTNER_S = 20.0
"""Seconds that a rank waits for a message of its partner before probing fails."""


class Messages:
    """Messages between two ranks of a group, with a limit for each; over the connections that its exchanges use.

    Not `all_to_all` with one partner: over gloo that waits for an empty message of *every* rank, so each link would be
    timed as the slowest one of its round.
    """

    def __init__(self, group: Group, patience_s: float = PARTNER_S):
        self._group, self._patience = group, patience_s

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Return when the tensor may be changed."""
        self._group.send(tensor, to, self._patience)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """In place."""
        self._group.receive(tensor, source, self._patience)

    def wait(self) -> None:
        """Return once all that was sent and received has arrived: on a GPU calls return before that."""
        self._group.wait()


class ProbeError(GroupError):
    """Probing failed; `partner` is the rank whose link was being measured, None where it was no single one's."""

    def __init__(self, message: str, partner: int | None = None):
        super().__init__(message)
        self.partner = partner


def measure(
    group: Group,
    node_of: Sequence[int] | npt.NDArray[np.int64],
    budget_s: float = 20.0,
    device: torch.device | str = "cpu",
    messages: Messages | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Topology:
    """Latency and bandwidth of the links between all ranks (collective; no other call of the group may be under way).

    A link is timed by its sender, as trips there with n bytes and back with one: no clocks are compared. Both
    directions of a pair are timed one after the other, the disjoint pairs of a round at once. Last the ranks of a node
    send all at once, to see what their node carries.

    Args:
        node_of: [R] node of each rank, the same on every rank.
        budget_s: about how long it may take; each pair is given at least the few messages that two sizes need.
        device: where the messages lie, as the group's exchanges have them.
        messages: how two ranks talk; None: over the group.
        clock: seconds.

    Returns:
        the same topology on every rank, with spread, measured, groups, lanes and measured_at.

    Raises:
        PlacementError: `node_of` does not fit the group, a budget that is not positive, a rank that reports nonsense.
        ProbeError: a rank died or did not answer while probing; the group is then unusable.
    """
    if len(node_of) != group.size:
        raise PlacementError(f"probe: node_of names {len(node_of)} ranks, the group has {group.size}")
    if group.size == 1:
        return Topology.of_nodes(list(node_of))
    alone, company = probe_rounds(node_of), company_rounds(node_of)
    part = budget_s / (len(alone) + len(company))
    fits, now = _time(group, alone, part * len(alone), device, messages, clock)
    topology = assemble(node_of, fits, measured_at=now)
    if company:
        fits, _ = _time(group, company, part * len(company), device, messages, clock, topology)
        topology = with_lanes(topology, fits)
    return find_groups(topology)


def measure_links(
    group: Group,
    known: Topology,
    pairs: Sequence[Pair],
    budget_s: float,
    device: torch.device | str = "cpu",
    messages: Messages | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Topology:
    """`known` with the links between some pairs of ranks, both ways, as they are now (collective, as `measure` is).

    Args:
        pairs: the same on every rank. The others as in `measure`.

    Raises:
        PlacementError, ProbeError: as `measure`.
    """
    plan = disjoint_rounds(known.node_of, pairs)
    fits, now = _time(group, plan, budget_s, device, messages, clock)
    return with_fits(known, fits, now)


def _time(
    group: Group,
    plan: list[list[Pair]],
    budget_s: float,
    device: torch.device | str,
    messages: Messages | None,
    clock: Callable[[], float],
    alone: Topology | None = None,
) -> tuple[dict[Pair, LinkFit], float]:
    """(Fits of both directions of every pair of the plan, rank 0's seconds since 1970), the same on every rank.

    alone: how fast each link is where all pairs of a round send at once, one node's ranks first, then the other's.
    """
    if not (math.isfinite(budget_s) and budget_s > 0):
        raise PlacementError(f"probe: budget_s is {budget_s}, expected a positive number of seconds")
    messages = messages or Messages(group)
    mine = torch.full((group.size, 4), math.nan, dtype=torch.float64)  # latency, bandwidth, spread, time of day
    mine[:, 3] = time.time()
    start, now, partner = clock(), "starting", None
    try:
        for number, pairs in enumerate(plan):
            now, partner = f"round {number + 1} of {len(plan)}", None
            group.barrier()
            partner = next((b if a == group.rank else a for a, b in pairs if group.rank in (a, b)), None)
            if partner is None:
                continue
            now += f", link with rank {partner}"
            budget = round_budget(budget_s, clock() - start, len(plan) - number) / 2
            end = _End(messages, partner, torch.device(device), clock)
            for sender in sorted((group.rank, partner), key=lambda r: (alone.node_of[r] if alone else 0, r)):
                if sender == group.rank:
                    found = end.lead(budget) if alone is None else end.together(alone, group.rank, budget)
                    mine[partner, :3] = torch.tensor([found.latency, found.bandwidth, found.spread])
                else:
                    end.follow()
        now, partner = "gathering the results", None
        gathered = group.all_gather(mine.to(device))  # [R, R, 4]
        group.wait()
        everything = gathered.cpu().numpy()
    except GroupError as e:
        raise ProbeError(f"rank {group.rank}: probing the links failed ({now}): {e}", partner) from None
    fits = {
        (a, b): LinkFit(*everything[a, b, :3].tolist()) for pairs in plan for x, y in pairs for a, b in ((x, y), (y, x))
    }
    return fits, float(everything[0, 0, 3])


class _End:
    """One end of a link. The leader says (bytes, repeats) before each size, (0, 0) at the end; the follower answers."""

    def __init__(self, messages: Messages, partner: int, device: torch.device, clock: Callable[[], float]):
        self._messages, self._partner, self._device, self._clock = messages, partner, device, clock
        self._byte = torch.zeros(1, dtype=torch.uint8, device=device)

    def lead(self, budget_s: float) -> LinkFit:
        """Time the link to the partner; NaN where the times are none, for the other ranks must hear of it."""
        try:
            found = fit(time_link(self._ping, budget_s))
        except PlacementError:
            found = LinkFit(math.nan, math.nan, math.nan)
        self._messages.send(torch.tensor([0, 0], device=self._device), self._partner)
        return found

    def together(self, alone: Topology, rank: int, budget_s: float) -> LinkFit:
        """The link to the partner while others send, too: many messages of one size, all of them counted."""
        known = LinkFit(float(alone.latency[rank, self._partner]), float(alone.bandwidth[rank, self._partner]), 0.0)
        size, repeats, expected = in_company(known, budget_s)
        took = sum(self._ping(size, repeats))
        kept = expected * repeats / took if took > 0 else math.nan  # for the other ranks must hear of it
        self._messages.send(torch.tensor([0, 0], device=self._device), self._partner)
        return LinkFit(known.latency, known.bandwidth * min(kept, 1.0), 0.0)

    def _ping(self, size: int, repeats: int) -> list[float]:
        payload = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self._messages.send(torch.tensor([size, repeats], device=self._device), self._partner)
        self._messages.wait()  # on a GPU the payload is there only then
        seconds = []
        for _ in range(repeats):
            start = self._clock()
            self._messages.send(payload, self._partner)
            self._messages.receive(self._byte, self._partner)
            self._messages.wait()
            seconds.append(self._clock() - start)
        return seconds

    def follow(self) -> None:
        """Answer the partner until it is done. On a GPU all answers to a size are enqueued before the first arrives."""
        order = torch.zeros(2, dtype=torch.int64, device=self._device)
        while True:
            self._messages.receive(order, self._partner)
            self._messages.wait()
            size, repeats = order.tolist()
            if size == 0:
                return
            payload = torch.empty(size, dtype=torch.uint8, device=self._device)
            for _ in range(repeats):
                self._messages.receive(payload, self._partner)
                self._messages.send(self._byte, self._partner)
