"""Where ranks go so that those which share a value of a node label, a block, are together. Pure: no Ray.

Room is counted in ranks: {node or block: how many more it holds}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


def room_of(free: Mapping[str, Mapping[str, float]], bundle: Mapping[str, float]) -> dict[str, int]:
    """How many ranks of a bundle each node has room for, given what is free there."""
    return {
        node: min(int(have.get(name, 0.0) / need + 1e-6) for name, need in bundle.items())
        for node, have in free.items()
    }


def fewest(room: Mapping[str, int], ranks: int) -> dict[str, int]:
    """How many ranks go where, on as few places as hold them all; {}: there is no room for all.

    The largest are filled first, and the rest goes to the smallest that holds it: larger ones stay whole.
    """
    left = dict(sorted(room.items(), key=lambda item: (-item[1], item[0])))
    found: dict[str, int] = {}
    while ranks > 0:
        holding = [place for place, holds in left.items() if holds >= ranks]
        place = holding[-1] if holding else next(iter(left), "")
        holds = left.pop(place, 0)
        if not holds:
            return {}
        found[place] = min(holds, ranks)
        ranks -= found[place]
    return found


def choose(room: Mapping[str, int], block_of: Mapping[str, str], ranks: int) -> list[str]:
    """A node for each rank, in as few blocks as hold them all and there on as few nodes; []: there is no room for all.

    Args:
        block_of: of each node that is in a block; others are not used.
    """
    where: list[str] = []
    for block, count in fewest(_by_block(room, block_of), ranks).items():
        inside = {node: holds for node, holds in room.items() if block_of.get(node) == block}
        for node, several in fewest(inside, count).items():
            where += [node] * several
    return where


def next_block(room: Mapping[str, int], block_of: Mapping[str, str], used: Mapping[str, int]) -> str:
    """The block for one more rank: with most ranks already, then with most room; "": no block has any.

    Args:
        used: how many ranks each block has.
    """
    there = {block: holds for block, holds in _by_block(room, block_of).items() if holds > 0}
    return min(there, key=lambda block: (-used.get(block, 0), -there[block], block), default="")


def _by_block(room: Mapping[str, int], block_of: Mapping[str, str]) -> Counter[str]:
    total: Counter[str] = Counter()
    for node, holds in room.items():
        if node in block_of:
            total[block_of[node]] += holds
    return total
