"""The torch paths of kernels.py: the same functions on any device, for a CUDA without Triton, CPUs, and as the oracle.

Arithmetic is float32, or float64 for float64. N rows, P pairs, H hidden, F ffn, S experts; "sorted" pairs are grouped
by expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def swiglu(gate_up: torch.Tensor, weight: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """h [P, F] = weight * silu(gate) * up, rounded once to the dtype of gate_up.

    Args:
        gate_up: [P, 2F] of the sorted pairs, gate first.
        weight: [P] of the pairs as they came, any float dtype. pair: int64 [P], the pair in each sorted place.
    """
    gate, up = _wide(gate_up).chunk(2, 1)
    return (_wide(weight[pair])[:, None] * (gate * torch.sigmoid(gate)) * up).to(gate_up.dtype)


def swiglu_backward(
    gate_up: torch.Tensor, weight: torch.Tensor, pair: torch.Tensor, dh: torch.Tensor, d_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """From dh [P, F], the gradient of `swiglu`: d_gate_up [P, 2F], and h [P, F] once more.

    Args:
        d_weight: [P] of the pairs as they came; those in `pair` are written.
    """
    gate, up = _wide(gate_up).chunk(2, 1)
    w, d, s = _wide(weight[pair])[:, None], _wide(dh), torch.sigmoid(gate)
    silu = gate * s
    d_weight[pair] = (d * silu * up).sum(1).to(d_weight.dtype)
    d_gate_up = torch.cat([d * w * up * (s * (1 + gate * (1 - s))), d * w * silu], 1)
    return d_gate_up.to(gate_up.dtype), (w * silu * up).to(gate_up.dtype)


def segment_sum(parts: Sequence[torch.Tensor], start: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """out [N, H], row i being the sum of rows[member[start[i]:start[i + 1]]], in this order and rounded once.

    Args:
        parts: one or two tensors [., H] that make up `rows`, one after the other.
        start: int64 [N + 1], ascending. member: int64, numbers of rows.
    """
    rows = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if not len(member):
        return rows.new_zeros(len(start) - 1, rows.shape[1])
    picked = _wide(rows.index_select(0, member))
    return torch.segment_reduce(picked, "sum", offsets=start, axis=0, unsafe=True).to(rows.dtype)


def zero_empty(out: torch.Tensor, ends: torch.Tensor) -> None:
    """Write zeros to the experts of out [S, ...] that have no pairs. ends: int32 [S], one past each expert's last."""
    empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    out.masked_fill_(empty.view(-1, *[1] * (out.dim() - 1)), 0)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
