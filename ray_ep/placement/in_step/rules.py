"""Balance inside a step: from the counts of one layer, how many pairs of which expert each rank computes.

Pure: `balance_step` is a function of its arguments alone, so all ranks that call it with the same counts and rules get
the same plan and need not talk about it. The compiled parts: search.py (the plan), fill.py, flows.py.
Dimensions: E experts of a layer, R ranks, G guests. A pair is one (token, expert) choice of a router.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError
from ray_ep.placement.in_step.fill import RuleArrays
from ray_ep.placement.in_step.flows import flows
from ray_ep.placement.in_step.search import plan_step
from ray_ep.placement.placement import Floats, Ints, Placement
from ray_ep.placement.topology import Topology

Bools = npt.NDArray[np.bool_]

NEAR_BANDWIDTH, NEAR_LATENCY = 3e9, 1e-4
"""Bytes/s and seconds. Links inside a node that nobody measured count as this fast."""

FAR_BANDWIDTH, FAR_LATENCY = 1.25e8, 1e-3
"""Bytes/s (1 Gbit/s) and seconds. Links between nodes that nobody measured count as this slow: crossing by mistake
costs more than staying."""

FAST_SHARE = 0.5
"""Share of the median bandwidth inside nodes. A link between nodes with at least this counts as fast."""

MIN_PAIRS = 16
"""Pairs. A guest computes at least this many: smaller GEMMs take nearly as long."""

NO_CAP = 2**62
"""Pairs. The cap of a plan without one; no count comes near."""

TOLERANCE = 0.01
"""Share of the mean. Imbalance below it is left alone."""


@dataclass(frozen=True, eq=False)
class StepRules:
    """What does not change from step to step of one layer; made once a placement and layer, the same on every rank.

    Args:
        holds: bool [E, R] the rank has a slot with the expert.
        owner: [E] rank of the primary.
        node_of: [R] node of each rank.
        seconds_per_pair: [R] compute time of one pair on each rank (as measured: ranks may differ).
        expert_seconds: [R, R] time to bring one expert's weights (in training also its gradient home) from rank
            (row) to rank; both are busy with it; inf where not allowed.
        pair_seconds: [R, R] time, on both ends, of a pair computed on a rank (column) and not at its source (row).
        guest_slots: most guests of a rank in this layer.
        min_pairs: fewest pairs worth a guest.
        fast: bool [R, R] joined by fast links: pairs and guests move for balance among these only (symmetric).

    Raises:
        PlacementError: shapes that do not agree, an expert that nobody holds, negative or NaN times.
    """

    holds: Bools
    owner: Ints
    node_of: Ints
    seconds_per_pair: Floats
    expert_seconds: Floats
    pair_seconds: Floats
    guest_slots: int
    min_pairs: int
    fast: Bools
    _arrays: RuleArrays = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kinds = {"holds": np.bool_, "fast": np.bool_, "owner": np.int64, "node_of": np.int64}
        for f in fields(self):
            if f.name not in ("guest_slots", "min_pairs", "_arrays"):
                value: npt.NDArray[Any] = np.array(getattr(self, f.name), kinds.get(f.name, np.float64), order="C")
                value.setflags(write=False)
                object.__setattr__(self, f.name, value)
        self._check()
        start = np.concatenate([[0], np.cumsum(self.holds.sum(1))]).astype(np.int64)
        host = np.ascontiguousarray(np.nonzero(self.holds)[1].astype(np.int64))
        arrays = RuleArrays(
            start, host, self.holds, self.owner, self.node_of,
            self.seconds_per_pair, self.expert_seconds, self.pair_seconds, self.fast,
        )  # fmt: skip
        for array in (start, host):
            array.setflags(write=False)
        object.__setattr__(self, "_arrays", arrays)

    def _check(self) -> None:
        if self.holds.ndim != 2:
            raise PlacementError(f"step rules: holds has shape {self.holds.shape}: expected [experts, ranks]")
        e, r = self.holds.shape
        square = dict.fromkeys(("expert_seconds", "pair_seconds", "fast"), (r, r))
        for name, shape in {"owner": (e,), "node_of": (r,), "seconds_per_pair": (r,), **square}.items():
            if np.shape(getattr(self, name)) != shape:
                raise PlacementError(f"step rules: {name} has shape {np.shape(getattr(self, name))}: expected {shape}")
        if e and not (((self.owner >= 0) & (self.owner < r)).all() and self.holds[np.arange(e), self.owner].all()):
            raise PlacementError("step rules: the owner of an expert does not hold it")
        if not (np.isfinite(self.seconds_per_pair).all() and (self.seconds_per_pair > 0).all()):
            raise PlacementError(f"step rules: seconds_per_pair is {self.seconds_per_pair}: expected positive seconds")
        if not ((self.expert_seconds >= 0).all() and np.isfinite(self.pair_seconds).all()):
            raise PlacementError("step rules: expert_seconds must not be negative or NaN, pair_seconds must be finite")
        if (self.pair_seconds < 0).any() or np.diagonal(self.pair_seconds).any():
            raise PlacementError("step rules: pair_seconds must not be negative, and zero on the diagonal")
        if (self.fast != self.fast.T).any():
            raise PlacementError("step rules: fast must be symmetric")
        if self.guest_slots < 0 or self.min_pairs < 0:
            raise PlacementError(f"step rules: guest_slots={self.guest_slots}, min_pairs={self.min_pairs}: at least 0")

    @staticmethod
    def of(
        placement: Placement,
        layer: int,
        topology: Topology,
        expert_bytes: float,
        seconds_per_pair: float | Floats,
        hidden_bytes: float,
        guest_slots: int,
        training: bool,
    ) -> StepRules:
        """The rules of one layer of a placement on a topology.

        Links that were not measured (infinite bandwidth) count as `NEAR_BANDWIDTH` inside a node and `FAR_BANDWIDTH`
        between nodes. Fast are the links inside a node, and those between nodes that are measured nearly as fast.
        `min_pairs` is `MIN_PAIRS`; `dataclasses.replace` changes it.

        Args:
            expert_bytes: weights of one expert as they travel.
            seconds_per_pair: of forward, in training of forward and backward; one number or [R].
            hidden_bytes: one token's hidden state as it travels.
            training: gradients travel too: weights there and gradients home, hidden states and theirs both ways.
        """
        ranks = placement.num_ranks
        if topology.num_ranks != ranks:
            raise PlacementError(f"topology has {topology.num_ranks} ranks: the placement has {ranks}")
        if not 0 <= layer < placement.num_layers:
            raise PlacementError(f"layer {layer}: the placement has layers 0 to {placement.num_layers - 1}")
        holds = np.zeros((placement.num_experts, ranks), np.bool_)
        rank, slot = np.nonzero(placement.slots[layer] >= 0)
        holds[placement.slots[layer][rank, slot], rank] = True
        bandwidth, latency, fast = _links(topology)
        ways = 2 if training else 1
        expert_seconds = latency + expert_bytes / bandwidth
        pair_seconds = hidden_bytes / bandwidth
        if training:
            expert_seconds = expert_seconds + expert_seconds.T
        pair_seconds = ways * (pair_seconds + pair_seconds.T)
        np.fill_diagonal(expert_seconds, 0.0)
        np.fill_diagonal(pair_seconds, 0.0)
        speeds = np.broadcast_to(np.asarray(seconds_per_pair, np.float64), (ranks,))
        return StepRules(
            holds, placement.owner[layer], topology.node_of, speeds, expert_seconds, pair_seconds,
            guest_slots, MIN_PAIRS, fast,
        )  # fmt: skip


def _links(topology: Topology) -> tuple[Floats, Floats, Bools]:
    """Bandwidth and latency [R, R] with defaults where not measured, and which links are fast."""
    near = topology.node_of[:, None] == topology.node_of[None]
    off = ~np.eye(len(near), dtype=bool)
    known = np.isfinite(topology.bandwidth)
    bandwidth = np.where(known, topology.bandwidth, np.where(near, NEAR_BANDWIDTH, FAR_BANDWIDTH))
    latency = np.where(known, topology.latency, np.where(near, NEAR_LATENCY, FAR_LATENCY))
    np.fill_diagonal(bandwidth, NEAR_BANDWIDTH)
    inside = topology.bandwidth[near & off & known]
    enough = FAST_SHARE * np.median(inside) if len(inside) else np.inf
    quick = known & (topology.bandwidth >= enough)
    return bandwidth, latency, near | (quick & quick.T)


@dataclass(frozen=True, eq=False, slots=True)
class StepPlan:
    """What one layer of one step does.

    Args:
        quota: int64 [E, R] pairs of each expert that each rank computes; rows sum to the counts of all sources.
        guests: int64 [G, 3] weights that travel: expert, from rank, to rank; sorted by (to, expert).
        moved: False: the quotas are the nearest-replica split untouched.
        before: slowest rank's compute time over that of a load spread by the ranks' speeds, without the plan.
        after: the same with it.
        saved_seconds: by how much the slowest rank's predicted time falls, guests' costs included; never negative,
            but when a cap asks for it.
        cost_seconds: most seconds that one rank spends on guests' weights.
        above_cap: pairs above the cap on the fullest rank; not 0 only where no rank may take them.
        counts: [R, E] what it was made from: kept, not copied, so not to be changed while the plan is in use.
    """

    quota: Ints
    guests: Ints
    moved: bool
    before: float
    after: float
    saved_seconds: float
    cost_seconds: float
    above_cap: int
    counts: Ints = field(repr=False)
    _node_of: Ints = field(repr=False)
    _only: Ints = field(repr=False)
    _between: Ints = field(repr=False)

    def sends(self, source: int) -> Ints:
        """int64 [E, R] how many of one source's pairs of each expert go to each rank.

        Sums to counts[source] over ranks, and over sources to the quota. A source computes what it can itself, then
        its node takes what it can, then the rest; in each, sources and ranks meet in ascending order.
        """
        if not 0 <= source < len(self.counts):
            raise PlacementError(f"source rank {source}: the plan has ranks 0 to {len(self.counts) - 1}")
        out: Ints = flows(self.counts, self.quota.T, self._only, self._node_of, source)
        return out

    def pairs_between(self) -> Ints:
        """int64 [R, R] pairs that travel from a source (row) to the rank that computes them; not to be changed."""
        return self._between


def balance_step(
    counts: npt.ArrayLike, rules: StepRules, *, bound: float = 1.05, cap: int | None = None, cross: bool = False
) -> StepPlan:
    """Balance one layer of one step, exactly, from its counts.

    Makes the slowest rank's predicted time (compute, travelling pairs, guests' weights) as small as it can with few
    guests, and never larger than that of the nearest-replica split. Deterministic: the same on every rank.

    Args:
        counts: int [R, E] pairs of each source rank that chose each expert.
        bound: with free guests, slots enough and `min_pairs` 0, no rank's load is more than this times its fair share
            (of the fullest group's load, by speed; whole pairs permitting). Imbalance under 1%, or under a smaller
            bound, is left alone; under 1.01 the bound is approached, not promised.
        cap: most pairs that a rank may compute, for memory's sake: kept even if it makes the step slower, over slow
            links if need be, as far as guest slots and allowed links go (see `StepPlan.above_cap`).
        cross: pairs and guests may move over slow links, too, where that pays.

    Raises:
        PlacementError: counts of another shape, negative counts, a bound under 1, a cap under 1.
    """
    array = np.ascontiguousarray(counts, np.int64)
    if not array.flags.writeable:  # a read-only array is another type to the compiler: no new compilation in a step
        array = array.copy()
    experts, ranks = rules.holds.shape
    if array.shape != (ranks, experts):
        raise PlacementError(f"counts have shape {array.shape}: expected [{ranks} ranks, {experts} experts]")
    if bound < 1 or (cap is not None and cap < 1):
        raise PlacementError(f"bound={bound}, cap={cap}: both are at least 1")
    most = NO_CAP if cap is None else int(cap)
    numbers = int(rules.guest_slots), int(rules.min_pairs), bool(cross), most, min(TOLERANCE, bound - 1.0)
    found = plan_step(array, rules._arrays, *numbers)
    if found.most < 0:
        raise PlacementError(f"counts: {array.min()} pairs: expected 0 or more")
    return StepPlan(
        found.rows.T, found.guests, found.moved, found.uneven, found.even, found.before - found.after, found.weights,
        max(found.most - most, 0), array, rules.node_of, found.only, found.between,
    )  # fmt: skip


def warm() -> None:
    """Compile the kernels, or load them from numba's cache: never inside a timed step."""
    one = np.ones((1, 1))
    rules = StepRules(one > 0, np.zeros(1), np.zeros(1), one[0], one * 0, one * 0, 1, 0, one > 0)  # type: ignore[arg-type]
    balance_step(np.ones((1, 1), np.int64), rules).sends(0)
