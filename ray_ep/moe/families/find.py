"""Which modules of a transformers model hold experts, and which routers. Changes nothing."""

from __future__ import annotations

import torch

from ray_ep.errors import ModelError

_FLAGS = ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel")


def find_experts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Experts modules of a model by dotted name, in forward order; raises ModelError if there are none."""
    found = {name: m for name, m in model.named_modules() if is_experts(m) or is_llama4(m)}
    if not found:
        other = [type(m).__name__ for _, m in model.named_modules() if type(m).__name__.endswith("Experts")]
        why = f" (its {other[0]} does not go through transformers' experts interface)" if other else ""
        raise ModelError(
            f"{type(model).__name__} has no experts that ray_ep can place{why}: "
            "it needs a Mixture-of-Experts model such as qwen3_moe, mixtral, deepseek_v3 or gpt_oss"
        )
    return found


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module was decorated with transformers' use_experts_implementation."""
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module, "num_experts")


def is_llama4(module: torch.nn.Module) -> bool:
    """Whether a module holds Llama 4's experts, adapted or not."""
    return any(c.__name__ == "Llama4TextExperts" for c in type(module).__mro__)


def find_router(model: torch.nn.Module, experts_name: str) -> torch.nn.Module | None:
    """The router beside an experts module: the sibling that transformers names gate or router."""
    parent = model.get_submodule(experts_name.rpartition(".")[0])
    for name in ("gate", "router"):
        router = getattr(parent, name, None)
        if isinstance(router, torch.nn.Module):
            return router
    return None
