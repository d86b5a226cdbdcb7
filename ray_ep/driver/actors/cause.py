"""Why ranks failed: of several failures the one that explains the others, in words that help. Calls nobody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from enum import Enum
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from ray_ep.collective.probe import ProbeError
from ray_ep.errors import BadInput, DivergedError, GroupError, RankError, SaveError

LOWER = (
    "lower batch.sequences or batch.length (or raise batch.accumulation), balance.guest_mb, placement.slots_per_rank "
    "or the ranks of that node, or give the node more memory"
)
"""What a user may change where a rank ran out of memory."""


def lost_peer(e: Exception) -> bool:
    """Whether a rank failed only since another did."""
    return isinstance(e, GroupError)


class Kind(Enum):
    """What a rank's failure means for the others."""

    OWN = 1  # nothing: the call was not collective, they end by themselves
    BY_ALL = 2  # as a rule every rank finds it by itself
    ALONE = 3  # they may wait for this rank in vain


def kind_of(e: Exception) -> Kind:
    """Whether the other ranks have to be released after this failure of one."""
    if isinstance(e, SaveError):
        return Kind.OWN
    return Kind.BY_ALL if isinstance(e, (BadInput, DivergedError, ProbeError)) else Kind.ALONE


def unreachable(partners: dict[int, int | None], silent: list[int]) -> int | None:
    """Which rank the others could not reach while probing; None: nothing tells.

    Args:
        partners: of each rank whose probing failed, the rank at the other end of the link then; None: it met all.
        silent: ranks that have said nothing yet. Some only wait for others, so a partner is suspected first.
    """
    named = Counter(p for p in partners.values() if p is not None)
    if named:  # the silent one first, then the one that most could not reach
        return min(named, key=lambda r: (r not in silent, -named[r], r))
    return silent[0] if len(silent) == 1 else None


def root_cause(failed: dict[int, Exception], silent: list[int], where: list[dict[str, Any]]) -> Exception:
    """Of several ranks' failures the one that explains the others, as an error of ours.

    Args:
        failed: in the order in which they failed.
        silent: ranks that have not come back from the call; they may answer otherwise.
        where: host, node and process of each rank; empty before they are known.
    """
    rank, e = min(failed.items(), key=lambda item: lost_peer(item[1]))  # of equals the first to fail
    if isinstance(e, ProbeError):  # all are: a rank that died or raised would have come first
        lost = unreachable({r: x.partner for r, x in failed.items() if isinstance(x, ProbeError)}, silent)
        rank = rank if lost is None else lost
        return RankError(rank, f"rank {rank} was unreachable while probing the links:\n{e}")
    if isinstance(e, (BadInput, DivergedError, SaveError)) and isinstance(e, RayTaskError):
        ours: Exception = type(e.cause)(str(e.cause))
        return ours
    if lost_peer(e) and silent:
        busy = RankError(silent[0], f"{_who(silent, where)} did not come back, while rank {rank} raised:\n{e}")
        busy.__cause__ = e
        return busy
    place = f" on {where[rank]['host']}" if where else ""
    if isinstance(e, OutOfMemoryError):  # Ray's monitor, which ends a process before the node has none left
        told = str(e).strip().partition("\n")[0]  # its table of the node's processes follows
        return RankError(rank, f"rank {rank}{place} was killed for memory (Ray's memory monitor): {LOWER}; {told}")
    if isinstance(e, RayActorError):
        if "node has died" in str(e) and where:  # Ray missed the node before the rank was silent for long enough
            node = f"{where[rank]['host']} ({where[rank]['address']})"
            place += f" died: no answer from node {node}, so Ray gave it up; it"
        died = RankError(rank, f"rank {rank}{place} died: {_reason(e)}")
        died.__cause__ = e
        return died
    return RankError(rank, f"rank {rank} raised:\n{e}")


def lost_ranks(failed: dict[int, Exception], quiet: Collection[int]) -> tuple[int, ...] | None:
    """Ranks that are gone, so that others may go on without them; None: one raised an error of its own.

    Args:
        quiet: those that did not come back from the call, though they were released.
    """
    gone = {r for r, e in failed.items() if isinstance(e, (RayActorError, OutOfMemoryError))}
    if any(r not in gone and not lost_peer(e) for r, e in failed.items()):
        return None
    return tuple(sorted(gone | set(quiet)))


def silent_cause(lost: dict[int, str], cut_off: Collection[int], where: list[dict[str, Any]]) -> RankError:
    """The error of ranks that went silent, as one of the first of them.

    Args:
        lost: {rank: how it was silent}.
        cut_off: those whose node does not answer.
    """
    ranks = sorted(lost)
    if all(rank in cut_off for rank in ranks):
        nodes = " and ".join(dict.fromkeys(f"{where[r]['host']} ({where[r]['address']})" for r in ranks))
        why = f"no answer from node {nodes}, which is down or cut off"
    else:
        ranks = [rank for rank in ranks if rank not in cut_off]
        why = "its node answers, so its process is stopped or hangs"
        if len(ranks) > 1:
            why = "their nodes answer, so their processes are stopped or hang"
    how = lost[ranks[0]] if len(ranks) == 1 else lost[ranks[0]].replace("has not", "have not", 1)
    return RankError(ranks[0], f"{_who(ranks, where)} {how}: {why}")


def _who(ranks: list[int], where: list[dict[str, Any]]) -> str:
    """Ranks with their host and process, as far as they are known."""

    def one(rank: int) -> str:
        if not where:
            return f"rank {rank}"
        process = f" (process {where[rank]['pid']})" if "pid" in where[rank] else ""
        return f"rank {rank} on {where[rank]['host']}{process}"

    return " and ".join(map(one, ranks))


def _reason(e: Exception) -> str:
    """Ray's sentences about a dead actor, without the list of its ids; a traceback of its start stays whole."""
    if "Traceback" in str(e) or "creation task" in str(e):
        return str(e)
    lines = str(e).splitlines()
    return " ".join(line.strip() for line in lines if line.strip() and not line.startswith(("\t", " ")))


def for_memory(error: RankError, host: str, killed: int) -> RankError:
    """The error of a rank that died while the kernel killed `killed` processes of its node for memory."""
    words = str(error).partition(" died: ")[2]
    return RankError(
        error.rank,
        f"rank {error.rank} on {host} died, most likely killed for memory: meanwhile the kernel's OOM killer ended "
        f"{killed} process(es) there: {LOWER}: {words}",
    )
