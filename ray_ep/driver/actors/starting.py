"""Starts the actor of a rank in its place, with the environment of its process."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_ep.config.process import RANK
from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.placing import Place


class Starter:
    """Starts the rank actors of one run.

    Args:
        device: cpu or cuda. actor: class of the actors, made with rank, number of ranks, threads and device.
    """

    def __init__(self, cfg: ClusterConfig, name: str, device: str, actor: Any):
        self.cfg, self.name, self.device, self.actor = cfg, name, device, actor

    def start(self, place: Place, member: str) -> Any:
        """The actor of member rank-N in its place: N is its rank until `join` tells it another."""
        options = {
            "num_cpus": self.cfg.cpus_per_rank,
            "num_gpus": int(self.device == "cuda"),
            "runtime_env": {"env_vars": _environment()},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(place.group, placement_group_bundle_index=0),
            "name": f"{self.name}-{member}",
        }
        threads = max(1, int(self.cfg.cpus_per_rank))
        return self.actor.options(**options).remote(
            int(member.rpartition("-")[2]), self.cfg.ranks, threads, self.device
        )


def _environment() -> dict[str, str]:
    """Variables of a rank's process: Ray adds them to those of the job, which go first here."""
    given = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return {k: v for k, v in RANK.items() if k not in given}
