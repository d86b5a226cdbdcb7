"""Where a run stands, as its events tell in their order: state and outcome, who is in it, the causes of its placements.

Imports nothing of ray_ep but its siblings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray_ep.observe.state.files import number, whole

MOST_EPOCHS = 200
"""Memberships that are kept, the newest."""
_OUTCOMES = {"interrupted": "interrupted", "failed": "failed", "diverged": "failed"}
_COUNTS = ("desired", "allocated", "active", "waiting", "joining", "ready", "planned_leaves", "failures")
_GAINS = ("gain_predicted", "move_predicted", "step_predicted")
_MEASURED = ("gain_measured", "move_seconds", "step_seconds_before", "step_seconds_after")


class Standing:
    """Folded from events; each attribute is what the last event about it said.

    Attributes:
        state: forming, stepping, migrating, resizing, recovering, draining or stopped; "" of a run that tells none.
        why: the sentence of the last change of state.
        outcome: done, interrupted or failed; "" while none is told. error: the sentence of a failure.
        started: time of the newest start. attempts: how often it was started. seen: time of the last event.
        model: figures of the start event. counts: of ranks, as `elastic` says. reason: of the number of ranks wanted.
        epochs: memberships as they followed one another. slow: members that are slow now.
        versions: what was said of each placement, by its number.
        page: address of the run's page, and that in Ray's dashboard (`address`, `dashboard`); {} while there is none.
    """

    def __init__(self) -> None:
        self.state = self.why = self.outcome = self.error = self.started = self.seen = self.reason = ""
        self.attempts = self.events = self.step = 0
        self.model: dict[str, Any] = {}
        self.counts: dict[str, int | None] = {}
        self.epochs: list[dict[str, Any]] = []
        self.slow: list[str] = []
        self.page: dict[str, str] = {}
        self.versions: dict[int, dict[str, Any]] = {}
        self._decided: dict[str, Any] = {}  # the last decision to move: its figures
        self._begun = False  # an attempt, whose start event is still to come
        self._takes: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
            "start": self._take_start,
            "state": self._take_state,
            "members": self._take_members,
            "placement": self._take_placement,
            "rebalance": self._take_rebalance,
            "elastic": self._take_elastic,
            "page": self._take_page,
            "straggler": self._take_straggler,
        }

    def add(self, event: dict[str, Any]) -> None:
        """Take on one, as `events.event_of` made it."""
        self.events += 1
        self.seen = event["time"] or self.seen
        self.step = self.step if event["step"] is None else event["step"]
        kind, fields = event["kind"], event["fields"]
        if kind in self._takes:
            self._takes[kind](event, fields)
        elif kind in _OUTCOMES:
            self.outcome = _OUTCOMES[kind]
            self.error = event["message"] if self.outcome == "failed" else ""

    def told(self) -> dict[int, tuple[int, tuple[str, ...]]]:
        """Of each placement the number of the event that told of it, and the members of its ranks."""
        return {n: (said["event"], tuple(r["member"] for r in said["ranks"])) for n, said in self.versions.items()}

    @property
    def members(self) -> list[dict[str, Any]]:
        """[R] the ranks of the present membership."""
        ranks: list[dict[str, Any]] = self.epochs[-1]["ranks"] if self.epochs else []
        return ranks

    def _take_start(self, event: dict[str, Any], fields: dict[str, Any]) -> None:
        self.started, self.model = event["time"], fields
        self.attempts += not self._begun
        self._begun, self.outcome, self.error = False, "", ""

    def _take_state(self, event: dict[str, Any], fields: dict[str, Any]) -> None:
        self.state, self.why = str(fields.get("to", "")), event["message"]
        if fields.get("from") == "forming":
            self.attempts, self._begun = self.attempts + 1, True
            self.outcome = self.error = ""
            self.counts, self.slow, self.reason, self.page = {}, [], "", {}
        if self.state == "stopped" and event["message"] == "done":
            self.outcome = "done"

    def _take_members(self, event: dict[str, Any], fields: dict[str, Any]) -> None:
        ranks = [dict(rank) for rank in _list(fields.get("ranks")) if isinstance(rank, dict)]
        for position, rank in enumerate(ranks):
            rank["rank"], rank["member"] = position, str(rank.get("member", f"rank-{position}"))
        epoch = {"epoch": whole(fields.get("epoch")), "attempt": self.attempts, "time": event["time"]}
        self.epochs = [*self.epochs[-MOST_EPOCHS + 1 :], {**epoch, "step": event["step"], "ranks": ranks}]
        here = [rank["member"] for rank in ranks]
        self.slow = [member for member in self.slow if member in here]

    def _take_placement(self, event: dict[str, Any], fields: dict[str, Any]) -> None:
        version = whole(fields.get("placement_version"))
        if version is None:
            return
        ours = fields.get("cause") == "rebalance" and self._decided.get("placement_version") == version
        decided = self._decided if ours else {}  # one that was broken off may have had this number, too
        said = {"time": event["time"], "step": event["step"], "words": event["message"], "event": self.events - 1}
        said |= {"cause": str(fields.get("cause", "")), "ranks": self.members}
        said["epoch"] = self.epochs[-1]["epoch"] if self.epochs else None
        said |= {name: _figure(decided.get(name)) for name in _GAINS} | dict.fromkeys(_MEASURED)
        if version not in self.versions:  # a run that was resumed goes on with the one that it had
            self.versions[version] = said

    def _take_rebalance(self, event: dict[str, Any], fields: dict[str, Any]) -> None:
        if fields.get("moves") is True:
            self._decided = fields
        if "moved_after" in fields:
            after = fields["moved_after"]
            moved = [v for v in self.versions.values() if v["step"] == after and v["cause"] in ("rebalance", "asked")]
            for version in moved[-1:]:
                version |= {name: _figure(fields.get(name)) for name in _MEASURED}

    def _take_elastic(self, event: dict[str, Any], fields: dict[str, Any]) -> None:
        self.counts = {name: whole(fields.get(name)) for name in _COUNTS}
        self.reason = str(fields.get("reason", ""))

    def _take_page(self, event: dict[str, Any], fields: dict[str, Any]) -> None:
        self.page = {name: str(fields.get(name, "")) for name in ("address", "dashboard")}

    def _take_straggler(self, event: dict[str, Any], fields: dict[str, Any]) -> None:
        member = str(fields.get("member", ""))
        self.slow = [m for m in self.slow if m != member] + [member] * (fields.get("slow") is True)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _figure(value: Any) -> float | None:
    figure = number(value)
    return figure if abs(figure) < float("inf") else None
