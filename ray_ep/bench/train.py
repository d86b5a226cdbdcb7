"""`ray-ep bench train`: whole training steps of ray_ep and of what one would use in its place, on the same work.

A case is one model, dtype and number of ranks, as a run's configuration says. Its contenders take turns, each round in
fresh processes: the peers of trainers.py, and `ray-ep train` itself, with its driver and Ray. CPUs only.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from ray_ep.bench.layer import spawn
from ray_ep.bench.own_run import own_run
from ray_ep.bench.train_rows import OURS, TRAIN_PEERS, TrainCase, TrainResult
from ray_ep.bench.trainers import Job, main
from ray_ep.config import from_dict
from ray_ep.config.schema import Config
from ray_ep.driver.start import Plan, check_run
from ray_ep.errors import BadInput, brief
from ray_ep.moe import find_experts
from ray_ep.rank.data.corpus import global_batch
from ray_ep.rank.model import draw_weights, meta_model
from ray_ep.rank.pretrained.hub import directory
from ray_ep.rank.pretrained.load import load_pretrained

MODELS: dict[str, dict[str, int]] = {
    "small": {},
    "fine": {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8},
    "wide": {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4},
}
"""What differs from the default model."""

OWN_MODEL = "own"
"""The model of the configuration that was given."""

NEED_SHARES = ("ddp", "transformers", "deepspeed")
"""Peers that give each rank as many sequences as every other."""

NEED_EXPERTS = ("transformers", "deepspeed")
"""Peers that give each rank as many sequences, or experts, as every other."""

WARM_STEPS, WARM_OURS = 5, 20
"""First steps that do not count: in ray_ep's it tries whether balance inside the step pays."""

_FIXED = {
    "run_dir": ("", "a run of the bench leaves nothing"),
    "checkpoint.dir": ("", "a run of the bench leaves nothing"),
    "resume": ("no", "all contenders start anew"),
    "cluster.address": ("", "contenders share this machine"),
    "optim.kind": ("adamw", "the peers have AdamW"),
    "batch.accumulation": (1, "the peers make one pass a step"),
    "router.force": ("none", "the peers route as the model says"),
}


def cases(
    cfg: Config,
    models: Sequence[str],
    dtypes: Sequence[str],
    ranks: Sequence[int],
    peers: Sequence[str] | None = None,
    steps: int = 20,
    rounds: int = 3,
    malloc: str = "tuned",
) -> list[TrainCase]:
    """Every combination, checked as far as can be without starting anything.

    Args:
        cfg: what a case does not say is as it is here.
        models: of MODELS, over cfg's; or OWN_MODEL alone, cfg's as it is.
        dtypes, ranks: none: cfg's.
        peers: contenders beside ray_ep; None: all that are installed.

    Raises:
        BadInput: a word that is not allowed, a peer that is not installed, ranks that a peer cannot share the work
            among, settings that contenders could not share, or whatever a run would refuse.
    """
    named = tuple(p for p in TRAIN_PEERS if _installed(p)) if peers is None else tuple(dict.fromkeys(peers))
    _among("--model", models, [OWN_MODEL] if list(models) == [OWN_MODEL] else list(MODELS))
    _among("--dtype", dtypes, ["float32", "bfloat16"])
    _among("--peers", named, TRAIN_PEERS)
    for peer in named:
        if not _installed(peer):
            raise BadInput(f"bench train: --peers={peer}: it is not installed: pip install 'ray_ep[bench]'")
    for key, (value, why) in _FIXED.items():
        given = OmegaConf.select(OmegaConf.structured(cfg), key)
        if given != value:
            raise BadInput(f"bench train: {key}={given}: only {value or 'empty'!s} is allowed, for {why}")
    if cfg.cluster.device == "cuda":
        raise BadInput("bench train: cluster.device=cuda: contenders are compared on CPUs")
    found = [
        TrainCase(model, _config(cfg, model, dtype, n), named, steps, rounds, malloc)
        for model, dtype, n in product(models, dtypes or [cfg.model.dtype], ranks or [cfg.cluster.ranks])
    ]
    for case in found:
        with tempfile.TemporaryDirectory() as tmp:
            _shared(case, _plan(case, tmp))
    return found


def run(case: TrainCase, say: Callable[[str], None] = lambda words: None) -> TrainResult:
    """Measure one case; blocks for minutes. Leaves nothing behind.

    Args:
        say: told what is under way.

    Raises:
        BadInput, RayEPError: ray_ep's own run was refused, or failed. A peer that fails is in `TrainResult.failed`.
    """
    result = TrainResult(case)
    result.failed = {p: "not installed: pip install 'ray_ep[bench]'" for p in TRAIN_PEERS if not _installed(p)}
    with tempfile.TemporaryDirectory(prefix="ray-ep-bench-") as tmp:
        say("writing weights and batches")
        names = _write(case, tmp)
        for number in range(case.rounds):
            contenders = (OURS, *case.peers)
            for name in contenders[:: 1 if number % 2 == 0 else -1]:
                if name in result.failed:
                    continue
                say(f"{case.model}, {case.dtype}, {case.ranks} ranks, round {number + 1} of {case.rounds}: {name}")
                if name == OURS:
                    _ours(result, tmp)
                else:
                    _peer(result, name, tmp, names)
    return result


