"""Which nodes are about to leave, and why one that was lost is gone: as planned, or by a failure. Acts on neither.

Ray forgets that a dead node was draining; `Leaving` does not. Ray's head may be away: it is asked beside the steps, and
never waited for long. Uses one private function of Ray, its list of draining nodes: pyproject pins the version range.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray._private.state import state

STEP_S = 0.02
"""How long a step waits for an answer that takes 0.4 ms: it goes on with what was known."""
LOSS_S = 1.0
"""How long a loss may wait to be explained."""

_EXPECTED, _PREEMPTED, _IDLE = 1, 3, 4
"""Reasons of a node's death (Ray's NodeDeathInfo) that are no failures: SIGTERM or the autoscaler; a drain; idle."""


class Leaving:
    """What is known of nodes that leave.

    Args:
        drains: {node: deadline} as Ray has it. nodes: Ray's table of nodes, dead ones included.
    """

    def __init__(
        self,
        drains: Callable[[], dict[str, int]] = state.get_draining_nodes,
        nodes: Callable[[], list[dict[str, Any]]] = ray.nodes,
    ):
        self._drains, self._nodes = drains, nodes
        self._asked: Future[Any] | None = None
        self._now: dict[str, int] = {}
        self._ever: set[str] = set()  # nodes that were seen to drain

    def draining(self) -> dict[str, int]:
        """{node: deadline in ms since 1970, 0 for none} of nodes that drain; cheap enough for every step.

        What was known stays while Ray's head does not answer.
        """
        if self._asked is None:
            self._asked = _beside(self._drains)
            wait([self._asked], STEP_S)
        if self._asked.done():
            answer, self._asked = self._asked, None
            if answer.exception() is None:
                self._now = answer.result()
                self._ever |= self._now.keys()
        return dict(self._now)

    def planned(self, node: str) -> str:
        """Why the loss of the ranks on a node was planned, in words; "": it was not, or Ray's head does not say."""
        self.draining()
        answer = _beside(self._nodes)
        wait([answer], LOSS_S)
        told = answer.result() if answer.done() and answer.exception() is None else []
        return why(node, told, node in self._ever)


def why(node: str, nodes: Iterable[Mapping[str, Any]], drained: bool) -> str:
    """Why a node's end was planned; "": it was not.

    Args:
        nodes: Ray's table of them. drained: it was seen to drain.
    """
    told = next((n for n in nodes if n["NodeID"] == node and not n["Alive"]), {})
    words = " ".join(str(told.get("DeathReasonMessage") or "no reason given").split())
    reason = told.get("DeathReason")
    if reason == _PREEMPTED:
        return f"its node was preempted ({words})"
    if reason == _IDLE:
        return f"its node was idle, and the autoscaler ended it ({words})"
    if drained:
        return "its node was draining"
    if reason == _EXPECTED:
        return f"its node was ended by the autoscaler or by SIGTERM ({words})"
    return ""


def _beside(ask: Callable[[], Any]) -> Future[Any]:
    """The answer of Ray's head, in a thread of its own: the question does not return while the head is away."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as e:
            answer.set_exception(e)

    threading.Thread(target=run, name="ask-ray", daemon=True).start()
    return answer
