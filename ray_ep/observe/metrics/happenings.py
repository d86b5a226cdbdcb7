"""What the events of a run change in its figures: decisions, moves, recoveries, ranks that come and go, checkpoints.

The fields of an event are those that its publisher gives it; one that lacks a field changes less. No Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray_ep.driver.records import Event
from ray_ep.observe.metrics.figures import Figures

Fields = Mapping[str, Any]


class Happenings:
    """Tells events to the figures of a run.

    Args:
        clock: seconds since 1970.

    Attributes:
        coming: ranks that have room and are not in the steps yet.
    """

    def __init__(self, figures: Figures, clock: Callable[[], float]):
        self._figures, self._clock = figures, clock
        self.coming = 0
        self._slow: dict[str, float] = {}  # member -> how many times slower
        self._told: dict[str, Callable[[Event], None]] = {
            "rebalance": self._rebalance,
            "rebalance-alert": lambda event: figures.put("ep_rebalance_stalled", 1),
            "routing-collapse": self._collapse,
            "elastic": self._elastic,
            "recovered": self._recovered,
            "straggler": self._straggler,
            "checkpoint": self._checkpoint,
            "checkpoint-failed": lambda event: figures.add("ep_checkpoint_failures_total", 1),
        }

    def tell(self, event: Event) -> None:
        """One event; of most kinds there is nothing to count."""
        if event.kind in self._told:
            self._told[event.kind](event)

    def _rebalance(self, event: Event) -> None:
        """A decision, or how the move of one before turned out."""
        said, put = event.fields, self._figures.put
        if "gain_measured" in said:
            put("ep_move_gain_seconds", said["gain_predicted"], "predicted")
            put("ep_move_gain_seconds", said["gain_measured"], "measured")
            put("ep_migration_seconds", said["move_predicted"], "predicted")
            put("ep_migration_seconds", said["move_seconds"], "measured")
        if "moved_after" in said:
            return
        outcome = "failed"
        if "moves" in said:
            advised = said.get("placement_version") is not None
            outcome = "move" if said["moves"] else "advise" if advised else "stay"
            put("ep_predicted_step_seconds", said["step_predicted"])
        self._figures.add("ep_rebalance_decisions_total", 1, outcome)
        put("ep_last_decision_step", event.step)
        put("ep_rebalance_stalled", 0)

    def _collapse(self, event: Event) -> None:
        self._figures.add("ep_routing_collapses_total", 1, event.fields["alarm"])

    def _elastic(self, event: Event) -> None:
        said = event.fields
        for state in ("desired", "active", "allocated", "joining", "waiting", "ready"):
            if state in said:
                self._figures.put("ep_ranks", said[state], state)
        self.coming = said.get("joining", 0) + said.get("ready", 0)
        self._figures.add("ep_rank_changes_total", len(said.get("come", ())), "come")
        self._figures.add("ep_rank_changes_total", len(said.get("left", ())), "gone")
        self._figures.add("ep_standing_seconds_total", sum(said.get("seconds", {}).values()), "resize")
        self._gone(said.get("left", ()))

    def _recovered(self, event: Event) -> None:
        said, add = event.fields, self._figures.add
        add("ep_recoveries_total", 1)
        add("ep_lost_ranks_total", len(said.get("lost", ())), "true" if said.get("planned") else "false")
        add("ep_repeated_steps_total", said.get("repeated", 0))
        clocks: Fields = said.get("seconds", {})
        for clock, seconds in clocks.items():
            self._figures.put("ep_recovery_seconds", seconds, clock)
        add("ep_standing_seconds_total", sum(s for clock, s in clocks.items() if clock != "first_step"), "recovery")
        self._gone(said.get("lost", ()))

    def _straggler(self, event: Event) -> None:
        said = event.fields
        if said["slow"]:
            self._slow[said["member"]] = said["times"]
        else:
            self._slow.pop(said["member"], None)
        self._gone(())

    def _gone(self, members: tuple[str, ...]) -> None:
        """Tell who is slow, without those that are no members any more."""
        self._slow = {member: times for member, times in self._slow.items() if member not in members}
        self._figures.put("ep_slow_ranks", len(self._slow))
        self._figures.put("ep_slow_rank_times", max(self._slow.values(), default=1.0))

    def _checkpoint(self, event: Event) -> None:
        self._figures.add("ep_checkpoints_total", 1)
        self._figures.put("ep_last_checkpoint_timestamp_seconds", self._clock())
        if event.fields.get("seconds") is not None:
            self._figures.put("ep_checkpoint_seconds", event.fields["seconds"])
