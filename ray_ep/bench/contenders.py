"""The MoE layers that are compared: ours, transformers' all-to-all expert parallelism, DeepSpeed's MoE, and the floor.

Each is built on the same weights, tokens and routing, from a Qwen3-MoE block; DeepSpeed routes with its own gate and
drops over capacity, so it does a little less work. Needs an initialised gloo process group.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ray_ep.collective import Group
from ray_ep.moe import choose, parallelize

TimedCall = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Work:
    """One layer's work: tokens of a rank, hidden, ffn of an expert, experts, top_k."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int


WORKS = {
    "A": Work(2048, 512, 1024, 16, 2),
    "B": Work(4096, 1024, 512, 64, 8),
    "C": Work(16, 512, 1024, 16, 2),
    "G": Work(16384, 2048, 768, 128, 8),
}
"""Sizes of the layer that is measured, by the name that --work takes."""


def block(work: Work, dtype: torch.dtype) -> Any:
    """A Qwen3-MoE block with seeded weights, the same in every process."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=work.hidden,
        moe_intermediate_size=work.ffn,
        num_experts=work.experts,
        num_experts_per_tok=work.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(1)
    module = Qwen3MoeSparseMoeBlock(config)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return module.to(dtype)


def tokens(work: Work, rank: int, dtype: torch.dtype, backward: bool) -> torch.Tensor:
    """[1, T, H] of one rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(1, work.tokens, work.hidden, generator=generator).to(dtype)
    return x.requires_grad_(backward)


def steps(module: torch.nn.Module, x: torch.Tensor, backward: bool) -> TimedCall:
    """One call of a block on x [1, T, H], with its gradients dropped afterwards."""

    def step() -> None:
        with torch.set_grad_enabled(backward):
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            if backward:
                y.float().square().mean().backward()
                for p in module.parameters():
                    p.grad = None

    return step


def ours(work: Work, group: Group, dtype: torch.dtype, backward: bool) -> tuple[TimedCall, Any]:
    """ray_ep's layer, contiguous placement, exchange chosen by measurement; counting of statistics included.

    Also returns the block.
    """
    module = parallelize(block(work, dtype), group)
    x = tokens(work, group.rank, dtype, backward)
    packed = contextlib.nullcontext() if backward else module.ray_ep.inference()  # weights stay as they are: pack once
    packed.__enter__()
    step = steps(module, x, backward)
    with module.ray_ep.capturing(0) as capture:
        step()
    choose(module.ray_ep, capture.work, 0, {"gloo": group}, backward=backward)  # as a run does at its start
    module.bench_packed = packed  # let go of, it would end
    return step, module


def transformers(work: Work, group: Group, dtype: torch.dtype, backward: bool) -> tuple[TimedCall, Any]:
    """transformers' own `AllToAllEP`: static, contiguous, a token sent once for each of its experts."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import AllToAllEP

    module = block(work, dtype)
    experts, n = module.experts, work.experts // group.size
    for name in ("gate_up_proj", "down_proj"):
        part = getattr(experts, name).data[group.rank * n : (group.rank + 1) * n].clone()
        setattr(experts, name, torch.nn.Parameter(part))
    experts.num_experts, experts._is_expert_parallel = n, True
    mesh = init_device_mesh("cpu", (group.size, 1), mesh_dim_names=("ep", "tp"))
    exchange = AllToAllEP(experts, mesh["ep"], mesh["tp"])
    experts.forward = lambda *args: exchange(*args)
    return steps(module, tokens(work, group.rank, dtype, backward), backward), module


def deepspeed(work: Work, group: Group, dtype: torch.dtype, backward: bool) -> tuple[TimedCall, Any]:
    """DeepSpeed's MoE layer (the `bench` extra), capacity factor 1.25 with drops."""
    import deepspeed as ds
    from deepspeed.moe.layer import MoE

    class SwiGLU(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(work.hidden, 2 * work.ffn, bias=False)
            self.down = torch.nn.Linear(work.ffn, work.hidden, bias=False)

        def forward(self, x: torch.Tensor) -> Any:
            gate, up = self.up(x).chunk(2, -1)
            return self.down(torch.nn.functional.silu(gate) * up)

    ds.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    options = {"num_experts": work.experts, "ep_size": group.size, "k": work.top_k, "use_rts": False}
    module = MoE(work.hidden, SwiGLU(), capacity_factor=1.25, drop_tokens=True, **options).to(dtype)
    module.set_deepspeed_parallelism()
    return steps(module, tokens(work, group.rank, dtype, backward), backward), module


def floor(work: Work, group: Group, dtype: torch.dtype) -> Callable[[], float]:
    """One timing of the work's GEMMs alone, in seconds of a forward: FLOPs over torch's best rate on its shapes.

    From and into buffers that exist, each expert's rows as balanced routing gives them; a backward counts as twice.
    In bfloat16 that is the rate in float32 where it is higher: on processors without bfloat16.
    """
    rows = max(1, work.tokens * work.top_k * group.size // work.experts)
    generator = torch.Generator().manual_seed(3)

    def of(dtype: torch.dtype, held: int) -> Callable[[], float]:
        def make(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype) * 0.02

        x, h = make(rows, work.hidden), make(rows, work.ffn)
        up, down = make(held, 2 * work.ffn, work.hidden), make(held, work.hidden, work.ffn)
        g, y = make(rows, 2 * work.ffn), make(rows, work.hidden)

        def once() -> float:
            start = time.perf_counter()
            for e in range(held):
                torch.mm(x, up[e].t(), out=g)
                torch.mm(h, down[e].t(), out=y)
            return time.perf_counter() - start

        return once

    best = min({dtype, torch.float32}, key=lambda kind: min(of(kind, 1)() for _ in range(2)))
    return of(best, work.experts // group.size)


LAYER_PEERS: dict[str, Callable[..., tuple[TimedCall, Any]]] = {
    "ray_ep": ours,
    "transformers": transformers,
    "deepspeed": deepspeed,
}
"""What makes a step and a module of each contender of `bench layer`, by its name."""
