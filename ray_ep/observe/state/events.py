"""What a run said of itself, event by event: the newest ones, counts by kind, and the entries of a time line.

What follows from them for the run's standing is standing.py's. Imports nothing of ray_ep but its siblings.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from ray_ep.observe.state.files import masked, masked_tree, whole

NEWEST = 500
"""Events that are kept whole."""
TIME_LINE = 1000
"""Entries of the time line that are kept, the newest."""

_ENTRIES = {
    "start": "start",
    "resume": "start",
    "state": "state",
    "placement": "placement",
    "members": "members",
    "recovered": "loss",
    "checkpoint": "checkpoint",
    "checkpoint-failed": "alarm",
    "snapshot-not-on-disk": "alarm",
    "straggler": "alarm",
    "routing-collapse": "alarm",
    "rebalance-alert": "alarm",
    "topology": "links",
    "signal": "end",
    "interrupted": "end",
    "failed": "end",
    "diverged": "end",
}


class Events:
    """Lines of events.jsonl in their order.

    Attributes:
        total: events so far. kinds: how many of each kind.
        newest: the last NEWEST. time_line: entries of those that change where a run stands, see `entry_of`.
    """

    def __init__(self) -> None:
        self.total = 0
        self.kinds: Counter[str] = Counter()
        self.newest: deque[dict[str, Any]] = deque(maxlen=NEWEST)
        self.time_line: deque[dict[str, Any]] = deque(maxlen=TIME_LINE)

    def add(self, event: dict[str, Any]) -> None:
        """Take on one, as `event_of` made it."""
        self.total += 1
        self.kinds[event["kind"]] += 1
        self.newest.append(event)
        if entry := entry_of(event):
            self.time_line.append({"entry": entry, **event})

    def snapshot(self) -> dict[str, Any]:
        """See the room's docstring."""
        return {
            "total": self.total,
            "kinds": dict(sorted(self.kinds.items())),
            "newest": list(self.newest),
            "time_line": list(self.time_line),
        }


def event_of(line: dict[str, Any]) -> dict[str, Any]:
    """A line of events.jsonl with every part there and of its kind, without secrets: step is None where it has none."""
    fields = line.get("fields")
    return {
        "time": str(line.get("time", "")),
        "step": whole(line.get("step")),
        "kind": str(line.get("kind", "")),
        "message": masked(str(line.get("message", ""))),
        "fields": masked_tree(fields) if isinstance(fields, dict) else {},
    }


def entry_of(event: dict[str, Any]) -> str:
    """What an event is on the time line; "": it is not on it.

    start, state, placement, members (who is in an epoch), move (decided), gain (of a move, measured), change (of the
    number of ranks), loss (and how the run went on, with its clocks), checkpoint, links, alarm, end.
    """
    kind, fields = event["kind"], event["fields"]
    if kind == "rebalance":
        return "move" if fields.get("moves") is True else "gain" if "moved_after" in fields else ""
    if kind == "elastic":
        return "change" if "come" in fields else ""
    return _ENTRIES.get(kind, "")
