"""The peer LLEP (Least-Loaded Expert Parallelism, arXiv 2601.17111), run from a clone of its repository.

What differs: LLEP computes gpt-oss experts (clamped SwiGLU with biases), our layer in the table Qwen3-MoE's (neither);
the GEMMs are the same, and `twin` is our layer on LLEP's own experts, weights included. Nothing of LLEP is in here.
T tokens, H hidden, K top_k, E experts, R ranks.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ray_ep.bench.contenders import WORKS, Work
from ray_ep.bench.layer import LayerCase
from ray_ep.collective import Group
from ray_ep.errors import BadInput
from ray_ep.moe import parallelize

REPOSITORY = "github.com/SalesforceAIResearch/LeastLoadedEP"
"""Where a user gets LLEP."""

FILES = ("llep/utils.py", "llep/gpt_oss_llep.py")
"""LLEP's files that are imported; a folder without one of them is refused."""

THRESHOLD = 1.1
"""LLEP balances from this max/mean load of ranks on; its README has 1.3."""
MIN_TOKENS = 64
"""Fewest tokens that LLEP moves; its own 1024 (for GPUs) is an eighth of all choices of work A on two ranks."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A contender of `ray-ep bench layer --routing`."""

    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x [T, H], index [T, K], weights
    parameters: list[torch.nn.Parameter]
    weights: Callable[[torch.Tensor], torch.Tensor]  # index [T, K] -> what `call` takes as weights; not timed


def even(index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, K] equal weights for index [T, K]."""
    return torch.full(index.shape, 1 / index.shape[1], dtype=dtype)


def ours(module: Any, dtype: torch.dtype) -> Layer:
    """A parallelized block's experts."""
    return Layer(module.experts, list(module.parameters()), lambda index: even(index, dtype))


def check_llep(folder: str, cases: list[LayerCase]) -> None:
    """Raises BadInput: a folder without the package `llep`, or ranks that it cannot share the experts among."""
    missing = [name for name in FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise BadInput(f"--llep={folder}: no {missing[0]} there: expected a git clone of {REPOSITORY}")
    for case in cases:
        experts = WORKS[case.work].experts
        if experts % case.ranks:
            raise BadInput(
                f"--llep with --ranks={case.ranks}: work {case.work} has {experts} experts; LLEP needs a divisor"
            )


def block(work: Work, dtype: torch.dtype) -> Any:
    """A gpt-oss block with seeded weights, the same in every process."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(
        hidden_size=work.hidden,
        intermediate_size=work.ffn,
        num_local_experts=work.experts,
        num_experts_per_tok=work.top_k,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(1)
    module = GptOssMLP(config)  # type: ignore[no-untyped-call]
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return module.to(dtype)


def twin(work: Work, group: Group, dtype: torch.dtype) -> Layer:
    """Our layer, with balance inside the step, on the experts that LLEP computes."""
    return ours(parallelize(block(work, dtype), group, balance="auto"), dtype)


def peer(folder: str, work: Work, group: Group, dtype: torch.dtype, backward: bool) -> tuple[Layer, Layer]:
    """LLEP with its balancer on and off (collective: it makes process groups of its own).

    Its switches are set as its modules keep them after a look at the environment.
    """
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from llep import gpt_oss_llep, utils

    logging.getLogger("llep").setLevel(logging.ERROR)  # else it tells its arguments
    gpt_oss_llep.LLEP_W_TRANSFER_AUTOGRAD = backward  # its other way to send weights has no gradient and less to do
    ranks = list(range(group.size))
    tokens_travel, weights_travel = dist.new_group(ranks), dist.new_group(ranks)
    utils.set_ep_group(tokens_travel)
    utils.set_moe_weight_transfer_group(weights_travel)
    whole, held = block(work, dtype).experts, work.experts // group.size
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    mine = slice(group.rank * held, (group.rank + 1) * held)
    parameters = [torch.nn.Parameter(getattr(whole, name).data[mine].clone()) for name in names]
    options = {"limit": whole.limit, "alpha": whole.alpha, "max_tokens_factor": 1.0, "min_tokens_per_gemm": MIN_TOKENS}

    def weights(index: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(index), work.experts, dtype=dtype).scatter_(1, index, even(index, dtype))  # [T, E]

    def layer(threshold: float) -> Layer:
        def call(x: torch.Tensor, index: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
            utils.MOE_ADAPTIVE_LPT_ROUTING_RATIO = threshold
            forward = gpt_oss_llep.gptoss_llep_forward
            out: torch.Tensor = forward(
                x[None], index, dense, *parameters, work.experts, held, tokens_travel, **options
            )
            return out[0]

        return Layer(call, parameters, weights)

    return layer(THRESHOLD), layer(math.inf)
