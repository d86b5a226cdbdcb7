"""Tokens in 8 bits on the wire: e4m3 with one float32 scale a token, as DeepSeek-V3's dispatch (arXiv 2412.19437, 3.3).

Only what is dispatched in forward is rounded; partial sums and all gradients travel in the model's dtype. H hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from ray_ep.moe.exchange.columns import beside, columns

_SCALE = 4
"""Bytes of a row's scale, which lies before its codes."""


def pack(rows: torch.Tensor) -> torch.Tensor:
    """rows [N, H] -> uint8 [N, 4 + H]."""
    top = torch.finfo(torch.float8_e4m3fn).max
    scale = (rows.detach().abs().amax(1, keepdim=True).float() / top).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (rows.detach().float() / scale).to(torch.float8_e4m3fn)
    return beside([scale, codes])


def unpack(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `pack`, rounded: [N, H] of `dtype`."""
    scale = columns(packed, 0, _SCALE, torch.float32)
    return (columns(packed, _SCALE, packed.shape[1], torch.float8_e4m3fn).float() * scale).to(dtype)


class Rounded(torch.autograd.Function):
    """Rows that do not travel, rounded as if they did: forward what `unpack` gives, backward the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return unpack(pack(rows), rows.dtype)

    @staticmethod
    def backward(ctx: Any, d_rows: torch.Tensor) -> torch.Tensor:
        return d_rows
