"""A run before it starts: what can be refused without a cluster is refused here; nothing is started.

The run directory is taken first; of a run that is refused later nothing is left there. Reads the data, the model's
config, the placement to begin with, and the checkpoint and configuration to go on from.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import torch
from transformers import PreTrainedConfig

from ray_ep.config.changes import changes
from ray_ep.config.exchange import most_tokens
from ray_ep.config.runs import settings_of
from ray_ep.config.schema import Config
from ray_ep.driver.records import Event
from ray_ep.driver.run.on_disk import newer_snapshot
from ray_ep.driver.run.rundir import RunDir, checkpoint_url, claimed, find_checkpoint
from ray_ep.errors import CheckpointError, ConfigError
from ray_ep.moe import find_experts
from ray_ep.moe.exchange.elastic import Room, check_fit
from ray_ep.moe.exchange.ways import DEEPEP
from ray_ep.placement import Placement, contiguous, random
from ray_ep.rank.balancing import balancing
from ray_ep.rank.data.corpus import Corpus, load_corpus
from ray_ep.rank.model import meta_model, model_config
from ray_ep.rank.pretrained.hub import directory
from ray_ep.rank.pretrained.load import inspect
from ray_ep.rank.saved.checkpoint import QUICK, Checkpoint
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.step.masks import check_documents
from ray_ep.rank.trained.frozen import freeze
from ray_ep.rank.trained.lora import adapt


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
    frozen: tuple[str, ...] = ()  # parameters that are not trained
    base: frozenset[str] = frozenset()  # parameters that adapters are beside: checkpoints do not hold them
    notes: tuple[Event, ...] = ()  # to tell when the run has started
    nothing_to_do: str = ""  # why, if the run has all its steps


def check_run(cfg: Config, now: datetime) -> Plan:
    """Everything that can be refused without a cluster; starts nothing. Raises BadInput.

    Whoever gets the plan calls `plan.run.release()` at the run's end.
    """
    run = claimed(cfg, now)
    try:
        return _checked(cfg, run)
    except BaseException:
        run.release()
        raise


def _checked(cfg: Config, run: RunDir) -> Plan:
    checkpoint, passed_over = _earlier_checkpoint(cfg, run)
    notes = [*_about_place(run), *passed_over, *_about_earlier(cfg, run, checkpoint)]
    done = _nothing_to_do(cfg, run, checkpoint)
    corpus = load_corpus(cfg.data, cfg.batch.length, cfg.seed)
    config = model_config(cfg.model, corpus.vocab_size)
    model = meta_model(config)
    modules = find_experts(model)
    experts: int = next(iter(modules.values())).num_experts  # type: ignore[assignment]
    placement = _placement(cfg, run, len(modules), experts)
    if cfg.exchange.transport == DEEPEP and cfg.cluster.ranks > 1:
        _check_deepep(cfg, next(iter(modules.values())), config, placement)
        notes.append(
            ("balance", "balance inside the step is off: exchange.transport=deepep carries tokens to slots only")
        )
    if cfg.model.path:  # a model of its own: inspect leaves one expert in each module
        notes += inspect(directory(cfg.model.path, weights=True), meta_model(config))
    frozen = tuple(freeze(model, cfg.optim.freeze))
    if cfg.lora.rank:
        adapt(model, cfg.lora, cfg.seed)
    if corpus.rows is not None and cfg.data.pack != "off":
        check_documents(model)
    signature = {n: list(p.shape) for n, p in model.named_parameters()}
    base = frozenset(getattr(model, "ray_ep_base", ()))
    size = max(sum(p.numel() for p in m.parameters()) for m in modules.values()) // experts
    notes += [("router", balancing(cfg, config).words)]
    if checkpoint is not None:
        _check_model(checkpoint, {n: shape for n, shape in signature.items() if n not in base})
    told = tuple(Event(kind, words) for kind, words in notes)
    return Plan(run, corpus, config, signature, placement, checkpoint, size, frozen, base, told, done)


def _placement(cfg: Config, run: RunDir, layers: int, experts: int) -> Placement:
    """The placement to begin with; raises PlacementError (fewer slots than experts) or ConfigError.

    A run that goes on (resume=auto) goes on with the last one it had, unless a file is named or it does not fit.
    """
    named = cfg.placement.initial not in ("contiguous", "random")
    last = run.newest_placement() if cfg.resume == "auto" else None
    initial = initial_placement(cfg, layers, experts)
    if last is None:
        return initial
    fits = last.slots.shape[:2] == initial.slots.shape[:2] and last.num_experts == experts
    fits = fits and last.slots.shape[2] <= initial.slots.shape[2]
    # Another one in the same run gets a number of its own, so that none that was there is overwritten.
    return last if fits and not named else replace(initial, version=last.version + 1)


def initial_placement(cfg: Config, layers: int, experts: int) -> Placement:
    """What placement.initial says; raises PlacementError (fewer slots than experts) or ConfigError."""
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


def _check_deepep(cfg: Config, experts: Any, config: PreTrainedConfig, placement: Placement) -> None:
    """Raise BadInput for a model that DeepEP does not carry; `experts` is one of its experts modules."""
    text = config.get_text_config()
    down = getattr(experts, "down_proj", None)  # [E, H, F], or the other way
    hidden = int(text.hidden_size if down is None else down.shape[2 if experts.is_transposed else 1])
    room = Room(
        tokens=cfg.exchange.tokens or most_tokens(cfg, cfg.cluster.ranks),
        hidden=hidden,
        choices=int(getattr(text, "num_experts_per_tok", None) or 1),
    )
    check_fit(room, cfg.cluster.ranks, placement.slots.shape[2], getattr(torch, cfg.model.dtype))


def _earlier_checkpoint(cfg: Config, run: RunDir) -> tuple[Checkpoint | None, list[tuple[str, str]]]:
    """The checkpoint to go on from, or a newer snapshot on disk; None to start anew; and what to tell of it.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if cfg.resume == "no":
        return None, []
    if cfg.resume != "auto":
        return find_checkpoint(cfg.resume), []
    directory = Directory(checkpoint_url(cfg, run))
    step = directory.newest()
    snapshot, damage = newer_snapshot(cfg, run, -1 if step is None else step)
    if snapshot is not None:
        return snapshot, []
    notes = [("resume", damage)] if damage else []
    command = f"ray-ep train {shlex.quote(f'run_dir={run.path}')} resume={{}}"
    return None if step is None else Checkpoint(directory, step, command), notes


