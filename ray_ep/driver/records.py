"""What a run says of itself: one record a step, one event for whatever else an operator should see.

Values only, of NumPy. Figures stay numbers until a listener writes or draws them. L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from math import isfinite
from typing import Any

import numpy as np

from ray_ep.rank.recorded import StepProvenance

STANDING = ("state", "members", "placement")
"""Kinds of events that say where a run stands (run/standing.py): what is true from then on, not what passes by."""

_APART = ("load", "rank_load", "sent", "sample", "provenance", "at")  # of a step's record: not in its line


def now() -> datetime:
    """The time, UTC."""
    return datetime.now(timezone.utc)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened that an operator should see.

    Args:
        kind: what it is about, such as rebalance or checkpoint.
        words: the sentence.
        fields: the figures behind it; JSON can hold them.
        step: steps that were done when it was published. at: when that was, UTC. The publisher stamps both.
    """

    kind: str
    words: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    at: datetime = field(default_factory=now)

    def line(self) -> dict[str, Any]:
        """As a line of events.jsonl."""
        time, figures = self.at.isoformat(timespec="seconds"), _jsonable(self.fields)
        return {"time": time, "step": self.step, "kind": self.kind, "message": self.words, "fields": figures}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. Seconds of exchange and experts are means over ranks; waiting for peers is exchange.

    Imbalance is the slowest rank's load over the mean, by layer and pass. What balance saved is predicted net of
    guests' weights, and measured as the tokens that the slowest rank was spared at the step's own time a token.

    Args:
        step: counted from 1. tokens: of the global batch.
        phase_seconds: where the step went: means over ranks, and `driver`, what it took beyond them.
        peak_mib: memory that the fullest rank has had at most.
        bytes_intra_node, bytes_inter_node: sent by all ranks.
        load: [L, E] tokens that each expert received; too long for a line of metrics.jsonl.
        rank_load: [L, R] (token, expert) pairs that each rank computed; too long for it, too.
        sent: [R, R] bytes from rank to rank; likewise. sample: [L, N, K] expert sets of recent tokens, now and then.
        max_expert_load: [L] of the hottest expert of each layer, in multiples of the layer's mean.
        migration_seconds, rebalance_seconds: that the job stood still for a move, and for all that rebalancing asks
            between two steps, the move included; None: it was skipped.
        eval_loss: on the held-out split; None: not evaluated after this step. eval_seconds: that it took.
        provenance: of the sampled tokens; None: none were; too long for a line, too.
        at: when the step had ended, UTC; not in a line.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    step_seconds: float
    tokens_per_second: float
    exchange_seconds: float
    expert_seconds: float
    phase_seconds: Mapping[str, float]
    peak_mib: int
    statistics_seconds: float
    bytes_intra_node: int
    bytes_inter_node: int
    balancedness: float
    world_size: int
    epoch: int
    placement_version: int
    aux_loss: float
    z_loss: float
    imbalance_before: float
    imbalance_after: float
    guests: int
    guest_bytes: int
    balance_saved_predicted: float
    balance_saved_measured: float
    max_expert_load: list[float]
    load: np.ndarray[Any, Any] = field(compare=False, repr=False)
    rank_load: np.ndarray[Any, Any] = field(compare=False, repr=False)
    sent: np.ndarray[Any, Any] = field(compare=False, repr=False)
    migration_seconds: float | None = None
    rebalance_seconds: float | None = None
    eval_loss: float | None = None
    eval_seconds: float | None = None
    provenance: StepProvenance | None = field(default=None, compare=False, repr=False)
    sample: np.ndarray[Any, Any] | None = field(default=None, compare=False, repr=False)
    at: datetime = field(default_factory=now, compare=False)

    def line(self) -> dict[str, Any]:
        """As a line of metrics.jsonl, without the figures that this step lacks."""
        names = (f.name for f in fields(self) if f.name not in _APART)
        return {name: _jsonable(value) for name in names if (value := getattr(self, name)) is not None}


def _jsonable(value: Any) -> Any:
    """What JSON can hold: it has no NaN and no infinity, which become null."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
