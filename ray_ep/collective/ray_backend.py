"""Our groups as backends of ray.util.collective: made, named and looked up the way Ray users know.

`RAY_EP_GLOO`, `RAY_EP_NCCL` and `RAY_EP_TORCH_NCCL`; each process registers one before it joins. Imports Ray, torch and
the groups. The two over NCCL have not run on a GPU yet.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import ray.experimental.internal_kv as kv
import torch
import torch.distributed as dist
from ray.util import collective, get_node_ip_address
from ray.util.collective.backend_registry import BackendRegistry, register_collective_backend
from ray.util.collective.collective_group.base_collective_group import BaseGroup
from ray.util.collective.types import ReduceOp
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from ray_ep.collective import cupy_nccl, torch_nccl
from ray_ep.collective.gloo_group import gloo
from ray_ep.collective.group import SplittableGroup
from ray_ep.collective.nccl import nccl
from ray_ep.collective.parking import CLOSE_S, park
from ray_ep.errors import BadInput, GroupError

RENDEZVOUS_S = 60.0
"""Seconds that the ranks of a group wait for each other to come, where the caller names no limit."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a group is formed.

    Args:
        timeout_s: of a collective. limit_s: of the forming.
    """

    epoch: int = 0
    timeout_s: float = 300.0
    limit_s: float = RENDEZVOUS_S


_FORMED: ContextVar[SplittableGroup | None] = ContextVar("formed", default=None)
"""The group that `join` has formed and Ray is to keep: under Ray's lock nobody waits for a peer."""


class OurBackend(BaseGroup):
    """What our backends share: ranks meet in a store of rank 0; `group` is the same members as a ray_ep `Group`."""

    name: str
    group: SplittableGroup

    def __init__(self, world_size: int, rank: int, group_name: str):
        super().__init__(world_size, rank, group_name)
        self.group = _FORMED.get() or self.meet(world_size, rank, group_name, Terms())

    @classmethod
    def meet(cls, size: int, rank: int, name: str, terms: Terms) -> SplittableGroup:
        """The group of all ranks that say the same name; where rank 0 waits is told through Ray, and forgotten then."""
        host = str(get_node_ip_address())  # type: ignore[no-untyped-call]
        key = f"ray_ep/{name}".encode()
        if rank == 0:
            store = TCPStore(host, 0, size, True, wait_for_workers=False)
            address = f"{host}:{store.port}".encode()
            kv._internal_kv_put(key, address, overwrite=True)
        else:
            store, address = _connect(key, size, terms.limit_s)
        store.set_timeout(timedelta(seconds=terms.limit_s))
        try:
            group = cls.form(store, rank, size, host, terms)
        except BaseException:
            _forget(key, address)  # rank 0 may be dead
            raise
        if rank == 0:
            _forget(key, address)
        return group

    @staticmethod
    @abstractmethod
    def form(store: Store, rank: int, size: int, host: str, terms: Terms) -> SplittableGroup:
        """The group of all ranks that meet in the store; `host` is the address of this node."""

    @classmethod
    @abstractmethod
    def check(cls) -> None:
        """Raise BadInput, saying what is missing, if this process cannot use the backend."""

    @classmethod
    def backend(cls) -> str:
        return cls.name

    @classmethod
    def check_backend_availability(cls) -> bool:
        try:
            cls.check()
        except BadInput:
            return False
        return True

    def destroy_group(self) -> None:
        self.group.on_close = lambda: None  # Ray, which holds its lock meanwhile, knows already
        park(self.group, CLOSE_S)

    # Ray's own calls hand over lists of one tensor (one per device).
    def allreduce(self, tensor: Any, allreduce_options: Any = None) -> None:
        self.group.all_reduce(_one(tensor), _op(allreduce_options))

    def barrier(self, barrier_options: Any = None) -> None:
        self.group.barrier()

    def reduce(self, tensor: Any, reduce_options: Any = None) -> None:
        target = _one(tensor)
        buffer = target.clone()
        self.group.all_reduce(buffer, _op(reduce_options))
        if self.rank == reduce_options.root_rank:
            target.copy_(buffer)

    def allgather(self, tensor_list: Any, tensor: Any, allgather_options: Any = None) -> None:
        outputs = tensor_list[0] if isinstance(tensor_list[0], list) else tensor_list
        for output, value in zip(outputs, self.group.all_gather(_one(tensor)), strict=True):
            output.copy_(value)

    def broadcast(self, tensor: Any, broadcast_options: Any = None) -> None:
        self.group.broadcast(_one(tensor), broadcast_options.root_rank)

    def reducescatter(self, tensor: Any, tensor_list: Any, reducescatter_options: Any = None) -> None:
        inputs = tensor_list[0] if isinstance(tensor_list[0], list) else tensor_list
        buffer = torch.stack(list(inputs))
        self.group.all_reduce(buffer, _op(reducescatter_options))
        _one(tensor).copy_(buffer[self.rank])

    def send(self, tensor: Any, send_options: Any) -> None:
        self.group.send(_one(tensor), send_options.dst_rank)

    def recv(self, tensor: Any, recv_options: Any) -> None:
        self.group.receive(_one(tensor), recv_options.src_rank)


