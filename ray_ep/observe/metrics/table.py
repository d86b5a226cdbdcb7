"""Every metric that a run exports: its name, what it is, its tags, what it means. docs/metrics.md shows this table.

Values and sentences alone; who fills them in is figures.py. Imports nothing of ray_ep.

Ray prefixes `ray_` and adds tags of its own, such as SessionName. Each metric has the tag `run`, which never changes
while a run goes; nor does any other tag say what changes (a version, an expert's number): the value says that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import product

PLACES = 3
"""Hottest experts of a layer, and slowest links, that are told: the first so many."""
SECONDS = (*(round(lead * 10**power, 3) for power in range(-2, 3) for lead in (1, 1.5, 2, 3, 5, 7)), 1000.0)
"""Upper ends of the buckets of ep_step_seconds, seconds."""


class Kind(Enum):
    """Prometheus' types of metrics."""

    GAUGE = "gauge"  # what is so now
    COUNTER = "counter"  # what has come together since the run began
    HISTOGRAM = "histogram"  # how often which value was


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Args:
        meaning: one sentence, with the unit.
        tags: beside `run`, each with all its values, or with words for values that depend on the run.
    """

    name: str
    kind: Kind
    meaning: str
    tags: dict[str, tuple[str, ...] | str]

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}"

    @property
    def series(self) -> list[tuple[str, ...]]:
        """Values of its tags, of each series that can be named before a run; [] where they depend on the run."""
        values = [v for v in self.tags.values() if not isinstance(v, str)]
        return list(product(*values)) if len(values) == len(self.tags) else []

    def row(self) -> str:
        """As a row of the table in the docs."""
        words = {tag: values if isinstance(values, str) else ", ".join(values) for tag, values in self.tags.items()}
        tags = "; ".join(f"`{tag}`: {values}" for tag, values in words.items())
        return f"| `{self.exported}` | {self.kind.value} | {tags} | {self.meaning} |"


_LAYER = "of each MoE layer, from 0"
_PLACE = tuple(str(place + 1) for place in range(PLACES))
_KIND = ("predicted", "measured")
_SCOPE = ("intra_node", "inter_node")
_STATISTIC = ("min", "median", "max")
_OUTCOME = ("move", "advise", "stay", "failed")
_STATE = ("desired", "active", "allocated", "joining", "waiting", "ready")
_CLOCK = ("detect", "decide", "regroup", "restore", "first_step")


def _gauge(name: str, meaning: str, **tags: tuple[str, ...] | str) -> Metric:
    return Metric(name, Kind.GAUGE, meaning, tags)


def _counter(name: str, meaning: str, **tags: tuple[str, ...] | str) -> Metric:
    return Metric(name, Kind.COUNTER, meaning, tags)


_ALL = (
    # the run and its steps
    _gauge("ep_run_info", "1 while the run goes", model="model type", layers="MoE layers", experts="of a layer"),
    _gauge("ep_step", "number of the newest step, from 1"),
    _gauge("ep_last_step_timestamp_seconds", "when it ended, or the run began, seconds since 1970"),
    _counter("ep_steps_total", "steps made, with those that were made again"),
    _counter("ep_tokens_total", "tokens of those steps; batches have no padding"),
    Metric("ep_step_seconds", Kind.HISTOGRAM, "seconds of a step; its sum is Ray's estimate from the buckets", {}),
    _counter("ep_stepping_seconds_total", "seconds of those steps, exact; its rate is the useful share of the time"),
    _counter("ep_standing_seconds_total", "seconds between steps", cause=("move", "planning", "recovery", "resize")),
    _gauge("ep_step_phase_seconds", "seconds of the newest step, means over ranks", phase="as in metrics.jsonl"),
    _gauge("ep_tokens_per_second", "of the newest step"),
    _gauge("ep_loss", "of the newest step"),
    _gauge("ep_eval_loss", "of the newest evaluation"),
    _gauge("ep_grad_norm", "of the newest step, before clipping"),
    _gauge("ep_learning_rate", "of the newest step"),
    _gauge("ep_peak_memory_bytes", "memory that the fullest rank has had at most"),
    # routing and balance
    _gauge("ep_balancedness", "mean over largest load of a rank; 1 is even", layer=_LAYER),
    _gauge("ep_hottest_expert_load", "load of the hottest experts over the mean", layer=_LAYER, place=_PLACE),
    _gauge("ep_hottest_expert_id", "which experts those are", layer=_LAYER, place=_PLACE),
    _counter("ep_rank_pairs_total", "(token, expert) pairs that ranks up to `le` computed", le="of each rank, from 0"),
    _gauge("ep_imbalance", "slowest rank's load over the mean, of balance inside the step", when=("before", "after")),
    _gauge("ep_balance_saved_seconds", "what balance inside the step saved of the newest one", kind=_KIND),
    _counter("ep_guests_total", "experts lent to other ranks for a layer of a step"),
    _counter("ep_guest_bytes_total", "bytes of their weights"),
    _counter("ep_routing_collapses_total", "warnings that a layer collapsed", alarm=("starved", "unbalanced")),
    # placement
    _gauge("ep_placement_version", "version of the placement of the newest step"),
    _counter("ep_migrated_experts_total", "experts that came to another rank, while the ranks were the same"),
    _gauge("ep_migration_seconds", "of the newest move whose gain was measured", kind=_KIND),
    _gauge("ep_move_gain_seconds", "of a step, by the newest move whose gain was measured", kind=_KIND),
    _gauge("ep_predicted_step_seconds", "of a step after the newest decision, as it was predicted then"),
    _counter("ep_rebalance_decisions_total", "decisions whether experts move", outcome=_OUTCOME),
    _gauge("ep_last_decision_step", "steps that were done when the newest of them was told"),
    _gauge("ep_rebalance_stalled", "1 from a warning that no decision comes until it does, else 0"),
    # links
    _counter("ep_exchange_bytes_total", "bytes that ranks sent to ranks on their node and on others", scope=_SCOPE),
    _gauge("ep_link_bandwidth_bytes_per_second", "measured", scope=_SCOPE, statistic=_STATISTIC),
    _gauge("ep_slowest_link_bandwidth_bytes_per_second", "of the slowest links", place=_PLACE),
    _gauge("ep_slowest_link_rank", "which links those are", place=_PLACE, end=("source", "destination")),
    _gauge("ep_slowed_links", "links that are slower than the same ranks measured them first, by more than noise"),
    _gauge("ep_link_slowdown", "how many times slower the most slowed link is; 1: none"),
    # ranks
    _gauge("ep_epoch", "number of the membership, which grows with each change"),
    _gauge("ep_ranks", "how many ranks", state=_STATE),
    _counter("ep_rank_changes_total", "ranks that came or went as planned, between two steps", change=("come", "gone")),
    _counter("ep_recoveries_total", "losses that the run went on from"),
    _counter("ep_lost_ranks_total", "ranks lost in them", planned=("true", "false")),
    _counter("ep_repeated_steps_total", "steps that were made again after them"),
    _gauge("ep_recovery_seconds", "of the newest recovery", clock=_CLOCK),
    _gauge("ep_slow_ranks", "ranks that are several times slower than the others for the same work"),
    _gauge("ep_slow_rank_times", "how many times slower the slowest of them is; 1: none"),
    # what is saved
    _counter("ep_checkpoints_total", "checkpoints written"),
    _counter("ep_checkpoint_failures_total", "checkpoints that could not be written"),
    _gauge("ep_last_checkpoint_timestamp_seconds", "when the newest was written, seconds since 1970"),
    _gauge("ep_checkpoint_seconds", "that the newest took of the run"),
)  # fmt: skip

METRICS = {metric.name: metric for metric in _ALL}
"""All of them by name."""
