"""The first words of a run, once its ranks have formed: what runs, where, and what is to be known of it. Pure."""

from __future__ import annotations

from math import prod
from typing import Any

from ray_ep.config.schema import Config
from ray_ep.driver.actors.reach import in_job_copy
from ray_ep.driver.forming import Formed
from ray_ep.driver.records import Event
from ray_ep.driver.run.saving import when
from ray_ep.driver.start import Plan
from ray_ep.placement.cost.memory import SnapshotMemory, state_bytes
from ray_ep.placement.links.groups import contradictions

JOB_COPY = (
    "lies in the job's own copy of its working directory, which Ray deletes with the job's files: give run_dir=/a/path "
    "that outlives the job"
)
"""End of the refusal of a run directory inside of what Ray deletes with a job."""


def start_of(cfg: Config, plan: Plan, formed: Formed, ray: str) -> Event:
    """The run begins; `ray` says on which Ray."""
    fields: dict[str, Any] = {
        "model": plan.config.model_type,
        "parameters": sum(prod(shape) for shape in plan.signature.values()),
        "layers": formed.placement.num_layers,
        "experts": formed.placement.num_experts,
        "expert_parameters": plan.expert_parameters,
        "ranks": formed.topology.num_ranks,
        "nodes": len(set(formed.topology.node_of.tolist())),
        "data": plan.corpus.source,
        "ray": ray,
        "run_dir": str(plan.run.path.absolute()),
        "snapshot_mib": snapshot_mib(cfg, plan, formed),
    }
    words = (
        "{model}, {millions:.1f}M parameters, {layers} MoE layers x {experts} experts on {ranks} ranks of {nodes} "
        "node(s); {data}; on {ray}; {saves}; run in {run_dir}"
    ).format(**fields, millions=fields["parameters"] / 1e6, saves=_saves(cfg, fields["snapshot_mib"]))
    return Event("start", words, fields)


def first_words(cfg: Config, plan: Plan) -> str:
    """Why the run has the placement that it begins with."""
    last = plan.run.newest_placement() if plan.placement.version else None
    if last is not None and last.version == plan.placement.version:
        return "the run went on with it: it is the last one that it had"
    return f"the run began with it: placement.initial={cfg.placement.initial}"


def snapshot_mib(cfg: Config, plan: Plan, formed: Formed) -> int:
    """Host memory that snapshots take of the rank that holds most."""
    placement, state = formed.placement, state_bytes(cfg.optim.kind, cfg.optim.beta1)
    every = sum(prod(shape) for shape in plan.signature.values())
    dense = every - placement.num_layers * placement.num_experts * plan.expert_parameters
    taken = SnapshotMemory(cfg.snapshot.every > 0, cfg.snapshot.to_disk, max(dense, 0) * state)
    return int(taken.most(placement, formed.topology.node_of.tolist(), plan.expert_parameters * state)) >> 20


def _saves(cfg: Config, mib: int) -> str:
    """How often what is saved."""
    if not cfg.snapshot.every:
        return f"{when(cfg.checkpoint)}, no snapshots (snapshot.every=0)"
    to_disk = ", written to disk, too" if cfg.snapshot.to_disk else ""
    return f"{when(cfg.checkpoint)}, a snapshot every {cfg.snapshot.every} steps (up to {mib} MiB of a rank{to_disk})"


def notes_of(cfg: Config, plan: Plan, formed: Formed) -> list[Event]:
    """What is to be known of the run that begins, in the order in which it is told."""
    notes = list(plan.notes)
    if in_job_copy(plan.run.path):
        notes.append(Event("run-dir", f"{plan.run.path.absolute()} {JOB_COPY}"))
    if cfg.topology.measure:
        notes += [Event("topology", sentence) for sentence in contradictions(formed.topology)]
    if plan.checkpoint is not None:
        name, before, now = plan.checkpoint.name, plan.checkpoint.manifest.get("data"), plan.corpus.source
        notes.append(Event("resume", f"goes on from {name}", {"checkpoint": name}))
        if before != now:
            words = f"trained on {before} until here, on {now} from here"
            notes.append(Event("data-changed", words, {"before": before, "now": now}))
    if formed.read:
        notes.append(
            Event("loaded", f"all ranks together: {formed.read} of {cfg.model.path}", {"path": cfg.model.path})
        )
    choice = formed.choice
    notes.append(Event("exchange", choice.words(), {"kind": choice.kind, "transport": choice.transport}))
    return notes
