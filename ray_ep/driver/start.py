"""A run before it starts: what can be refused without a cluster is refused here; nothing is started or written.

Reads the data, the model's config, the placement to begin with and the checkpoint to go on from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedConfig

from ray_ep.config.schema import Config
from ray_ep.driver.rundir import RunDir, checkpoint_url, choose, find_checkpoint
from ray_ep.errors import CheckpointError, ConfigError
from ray_ep.moe import find_experts
from ray_ep.placement import Placement, contiguous, random
from ray_ep.rank.checkpoint import Checkpoint, Directory
from ray_ep.rank.data import Corpus, load_corpus
from ray_ep.rank.model import meta_model, model_config
from ray_ep.rank.pretrained import inspect


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked run: everything that could be refused has been."""

    run: RunDir
    corpus: Corpus
    config: PreTrainedConfig
    signature: dict[str, list[int]]  # parameter -> shape
    placement: Placement  # to begin with
    checkpoint: Checkpoint | None  # to go on from
    expert_parameters: int  # of the largest expert
    notes: tuple[tuple[str, str], ...] = ()  # (kind, message) of events to tell when the run has started


def check(cfg: Config, now: datetime) -> Plan:
    """Everything that can be refused without a cluster; starts and writes nothing. Raises BadInput."""
    run = choose(cfg, now)
    corpus = load_corpus(cfg.data, cfg.batch.length, cfg.seed)
    config = model_config(cfg.model, corpus.vocab_size)
    model = meta_model(config)
    modules = find_experts(model)
    experts = int(next(iter(modules.values())).num_experts)
    placement = _placement(cfg, run, len(modules), experts)
    signature = {n: list(p.shape) for n, p in model.named_parameters()}
    size = max(sum(p.numel() for p in m.parameters()) for m in modules.values()) // experts
    notes = tuple(inspect(Path(cfg.model.path), model)) if cfg.model.path else ()
    return Plan(run, corpus, config, signature, placement, _resume(cfg, run, signature), size, notes)


def _placement(cfg: Config, run: RunDir, layers: int, experts: int) -> Placement:
    """The placement to begin with; raises PlacementError (fewer slots than experts) or ConfigError.

    A run that goes on (resume=auto) goes on with the last one it had, unless a file is named or it does not fit.
    """
    named = cfg.placement.initial not in ("contiguous", "random")
    last = run.newest_placement() if cfg.resume == "auto" else None
    initial = _initial(cfg, layers, experts)
    if last is None:
        return initial
    fits = last.slots.shape[:2] == initial.slots.shape[:2] and last.num_experts == experts
    fits = fits and last.slots.shape[2] <= initial.slots.shape[2]
    # Another one in the same run gets a number of its own, so that none that was there is overwritten.
    return last if fits and not named else replace(initial, version=last.version + 1)


def _initial(cfg: Config, layers: int, experts: int) -> Placement:
    ranks, slots = cfg.cluster.ranks, cfg.placement.slots_per_rank or None
    if cfg.placement.initial == "contiguous":
        return contiguous(layers, experts, ranks, slots)
    if cfg.placement.initial == "random":
        return random(layers, experts, ranks, slots, cfg.seed)
    placement = Placement.load(cfg.placement.initial)
    if (placement.num_layers, placement.num_experts, placement.num_ranks) != (layers, experts, ranks):
        raise ConfigError(
            f"placement.initial={cfg.placement.initial!r} is for {placement.num_layers} layers x "
            f"{placement.num_experts} experts on {placement.num_ranks} ranks; this run has {layers} x {experts} on "
            f"{ranks}"
        )
    return placement


def _resume(cfg: Config, run: RunDir, signature: dict[str, list[int]]) -> Checkpoint | None:
    """The checkpoint to go on from, checked against the model; None to start anew. Raises CheckpointError."""
    if cfg.resume == "no":
        return None
    if cfg.resume == "auto":
        directory = Directory(checkpoint_url(cfg, run))
        if not directory.steps():
            return None
        checkpoint = Checkpoint(directory, directory.steps()[-1])
    else:
        checkpoint = find_checkpoint(cfg.resume)
    other = checkpoint.manifest.get("signature")
    if other != signature:
        differ = next((n for n in {**signature, **(other or {})} if (other or {}).get(n) != signature.get(n)), "?")
        raise CheckpointError(
            f"checkpoint {checkpoint.name} is of another model: {differ} has shape "
            f"{(other or {}).get(differ)} there and {signature.get(differ)} here"
        )
    return checkpoint
