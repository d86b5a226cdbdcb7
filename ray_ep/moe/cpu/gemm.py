"""Matrix products of the CPU layer by the fastest library that torch carries, into buffers that exist.

torch.mm goes to MKL in float32, which with AVX512 leaves a tenth to oneDNN on AMD and has a tenth more on Intel
(docs/benchmarks.md); weights that do not change can be packed once for oneDNN, which then reads them at memory speed in
decode. oneDNN compiles a kernel for every new number of rows, which takes a millisecond: more than small matrices can
gain. Without AVX512 (or AVX-NE-CONVERT) it has no bfloat16, and torch multiplies that at a tenth of float32's rate: we
widen it, and round once.
"""

from __future__ import annotations

import functools
import threading

import torch

from ray_ep.moe.cpu import kernels
from ray_ep.moe.cpu.kernels import view
from ray_ep.moe.cpu.pool import Pool

_ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_INTEL = "Intel" in str(torch.cpu.get_capabilities().get("cpu_name"))
_FASTER = _ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512" and not _INTEL
"""Whether oneDNN beats MKL in float32: with AVX2 alone, or on Intel, it does not (measured)."""
_LARGE = 1 << 18
"""Elements of a weight from which on oneDNN's kernels are worth their compilation."""
_ROWS = 32
"""Rows that weights are packed for: a layout that is good for few rows and for many (measured)."""

_REUSE = {torch.float32: 1 << 13, torch.bfloat16: 1 << 11 if _INTEL else 0}
"""Elements of a weight a row from which on packed ones beat torch.mm, where oneDNN as such does not: many rows repay
that torch.mm packs weights anew, by up to a fifth; in bfloat16 they save a copy of the result (measured)."""

_ALIGN = 32
"""Rows that are multiplied by oneDNN, when they are many, are a multiple of this: new numbers miss its kernel cache."""

_FEW = 8
"""Rows up to which float32 weight gradients are written row by row, and widened weights row by row: MKL takes 2 to 3
times as long for the ones, and widening at once twice as long for the others (measured)."""

_WIDEN = _ONEDNN and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether products of bfloat16 are computed in float32."""
_AT_ONCE = 2048
"""Rows that are widened at once."""
_ONE = torch.ones(1)


class _Own(threading.local):
    """Buffers of one thread, free again after each product."""

    def __init__(self) -> None:
        self.pool = Pool()


_own = _Own()


def align(dtype: torch.dtype) -> int:
    """Of what the rows of a product should be a multiple, when they are many."""
    return _ALIGN if _FASTER or (dtype == torch.bfloat16 and not _WIDEN) else 1


def between(like: torch.Tensor) -> torch.Tensor:
    """A tensor of the dtype that is best for what lies between two products of the dtype of `like`."""
    return _ONE if _WIDEN and like.dtype == torch.bfloat16 else like


def widen(x: torch.Tensor) -> torch.Tensor:
    """x [M, N] for products: itself, or a float32 copy in its layout where bfloat16 is multiplied as that."""
    if not _WIDEN or x.dtype != torch.bfloat16:
        return x
    return _float32(x).copy_(x) if x.stride(1) == 1 else _float32(x.t()).copy_(x.t()).t()


def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out [M, N] = a [M, K] @ b [K, N]; any layouts."""
    if _WIDEN and b.dtype == torch.bfloat16:
        if len(a) <= _FEW and b.stride(0) == 1:
            kernels.few(*(view(x) for x in (a.contiguous(), b.t(), out)))
            return
        wide = widen(b)
        for rows, to in zip(a.split(_AT_ONCE), out.split(_AT_ONCE), strict=True):
            into = to if to.dtype == torch.float32 else _float32(to)
            torch.mm(widen(rows), wide, out=into)
            to.copy_(into)
    elif _FASTER and a.dtype == torch.float32 and a.stride(1) == 1 and b.numel() >= _LARGE:
        out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""))
    else:
        torch.mm(a, b, out=out)


def gradient(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """out [M, N] = (or to add +=) a [n, M]^T @ b [n, N]: of a weight, from rows' inputs and outputs' gradients."""
    if _WIDEN and out.dtype == torch.bfloat16:
        total = _float32(out)
        for i, (rows, others) in enumerate(zip(a.split(_AT_ONCE), b.split(_AT_ONCE), strict=True)):
            torch.addmm(total, widen(rows).t(), widen(others), beta=min(i, 1), out=total)
        out.copy_(total.add_(out) if add else total)
    elif add:
        torch.addmm(out, a.t(), b, out=out)
    elif a.dtype == torch.float32 and len(a) <= _FEW:
        kernels.outer(a.numpy(), b.numpy(), out.numpy())
    else:
        torch.mm(a.t(), b, out=out)


def _float32(like: torch.Tensor) -> torch.Tensor:
    return _own.pool.take(*like.shape, like=_ONE)


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of a dtype on this processor."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.ones(1, 1, dtype=dtype), _ROWS)
    except RuntimeError:
        return False
    return True


class Packed:
    """An expert weight [S, N, K] with a packed copy of each row that is used so: for weights that stay as they are.

    A copy is made at its first use: it doubles a row's memory. None if small, nor where oneDNN cannot pack the dtype.
    """

    def __init__(self, weight: torch.Tensor):
        weight = weight.detach()
        self.rows = len(weight)
        self._packs = _ONEDNN and weight[:1].numel() >= _LARGE and _packs(weight.dtype)
        self._plain = list(weight)
        self._packed: dict[int, torch.Tensor] = {}

    def append(self, weight: torch.Tensor) -> None:
        """One more row [N, K]."""
        self._plain.append(weight.detach())
        self.rows += 1

    def cut(self, rows: int) -> None:
        """Give up all rows but the first."""
        del self._plain[rows:]
        self._packed = {row: packed for row, packed in self._packed.items() if row < rows}
        self.rows = rows

    def mm(self, a: torch.Tensor, row: int, out: torch.Tensor) -> None:
        """out [M, N] = a [M, K] @ weight[row].t()."""
        plain = self._plain[row]
        if not self._packs or (not _FASTER and plain.numel() <= _REUSE[a.dtype] * len(a)):
            mm(a, plain.t(), out)
            return
        if row not in self._packed:
            self._packed[row] = torch.ops.mkldnn._reorder_linear_weight(plain, _ROWS)
        out.copy_(torch.ops.mkldnn._linear_pointwise(a, self._packed[row], None, "none", [], ""))
