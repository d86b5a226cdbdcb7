"""Tensors of several dtypes in one message, side by side: columns in and out. N rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def beside(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts [N, ...] of any dtypes -> uint8 [N, bytes], in one row what all of them have there."""
    return torch.cat([p.reshape(-1).view(torch.uint8).view(len(p), width(p)) for p in parts], 1)


def width(part: torch.Tensor) -> int:
    """Bytes of a row of [N, C]."""
    return part.shape[1] * part.element_size()


def columns(message: torch.Tensor, first: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns [..., first:end] of a message, seen as `dtype`; memory of their own.

    Not `contiguous`: of one row, or none, it gives the message's own memory, which need not begin where the dtype may.
    """
    return message[..., first:end].clone(memory_format=torch.contiguous_format).view(dtype)
