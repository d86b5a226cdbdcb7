"""DeepEP's buffer, as the layers of one rank use it: what it takes, its three calls, its errors made ours.

Not run on a GPU yet, nor with the real library: written against deep_ep 2.1 (docs/notes/deepep.md). No autograd and no
experts here (deepep.py). Imports the groups; deep_ep is imported when a buffer is made. T tokens, K top_k, H hidden,
N rows received, R ranks, S slots of a rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ray_ep.collective import EpochGroup, Group, TorchNcclGroup
from ray_ep.errors import BadInput, GroupError

T = TypeVar("T")

HIDDEN_MULTIPLE = 256
"""H is a multiple of this: combine reads 32 lanes of 16 bytes at once."""

MOST_CHOICES = 32
"""Most choices of a token: one a lane of a warp."""

MOST_SLOTS, MOST_SLOTS_OF_RANK, MOST_RANKS = 2048, 256, 1024
"""Most slots of all ranks and of one, and most ranks: sizes of its workspace."""

INSTALL = "it is built from source (github.com/deepseek-ai/DeepEP, 2.1 or newer, NCCL 2.30.4 or newer)"
"""Where the library comes from, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What one buffer is made for; the same on every rank.

    Args:
        tokens: most tokens of a rank in one pass. choices: K.
    """

    tokens: int
    hidden: int
    choices: int


@dataclass(frozen=True, slots=True)
class Parcels:
    """What one rank received.

    Args:
        rows: [N, H] by source rank, and by token there.
        slot: [N, K] local slot of each choice, -1 where it is another rank's or none.
        weights: float32 [N, K]; they mean nothing where `slot` is -1.
        pairs: how many choices are this rank's.
        handle: the library's own, to go the same ways again, there and back.
    """

    rows: torch.Tensor
    slot: torch.Tensor
    weights: torch.Tensor
    pairs: int
    handle: Any


def check_fit(room: Room, ranks: int, slots: int, dtype: torch.dtype) -> None:
    """Raise BadInput for a layer that the library does not carry; starts and imports nothing.

    Args:
        slots: S.
    """
    said = [
        (dtype == torch.bfloat16, f"hidden states of {str(dtype).removeprefix('torch.')}: it moves bfloat16"),
        (
            room.hidden > 0 and room.hidden % HIDDEN_MULTIPLE == 0,
            f"hidden size {room.hidden}: it moves multiples of {HIDDEN_MULTIPLE}",
        ),
        (1 <= room.choices <= MOST_CHOICES, f"{room.choices} experts of a token: it takes 1 to {MOST_CHOICES}"),
        (room.tokens > 0, f"exchange.tokens={room.tokens}: its buffer needs a bound on a rank's tokens in one pass"),
        (ranks <= MOST_RANKS, f"{ranks} ranks: it takes up to {MOST_RANKS}"),
        (
            slots <= MOST_SLOTS_OF_RANK and ranks * slots <= MOST_SLOTS,
            f"{slots} slots on each of {ranks} ranks: it takes up to {MOST_SLOTS_OF_RANK} on a rank and {MOST_SLOTS} "
            "in all",
        ),
    ]
    wrong = [words for fine, words in said if not fine]
    if wrong:
        raise BadInput(f"exchange.transport=deepep cannot carry {'; nor '.join(wrong)}")


def installed() -> bool:
    """Whether Python finds deep_ep; it is not imported."""
    return importlib.util.find_spec("deep_ep") is not None


def library() -> Any:
    """The module deep_ep.

    Raises:
        BadInput: it is not installed, cannot be loaded, or is of version 1.
    """
    if not installed():
        raise BadInput(f"exchange.transport=deepep: Python finds no module deep_ep; {INSTALL}")
    try:
        import deep_ep
    except Exception as e:  # it asserts that the NCCL which it was built for is the one that torch has loaded
        raise BadInput(f"exchange.transport=deepep: deep_ep cannot be loaded: {_first_line(e)}; {INSTALL}") from None
    if not hasattr(deep_ep, "ElasticBuffer"):
        raise BadInput(f"exchange.transport=deepep: deep_ep has no ElasticBuffer, as version 1 has none: {INSTALL}")
    return deep_ep


class Elastic:
    """One buffer of DeepEP, and what is said to it. Every call is collective and raises GroupError.

    The host waits for the device once, in `send`, and holds Python's lock meanwhile: no other thread of the process
    runs until the peers have sent too. A peer that does not come ends it after the group's time limit, on the device by
    a trap: the process cannot use its GPU any more.

    Args:
        group: its ranks; the buffer goes over its NCCL communicator. room: see `Room`.
    """

    def __init__(self, group: TorchNcclGroup, room: Room):
        deep_ep = library()
        self.group, self.room, self._index = group, room, deep_ep.topk_idx_t
        limit_s = max(1, int(group.timeout_s))
        group.barrier()  # the library takes torch's communicator as it is, and torch makes one at the first collective
        self._buffer = self._called(
            lambda: deep_ep.ElasticBuffer(
                group.process_group,
                num_max_tokens_per_rank=room.tokens,
                hidden=room.hidden,
                num_topk=room.choices,
                # Else rows of one source come in another order each time. A block that is computed again in backward
                # has new rows and the old handle: gradients would belong to other tokens.
                deterministic=True,
                prefer_overlap_with_compute=False,  # nothing computes meanwhile: all of the device for the exchange
                num_cpu_timeout_secs=limit_s,
                num_gpu_timeout_secs=limit_s,
                explicitly_destroy=True,  # its own end is a barrier on the device, which a dead peer would hold up
            )
        )

    def send(self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, num_slots: int) -> Parcels:
        """rows bfloat16 [T, H] once to each rank of their slots.

        Args:
            slots: [T, K] number of each choice's slot, rank * S + local slot, each once in a row; -1: none.
            weights: [T, K] that travel along. num_slots: R * S.
        """
        found = self._called(
            lambda: self._buffer.dispatch(
                rows.contiguous(),
                topk_idx=slots.to(self._index).contiguous(),
                topk_weights=weights.float().contiguous(),
                num_experts=num_slots,
                expert_alignment=1,
            )
        )
        received, slot, came, handle, _ = found
        return Parcels(received, slot.long(), came, sum(handle.num_recv_tokens_per_expert_list), handle)

    def send_again(self, rows: torch.Tensor, handle: Any) -> torch.Tensor:
        """rows [T, H] the ways of an earlier `send` -> [N, H], in the order that its rows had."""
        # With a handle the library does not find the number of SMs by itself (DeepEP pull request 685).
        received: torch.Tensor = self._called(
            lambda: self._buffer.dispatch(rows.contiguous(), handle=handle, num_sms=handle.num_sms)
        )[0]
        return received

    def bring_back(
        self, rows: torch.Tensor, handle: Any, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """rows [N, H] of a `send` home, added up a token -> [T, H]; and float32 weights [N, K] to their choices."""
        home, came, _ = self._called(lambda: self._buffer.combine(rows.contiguous(), handle, topk_weights=weights))
        return home, came

    def _called(self, call: Callable[[], T]) -> T:
        """The result of a call; every failure of the library becomes GroupError, at this one place."""
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as e:
            self.group.abort()
            raise GroupError(
                f"rank {self.group.rank}: DeepEP failed in epoch {self.group.epoch}: {_first_line(e)}"
            ) from None


class ElasticPool:
    """The buffers of one model on one rank: all layers share them, as they never exchange at once."""

    def __init__(self) -> None:
        self._group: Group | None = None
        self._buffers: dict[Room, Elastic] = {}

    def take(self, group: Group, room: Room) -> Elastic:
        """The buffer over the group that is in use now, made where there is none (collective); those of others go.

        Raises:
            BadInput: the group is no TorchNcclGroup, or the library cannot be used. GroupError: a peer is gone.
        """
        present = EpochGroup.of(group).present
        if not isinstance(present, TorchNcclGroup):
            raise BadInput(
                "exchange.transport=deepep goes over torch's NCCL between GPUs; this group is a "
                f"{type(present).__name__}"
            )
        if present is not self._group:
            self._group, self._buffers = present, {}
        if room not in self._buffers:
            self._buffers[room] = Elastic(present, room)
        return self._buffers[room]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
