"""Memory that is kept between steps: fresh large tensors cost more in page faults than the work done in them."""

from __future__ import annotations

import math

import torch

from ray_ep.collective.mailboxes import is_free


class Pool:
    """CPU buffers that are handed out again once nothing refers to them: no view, no graph, no NumPy array.

    So what a forward saves is never shared with another forward, whatever the order of backward passes.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def take(self, *shape: int, like: torch.Tensor) -> torch.Tensor:
        """An unwritten tensor of `shape` with the dtype of `like`."""
        size = math.prod(shape) * like.element_size()
        if size < 1 << 16:
            return torch.empty(shape, dtype=like.dtype)
        fits = [b for b in self._buffers if size <= len(b) <= size + size // 2 and is_free(b)]
        if fits:
            buffer = min(fits, key=len)
        else:
            self._drop_free(size)
            buffer = torch.empty(size + size // 8, dtype=torch.uint8)  # room for a little more next time
            self._buffers.append(buffer)
        return buffer[:size].view(like.dtype).view(shape)

    def _drop_free(self, size: int) -> None:
        """Before growing, give up free buffers of other sizes, as many as the new one needs."""
        for b in sorted((b for b in self._buffers if is_free(b)), key=len):
            if size <= 0:
                return
            size -= len(b)
            self._buffers = [x for x in self._buffers if x is not b]