class GlooBackend(OurBackend):
    """CPU tensors over gloo."""

    name = "RAY_EP_GLOO"

    @staticmethod
    def form(store: Store, rank: int, size: int, host: str, terms: Terms) -> SplittableGroup:
        return gloo(store, rank, size, terms.epoch, host, terms.timeout_s, terms.limit_s)

    @classmethod
    def check(cls) -> None:
        if not dist.is_gloo_available():
            raise BadInput(f"torch {torch.__version__} was built without gloo")


class NcclBackend(OurBackend):
    """CUDA tensors over a communicator of CuPy's NCCL."""

    name = "RAY_EP_NCCL"

    @staticmethod
    def form(store: Store, rank: int, size: int, host: str, terms: Terms) -> SplittableGroup:
        return nccl(store, rank, size, terms.epoch, None, terms.timeout_s, terms.limit_s)

    @classmethod
    def check(cls) -> None:
        cupy_nccl.library()


class TorchNcclBackend(OurBackend):
    """CUDA tensors over torch's NCCL process group."""

    name = "RAY_EP_TORCH_NCCL"

    @staticmethod
    def form(store: Store, rank: int, size: int, host: str, terms: Terms) -> SplittableGroup:
        return torch_nccl.torch_nccl(store, rank, size, terms.epoch, None, terms.timeout_s, terms.limit_s)

    @classmethod
    def check(cls) -> None:
        torch_nccl.check_torch_nccl()


BACKENDS: dict[str, type[OurBackend]] = {"gloo": GlooBackend, "nccl": NcclBackend, "torch_nccl": TorchNcclBackend}
"""Our backends for Ray's collective groups, by the transport's name in the configuration."""


def join(
    name: str,
    rank: int,
    size: int,
    epoch: int = 0,
    timeout_s: float = 300.0,
    backend: str = "gloo",
    limit_s: float = RENDEZVOUS_S,
) -> SplittableGroup:
    """Join (all ranks call) the named group through ray.util.collective, inside an actor.

    Ray knows it by its name until it is closed. A name for each epoch keeps members of different ones apart.

    Args:
        timeout_s: of a collective.
        backend: a key of `BACKENDS`: gloo, nccl (CuPy) or torch_nccl.
        limit_s: time for the peers to come.

    Raises:
        BadInput: no such backend, or it cannot be used in this process.
        GroupError: a peer did not come within the limit, or died meanwhile.
    """
    if backend not in BACKENDS:
        raise BadInput(f"backend {backend!r}: allowed are {', '.join(BACKENDS)}")
    ours = BACKENDS[backend]
    ours.check()
    if not BackendRegistry().is_registered(ours.name):  # type: ignore[no-untyped-call]
        register_collective_backend(ours.name, ours)
    group = ours.meet(size, rank, name, Terms(epoch, timeout_s, limit_s))
    group.on_close = partial(leave, name)
    token = _FORMED.set(group)
    try:
        collective.init_collective_group(size, rank, ours.name, name)  # type: ignore[arg-type]
    finally:
        _FORMED.reset(token)
    return group


def usable() -> list[str]:
    """Backends that this process could use."""
    return [name for name, ours in BACKENDS.items() if ours.check_backend_availability()]


def leave(name: str) -> None:
    """Destroy this process's membership of a named group; not collective, and over in about a second at most."""
    if collective.is_group_initialized(name):  # type: ignore[no-untyped-call]
        collective.destroy_collective_group(name)


def _connect(key: bytes, size: int, limit_s: float) -> tuple[TCPStore, bytes]:
    """The store of rank 0 wherever it says it is now, and that: what a dead rank 0 left behind answers nobody."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        if address := kv._internal_kv_get(key):
            host, port = address.decode().rsplit(":", 1)
            try:
                return TCPStore(host, int(port), size, False, timeout=timedelta(seconds=min(2.0, limit_s))), address
            except (RuntimeError, ValueError):
                continue
        time.sleep(0.005)
    raise GroupError(f"group {key.decode()}: rank 0 did not appear within {limit_s:g} s")


def _forget(key: bytes, address: bytes) -> None:
    """Remove where rank 0 waited, unless another one says it already."""
    if kv._internal_kv_get(key) == address:
        kv._internal_kv_del(key)


def _one(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return found


def _op(options: Any) -> str:
    names = {ReduceOp.SUM: "sum", ReduceOp.MAX: "max"}
    if options.reduceOp not in names:
        raise GroupError(f"reduce operation {options.reduceOp}: allowed are SUM and MAX")
    return names[options.reduceOp]
