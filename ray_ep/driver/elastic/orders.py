"""What somebody asks of a run's membership, `ray-ep scale` and `ray-ep drain`: taken one after another, or refused.

An order stands from then on. It is carried out by elastic.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from ray_ep.config.schema import Config
from ray_ep.driver.elastic.around import PlacedRanks
from ray_ep.driver.elastic.leavers import node_named, ranks_on
from ray_ep.driver.elastic.limits import scale_refusal
from ray_ep.driver.requests import Request, RequestKind


class Say(Protocol):
    """Tells an operator."""

    def __call__(self, words: str, **fields: Any) -> None:
        """Tell it."""


class SayOnce(Protocol):
    """Tells an operator what was not told last of the same subject."""

    def __call__(self, subject: str, key: object, words: str, **fields: Any) -> None:
        """Tell it, unless `key` is that of the last time."""


class Orders:
    """The orders that stand, and the requests that wait.

    Args:
        experts: of a layer.

    Attributes:
        ranks: how many somebody asked for; 0: as many as the policy says.
        drained: nodes that somebody asked to leave, in order.
    """

    def __init__(self, cfg: Config, experts: int, say: Say, say_once: SayOnce):
        self.cfg, self.experts, self._say, self._say_once = cfg, experts, say, say_once
        self.ranks = 0
        self.drained: list[str] = []
        self._waiting: deque[Request] = deque()

    def put(self, request: Request, recovering: bool = False) -> None:
        """Take a request: it is served after a step, one at a time."""
        self._waiting.append(request)
        if recovering:
            self._say(f"{_named(request)} waits: the run goes on from a loss first")

    def serve(self, under_way: bool, ranks: PlacedRanks) -> bool:
        """Have the oldest request stand, unless it cannot be or, for now, a change is under way; whether it does."""
        if not self._waiting:
            return False
        request = self._waiting[0]
        why = self._refusal(request, ranks)
        if under_way and not why:
            self._say_once("request", id(request), f"{_named(request)} waits: another change is under way")
            return False
        self._waiting.popleft()
        if why:
            self._say(f"{_named(request)} is refused: {why}")
            return False
        (self._scale if request.kind is RequestKind.SCALE else self._drain)(request, ranks)
        return True

    def _refusal(self, request: Request, ranks: PlacedRanks) -> str:
        """Why it cannot be; "": it can."""
        if request.kind is RequestKind.DRAIN:
            if self.cfg.exchange.transport == "deepep":
                return "with exchange.transport=deepep the number of ranks stays as it is"
            return node_named(str(request.fields.get("node", "")), ranks.where)[1]
        wanted = request.fields.get("ranks")
        if not isinstance(wanted, int) or wanted < 0:
            return f"ranks={wanted!r}: expected a number of ranks, or 0 for what elastic.policy says"
        return scale_refusal(self.cfg, wanted, self.experts) if wanted else ""

    def _scale(self, request: Request, ranks: PlacedRanks) -> None:
        self.ranks, active = int(request.fields["ranks"]), ranks.membership.size
        if self.ranks:
            change = "as many as there are" if self.ranks == active else f"there are {active}"
            self._say(f"{_named(request)}: {change}", desired=self.ranks)
        else:
            self._say(f"{_named(request)}: elastic.policy={self.cfg.elastic.policy} decides again")

    def _drain(self, request: Request, ranks: PlacedRanks) -> None:
        node, _ = node_named(str(request.fields["node"]), ranks.where)
        if node not in self.drained:
            self.drained.append(node)
        here = ranks_on([node], ranks.where)[node]
        self._say(f"{_named(request)}: ranks {numbers(here)} are to leave node {node}", node=node)


def numbers(ranks: Sequence[int]) -> str:
    """For a sentence: 0, 2, 3."""
    return ", ".join(map(str, ranks))


def _named(request: Request) -> str:
    """What was asked, and by whom, to begin a sentence with."""
    if request.kind is RequestKind.SCALE:
        ranks = request.fields.get("ranks")
        return f"scale to {f'{ranks} rank' + 's' * (ranks != 1) if ranks else 'auto'} ({request.by})"
    return f"drain of {request.fields.get('node')!r} ({request.by})"
