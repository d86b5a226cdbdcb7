"""Matrix products of the CPU layer, into buffers that exist, by one of the libraries that torch carries.

torch: torch.mm, which goes to MKL in float32 and to oneDNN in bfloat16. onednn: float32 by oneDNN too, which on some
processors gains a tenth and on others loses it. widened: bfloat16 is multiplied as float32 and rounded once, where
oneDNN has no bfloat16. Which is fastest is timed (measure.py); nothing is read from the machine at import.
"""

from __future__ import annotations

import functools

import torch

from ray_ep.moe.cpu import kernels
from ray_ep.moe.cpu.kernels import view
from ray_ep.moe.cpu.pool import Pool

LIBRARIES = {torch.float32: ("torch", "onednn"), torch.bfloat16: ("torch", "widened")}
"""What can multiply a dtype."""

_LARGE = 1 << 18
"""Elements of a weight from which on oneDNN's kernels for float32, and packing, are worth their compilation: it takes a
millisecond for every new number of rows."""

_ROWS = 32
"""Rows that weights are packed for: a layout that is good for few rows and for many (measured)."""

_REUSE = {torch.float32: 1 << 13, torch.bfloat16: 0}
"""Elements of a packed weight a row from which on it beats torch.mm, before that is timed: many rows repay that
torch.mm packs weights anew; in bfloat16 packed ones save a copy of the result (measured)."""

_ALIGN = 32
"""Rows that are multiplied by oneDNN, when they are many, are a multiple of this: new numbers miss its kernel cache."""

_FEW = 8
"""Rows up to which float32 weight gradients are written row by row, and widened weights row by row: MKL takes 2 to 3
times as long for the ones, and widening at once twice as long for the others (measured)."""

_AT_ONCE = 2048
"""Rows that are widened at once."""

_ONE = torch.ones(1)


class Gemm:
    """The products of one rank, with buffers that are free again after each.

    Attributes:
        library: by dtype, one of LIBRARIES; the same on all ranks once it was timed.
        reuse: by dtype, elements of a packed weight a row up to which torch.mm is faster than the packed weight.
    """

    def __init__(self) -> None:
        self.library = {torch.float32: "torch", torch.bfloat16: "torch" if has_bfloat16() else "widened"}
        self.reuse = dict(_REUSE)
        self._pool = Pool()

    def align(self, dtype: torch.dtype) -> int:
        """Of what the rows of a product should be a multiple, when they are many."""
        by_onednn = self.library.get(dtype) == ("onednn" if dtype == torch.float32 else "torch")
        return _ALIGN if by_onednn else 1

    def between(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the dtype that is best for what lies between two products of the dtype of `like`."""
        return _ONE if self._widens(like) else like

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, N] for products: itself, or a float32 copy in its layout where bfloat16 is multiplied as that."""
        if not self._widens(x):
            return x
        return self._float32(x).copy_(x) if x.stride(1) == 1 else self._float32(x.t()).copy_(x.t()).t()

    def mm(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """out [M, N] = a [M, K] @ b [K, N]; any layouts."""
        if self._widens(b):
            if len(a) <= _FEW and b.stride(0) == 1:
                kernels.few(*(view(x) for x in (a.contiguous(), b.t(), out)))
                return
            wide = self.widen(b)
            for rows, to in zip(_parts(a), _parts(out), strict=True):
                into = to if to.dtype == torch.float32 else self._float32(to)
                torch.mm(self.widen(rows), wide, out=into)
                to.copy_(into)
        elif self._by_onednn(a) and a.stride(1) == 1 and b.numel() >= _LARGE:
            out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""))
        else:
            torch.mm(a, b, out=out)

    def gradient(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        """out [M, N] = (or to add +=) a [n, M]^T @ b [n, N]: of a weight, from rows' inputs and outputs' gradients."""
        if self._widens(out):
            total = self._float32(out)
            for i, (rows, others) in enumerate(zip(_parts(a), _parts(b), strict=True)):
                torch.addmm(total, self.widen(rows).t(), self.widen(others), beta=min(i, 1), out=total)
            out.copy_(total.add_(out) if add else total)
        elif add:
            torch.addmm(out, a.t(), b, out=out)
        elif a.dtype == torch.float32 and len(a) <= _FEW:
            kernels.outer(a.numpy(), b.numpy(), out.numpy())
        else:
            torch.mm(a.t(), b, out=out)

    def takes_plain(self, weight: torch.Tensor, rows: int) -> bool:
        """Whether `rows` are multiplied by the plain weight [N, K] where it can be packed."""
        if self._widens(weight):
            return True
        return not self._by_onednn(weight) and weight.numel() <= self.reuse[weight.dtype] * rows

    def _by_onednn(self, x: torch.Tensor) -> bool:
        return x.dtype == torch.float32 and self.library[torch.float32] == "onednn"

    def _widens(self, x: torch.Tensor) -> bool:
        return x.dtype == torch.bfloat16 and self.library[torch.bfloat16] == "widened"

    def _float32(self, like: torch.Tensor) -> torch.Tensor:
        return self._pool.take(*like.shape, like=_ONE)


class Packed:
    """An expert weight [S, N, K] with a packed copy of each row that is used so: for weights that stay as they are.

    A copy is made at its first use: it doubles a row's memory. None if small, nor where oneDNN cannot pack the dtype.
    """

    def __init__(self, weight: torch.Tensor, gemm: Gemm):
        weight = weight.detach()
        self.rows = len(weight)
        self._gemm = gemm
        self._packs = is_large(weight[:1].numel()) and has_onednn() and _packs(weight.dtype)
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
        if not self._packs or self._gemm.takes_plain(plain, len(a)):
            self._gemm.mm(a, plain.t(), out)
            return
        if row not in self._packed:
            self._packed[row] = torch.ops.mkldnn._reorder_linear_weight(plain, _ROWS)
        out.copy_(torch.ops.mkldnn._linear_pointwise(a, self._packed[row], None, "none", [], ""))


def is_large(elements: int) -> bool:
    """Whether an expert's weight of so many elements is worth another library than torch.mm, or a packed copy."""
    return elements >= _LARGE


def has_onednn() -> bool:
    """Whether torch carries oneDNN here."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@functools.cache
def has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor; torch alone does at a tenth of float32's rate."""
    return not has_onednn() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of a dtype on this processor."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.ones(1, 1, dtype=dtype), _ROWS)
    except RuntimeError:
        return False
    return True


def _parts(x: torch.Tensor) -> list[torch.Tensor]:
    """Rows that are widened at once."""
    return list(x.split(_AT_ONCE))  # type: ignore[no-untyped-call]
