"""Where survivors go on from after a loss, given what each says of itself. Pure: no Ray, no clock.

Who raised an error says nothing: a call may end on one rank and fail on another. What each has done decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_ep.collective import Membership
from ray_ep.placement import Placement
from ray_ep.rank.results import RankState
from ray_ep.rank.snapshot.copies import Key
from ray_ep.rank.snapshot.keepers import keepers
from ray_ep.rank.snapshot.snapshots import Held


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot as the driver knows it: who took it, and who owned what then."""

    key: Key
    membership: Membership
    placement: Placement


@dataclass(frozen=True, slots=True)
class Survivor:
    """What a rank that is there says of itself."""

    state: RankState
    held: Held


@dataclass(frozen=True, slots=True)
class Decision:
    """How survivors come to one step.

    Args:
        done: steps behind them then.
        snapshot: that all go back to; None: nobody goes back.
        finish: step that those with all its reductions finish; None: half steps are forgotten.
        keepers: member that has the state of each lost one, which owned experts in the snapshot.
        checkpoint: directory of the checkpoint that all go back to; "": none.
        words: why.
    """

    done: int
    snapshot: Taken | None
    finish: int | None
    words: str
    keepers: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = ""


def decide(
    membership: Membership,
    placement: Placement,
    survivors: Mapping[str, Survivor],
    snapshots: Sequence[Taken],
    go_back: bool = False,
) -> Decision | str:
    """Where the survivors go on from; words: they can't, and why.

    Args:
        membership: of before the loss. placement: of its ranks.
        survivors: by member.
        snapshots: taken so far.
        go_back: some have gone back to a snapshot already: so must all, whoever is there now.
    """
    if not survivors:
        return "nobody is left of those that held the model"
    gone = [m for m in membership.members if m not in survivors]
    owners = {int(r) for r in placement.owner.flat}
    without = [m for m in gone if membership.rank_of(m) in owners]
    if not without and not go_back:
        done = max(s.state.updates for s in survivors.values())
        behind = [m for m, s in survivors.items() if s.state.updates < done]
        if all(survivors[m].state.ready == done - 1 for m in behind):
            words = f"step {done} counts, since one rank has made it" if behind else "no step is lost"
            return Decision(done, None, done - 1 if behind else None, words)
    for taken in sorted(snapshots, key=lambda t: (t.key.step, t.key.epoch), reverse=True):
        found = keepers_of(taken, survivors)
        if found is not None:
            step = taken.key.step
            return Decision(step, taken, None, f"all go back to the snapshot of step {step}", found)
    who = ", ".join(without) or "ranks that fell apart"
    if not snapshots:
        return f"what {who} owned is held by nobody else: there was no snapshot yet"
    return f"what {who} owned is held by nobody else: no snapshot is whole without its keeper"


def keepers_of(taken: Taken, survivors: Mapping[str, Survivor]) -> dict[str, str] | None:
    """Who has the state of each member of a snapshot that is not there any more; None: somebody's is nowhere."""
    members, keeper_of = taken.membership.members, keepers(taken.membership.node_of)
    owners = {int(r) for r in taken.placement.owner.flat}
    found: dict[str, str] = {}
    for rank, member in enumerate(members):
        if member in survivors:
            if taken.key not in survivors[member].held.own:
                return None
            continue
        keeper = members[keeper_of[rank]] if keeper_of[rank] >= 0 else ""
        if keeper in survivors and taken.key in survivors[keeper].held.wards.get(rank, ()):
            found[member] = keeper
        elif rank in owners:
            return None
    return found
