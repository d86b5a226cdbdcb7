"""Adapters of a model: PEFT's own on its modules, ours on its experts; and the adapter that PEFT reads.

E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ray_ep.config.sections.lora import LoraConfig
from ray_ep.errors import ModelError, brief
from ray_ep.moe import find_experts
from ray_ep.moe.adapters import attach


def adapt(model: Any, cfg: LoraConfig, seed: int, rows: Mapping[str, list[int]] | None = None) -> None:
    """Give a model adapters, which alone are trained from now on; the same on every rank for a seed. Not collective.

    Args:
        rows: experts in the rows of each experts module, by its name; None: all.

    Raises:
        ModelError: a target is nowhere in the model.
    """
    meta = next(model.parameters()).is_meta
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if cfg.targets:
            _adapt_modules(model, cfg, meta)
        if cfg.target_parameters:
            _adapt_experts(model, cfg, rows)
    model.ray_ep_base = [n for n, p in model.named_parameters() if not p.requires_grad]


def peft_config(cfg: LoraConfig, base: str | None = None, experts: bool = True) -> Any:
    """PEFT's configuration of the same adapters.

    Args:
        base: directory of the model, for others to know it by. experts: those of experts, too.
    """
    from peft import LoraConfig as PeftConfig

    alpha: Any = cfg.alpha  # PEFT says int, and takes any number
    parameters = list(cfg.target_parameters) if experts else []
    return PeftConfig(
        r=cfg.rank, lora_alpha=alpha, lora_dropout=cfg.dropout, task_type="CAUSAL_LM",
        target_modules=list(cfg.targets), target_parameters=parameters or None, base_model_name_or_path=base,
    )  # fmt: skip


def _adapt_modules(model: Any, cfg: LoraConfig, meta: bool) -> None:
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise ModelError("lora.rank needs the peft package: pip install 'ray_ep[lora]'") from None
    try:
        inject_adapter_in_model(peft_config(cfg, experts=False), model, low_cpu_mem_usage=meta)
    except ValueError as e:
        raise ModelError(f"lora.targets={list(cfg.targets)}: {brief(e)}") from None


def _adapt_experts(model: Any, cfg: LoraConfig, rows: Mapping[str, list[int]] | None) -> None:
    modules, found = find_experts(model), set()
    for name, module in modules.items():
        total = len(next(module.parameters(recurse=False))) if rows is None else _experts(module)
        for key, weight in list(module.named_parameters(recurse=False)):
            target = next((t for t in cfg.target_parameters if f".{name}.{key}".endswith(f".{t}")), None)
            if target is None or weight.dim() != 3:
                continue
            found.add(target)
            wide, out = weight.shape[1:] if module.is_transposed else weight.shape[:0:-1]
            drawn = (torch.rand(total, cfg.rank, wide) * 2 - 1) / wide**0.5  # as PEFT: kaiming_uniform_(a=sqrt(5))
            mine = drawn if rows is None else drawn[rows[name]]
            b = weight.data.new_zeros(len(weight), out, cfg.rank)
            attach(module, key, mine.to(weight.device, weight.dtype), b, cfg.alpha / cfg.rank)
    if lost := [t for t in cfg.target_parameters if t not in found]:
        name, module = next(iter(modules.items()))
        there = [f"{name}.{key}" for key, p in module.named_parameters(recurse=False) if p.dim() == 3]
        raise ModelError(
            f"lora.target_parameters={lost[0]!r} is no weight of this model's experts; they are {', '.join(there)}, "
            "of which the end is enough"
        )


def _experts(module: Any) -> int:
    """E, of a module that was cut down to some of them."""
    total: int = module.ray_ep_layer.num_experts
    return total
