"""How rows travel in the fused body: tokens there, partial sums back, and in backward gradients the same ways.

Orders and sizes are the plan's (plan.py), products are not here. T tokens, K top_k, H hidden, N rows received, P pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ray_ep.moe.cpu import kernels
from ray_ep.moe.cpu.kernels import view
from ray_ep.moe.cpu.plan import FusedPlan
from ray_ep.moe.exchange.float8 import pack, unpack


def collect(tokens: torch.Tensor, plan: FusedPlan, forward: bool) -> torch.Tensor:
    """tokens [T, H] -> X [N, H]: others' copies by exchange, own ones by a gather (collective)."""
    plan.traffic.meter.enter("pack")
    pool, sizes, out, n = plan.pool, plan.sizes, plan.order.others, plan.others_in
    there, own = plan.order.token[:out], plan.order.token[out:]
    x = pool.take(n + len(own), tokens.shape[1], like=tokens)
    if forward and plan.float8:
        codes, theirs = pack(tokens), plan.gathered
        if theirs is None:
            theirs = plan.traffic.all_to_all(codes[there], sizes.rows_out, sizes.rows_in)
        x[:n], x[n:] = unpack(theirs, x.dtype), unpack(codes[own], x.dtype)
        return x
    if forward and plan.gathered is not None:
        x[:n] = plan.gathered
    else:
        send = torch.index_select(tokens, 0, there, out=pool.take(out, tokens.shape[1], like=tokens))
        plan.traffic.all_to_all(send, sizes.rows_out, sizes.rows_in, x[:n])
    torch.index_select(tokens, 0, own, out=x[n:])
    return x


def send_back(partial: torch.Tensor, rows: torch.Tensor, like: torch.Tensor, plan: FusedPlan) -> torch.Tensor:
    """Others' partial sums go home; each token's own rows and what came back for it are added: [T, H] (collective)."""
    back = plan.pool.take(plan.order.others, like.shape[1], like=like)
    plan.traffic.all_to_all(partial, plan.sizes.rows_in, plan.sizes.rows_out, back)
    return _add_up(rows, back, like, plan)


def send_home(
    partial: torch.Tensor, rows: torch.Tensor, d_weight: np.ndarray, d_out: torch.Tensor, weights: Any, plan: FusedPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the tokens [T, H] and of the pair weights [T, K] (collective).

    Args:
        partial: [others in, H], one sum a row of X that others sent. rows: one row a pair, sorted by expert.
        d_weight: of each sorted pair. d_out: [T, H], for its shape. weights: shape and dtype of the weights.
    """
    sizes = plan.sizes
    by_pair = torch.from_numpy(d_weight[plan.by_expert.place])
    if plan.gathered is None:
        d_hidden = send_back(partial, rows, d_out, plan)
        home = plan.traffic.all_to_all(by_pair[: sum(sizes.pairs_in)], sizes.pairs_in, sizes.pairs_out)
    else:
        back, home = _one_message(partial, by_pair, d_out, plan)
        d_hidden = _add_up(rows, back, d_out, plan)
    shape, dtype = weights
    out = torch.zeros(shape, dtype=torch.float32).view(-1)
    out[torch.from_numpy(plan.order.pair)] = torch.cat([home, by_pair[sum(sizes.pairs_in) :]])
    return d_hidden, out.view(shape).to(dtype)


def _add_up(rows: torch.Tensor, back: torch.Tensor, like: torch.Tensor, plan: FusedPlan) -> torch.Tensor:
    out = plan.pool.take(*like.shape, like=like)
    ours = plan.by_expert
    kernels.sum_two(view(rows), ours.own_start, ours.place, view(back), *plan.order.back, view(out))
    return out


def _one_message(
    partial: torch.Tensor, by_pair: torch.Tensor, like: torch.Tensor, plan: FusedPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of rows and gradients of pair weights go home in one exchange: for few tokens each costs its latency.

    Returns the rows that came back [others out, H] and the pairs' gradients [sum(pairs_out)].
    """
    sizes, row = plan.sizes, like.shape[1] * like.element_size()
    give = [row * r + 4 * p for r, p in zip(sizes.rows_in, sizes.pairs_in, strict=True)]
    take = [row * r + 4 * p for r, p in zip(sizes.rows_out, sizes.pairs_out, strict=True)]
    rows = _split(view(partial).reshape(-1).view(np.uint8), [row * r for r in sizes.rows_in])
    gradients = _split(by_pair.numpy().view(np.uint8)[: 4 * sum(sizes.pairs_in)], [4 * p for p in sizes.pairs_in])
    message = torch.cat([part for block in zip(rows, gradients, strict=True) for part in block])
    parts = _split(plan.traffic.all_to_all(message, give, take).numpy(), take)
    at = [row * r for r in sizes.rows_out]
    back = torch.cat([part[:n] for part, n in zip(parts, at, strict=True)])
    back = back.view(like.dtype).view(plan.order.others, like.shape[1])
    home = torch.cat([part[n:] for part, n in zip(parts, at, strict=True)])
    return back, torch.from_numpy(home.numpy().view(np.float32))


def _split(data: np.ndarray, sizes: list[int]) -> list[torch.Tensor]:
    """uint8 [sum(sizes)] cut into views."""
    return list(torch.from_numpy(data).split(sizes))  # type: ignore[no-untyped-call]
