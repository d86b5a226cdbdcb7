"""A run's status and placement as lines for the terminal."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING

from ray_ep.cli.table import table
from ray_ep.cli.units import in_seconds

if TYPE_CHECKING:
    from ray_ep.control.v1 import control_pb2 as pb

SHOWN = 5
"""Of the newest events."""


def state_of(status: pb.RunStatus) -> str:
    """What a run is at, in one word, and why."""
    from ray_ep.control.v1 import control_pb2 as pb

    name = pb.RunState.Name(status.state).removeprefix("RUN_STATE_").lower()
    said = status.outcome or ("running" if name == "unspecified" else name)
    return f"{said} ({status.why})" if status.why not in ("", said) and said != "stepping" else said


def figures(step: pb.Step) -> str:
    """The newest step in one line; "": there is none."""
    if not step.step:
        return ""
    parts = [f"loss {step.loss:.4f}"]
    if step.HasField("eval_loss"):
        parts.append(f"held-out {step.eval_loss:.4f}")
    parts += [
        f"{in_seconds(step.step_seconds)} a step",
        f"{step.tokens_per_second:,.0f} tokens/s",
        f"balancedness {step.balancedness:.2f}",
    ]
    return ", ".join(parts)


def counts(members: pb.Membership) -> str:
    """Ranks that are there, wanted, and on their way."""
    said = f"{members.active} of {members.desired} ranks in epoch {members.epoch}"
    coming = [f"{n} {name}" for name in ("waiting", "joining", "ready") if (n := getattr(members, name))]
    return ", ".join([said, *coming, *([f"leaves node {', '.join(members.drained)}"] if members.drained else [])])


def newest_of(status: pb.RunStatus, most: int) -> list[str]:
    """The newest events, a line each, without those that the state and the ranks above them tell."""
    return [event_of(e) for e in status.events if e.kind not in ("state", "members")][-most:]


def event_of(event: pb.Event) -> str:
    """An event in one line, with the time of here; what would steer a terminal is left out."""
    at = ""
    with suppress(ValueError):
        at = datetime.fromisoformat(event.time).astimezone().strftime("%H:%M:%S ")
    first = event.message.partition("\n")[0]
    return "".join(c for c in f"{at}{event.kind}: {first}" if c.isprintable())


def lines(status: pb.RunStatus) -> list[str]:
    """All that `ray-ep status` says."""
    done = f"{status.done} of {status.steps} steps" if status.steps else f"{status.done} steps"
    out = [
        f"{status.run}: {state_of(status)}, {done}, placement {status.placement_version}",
        *filter(None, [figures(status.step)]),
        counts(status.membership),
    ]
    if status.membership.ranks:
        rows = [(str(r.rank), r.member, r.host or "?", r.node[:12], r.device or "?") for r in status.membership.ranks]
        out += ["", table(("rank", "member", "host", "node", "device"), rows)]
    newest = newest_of(status, SHOWN)
    return [*out, *([""] if newest else []), *newest]


def placed(placement: pb.Placement) -> list[str]:
    """Experts by layer and rank; an owner's are marked."""
    from ray_ep.control.messages import placement_of

    found = placement_of(placement)
    rows = []
    for layer in range(found.num_layers):
        cells = [
            " ".join(f"{e}{'*' if found.owner[layer, e] == rank else ''}" for e in found.experts_of(layer, rank))
            for rank in range(found.num_ranks)
        ]
        rows.append((str(layer), *cells))
    head = ("layer", *(f"rank {rank}" for rank in range(found.num_ranks)))
    return [f"version {placement.version}; * owns the expert, others hold a replica", table(head, rows)]


def proposal(found: pb.ProposePlacementResponse) -> list[str]:
    """What a placement would bring."""
    return [
        found.words,
        f"step {in_seconds(found.step_seconds)} now, {in_seconds(found.predicted_step_seconds)} predicted; the move "
        f"takes {in_seconds(found.move_seconds)}",
        f"{found.moved_slots} slots get another expert, {found.moved_primaries} experts another owner; balancedness "
        f"{found.balancedness:.3f} -> {found.predicted_balancedness:.3f}",
        f"predicted for epoch {found.epoch} and placement {found.placement_version}",
    ]
