"""Low-rank adapters of experts (LoRA, arXiv 2106.09685): parameters of their experts module, so they move with it.

Beside a weight W [S, ...] lie A [S, r, in] and B [S, out, r]; a pass computes with W + scaling * B A, as PEFT does for
weights of experts that are fused in one tensor. S experts held, r rank.
"""

from __future__ import annotations

from typing import Any

import torch

from ray_ep.moe.exchange.steps import WithParameters

A, B = "lora_A_", "lora_B_"
"""What stands before a weight's name in those of its adapter."""


def attach(module: Any, name: str, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """Give the weight `name` of an experts module an adapter: a [S, r, in], b [S, out, r]; the weight is frozen."""
    module.get_parameter(name).requires_grad_(False)
    module.register_parameter(A + name, torch.nn.Parameter(a))
    module.register_parameter(B + name, torch.nn.Parameter(b))
    module.ray_ep_scaling = {**getattr(module, "ray_ep_scaling", {}), name: scaling}


def adapted(module: Any) -> Any:
    """What a pass computes with: the module, or one whose weights have their adapters added, with graph."""
    scaling: dict[str, float] = getattr(module, "ray_ep_scaling", {})
    if not scaling:
        return module
    every = dict(module.named_parameters(recurse=False))
    weights = {n: p for n, p in every.items() if not n.startswith((A, B))}
    for name, factor in scaling.items():
        left, right = every[B + name], every[A + name]
        if module.is_transposed:  # [S, in, out]
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        weights[name] = torch.baddbmm(weights[name], left, right, alpha=factor)
    return WithParameters(module, weights)
