"""Values of ray_ep as messages of v1/control.proto, and back. L MoE layers, R ranks, S slots, E experts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.requests import Where
from ray_ep.errors import PlacementError
from ray_ep.placement import Placement
from ray_ep.placement.whatif.propose import Proposal

EVENTS = 50
"""The newest, in a status."""
WORDS = 2000
"""Characters of an event's sentence in a status: a failed rank's traceback is in events.jsonl."""

_FIGURES = (
    "loss", "grad_norm", "step_seconds", "tokens_per_second", "exchange_seconds", "expert_seconds", "balancedness",
)  # fmt: skip
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def proper_id(text: str) -> bool:
    """Whether a request may be called so."""
    return _REQUEST_ID.fullmatch(text) is not None


def text(value: object) -> str:
    """As a message can carry it: of a file's name that is not UTF-8, what is."""
    return str(value).encode("utf-8", "replace").decode()


def placement_message(placement: Placement) -> pb.Placement:
    """A placement, whole."""
    layers, ranks, slots = placement.slots.shape
    shares = [] if placement.shares is None else placement.shares.ravel().tolist()
    return pb.Placement(
        version=placement.version, layers=layers, ranks=ranks, slots_per_rank=slots, experts=placement.num_experts,
        slots=placement.slots.ravel().tolist(), primaries=placement.owner.ravel().tolist(), shares=shares,
    )  # fmt: skip


def placement_of(message: pb.Placement) -> Placement:
    """A placement as somebody sent it. Raises PlacementError."""
    shape = message.layers, message.ranks, message.slots_per_rank
    if not all(shape) or math.prod(shape) != len(message.slots):
        raise PlacementError(
            f"placement: {len(message.slots)} slots for {shape[0]} layers x {shape[1]} ranks x {shape[2]} slots"
        )
    if not 0 < message.experts <= len(message.slots):
        raise PlacementError(f"placement: experts={message.experts} in {len(message.slots)} slots")
    primary = shares = None
    if message.primaries:
        if len(message.primaries) != message.layers * message.experts:
            raise PlacementError(
                f"placement: {len(message.primaries)} primaries for {message.layers} layers x {message.experts} experts"
            )
        primary = np.array(message.primaries, np.int64).reshape(message.layers, message.experts)
    if message.shares:
        if len(message.shares) != len(message.slots):
            raise PlacementError(f"placement: {len(message.shares)} shares for {len(message.slots)} slots")
        shares = np.array(message.shares, np.float64).reshape(shape)
    slots = np.array(message.slots, np.int64).reshape(shape)
    return Placement(slots, message.experts, primary=primary, shares=shares)


def proposal_message(found: Proposal, epoch: int, version: int) -> pb.ProposePlacementResponse:
    """What a placement would bring to the membership and the placement of these numbers."""
    verdict = found.verdict
    return pb.ProposePlacementResponse(
        words=verdict.words, pays=verdict.placement is not None, step_seconds=found.step_seconds,
        predicted_step_seconds=verdict.step_seconds, move_seconds=verdict.cost,
        moved_slots=found.moved_slots, moved_primaries=found.moved_primaries, balancedness=found.balancedness,
        predicted_balancedness=found.predicted_balancedness, placement=placement_message(found.placement),
        epoch=epoch, placement_version=version,
    )  # fmt: skip


def status_message(
    tree: Mapping[str, Any], step: Mapping[str, Any], where: Where | None, evaluated: float | None
) -> pb.RunStatus:
    """What a run is at.

    Args:
        tree: of `RunState.snapshot`, its run, membership and events.
        step: the newest line of metrics; {}: there is none yet. evaluated: the newest loss on the held-out split.
        where: what the driver says itself.
    """
    run, members = tree["run"], tree["membership"]
    counts = {k: int(members.get(k) or 0) for k in ("epoch", "desired", "active", "waiting", "joining", "ready")}
    counts["desired"] = counts["desired"] or counts["active"]
    drained: Sequence[str] = ()
    done, version = int(run["done"] or 0), 0
    if where is not None:
        done, version, drained, counts["epoch"] = where.done, where.version, where.drained, where.epoch
    return pb.RunStatus(
        run=text(run["name"]), run_dir=text(run["path"]), state=_state(str(run["state"])), why=text(run["why"])[:WORDS],
        done=done, steps=int(run["steps"] or 0), placement_version=version, outcome=str(run["outcome"]),
        membership=pb.Membership(**counts, ranks=list(map(_rank, count(), members["ranks"])), drained=drained),
        step=_step(step, evaluated), events=[_event(e) for e in tree["events"]["newest"][-EVENTS:]],
    )  # fmt: skip


def _state(name: str) -> str:
    return f"RUN_STATE_{name.upper()}" if name in _STATES else "RUN_STATE_UNSPECIFIED"


_STATES = {name.removeprefix("RUN_STATE_").lower() for name in pb.RunState.keys()}  # noqa: SIM118  # no mapping


def _rank(number: int, said: Mapping[str, Any]) -> pb.Rank:
    texts = {k: text(said.get(k) or "") for k in ("member", "host", "address", "device")}
    return pb.Rank(rank=number, node=text(said.get("node_id") or ""), **texts)


def _step(said: Mapping[str, Any], evaluated: float | None) -> pb.Step:
    if not said:
        return pb.Step()
    figures: dict[str, Any] = {k: float(v) for k in _FIGURES if isinstance(v := said.get(k), int | float)}
    sizes = {k: int(v) for k in ("bytes_intra_node", "bytes_inter_node") if isinstance(v := said.get(k), int | float)}
    rate = said.get("lr")
    return pb.Step(
        step=int(said["step"]), learning_rate=float(rate) if isinstance(rate, int | float) else 0.0,
        eval_loss=evaluated, **figures, **sizes,
    )  # fmt: skip


def _event(said: Mapping[str, Any]) -> pb.Event:
    return pb.Event(
        time=text(said["time"] or ""), step=int(said["step"] or 0), kind=text(said["kind"]),
        message=text(said["message"])[:WORDS],
    )  # fmt: skip
