"""What live routing teaches: loads, co-activation, transitions, and a sample of token expert sets.

Pure NumPy. Counting happens on the ranks (ray_ep.moe.counters); this is the sum, and its file format.
Dimensions: L MoE layers, E experts, K top_k, N sampled tokens.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError
from ray_ep.placement.placement import Placement


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """Routing counts of one model.

    Args:
        load: [L, E] tokens that each expert received.
        coactivation: [L, E, E] tokens for which both fired in one layer (the diagonal is the load).
        transitions: [L-1, E, E] tokens for which the first fired here and the second in the next MoE layer.
        sample: [L, N, K] expert sets of a reservoir of recent tokens.

    Raises:
        PlacementError: shapes that do not agree, NaN or negative counts.
    """

    load: npt.NDArray[np.int64]
    coactivation: npt.NDArray[np.int64] | None = None
    transitions: npt.NDArray[np.int64] | None = None
    sample: npt.NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        load = np.asarray(self.load)
        object.__setattr__(self, "load", load)
        if load.ndim != 2 or not np.isfinite(load).all() or (load < 0).any():
            raise PlacementError(f"statistics: load has shape {load.shape}: expected finite counts [layers, experts]")
        layers, experts = load.shape
        expected = {
            "coactivation": (layers, experts, experts),
            "transitions": (max(layers - 1, 0), experts, experts),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and np.shape(value) != shape:
                raise PlacementError(f"statistics: {name} has shape {np.shape(value)}: expected {shape}")
        if self.sample is not None and (np.ndim(self.sample) != 3 or len(self.sample) != layers):
            raise PlacementError(
                f"statistics: sample has shape {np.shape(self.sample)}: expected [{layers}, tokens, top_k]"
            )

    @property
    def tells_visits(self) -> bool:
        """Whether it is known which experts a token chose together: without, traffic can only be guessed."""
        sampled = self.sample is not None and self.sample.shape[1] > 0
        return sampled or self.coactivation is not None

    def balancedness(self, placement: Placement) -> float:
        """Mean over layers of mean rank load / max rank load (1 is perfect)."""
        ranks = placement.rank_load(self.load.astype(np.float64))
        top = ranks.max(1)
        return float(np.where(top > 0, ranks.mean(1) / np.maximum(top, 1e-30), 1.0).mean())

    @staticmethod
    def merge(parts: list[RoutingStatistics], capacity: int, seed: int = 0) -> RoutingStatistics:
        """Sum of several ranks' or runs' statistics; of their samples at most `capacity` tokens, by tokens counted."""

        def total(name: str) -> npt.NDArray[np.int64] | None:
            arrays = [getattr(p, name) for p in parts]
            return None if any(a is None for a in arrays) else np.sum(arrays, axis=0)

        rng = np.random.default_rng(seed)
        seen = np.array([p.load[0].sum() if len(p.load) else 0 for p in parts], np.float64)
        kept = []
        for part, share in zip(parts, seen / max(seen.sum(), 1), strict=True):
            have = 0 if part.sample is None else part.sample.shape[1]
            take = min(have, round(share * capacity))
            if part.sample is not None and take:
                kept.append(part.sample[:, np.sort(rng.permutation(have)[:take])])
        empty = np.zeros((len(parts[0].load), 0, 1), np.int32)
        sample = np.concatenate(kept, 1) if kept else empty
        load = np.sum([p.load for p in parts], axis=0)
        return RoutingStatistics(load, total("coactivation"), total("transitions"), sample)

    def save(self, path: str | Path) -> None:
        """Write an .npz with one array a field."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        with open(path, "wb") as f:
            np.savez_compressed(f, **{k: v for k, v in arrays.items() if v is not None})

    @staticmethod
    def load_file(path: str | Path) -> RoutingStatistics:
        """Read `save`; raises PlacementError."""
        try:
            with np.load(path) as z:
                return RoutingStatistics(**{f.name: z[f.name] for f in fields(RoutingStatistics) if f.name in z})
        except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as e:
            raise PlacementError(f"statistics file {path}: {getattr(e, 'strerror', None) or e}") from None
