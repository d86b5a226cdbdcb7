"""Groups of CPU tensors: gloo between hosts, memory that ranks share on one, where gloo carries what is small.

gloo over loopback copies in the kernel on both sides; one copy into memory that the peer reads and one out of it took a
quarter to two fifths of its time (docs/notes/balance.md), and what is only read needs neither. Imports group.py,
torch_group.py, mailboxes.py and torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from ray_ep.collective.group import Group, check_partner, same_color, split_key
from ray_ep.collective.mailboxes import FACTS, Mailboxes
from ray_ep.collective.one_host import ORDERED, OneHost, as_bytes, seen_as
from ray_ep.collective.torch_group import TorchGroup
from ray_ep.errors import GroupError

SHARED_BYTES = 1 << 17
"""Least bytes from one rank to another that go through shared memory: less is as fast inside gloo's own message."""

_SIGN = torch.zeros(1, dtype=torch.uint8)
"""A message that says that a box is full, or was read."""

_MESSAGE, _BOXES = 2, 3  # boxes of a reader: two for all_to_all in turn, one for send

_PLACE = 8
"""Bytes that tell where a loan lies."""


class GlooGroup(TorchGroup):
    """ProcessGroupGloo, and memory shared with ranks on the same host (the same network namespace of one kernel).

    Where all ranks are on one host and can be watched, gloo carries nothing but `send`, `receive` and `broadcast`
    (one_host.py). Elsewhere a call ends in one of gloo's: it says that the boxes are full, and fails as gloo does when
    a peer is gone. Two boxes in turn do without a second one: who fills a box again has seen its reader begin the call
    after. Loans are read where they are, and kept until their readers have begun another call.
    """

    _mail: Mailboxes | None = None
    _near: list[bool] = []  # [R] ranks that this one shares memory with  # noqa: RUF012
    _here: OneHost | None = None  # all ranks are on this host
    _calls = 0
    _lent: list[torch.Tensor] = []  # that readers may still read  # noqa: RUF012

    def _warm(self) -> None:
        super()._warm()
        facts = torch.zeros(FACTS, dtype=torch.int64)
        try:
            self._mail = Mailboxes(self.size, _BOXES)
            facts = self._mail.facts()
        except (OSError, AttributeError, ValueError):  # not Linux, or memory files are not allowed
            self._mail = None
        every = self.all_gather(facts)
        opened = torch.tensor([r != self.rank and self._open(r, every[r]) for r in range(self.size)])
        both = self.all_gather(opened.long())
        self._near = (both & both.t())[self.rank].bool().tolist()
        watched = self._mail is not None and all(self._mail.watches(r) for r in range(self.size) if r != self.rank)
        if bool(self.all_gather(torch.tensor([watched and ORDERED])).all()) and self._mail is not None:
            self._here = OneHost(self._mail, self, self._aborted)

    def _open(self, rank: int, facts: torch.Tensor) -> bool:
        return self._mail is not None and bool(facts.any()) and self._mail.open(rank, facts)

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        start = time.perf_counter()
        if self._here is not None:
            self._watched(self._here.all_to_all, output, input, output_sizes, input_sizes)
        else:
            read, self._lent = self._lent, []
            self._calls += 1
            self._exchange(self._calls % 2, output, input, output_sizes, input_sizes)
            read.clear()
        self.seconds += time.perf_counter() - start

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        if self._here is None:
            return super().all_gather(input)
        start = time.perf_counter()
        output: torch.Tensor = self._watched(self._here.all_gather, input)
        self.seconds += time.perf_counter() - start
        return output

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        if self._here is None:
            super().all_reduce(tensor, op)
        else:
            self._watched(self._here.all_reduce, tensor, op)

    def barrier(self) -> None:
        if self._here is None:
            super().barrier()
        else:
            self._watched(self._here.barrier)

    def standing(self) -> str:
        try:
            return "" if self._here is None else self._here.standing()
        except (AttributeError, KeyError):  # it is closed at this moment
            return ""

    def take(self, *shape: int, like: torch.Tensor) -> torch.Tensor:
        size = prod(shape) * like.element_size()
        if self._mail is None or (size < SHARED_BYTES and self._here is None) or like.device.type != "cpu":
            return super().take(*shape, like=like)
        return self._mail.lend(size).view(like.dtype).view(shape)

    def begin_loan(
        self, message: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> Callable[[], list[torch.Tensor]]:
        self._check()
        if self._here is not None:
            ended = self._here.begin_loan(message, output_sizes, input_sizes)
            return lambda: self._ended(ended)
        mail, row = self._mail, prod(message.shape[1:])
        give, take = [n * row for n in input_sizes], [n * row for n in output_sizes]
        near_in, near_out = ([self._shares(r, n) for r, n in enumerate(sizes)] for sizes in (take, give))
        if mail is None or not (any(near_in) or any(near_out)):
            return super().begin_loan(message, output_sizes, input_sizes)
        blocks = as_bytes(message).split_with_sizes(give)
        told = [_place(mail.place(b)) if near else b for b, near in zip(blocks, near_out, strict=True)]
        sizes = [_PLACE if near else n for n, near in zip(take, near_in, strict=True)]
        arrived = self.take(sum(sizes), like=message)
        read, self._lent = self._lent, []
        finish = self._start(arrived, torch.cat(told), sizes, [len(part) for part in told])

        def end() -> list[torch.Tensor]:
            start = time.perf_counter()
            finish()
            read.clear()
            self._lent.append(message)
            parts = [
                mail.read(r, int.from_bytes(part.numpy(), "little"), take[r]) if near_in[r] else part
                for r, part in enumerate(arrived.split_with_sizes(sizes))
            ]
            self.seconds += time.perf_counter() - start
            return [part.view(n, *message.shape[1:]) for part, n in zip(parts, output_sizes, strict=True)]

        return end

    def _ended(self, end: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        start = time.perf_counter()
        parts: list[torch.Tensor] = self._watched(end)
        self.seconds += time.perf_counter() - start
        return parts

    def _watched(self, call: Callable[..., Any], *args: Any) -> Any:
        """A call among ranks of this host; after one that failed, in whatever way, the group is unusable."""
        self._check()
        try:
            with torch.no_grad():
                return call(*args)
        except BaseException:
            self._aborted.set()
            if self._here is None:
                raise GroupError(f"rank {self.rank}: the group of epoch {self.epoch} was closed meanwhile") from None
            raise

    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        check_partner(to, self)
        shared = self._shares(to, tensor.nbytes)
        if shared:
            seen_as(tensor, self._box(-1, to, _MESSAGE, tensor.nbytes)).copy_(tensor)
            tensor = _SIGN
        super().send(tensor, to, limit_s)
        if shared:  # gloo's send waits for its receiver as well
            super().receive(_SIGN.clone(), to, limit_s)

    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        check_partner(source, self)
        if not self._shares(source, tensor.nbytes):
            super().receive(tensor, source, limit_s)
            return
        super().receive(_SIGN.clone(), source, limit_s)
        tensor.copy_(seen_as(tensor, self._box(source, self.rank, _MESSAGE, tensor.nbytes)))
        super().send(_SIGN, source, limit_s)

    def _free(self) -> None:
        self._aborted.set()
        self._lent = []
        if self._here is not None:
            self._here.close()
            self._here = None
        if self._mail is not None:
            self._mail.close()
        self._mail, self._near = None, []
        super()._free()  # last: with a silent peer gloo takes its time

    def _shares(self, rank: int, size: int) -> bool:
        return size >= SHARED_BYTES and bool(self._near) and self._near[rank]

    def _box(self, owner: int, reader: int, number: int, size: int) -> torch.Tensor:
        if self._mail is None:
            raise GroupError(f"rank {self.rank}: the group of epoch {self.epoch} is closed")
        return self._mail.box(owner, reader, number, size)

    def _exchange(
        self, box: int, output: torch.Tensor, input: torch.Tensor, taken: Sequence[int], given: Sequence[int]
    ) -> None:
        """all_to_all; big rows for near ranks, and a rank's own, bypass gloo."""
        self._check()
        row = prod(input.shape[1:]) * input.element_size()
        give, take = list(given), list(taken)
        send, receive = input.split_with_sizes(give), output.split_with_sizes(take)
        into = [r for r, n in enumerate(give) if self._shares(r, n * row)]
        out_of = [r for r, n in enumerate(take) if self._shares(r, n * row)]
        if not into and not out_of:
            self._start(output, input, take, give)()
            return
        for r in into:
            seen_as(send[r], self._box(-1, r, box, give[r] * row)).copy_(send[r])
            give[r] = 0
        for r in out_of:
            take[r] = 0
        receive[self.rank].copy_(send[self.rank])
        give[self.rank] = take[self.rank] = 0
        rest = torch.cat([send[r] for r, n in enumerate(give) if n]) if any(give) else input[:0]
        arrived = output.new_empty(sum(take), *output.shape[1:])
        self._start(arrived, rest, take, give)()
        for r in out_of:
            receive[r].copy_(seen_as(receive[r], self._box(r, self.rank, box, taken[r] * row)))
        for r, part in enumerate(arrived.split_with_sizes(take)):
            if take[r]:
                receive[r].copy_(part)


def _place(at: int) -> torch.Tensor:
    return torch.tensor(list(at.to_bytes(_PLACE, "little")), dtype=torch.uint8)


def from_torch(timeout_s: float = 300.0, process_group: dist.ProcessGroup | None = None) -> Group:
    """A torch process group as a `Group` (collective over it).

    Args:
        process_group: one of torch's; it cannot be split further. None: the default one, as torchrun makes it.

    Raises:
        GroupError: torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise GroupError(
            "no torch process group: call torch.distributed.init_process_group first (or run under torchrun)"
        )
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    backend = dist.get_backend(process_group)
    if "nccl" in backend:
        from ray_ep.collective.torch_nccl import TorchNcclGroup  # it builds on this module

        kind: type[TorchGroup] = TorchNcclGroup
    else:
        kind = GlooGroup if "gloo" in backend else TorchGroup
    form = _new_group if process_group is None else None
    group = kind(process_group or dist.group.WORLD, rank, size, timeout_s=timeout_s, form=form)
    group._warm()
    return group


def _new_group(parent: TorchGroup, colors: list[int]) -> TorchGroup:
    """A subgroup of torch's default group: torch wants every rank to make every group, in the same order."""
    limit = timedelta(seconds=parent.timeout_s)
    made = {
        color: dist.new_group([r for r, c in enumerate(colors) if c == color], timeout=limit)
        for color in sorted(set(colors))
    }
    own, members = made[colors[parent.rank]], same_color(colors, parent.rank)
    return type(parent)(
        own, members.index(parent.rank), len(members), parent.epoch, parent.timeout_s,
        on_close=lambda: dist.destroy_process_group(own),
    )  # fmt: skip


def gloo(
    store: Store,
    rank: int,
    size: int,
    epoch: int = 0,
    host: str | None = None,
    timeout_s: float = 300.0,
    limit_s: float | None = None,
) -> GlooGroup:
    """A gloo group of its own over a rendezvous store; all ranks call it, and it is warm when it returns.

    Args:
        host: address of this rank's network interface; None: what the host name resolves to.
        timeout_s: of a collective. limit_s: of forming the group, beside the store's own; None: the same.

    Raises:
        GroupError: a peer did not come in time, or died meanwhile.
    """
    group = _gloo(PrefixStore(f"epoch-{epoch}", store), rank, size, epoch, host, limit_s or timeout_s)
    group._warm()
    group.timeout_s = timeout_s
    return group


def _gloo(store: Store, rank: int, size: int, epoch: int, host: str | None, timeout_s: float) -> GlooGroup:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2
    device = (
        dist.ProcessGroupGloo.create_device(hostname=host) if host else dist.ProcessGroupGloo.create_default_device()
    )
    options._devices = [device]
    try:
        process_group = dist.ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as e:
        raise GroupError(f"rank {rank}: could not join the group of epoch {epoch}: {str(e).splitlines()[0]}") from None

    def form(parent: TorchGroup, colors: list[int]) -> TorchGroup:
        members = same_color(colors, parent.rank)
        place = PrefixStore(split_key(parent, colors), store)
        return _gloo(place, members.index(parent.rank), len(members), parent.epoch, host, parent.timeout_s)

    return GlooGroup(process_group, rank, size, epoch, timeout_s, form=form)
