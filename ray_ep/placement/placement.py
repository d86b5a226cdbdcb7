"""A placement: which expert sits in which slot of which rank, and how tokens choose among replicas.

Pure NumPy. Planning lives in baselines.py (and later planners), moving the weights in ray_ep.moe.
Dimensions: L MoE layers, E experts, R ranks, S slots, K top_k.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CHOICES = 32
"""Resolution with which tokens are split among equally near replicas (columns of `Placement.routes`)."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Slot -> expert for every layer; immutable.

    Args:
        slots: [L, R, S] expert id of each slot, -1 where empty (ranks with fewer slots are padded with -1).
        num_experts: E, experts of a layer.
        version: counts placements of one run.
        primary: [L, E] rank that owns each expert (master weights and optimizer state); None: the rank with the
            expert in its earliest slot, the lowest such rank.
        shares: [L, R, S] how much of an expert's far traffic each replica takes (normalised per expert); None: even.

    Raises:
        PlacementError: an expert without a slot, an id out of range, a primary that does not hold its expert.
    """

    slots: Ints
    num_experts: int
    version: int = 0
    primary: Ints | None = None
    shares: Floats | None = None

    def __post_init__(self) -> None:
        slots = np.asarray(self.slots, np.int64)
        object.__setattr__(self, "slots", slots)
        if slots.ndim != 3:
            raise PlacementError(f"placement slots have shape {slots.shape}: expected [layers, ranks, slots]")
        if slots.size and (slots.min() < -1 or slots.max() >= self.num_experts):
            raise PlacementError(
                f"placement names expert {slots.max()}: allowed are -1 (empty) to {self.num_experts - 1}"
            )
        flat = slots.reshape(len(slots), -1)
        filled = (flat >= 0).sum(1)
        for layer, row in enumerate(flat):
            missing = np.setdiff1d(np.arange(self.num_experts), row)
            if len(missing):
                raise PlacementError(
                    f"placement of layer {layer}: {len(missing)} of {self.num_experts} experts have no slot, first is "
                    f"expert {missing[0]} ({filled[layer]} slots are filled)"
                )
        primary = self._earliest() if self.primary is None else np.asarray(self.primary, np.int64)
        if primary.shape != (len(slots), self.num_experts):
            raise PlacementError(f"placement primary has shape {primary.shape}: expected [layers, experts]")
        if ((primary < 0) | (primary >= slots.shape[1])).any() or not self._holds(primary).all():
            raise PlacementError("placement: a primary rank does not hold its expert")
        object.__setattr__(self, "primary", primary)
        if self.shares is not None:
            shares = np.asarray(self.shares, np.float64)
            if shares.shape != slots.shape or not np.isfinite(shares).all() or (shares < 0).any():
                raise PlacementError("placement shares: expected finite, non-negative [layers, ranks, slots]")
            object.__setattr__(self, "shares", shares)
        for array in (self.slots, self.primary, self.shares):
            if array is not None:
                array.setflags(write=False)

    @property
    def num_layers(self) -> int:
        """L, MoE layers."""
        return int(self.slots.shape[0])

    @property
    def num_ranks(self) -> int:
        """R, ranks."""
        return int(self.slots.shape[1])

    @cached_property
    def owner(self) -> Ints:
        """[L, E] rank of each expert's primary."""
        assert self.primary is not None
        return self.primary

    def experts_of(self, layer: int, rank: int) -> list[int]:
        """Experts that a rank holds in a layer, each once: the ones it owns first, each group in ascending order."""
        held = {int(e) for e in self.slots[layer, rank] if e >= 0}
        return sorted(held, key=lambda e: (self.owner[layer, e] != rank, e))

    def ranks_of(self, layer: int, expert: int) -> list[int]:
        """Ranks that hold an expert, ascending."""
        return [int(r) for r in np.nonzero((self.slots[layer] == expert).any(1))[0]]

    def lost(self, origin: Sequence[int], keepers: Mapping[int, int] | None = None) -> Ints:
        """[n, 2] (layer, expert) that nobody holds any more; arguments as of `among`."""
        stay = [r for r in origin if r >= 0]
        missing = [
            (layer, e)
            for layer in range(self.num_layers)
            for e in np.setdiff1d(np.arange(self.num_experts), self.slots[layer, stay]).tolist()
            if self.owner[layer, e] not in (keepers or {})
        ]
        return np.array(missing, np.int64).reshape(-1, 2)

    def primaries(self) -> Placement:
        """Owners alone, each with its experts in ascending order; replicas are dropped."""
        per_rank = [[self._owned(layer, r) for r in range(self.num_ranks)] for layer in range(self.num_layers)]
        return replace(self, slots=_padded(per_rank, 0), shares=None)

    def among(self, origin: Sequence[int], keepers: Mapping[int, int] | None = None) -> Placement:
        """What is left under another membership; no weight is moved for it, but from keepers.

        Who stays keeps its slots under its new rank, who comes has empty ones, who goes takes its slots along. A
        primary that went is succeeded by its keeper, or else by the replica in the earliest slot of the lowest rank,
        which has compute weights only: its masters and moments are gone.

        Args:
            origin: [R'] rank here of each new rank, -1 for one that comes (`Membership.origin`).
            keepers: new rank that has the state of a rank that went, by that rank here: it owns what that one owned.

        Raises:
            PlacementError: experts that nobody holds any more (`lost` tells all), a rank that stays twice or is none.
        """
        keepers = keepers or {}
        self._check_origin(origin, keepers)
        if len(lost := self.lost(origin, keepers)):
            raise PlacementError(
                f"{len(lost)} experts are held by nobody any more, first is expert {lost[0, 1]} of layer {lost[0, 0]}"
            )
        where = np.asarray(origin, np.int64)
        slots = np.where(where[None, :, None] >= 0, self.slots[:, where], -1)
        shares = None if self.shares is None else np.where(where[None, :, None] >= 0, self.shares[:, where], 0.0)
        new_rank = np.full(self.num_ranks, -1)
        new_rank[where[where >= 0]] = np.flatnonzero(where >= 0)
        for gone, keeper in keepers.items():
            new_rank[gone] = keeper
        primary = new_rank[self.owner]
        taken = [(k, [self._owned(layer, g) for layer in range(self.num_layers)]) for g, k in keepers.items()]
        slots, shares = _with_experts(slots, shares, taken)
        left = Placement(slots, self.num_experts, self.version, None, shares)
        return replace(left, primary=np.where(primary >= 0, primary, left.owner))

    def routes(self, layer: int, source: int, node_of: Ints | None = None) -> Ints:
        """[E, CHOICES] the rank that serves each expert for tokens of one source rank.

        Token number t takes column t % CHOICES. The nearest replica serves: the source rank itself, else ranks of its
        node, else any, split by `shares`. Pure, so that every rank can compute every other's.
        """
        node_of = np.zeros(self.num_ranks, np.int64) if node_of is None else node_of
        table = np.empty((self.num_experts, CHOICES), np.int64)
        weight = self._weights(layer)
        for e in range(self.num_experts):
            ranks = np.asarray(self.ranks_of(layer, e))
            if source in ranks:
                table[e] = source
                continue
            near = ranks[node_of[ranks] == node_of[source]]
            ranks = near if len(near) else ranks
            table[e] = _spread(ranks, weight[e, ranks], start=source + e)
        return table

    def rank_load(self, load: Floats, node_of: Ints | None = None) -> Floats:
        """[L, R] tokens that each rank computes under `load` [L, E], tokens spread evenly over source ranks."""
        out = np.zeros((self.num_layers, self.num_ranks))
        for layer in range(self.num_layers):
            for source in range(self.num_ranks):
                table = self.routes(layer, source, node_of)
                part = np.repeat(load[layer] / (self.num_ranks * CHOICES), CHOICES)
                np.add.at(out[layer], table.ravel(), part)
        return out

    def to_json(self) -> str:
        """One JSON document; `from_json` reads it back."""
        tree: dict[str, Any] = {"version": self.version, "num_experts": self.num_experts, "slots": self.slots.tolist()}
        tree["primary"] = self.owner.tolist()
        if self.shares is not None:
            tree["shares"] = self.shares.tolist()
        return json.dumps(tree)

    @staticmethod
    def from_json(text: str, where: str = "placement") -> Placement:
        """Parse `to_json`; raises PlacementError naming `where`."""
        try:
            tree = json.loads(text)
            slots = np.asarray(tree["slots"], np.int64)
            return Placement(
                slots,
                int(tree.get("num_experts", slots.max(initial=-1) + 1)),
                int(tree.get("version", 0)),
                tree.get("primary"),
                tree.get("shares"),
            )
        except PlacementError as e:
            raise PlacementError(f"{where}: {e}") from None
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError, IndexError, RecursionError):
            raise PlacementError(
                f"{where}: not a placement: expected JSON with slots, expert ids as [layers, ranks, slots] with -1 for "
                "an empty one, and num_experts"
            ) from None

    @staticmethod
    def load(path: str | Path) -> Placement:
        """Read a placement file; raises PlacementError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise PlacementError(f"placement file {path}: {getattr(e, 'strerror', None) or e}") from None
        return Placement.from_json(text, str(path))

    def _owned(self, layer: int, rank: int) -> list[int]:
        return [int(e) for e in np.flatnonzero(self.owner[layer] == rank)]

    def _check_origin(self, origin: Sequence[int], keepers: Mapping[int, int]) -> None:
        stay = [r for r in origin if r >= 0]
        if len(set(stay)) < len(stay) or any(not -1 <= r < self.num_ranks for r in origin) or not len(origin):
            raise PlacementError(
                f"origin {list(origin)}: expected, for each new rank, its rank of before (0 to {self.num_ranks - 1}, "
                "each at most once) or -1"
            )
        for gone, keeper in keepers.items():
            if gone in stay or not 0 <= gone < self.num_ranks or not 0 <= keeper < len(origin):
                raise PlacementError(f"keeper {keeper} for rank {gone}: expected a new rank, for one that went")

    def _earliest(self) -> Ints:
        """[L, E] the rank with the expert in its lowest slot number, the lowest such rank."""
        by_slot = self.slots.transpose(0, 2, 1).reshape(self.num_layers, -1)  # slot-major, then rank
        out = np.empty((self.num_layers, self.num_experts), np.int64)
        for layer, row in enumerate(by_slot):
            experts, first = np.unique(row, return_index=True)
            keep = experts >= 0
            out[layer, experts[keep]] = first[keep] % self.num_ranks
        return out

    def _holds(self, primary: Ints) -> npt.NDArray[np.bool_]:
        """[L, E] whether the named rank has a slot with the expert."""
        layers = np.arange(self.num_layers)[:, None]
        rows = self.slots[layers, primary]  # [L, E, S]
        return np.asarray((rows == np.arange(self.num_experts)[None, :, None]).any(-1))

    def _weights(self, layer: int) -> Floats:
        """[E, R] share of each replica, zero where a rank lacks the expert."""
        out = np.zeros((self.num_experts, self.num_ranks))
        for rank in range(self.num_ranks):
            for slot, e in enumerate(self.slots[layer, rank]):
                if e >= 0:
                    out[e, rank] += 1.0 if self.shares is None else self.shares[layer, rank, slot]
        return out


def files_by_version(folder: Path) -> list[Path]:
    """Files of the placements in a run's folder `placements`, by version: 10000.json comes after 9999.json."""
    return sorted(folder.glob("*.json"), key=lambda path: (len(path.stem), path.stem))


