"""Experiment trackers and OpenTelemetry: what a run says, each by its own library."""

from ray_ep.observe.trackers.tracked import check_trackers, trackers

__all__ = ["check_trackers", "trackers"]
