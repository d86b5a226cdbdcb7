"""torch's own NCCL process group as a `Group`: the second implementation, to compare with nccl.py.

Not run on a GPU yet. Imports group.py and device.py. torch kills a process whose collective failed unless
TORCH_NCCL_ASYNC_ERROR_HANDLING is 2 (or 0) when the group is made: whoever starts the ranks sets it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store

from ray_ep.collective.device import ABORT_S, cuda_device, here, in_time, writable
from ray_ep.collective.group import same_color, split_key
from ray_ep.collective.torch_group import TorchGroup
from ray_ep.errors import BadInput, GroupError


class TorchNcclGroup(TorchGroup):
    """ProcessGroupNCCL behind the `Group` interface: calls return when the work is in the stream's order.

    Tensors elsewhere than on the device are copied there and back, which is a host sync. `seconds` counts what the host
    spent in the calls only.
    """

    def __init__(
        self,
        process_group: Any,
        rank: int,
        size: int,
        epoch: int = 0,
        timeout_s: float = 300.0,
        on_close: Callable[[], None] = lambda: None,
        form: Callable[[TorchGroup, list[int]], TorchGroup] | None = None,
        device: torch.device | None = None,
    ):
        super().__init__(process_group, rank, size, epoch, timeout_s, on_close, form)
        self.device = cuda_device(device)
        self._last: Any = None  # keeps the last result alive until the next call
        self._live = True
        self._whole: ProcessGroup | None = None

    @property
    def process_group(self) -> ProcessGroup:
        """torch's group of the same ranks, always the same object, for libraries that want one.

        It goes over this group's communicator, which torch makes at the first collective.
        """
        if self._whole is None:
            kind = ProcessGroup.BackendType.NCCL
            self._whole = whole(self._pg, self.rank, self.size, self.device.type, kind)
        return self._whole

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        with writable(output, self.device, self.wait, fill=False) as buffer:
            super().all_to_all(buffer, here(input, self.device), output_sizes, input_sizes)

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        mine = here(input, self.device)
        output = mine.new_empty(self.size, *mine.shape)
        self._run(lambda: self._pg._allgather_base(output.view(-1), mine.view(-1)))
        self.seconds += time.perf_counter() - start
        if input.device != self.device:
            self.wait()
        return output.to(input.device)

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        with writable(tensor, self.device, self.wait) as buffer:
            super().all_reduce(buffer, op)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        with writable(tensor, self.device, self.wait) as buffer:
            super().broadcast(buffer, source)

    def barrier(self) -> None:
        # Not the process group's own: its wait cannot be aborted.
        super().all_reduce(torch.zeros(1, device=self.device))
        self.wait()

    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        super().send(here(tensor, self.device), to, limit_s)

    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        with writable(tensor, self.device, self.wait, fill=False) as buffer:
            super().receive(buffer, source, limit_s)

    def wait(self) -> None:
        self._check()
        work, self._last = self._last, None
        if work is None:
            return
        limit = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if self._aborted.is_set():
                raise GroupError(f"rank {self.rank}: the group of epoch {self.epoch} was aborted")
            if time.monotonic() > limit:
                self.abort()
                raise GroupError(
                    f"rank {self.rank}: no answer from the peers of epoch {self.epoch} in {self.timeout_s:g} s"
                )
            time.sleep(0.0001)
        self._run(lambda: work)  # raises what torch's watchdog has found
        self._last = None

    def abort(self) -> None:
        super().abort()
        live, self._live = self._live, False
        if live and self._pg is not None:
            end(self._pg)

    def _free(self) -> None:
        """What is enqueued gets a second to end. A group of torch's own stays as it is."""
        limit = time.monotonic() + 1.0
        while not self._aborted.is_set() and self._last is not None and not self._last.is_completed():
            if time.monotonic() > limit:
                break
            time.sleep(0.001)
        super()._free()
        self._whole = None

    def _warm(self) -> None:
        # Send and receive connect each pair by itself, apart from the rings of the reductions.
        ones = torch.ones(self.size, device=self.device)
        self.all_to_all(torch.empty_like(ones), ones, [1] * self.size, [1] * self.size)
        self.barrier()

    def _finish_message(self, work: Any, limit_s: float | None) -> None:
        self._finish(work)  # a message is in the stream's order, too

    def _finish(self, work: Any) -> None:
        """Order the current stream after the work; the host goes on."""
        work.wait()  # without a limit: with one it would be a host sync
        self._last = work


def torch_nccl(
    store: Store,
    rank: int,
    size: int,
    epoch: int = 0,
    device: torch.device | str | int | None = None,
    timeout_s: float = 300.0,
    limit_s: float | None = None,
) -> TorchNcclGroup:
    """A group of its own over torch's NCCL and a rendezvous store; all ranks call it, and it is warm when it returns.

    Args:
        device: this rank's CUDA device; None: the current one. Two ranks on one device are refused by NCCL.
        limit_s: of forming the group; None: `timeout_s`, that of a call.

    Raises:
        BadInput: no CUDA device, or torch was built without NCCL.
        GroupError: the peers did not come within the limit.
    """
    check_torch_nccl()
    limit_s = limit_s or timeout_s
    place = PrefixStore(f"epoch-{epoch}", store)
    group = _join(place, rank, size, epoch, cuda_device(device), limit_s)

    def warm() -> None:
        torch.cuda.set_device(group.device)  # of this thread
        group._warm()

    in_time(warm, limit_s, f"rank {rank}: connecting the group of epoch {epoch}")
    group.timeout_s = timeout_s
    return group


def whole(backend: Any, rank: int, size: int, device: str, kind: Any) -> ProcessGroup:
    """A backend of torch's as a process group for tensors on `device`; `kind`: which it is. A group stays itself."""
    if isinstance(backend, ProcessGroup):
        return backend
    make: Any = ProcessGroup  # torch's stubs know only the one with a store
    group: ProcessGroup = make(rank, size)
    group._register_backend(torch.device(device), kind, backend)
    group._set_default_backend(kind)
    return group


def check_torch_nccl() -> None:
    """Raise BadInput if this process cannot use torch's NCCL."""
    cuda_device(None)
    if not dist.is_nccl_available():
        raise BadInput(f"torch {torch.__version__} was built without NCCL")


def end(process_group: Any) -> None:
    """Abort: kernels that wait for a dead peer end only with the communicator; the abort itself may hang, too."""
    with contextlib.suppress(GroupError, RuntimeError):
        in_time(process_group.abort, ABORT_S, "abort of torch's NCCL group")


def _join(store: Store, rank: int, size: int, epoch: int, device: torch.device, timeout_s: float) -> TorchNcclGroup:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    options.is_high_priority_stream = True
    try:
        process_group = dist.ProcessGroupNCCL(store, rank, size, options)
    except RuntimeError as e:
        raise GroupError(f"rank {rank}: could not join the group of epoch {epoch}: {str(e).splitlines()[0]}") from None

    def form(parent: TorchGroup, colors: list[int]) -> TorchGroup:
        members = same_color(colors, parent.rank)
        place = PrefixStore(split_key(parent, colors), store)
        return _join(place, members.index(parent.rank), len(members), parent.epoch, device, parent.timeout_s)

    return TorchNcclGroup(
        process_group, rank, size, epoch, timeout_s, on_close=lambda: end(process_group), form=form, device=device
    )
