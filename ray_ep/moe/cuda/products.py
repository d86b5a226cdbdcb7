"""Products of sorted rows with each expert's weight: torch's grouped kernel where it has one, else one product each.

P sorted pairs, S experts, ends [S] one past each expert's last pair.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import grouped_mm

_GROUPED = (9, 10)
"""Major compute capabilities with torch's grouped kernel: Hopper, Blackwell."""

_GROUPS = 1024
"""Groups that torch's kernel refuses, and more."""


class Groups:
    """Sorted rows, cut into experts.

    Args:
        ends: int32 [S] on the device, the last one P.
        on_host: the same numbers where torch has no grouped kernel; None where it has one.
        kernels: what `kernels_for` gives for the device.
    """

    def __init__(self, ends: torch.Tensor, on_host: list[int] | None, kernels: Any):
        self.ends, self.grouped, self._kernels = ends, on_host is None, kernels
        self._cuts = list(pairwise([0, *(on_host or ())]))

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [P, K], weight [S, N, K] -> [P, N], each row times the transpose of its expert's weight."""
        return self.times(x, weight.transpose(1, 2))

    def times(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [P, K], weight [S, K, N] -> [P, N], each row times its expert's weight."""
        if self.grouped and len(x):
            return grouped_mm(x, weight, offs=self.ends)
        out = x.new_empty(len(x), weight.shape[2])
        for w, (first, end) in zip(weight, self._cuts, strict=False):
            if first < end:
                torch.mm(x[first:end], w, out=out[first:end])
        return out

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a [P, M], b [P, N] -> [S, M, N], the products of each expert's rows; zeros for one without."""
        if self.grouped and len(a):
            # Only of this layout (columns of a, rows of b) the kernel takes empty groups; and on Blackwell it leaves
            # what it likes in theirs (pytorch 172439).
            out = grouped_mm(a.t(), b, offs=self.ends)
            self._kernels.zero_empty(out, self.ends)
            return out
        if not len(a):
            return a.new_zeros(len(self.ends), a.shape[1], b.shape[1])
        out = a.new_empty(len(self.ends), a.shape[1], b.shape[1])
        for into, (first, end) in zip(out, self._cuts, strict=True):
            torch.mm(a[first:end].t(), b[first:end], out=into)  # of no rows: zeros
        return out


def has_grouped_kernel(like: torch.Tensor, groups: int) -> bool:
    """Whether torch multiplies all groups at once for this dtype and device.

    Elsewhere its own path reads the ends on the host anew for each product: `Groups` gets them read once for all.
    """
    if not like.is_cuda or like.dtype != torch.bfloat16 or groups >= _GROUPS:
        return False
    return torch.cuda.get_device_capability(like.device)[0] in _GROUPED
