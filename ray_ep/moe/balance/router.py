"""Balancing of the router over the global batch: auxiliary losses, z-loss, correction-bias updates.

T tokens, E experts, K top_k, L layers. Sums over ranks of what is returned are the figures of the global batch.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ray_ep.collective import Group
from ray_ep.moe.counters import bincount


@dataclass(frozen=True, slots=True)
class RouterLosses:
    """This rank's share of the router losses (scalars): summed over ranks they are the global ones."""

    aux: torch.Tensor
    z: torch.Tensor


def router_losses(
    logits: list[torch.Tensor | None],
    load: torch.Tensor,
    routers: list[torch.nn.Module | None],
    group: Group,
    tokens: int,
    kind: str = "layer",
    top_k: int = 0,
    graph: tuple[bool, bool] = (True, True),
) -> RouterLosses:
    """Losses of one forward pass (collective).

    Args:
        logits: [T, E] a layer, of this rank's T tokens.
        load: [L, E] tokens that this rank sent to each expert in the same pass.
        tokens: tokens of the pass over all ranks.
        kind: layer: sum over layers of E * sum_e f_e P_e, with f_e the share of tokens that chose e and P_e its mean
            probability, both over the global batch (Switch Transformer eq. 4, per layer; K at perfect balance);
            pooled: the same over the tokens of all layers together; transformers: pooled, of the softmax and the
            first `top_k` experts of the logits whatever the router does, as load_balancing_loss_func; off.
        graph: whether aux and z are to have a gradient; one that is only reported costs half without.
    """
    if kind == "transformers":
        load = torch.stack([_first_choices(x, load[i], top_k) for i, x in enumerate(logits)])
        routers = [None] * len(routers)  # softmax for all
    load = load.to(torch.float32, copy=True)
    group.all_reduce(load)
    zero = load.new_zeros(())
    found = [(i, x) for i, x in enumerate(logits) if x is not None]
    aux_graph, z_graph = (nullcontext() if wanted else torch.no_grad() for wanted in graph)
    with z_graph:
        z = sum((torch.logsumexp(x.float(), -1).square().sum() / tokens for _, x in found), zero) / max(len(found), 1)
    if kind == "off" or not found:
        return RouterLosses(zero, z)
    experts = load.shape[1]
    with aux_graph:  # layer by layer: twice as fast as all logits in one tensor, for many layers and experts
        mean_prob = torch.stack([probabilities(x, routers[i]).sum(0) for i, x in found]) / tokens  # [L, E] of this rank
    share = torch.stack([load[i] for i, _ in found]) / tokens  # [L, E]
    if kind in ("pooled", "transformers"):
        return RouterLosses(experts * (share.mean(0) * mean_prob.mean(0)).sum(), z)
    return RouterLosses(experts * (share * mean_prob).sum(), z)


def _first_choices(logits: torch.Tensor | None, load: torch.Tensor, top_k: int) -> torch.Tensor:
    """[E] how many tokens have an expert among their `top_k` largest logits [T, E]; zeros like `load` without any."""
    if logits is None:
        return torch.zeros_like(load)
    return bincount(logits.detach().topk(top_k).indices.flatten(), len(load)).to(load)


def probabilities(logits: torch.Tensor, router: torch.nn.Module | None) -> torch.Tensor:
    """[T, E] as the router scores: softmax, or normalised sigmoids for routers with a correction bias (DeepSeek-V3)."""
    if correction_bias(router) is None:
        return torch.softmax(logits.float(), -1)
    scores = torch.sigmoid(logits.float())
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


def correction_bias(router: torch.nn.Module | None) -> torch.Tensor | None:
    """The router's bias for choosing experts (not for weighting them), if it has one."""
    return getattr(router, "e_score_correction_bias", None)


@torch.no_grad()
def update_bias(routers: list[torch.nn.Module | None], load: torch.Tensor, rate: float) -> int:
    """Auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    Raises the bias of experts under the mean load, lowers it above. `load` [L, E] is that of the whole step, so every
    rank does the same. Returns the number of routers updated.
    """
    updated = 0
    for index, router in enumerate(routers):
        bias = correction_bias(router)
        if bias is not None and rate > 0:
            now = load[index].to(torch.float32)
            bias += rate * torch.sign(now.mean() - now).to(bias)
            updated += 1
    return updated