def _config(cfg: Config, model: str, dtype: str, ranks: int) -> Config:
    """The configuration of a case: as many threads for a rank of ours as a peer's process has, and only steps."""
    tree: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(cfg))  # type: ignore[assignment]
    tree["model"]["dtype"] = dtype
    tree["model"]["overrides"] |= MODELS.get(model, {})
    tree["cluster"] |= {"ranks": ranks, "device": "cpu", "address": "local"}
    tree["cluster"]["cpus_per_rank"] = min(1.0, len(os.sched_getaffinity(0)) / ranks)
    tree["eval"]["every"] = tree["checkpoint"]["every"] = tree["checkpoint"]["every_minutes"] = 0
    return from_dict(tree)


def _timed(case: TrainCase, tmp: str) -> Config:
    tree: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(case.cfg))  # type: ignore[assignment]
    tree["run_dir"] = f"{tmp}/run"
    tree["optim"]["steps"] = WARM_OURS + case.steps
    return from_dict(tree)


def _plan(case: TrainCase, tmp: str) -> Plan:
    plan = check_run(_timed(case, tmp), datetime.now())
    plan.run.release()  # it begins elsewhere
    return plan


def _shared(case: TrainCase, plan: Plan) -> None:
    """BadInput if a peer cannot share the case's work among its ranks."""
    experts, sequences = plan.placement.num_experts, case.cfg.batch.sequences
    for need, count, what in (
        (NEED_EXPERTS, experts, f"model {case.model!r} has {experts} experts"),
        (NEED_SHARES, sequences, f"batch.sequences={sequences}"),
    ):
        short = [p for p in case.peers if p in need and count % case.ranks]
        if short:
            left = ",".join(p for p in case.peers if p not in short)
            raise BadInput(
                f"bench train: --ranks={case.ranks}: {what}, which {', '.join(short)} cannot share evenly: give other "
                f"--ranks, or --peers={left}"
            )


def _write(case: TrainCase, tmp: str) -> tuple[str, ...]:
    """Put what contenders start from into `tmp`: config.yaml, model.pt, batches.npy; names of the experts modules."""
    cfg, plan = _timed(case, tmp), _plan(case, tmp)
    OmegaConf.save(cfg, f"{tmp}/config.yaml")
    model = meta_model(plan.config, case.dtype)
    modules = find_experts(model)
    rows = {name: list(range(plan.placement.num_experts)) for name in modules}
    if cfg.model.path:
        load_pretrained(model, directory(cfg.model.path, weights=True), rows)
    else:
        draw_weights(model, cfg.seed, rows)
    for module in modules.values():
        module.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    torch.save(model, f"{tmp}/model.pt")
    size = cfg.batch.sequences, cfg.batch.length
    batches = [global_batch(plan.corpus.train, cfg.seed, step, *size) for step in range(WARM_STEPS + case.steps)]
    np.save(f"{tmp}/batches.npy", np.stack(batches))
    return tuple(modules)


def _peer(result: TrainResult, name: str, tmp: str, experts: tuple[str, ...]) -> None:
    case = result.case
    processes = 1 if name == "plain" else case.ranks
    job = Job(
        peer=name,
        ranks=processes,
        threads=case.ranks // processes,
        malloc=case.malloc,
        model=f"{tmp}/model.pt",
        error=f"{tmp}/{name}.error",
        batches=f"{tmp}/batches.npy",
        optim=OmegaConf.to_container(OmegaConf.structured(_timed(case, tmp)).optim),  # type: ignore[arg-type]
        dtype=case.dtype,
        experts=experts,
        checkpointing=case.cfg.model.gradient_checkpointing,
    )
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # told in the table
    try:
        found = spawn(job, main)
    except (ProcessExitedException, ProcessRaisedException) as e:
        for figures in (result.seconds, result.losses, result.peak_mib):
            figures.pop(name, None)
        why = Path(job.error)
        result.failed[name] = brief(RuntimeError(why.read_text() if why.exists() else str(e)))
        return
    _add(result, name, found["seconds"][WARM_STEPS:], found["losses"], found["peak_mib"])


def _ours(result: TrainResult, tmp: str) -> None:
    """`ray-ep train` in a process of its own."""
    metrics = own_run(Path(tmp, "config.yaml"), "bench train").metrics
    counted = metrics[WARM_OURS:]
    for phases in (m.get("phase_seconds") or {} for m in counted):
        for name, seconds in phases.items():
            result.phases.setdefault(name, []).append(seconds)
    peaks = [m["peak_mib"] for m in metrics if m.get("peak_mib") is not None]
    _add(result, OURS, [m["step_seconds"] for m in counted], [m["loss"] for m in metrics], max(peaks, default=None))


def _add(result: TrainResult, name: str, seconds: list[float], losses: list[float], peak: float | None) -> None:
    result.seconds.setdefault(name, []).append(seconds)
    result.losses.setdefault(name, losses)
    if peak is not None:
        result.peak_mib[name] = max(result.peak_mib.get(name, 0), round(peak))


def _installed(peer: str) -> bool:
    return peer != "deepspeed" or importlib.util.find_spec("deepspeed") is not None


def _among(option: str, words: Iterable[str], allowed: Sequence[str]) -> None:
    for word in words:
        if word not in allowed:
            raise BadInput(f"bench train: {option}={word}: allowed are {', '.join(allowed)}")
