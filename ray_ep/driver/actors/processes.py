"""The processes of rank actors: started each in its place, located, killed; why one is dead. No call of a run here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_ep.config.process import RANK
from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.cause import for_memory
from ray_ep.driver.actors.head import HEAD_S, within
from ray_ep.driver.actors.heartbeat import process_of
from ray_ep.driver.actors.placing import Place, nodes
from ray_ep.errors import RankError
from ray_ep.rank.memory import oom_kills


class Starter:
    """Starts the rank actors of one run.

    Args:
        name: of the run.
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
        }
        number, threads = int(member.rpartition("-")[2]), max(1, int(self.cfg.cpus_per_rank))
        given = number, self.cfg.ranks, threads, self.device
        try:
            return self.actor.options(name=f"ep/{self.name}/rank{number}", **options).remote(*given)
        except ValueError:  # another run of this job has the name, such as one before that the head has not buried yet
            return self.actor.options(**options).remote(*given)


def _environment() -> dict[str, str]:
    """Variables of a rank's process: Ray adds them to those of the job, which go first here."""
    given = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return {k: v for k, v in RANK.items() if k not in given}


def locate(where: Sequence[dict[str, Any]], actors: Sequence[Any]) -> None:
    """Ask Ray for the processes of ranks that have not come up, into `where`."""
    for rank, actor in zip(where, actors, strict=False):
        if "worker" not in rank and (process := within(HEAD_S, partial(process_of, actor))):
            rank |= {"worker": process.worker, "pid": process.pid}


def kill(actors: Sequence[Any]) -> None:
    """Have Ray's head kill these actors; what it does not do at once it does when it is back."""
    them = list(actors)
    within(HEAD_S, lambda: [ray.kill(actor, no_restart=True) for actor in them])


def end(actors: Sequence[Any]) -> None:
    """End these actors, also while Ray's head, which kills them, is away: then they end themselves."""
    if within(HEAD_S, nodes) is None:
        for actor in actors:
            actor.end.remote()
    kill(actors)


def explained(
    cause: Exception, where: Sequence[dict[str, Any]], actors: Sequence[Any], gone: Collection[int]
) -> Exception:
    """Of a rank that is dead: whether the kernel killed processes of its node for memory meanwhile.

    Args:
        gone: ranks that are lost with it, and answer nothing.
    """
    if not (isinstance(cause, RankError) and isinstance(cause.__cause__, RayActorError)):
        return cause
    lost = where[cause.rank]
    if "oom_kills" not in lost:  # it had not come up
        return cause
    there = [r for r, w in enumerate(where) if w["node"] == lost["node"] and r not in {cause.rank, *gone}]
    killed = 0
    with suppress(RayError):
        if there:
            killed = ray.get(actors[there[0]].oom_kills.remote(), timeout=2) - lost["oom_kills"]
        elif lost["node"] == ray.get_runtime_context().get_node_id():
            killed = oom_kills() - lost["oom_kills"]
    return for_memory(cause, lost["host"], killed) if killed > 0 else cause