def _padded(per_rank: list[list[list[int]]], at_least: int) -> Ints:
    """[L, R, S] from lists of experts [L][R], -1 behind them."""
    size = max((len(row) for layer in per_rank for row in layer), default=0)
    rows = [[row + [-1] * (max(size, at_least) - len(row)) for row in layer] for layer in per_rank]
    return np.array(rows, np.int64).reshape(len(per_rank), -1, max(size, at_least))


def _with_experts(
    slots: Ints, shares: Floats | None, taken: list[tuple[int, list[list[int]]]]
) -> tuple[Ints, Floats | None]:
    """Slots [L, R, S] and shares with experts (rank, [L] lists) in empty slots, and in as many more as that needs.

    A rank that has one of them keeps it where it is.
    """
    per_rank = slots.tolist()
    for rank, layers in taken:
        for row, experts in zip([layer[rank] for layer in per_rank], layers, strict=True):
            for e in experts:
                if e not in row:
                    at = row.index(-1) if -1 in row else len(row)
                    row[at : at + 1] = [e]
    out = _padded(per_rank, slots.shape[2])
    if shares is None:
        return out, None
    wide = np.zeros(out.shape)
    wide[:, :, : shares.shape[2]] = shares
    kept = np.zeros(out.shape, bool)
    kept[:, :, : slots.shape[2]] = slots >= 0
    return out, np.where(kept | (out < 0), wide, 1.0)


def _spread(ranks: Ints, weights: Floats, start: int) -> Ints:
    """[CHOICES] ranks in proportion to weights (largest remainder), interleaved, rotated by `start`."""
    if len(ranks) == 1:
        return np.full(CHOICES, ranks[0])
    weights = weights if weights.sum() > 0 else np.ones(len(ranks))
    exact = weights / weights.sum() * CHOICES
    count = np.floor(exact).astype(np.int64)
    short = CHOICES - count.sum()
    count[np.argsort(-(exact - count), kind="stable")[:short]] += 1
    # Each rank's k-th turn is due at (k + 1/2) / count: sorting the due times interleaves them evenly.
    due = np.concatenate([(np.arange(c) + 0.5) / c for c in count])
    owner = np.repeat(ranks, count)
    return np.roll(owner[np.argsort(due, kind="stable")], start)
