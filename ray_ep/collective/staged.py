"""A group whose tensors live on one device and travel through CPU buffers: several ranks on one GPU, or no NCCL.

Slow by design: every call is a host sync and two copies. Not run on a GPU yet; the copies are tested on CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ray_ep.collective.device import here, writable
from ray_ep.collective.group import Group

CPU = torch.device("cpu")
"""The device that inner groups exchange on."""


class StagedGroup(Group):
    """Takes tensors of any device and exchanges them over a group of CPU tensors, which it owns.

    NCCL refuses two ranks on one GPU; with this they can share it.
    """

    def __init__(self, inner: Group):
        self.inner = inner
        self.rank, self.size, self.epoch, self.members = inner.rank, inner.size, inner.epoch, inner.members

    @property
    def seconds(self) -> float:  # type: ignore[override]
        """As the group below counts: without the copies."""
        return self.inner.seconds

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        with writable(output, CPU, self.wait, fill=False) as buffer:
            self.inner.all_to_all(buffer, here(input, CPU), output_sizes, input_sizes)

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        return self.inner.all_gather(here(input, CPU)).to(input.device)

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        with writable(tensor, CPU, self.wait) as buffer:
            self.inner.all_reduce(buffer, op)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        with writable(tensor, CPU, self.wait) as buffer:
            self.inner.broadcast(buffer, source)

    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        self.inner.send(here(tensor, CPU), to, limit_s)

    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        with writable(tensor, CPU, self.wait, fill=False) as buffer:
            self.inner.receive(buffer, source, limit_s)

    def barrier(self) -> None:
        self.inner.barrier()

    def split(self, color: int) -> Group:
        return StagedGroup(self.inner.split(color))

    def wait(self) -> None:
        self.inner.wait()

    def standing(self) -> str:
        return self.inner.standing()

    def abort(self) -> None:
        self.inner.abort()

    def close(self) -> None:
        self.inner.close()