def _check_model(checkpoint: Checkpoint, signature: dict[str, list[int]]) -> None:
    other = checkpoint.manifest.get("signature")
    if other != signature:
        differ = next((n for n in {**signature, **(other or {})} if (other or {}).get(n) != signature.get(n)), "?")
        raise CheckpointError(
            f"checkpoint {checkpoint.name} is of another model: {differ} has shape "
            f"{(other or {}).get(differ)} there and {signature.get(differ)} here"
        )
    checkpoint.verify(QUICK)


def _about_place(run: RunDir) -> list[tuple[str, str]]:
    notes = []
    if not all(claim.locked for claim in run.claims):
        notes.append(("run-dir", f"the file system of {run.path} has no locks: a second run there is not noticed"))
    return notes


def _about_earlier(cfg: Config, run: RunDir, checkpoint: Checkpoint | None) -> list[tuple[str, str]]:
    """What to tell about the run that this one goes on with. Raises ConfigError for a change that cannot be."""
    if cfg.resume == "no":
        return []
    notes = []
    earlier = settings_of(run.path) if cfg.resume == "auto" else {}
    if checkpoint is None and earlier:
        notes.append(("resume", f"{run.path} has no checkpoint yet: it starts anew, with its own configuration"))
    elif checkpoint is None:
        notes.append(("resume", f"nothing to resume in {cfg.run_dir or run.path.parent}: a new run starts"))
    else:
        earlier = earlier or checkpoint.manifest.get("config") or {}
    said = changes(earlier, cfg, checkpoint is not None)
    return notes + [("config-changed", sentence) for sentence in said]


def _nothing_to_do(cfg: Config, run: RunDir, checkpoint: Checkpoint | None) -> str:
    """Why the run has nothing left to do; "" if it has. Raises CheckpointError for a new run of that kind."""
    steps = cfg.optim.steps
    if checkpoint is None or checkpoint.step < steps:
        return ""
    said = f"nothing to do: {checkpoint.step} of {steps} steps are done; optim.steps={2 * checkpoint.step} trains on"
    if not (run.path / "config.yaml").exists():
        raise CheckpointError(f"checkpoint {checkpoint.name}: {said}")
    return said
