"""Cross entropy of a pass without a float32 copy of all its logits: a block of rows at a time.

Models are transformers' own and give logits; `torch.nn.functional.linear_cross_entropy` wants hidden states and the
head's weight, and knows no scaled or capped logits. T rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, nll_loss

WHOLE = 1 << 22
"""Logits. Up to so many are computed in one block: smaller blocks gain nothing."""

BLOCK = 1 << 20
"""Logits of a block on a CPU: its 4 MB in float32 stay in the cache, which gains more than reading twice costs."""

BLOCK_ELSEWHERE = 1 << 26
"""The same on other devices, where each block costs launches. Not measured yet."""


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`cross_entropy(logits.float(), targets, reduction="sum")` over all rows: a float32 scalar.

    Beside the logits and their gradient, each in the logits' dtype, it takes the memory of a few blocks. The gradient
    is torch's bit for bit, and so is the loss of one block; the losses of several are summed block by block.

    Args:
        logits: [..., V], floating.
        targets: [...] int64 below V; -100: the row counts nothing.
    """
    logits, targets = logits.flatten(0, -2), targets.flatten()  # [T, V], [T]
    rows = _rows(logits)
    if len(logits) <= rows:
        return cross_entropy(logits.float(), targets, reduction="sum")
    return _Blocks.apply(logits, targets, rows)  # type: ignore[no-any-return, no-untyped-call]


def _rows(logits: torch.Tensor) -> int:
    """Rows of a block: at least one a thread; a multiple of 8, so that each lies as aligned there as in the whole."""
    if logits.numel() <= WHOLE:
        return len(logits)
    cpu = logits.device.type == "cpu"
    wanted = max((BLOCK if cpu else BLOCK_ELSEWHERE) // logits.shape[1], torch.get_num_threads() if cpu else 1)
    return -(-wanted // 8) * 8


class _Blocks(torch.autograd.Function):
    """Forward the loss summed over blocks of rows; backward the gradient of each, from its logits again."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.rows = rows
        buffers, losses = _buffers(logits, rows, 2), []
        for x, t in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
            losses.append(nll_loss(_log_softmax(x, *(b[: len(x)] for b in buffers)), t, reduction="sum"))
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        buffers, out = _buffers(logits, ctx.rows, 3), torch.empty_like(logits)
        unused = gradient.new_ones(())  # the sum of weights, which only a mean is divided by
        for x, t, to in zip(*(y.split(ctx.rows) for y in (logits, targets, out)), strict=True):
            a, b, c = (buffer[: len(x)] for buffer in buffers)
            log_p = _log_softmax(x, a, b)
            into = to if to.dtype == torch.float32 else c
            torch.ops.aten.nll_loss_backward.grad_input(gradient, log_p, t, None, 2, -100, unused, grad_input=a)
            torch.ops.aten._log_softmax_backward_data.out(a, log_p, -1, torch.float32, out=into)
            if into is c:
                to.copy_(c)
        return out, None, None


def _buffers(logits: torch.Tensor, rows: int, number: int) -> torch.Tensor:
    """[number, rows, V] float32, used for every block: memory anew for each would cost more than the arithmetic."""
    return logits.new_empty((number, rows, logits.shape[1]), dtype=torch.float32)


def _log_softmax(x: torch.Tensor, copy: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Of a block [n, V], into `out`; in `copy` is its float32 form, where it has another."""
    return torch.log_softmax(x if x.dtype == torch.float32 else copy.copy_(x), -1, out=out)
