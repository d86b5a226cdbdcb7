"""What the groups over a device share: which device, tensors from elsewhere, calls that may never return.

No collective here. Imports errors and torch. What needs CUDA has not run on a GPU yet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from ray_ep.errors import BadInput, GroupError, LateError

T = TypeVar("T")

ABORT_S = 10.0
"""Seconds that `abort` waits for NCCL's own abort, which may hang itself."""

SPIN_S = 0.002
"""Seconds of looking without sleep: what is nearly there is not worth one, and messages are timed by it."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How many seconds a call may take, and what is said of one that takes longer."""

    seconds: float
    words: str

    @staticmethod
    def of_call(timeout_s: float) -> Limit:
        """Of a call that needs all ranks."""
        return Limit(timeout_s, f"no answer from the peers in {timeout_s:g} s")

    @staticmethod
    def of_message(partner: int, limit_s: float, sent: bool) -> Limit:
        """Of a message to or from a partner."""
        what = f"rank {partner} did not take a message" if sent else f"no message from rank {partner}"
        return Limit(limit_s, f"{what} within {limit_s:g} s")


def ended(rank: int, epoch: int, why: str, timeout_s: float) -> GroupError:
    """The error of any call in a group that has ended for `why`; `timeout_s`: of its calls."""
    kind = LateError if why == Limit.of_call(timeout_s).words else GroupError
    return kind(f"rank {rank}: the group of epoch {epoch} is closed or aborted: {why}")


def cuda_device(device: torch.device | str | int | None) -> torch.device:
    """A CUDA device with its number, as tensors name it; None: the current one.

    Raises:
        BadInput: no CUDA here, or the device is not a CUDA device.
    """
    if not torch.cuda.is_available():
        why = "was built without CUDA: install torch's build for CUDA"
        if torch.version.cuda:
            why = f"(for CUDA {torch.version.cuda}) sees none: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        raise BadInput(f"no GPU can be used here: torch {torch.__version__} {why}")
    if device is None:
        return torch.device("cuda", torch.cuda.current_device())
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type != "cuda":
        raise BadInput(f"NCCL exchanges between CUDA devices, not on {found}")
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())


def check_current(device: torch.device) -> None:
    """Raise BadInput for a GPU that is not the current one: kernels and streams would be those of the current one."""
    if device.type == "cuda" and device.index != (current := torch.cuda.current_device()):
        raise BadInput(
            f"the model is on {device}, and this thread's current device is cuda:{current}: call "
            f"torch.cuda.set_device({device.index}) first"
        )


def here(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor itself if it is contiguous and on the device, else a copy that is."""
    return tensor.detach().to(device).contiguous()


@contextmanager
def writable(
    tensor: torch.Tensor, device: torch.device, wait: Callable[[], None], fill: bool = True
) -> Iterator[torch.Tensor]:
    """A contiguous tensor on the device to write into: `tensor` itself if it is one, else it is written to at the end.

    Args:
        wait: called before the copy to another device, which is a host sync.
        fill: the block reads the tensor, too.
    """
    tensor = tensor.detach()
    if tensor.device == device and tensor.is_contiguous():
        yield tensor
        return
    if fill:
        there = here(tensor, device)
    else:
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    yield there
    if tensor.device != device:
        wait()
    tensor.copy_(there)


def check_sizes(
    output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], size: int
) -> None:
    """Raise BadInput for an all-to-all whose sizes [R] do not fit: the device would go beyond the tensors."""
    for tensor, sizes, what in ((output, output_sizes, "output"), (input, input_sizes, "input")):
        if len(sizes) != size or min(sizes) < 0 or sum(sizes) != len(tensor):
            raise BadInput(
                f"all_to_all {what}: sizes {list(sizes)} do not divide {len(tensor)} rows among {size} ranks"
            )
    if output.dtype != input.dtype or output.shape[1:] != input.shape[1:]:
        raise BadInput(
            f"all_to_all: rows of the output ({output.dtype} {tuple(output.shape[1:])}) are not like those of the "
            f"input ({input.dtype} {tuple(input.shape[1:])})"
        )


def is_soon(is_done: Callable[[], bool], look: Callable[[], None], limit_s: float) -> bool:
    """Whether `is_done` became true within the limit; `look` is called between two looks at it and may raise."""
    now = time.monotonic()
    limit, spin = now + limit_s, now + SPIN_S
    while not is_done():
        look()
        if (now := time.monotonic()) > limit:
            return False
        time.sleep(0 if now < spin else 0.0002)
    return True


def in_time(
    call: Callable[[], T],
    timeout_s: float,
    what: str,
    is_aborted: Callable[[], bool] = lambda: False,
    late: Callable[[T], None] = lambda result: None,
) -> T:
    """The result of a library's call that may block for ever, made in a thread which is then left behind.

    Args:
        late: takes, in that thread, a result for which nobody waited.

    Raises:
        GroupError: it took longer than `timeout_s`, or `is_aborted` became true; `what` says what it was.
    """
    result: list[T] = []
    errors: list[BaseException] = []
    ended, left, either = threading.Event(), threading.Event(), threading.Lock()

    def run() -> None:
        try:
            made = call()
            with either:
                if not left.is_set():
                    result.append(made)
                    ended.set()
            if left.is_set():
                late(made)
        except BaseException as e:
            errors.append(e)
        finally:
            ended.set()

    def leave(why: str) -> None:
        with either:
            if not ended.is_set():
                left.set()
                raise GroupError(f"{what}: {why}")

    limit = time.monotonic() + timeout_s
    threading.Thread(target=run, name=what, daemon=True).start()
    while not ended.wait(min(0.2, timeout_s)):
        if is_aborted():
            leave("aborted")
        if time.monotonic() > limit:
            leave(f"not within {timeout_s:g} s")
    if errors:
        raise errors[0]
    return result[0]
