"""Streams for the parts of a layer's tokens, the same for all layers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Lanes:
    """A stream a part. They are kept, since each has memory of its own in torch's allocator. Not run on a GPU yet."""

    def __init__(self) -> None:
        self._streams: list[torch.cuda.Stream] = []

    def of(self, parts: int, device: torch.device) -> Sequence[torch.cuda.Stream | None]:
        """A stream for each part; None on the CPU, which has none."""
        if device.type == "cpu":
            return [None] * parts
        while len(self._streams) < parts:
            self._streams.append(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        return self._streams[:parts]
