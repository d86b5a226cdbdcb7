"""Where ranks are, asked of all at once: each of itself, and one that does not answer of others on its node.

What is made of it is keeping.py's. Every call to Ray here is one of a few milliseconds, and none is waited for longer
than LIMIT_S.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import wait
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ep.driver.actors.head import beside
from ray_ep.rank import stacks

LIMIT_S = 0.9
"""Most seconds that are waited for answers; a rank that answers does so within some ten milliseconds."""

_NO_ANSWER = "It does not answer."
_NOBODY = "Neither the driver nor a rank that answers is on its node: it cannot be seen from outside."


def everybody(actors: Sequence[Any], where: Sequence[dict[str, Any]], silent: Collection[int]) -> list[str]:
    """[R] what each rank is at, in words, within LIMIT_S.

    Args:
        where: [R] node and process of each, as far as they are known.
        silent: ranks that do not answer, for which nobody waits: they are seen from outside.
    """
    if not actors:
        return []
    limit = time.monotonic() + LIMIT_S
    asked = {rank: actor.stacks.remote() for rank, actor in enumerate(actors)}
    outside = _from_outside(actors, where, silent)
    awaited = [call for rank, call in asked.items() if rank not in silent]
    if awaited:
        ray.wait(awaited, num_returns=len(awaited), timeout=max(limit - time.monotonic(), 0))
    told = _answers(asked)
    for rank in silent:
        told[rank] = f"{told.get(rank, _NO_ANSWER)}\n\nFrom outside:\n{_outside(outside, rank, limit)}"
    return [told.get(rank, f"{_NO_ANSWER} It was asked {LIMIT_S:g} s ago.") for rank in range(len(actors))]


def _from_outside(actors: Sequence[Any], where: Sequence[dict[str, Any]], silent: Collection[int]) -> dict[int, Any]:
    """Have each silent rank looked at by the driver, if it is on that node, or by a rank there; what will answer."""
    looks: dict[int, Any] = {}
    here = ray.get_runtime_context().get_node_id() if silent else ""
    for rank in silent:
        node, pid = where[rank]["node"], where[rank].get("pid")
        beside_it = [r for r, w in enumerate(where) if w["node"] == node and r not in silent]
        if pid is None:
            continue
        if node == here:
            looks[rank] = beside(partial(stacks.seen, [pid]))
        elif beside_it:
            looks[rank] = actors[beside_it[0]].seen.remote([pid])
    return looks


def _outside(looks: dict[int, Any], rank: int, limit: float) -> str:
    """What is seen of a rank from outside."""
    look, left = looks.get(rank), max(limit - time.monotonic(), 0.01)
    if look is None:
        return _NOBODY
    if isinstance(look, ray.ObjectRef):
        ready, _ = ray.wait([look], timeout=left)
        return _answers({rank: look}).get(rank, _NO_ANSWER) if ready else "Whoever looks at it is not done."
    wait([look], left)
    return str(look.result()[0]) if look.done() else "The driver, which looks at it, is not done."


def _answers(calls: dict[int, Any]) -> dict[int, str]:
    """Of those that have ended by now."""
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=0)
    done, told = set(ready), {}
    for rank, call in calls.items():
        if call in done:
            try:
                said = ray.get(call)
                told[rank] = said[0] if isinstance(said, list) else said
            except RayError as e:
                told[rank] = f"It says nothing: {str(e).splitlines()[0]}"
    return told
