"""A CUDA device that is not there: tensors of the CPU that claim to be on cuda:0, and behave like it.

    with fake_cuda():                                  # patches torch, and takes all of it back
        ranks(3, work)                                 # each rank a thread, with a device of its own, as under Ray
        with host_syncs() as syncs: layer(...)         # [(kind, "file:line")] of the host waiting for the device

What it does like CUDA: operations on tensors of both devices are refused, so is `numpy()`; whatever lets the host wait
is noted; streams and events order work, and a use that they do not order raises Race (fake_streams.py); cupy.cuda.nccl
works between threads (fake_nccl.py), Triton's kernels in its interpreter (fake_triton.py). What it does not: numbers
are the CPU's, memory is not limited, time is not a GPU's, and graphs are not captured.

A tensor is on the device if its storage has a `fake_memory` that is not pinned. Three places see to that: patched
methods and factories (what names a device), a dispatch mode in every thread (what computes), hooks on backward.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import types
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed import HashStore
from torch.utils._device import _device_constructors

from ray_ep.collective.nccl import nccl
from ray_ep.errors import GroupError
from tests import fake_nccl
from tests.conftest import in_threads
from tests.fake_backward import Backward
from tests.fake_device import CPU, CUDA, Device, claim, on_device
from tests.fake_streams import HERE, Event, Process, Stream, memory_of, on, spot, touch
from tests.fake_triton import checked, interpreter


def copied(source, device, dtype=None, non_blocking=False):
    """A copy on a device, without a graph."""
    target = torch.empty_like(source, dtype=dtype or source.dtype, device=device)
    return target.copy_(source.detach(), non_blocking=non_blocking)


class _Move(torch.autograd.Function):
    """A copy to another device; the gradient comes back."""

    @staticmethod
    def forward(ctx, source, device, dtype, non_blocking):
        ctx.back = source.device, source.dtype
        return copied(source, device, dtype, non_blocking)

    @staticmethod
    def backward(ctx, gradient):
        return copied(gradient, *ctx.back), None, None, None


def _device_of(value):
    return value if isinstance(value, torch.device) else torch.device("cuda", value) if isinstance(value, int) else (
        torch.device(value))  # fmt: skip


def _factory(real, values=False):
    """A factory that takes device= and pin_memory=; `values`: from numbers of the host, so they travel."""

    @functools.wraps(real)
    def make(*args, **kwargs):
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        before, HERE.fills = HERE.fills, False  # what is made here is not the engine's
        try:
            return place(device, pinned, args, kwargs)
        finally:
            HERE.fills = before

    def place(device, pinned, args, kwargs):
        if device is None and not pinned:
            return real(*args, **kwargs)
        device = CPU if device is None else _device_of(device)
        if device.type not in ("cuda", "cpu"):
            return real(*args, **kwargs)
        if values and args and isinstance(args[0], Tensor):
            return args[0].to(device, kwargs.get("dtype"))
        out = claim(real(*args, **{**kwargs, "device": "cpu"}), device, pinned)
        if values and device.type == "cuda":
            HERE.synchronise("values of the host", HERE.stream)
        return out

    return make


def _to(self, *args, **kwargs):
    other = next((a for a in args if isinstance(a, Tensor)), kwargs.pop("other", None))
    copy = kwargs.pop("copy", False)
    if other is not None:
        device, dtype = other.device, other.dtype
        non_blocking = kwargs.get("non_blocking", False)
    else:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    device = device or self.device
    if device.type == "cuda":
        device = CUDA
    if device.type == "meta":
        return _REAL["to"](self, *args, **kwargs)
    if device != self.device:
        if self.requires_grad and torch.is_grad_enabled():
            return _Move.apply(self, device, dtype, non_blocking)
        return copied(self, device, dtype, non_blocking)
    return _REAL["to"](self, dtype or self.dtype, copy=copy)


def _numpy(name):
    def convert(self, *args, **kwargs):
        if on_device(self):
            if not kwargs.get("force"):
                raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({spot()})")
            self = self.detach().cpu()
        else:
            touch(self, name, HERE.host, HERE.host.tick(), False, spot())
        return _REAL[name](self, *args, **kwargs)

    return convert


def _tolist(self):
    if on_device(self):
        touch(self, "tolist", *HERE.launch(), False, spot())
        HERE.synchronise("tolist", HERE.stream)
    else:
        touch(self, "tolist", HERE.host, HERE.host.tick(), False, spot())
    return _REAL["tolist"](self)


def _data_ptr(self):
    if on_device(self):
        HERE.process.give_address(self.untyped_storage())
    return _REAL["data_ptr"](self)


def _pin_memory(self, *_):
    assert not on_device(self), "cannot pin memory of the device"
    return claim(self.clone(), CPU, pinned=True)


def _deepcopy(self, memo):
    out = _REAL["__deepcopy__"](self, memo)
    return claim(out, CUDA) if on_device(self) and memory_of(out) is None else out


def _backward(roots, *args, **kwargs):
    backward = Backward([root.grad_fn for root in roots if root.grad_fn is not None])
    try:
        return _REAL["backward"](roots, *args, **kwargs)
    finally:
        backward.close()


def _begin_thread(self):
    """A thread is of its starter's process, and comes after what that has done so far."""
    process, clock = self.fake_origin
    HERE.enter(process or Process())
    HERE.host.after(clock)
    with Device():
        _REAL["_bootstrap_inner"](self)


def _starting(started):
    """`Thread.start`, which also puts the thread into a list."""

    def start(self):
        self.fake_origin = HERE.process, dict(HERE.host.clock)
        started.append(self)
        _REAL["start"](self)

    return start


def _leave(threads, limit_s=0.5):
    """Let threads end before the device goes: whoever closes a group, or is late for one, still needs it."""
    limit = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(limit - time.monotonic(), 0))


_REAL = {
    **{name: getattr(Tensor, name) for name in ("to", "numpy", "__array__", "tolist", "data_ptr", "__deepcopy__")},
    "backward": torch.autograd._engine_run_backward,
    "start": threading.Thread.start,
    "_bootstrap_inner": threading.Thread._bootstrap_inner,
}
_TENSOR = {
    "device": property(lambda self: CUDA if on_device(self) else torch._C.TensorBase.device.__get__(self)),
    "is_cuda": property(on_device),
    "is_cpu": property(lambda self: self.device.type == "cpu"),
    "get_device": lambda self: 0 if on_device(self) else -1,
    "to": _to,
    "cpu": lambda self, *a, **k: self.to(CPU),
    "cuda": lambda self, device=None, non_blocking=False, **_: self.to(CUDA, non_blocking=non_blocking),
    "numpy": _numpy("numpy"), "__array__": _numpy("__array__"), "tolist": _tolist, "data_ptr": _data_ptr,
    "pin_memory": _pin_memory,
    "is_pinned": lambda self, *_: memory_of(self) is not None and memory_of(self).pinned,
    "record_stream": lambda self, stream: memory_of(self).kept_for.add(stream),
    "__deepcopy__": _deepcopy,
}  # fmt: skip
_MODULE = {
    "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
    "set_device": lambda device: None, "device": lambda device: nullcontext(), "is_initialized": lambda: True,
    "current_stream": lambda device=None: HERE.stream, "default_stream": lambda device=None: HERE.process.default,
    "stream": on, "set_stream": lambda stream: HERE.switch(stream) and None, "Stream": Stream, "Event": Event,
    "synchronize": lambda device=None: HERE.synchronise("torch.cuda.synchronize", *HERE.process.streams()),
    "set_sync_debug_mode": lambda mode: setattr(HERE.process, "debug", _DEBUG.get(mode, mode)),
    "get_sync_debug_mode": lambda: ["", "warn", "error"].index(HERE.process.debug),
    "is_current_stream_capturing": lambda: False, "is_bf16_supported": lambda *_, **__: True,
    "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: "NVIDIA Fake",
    "get_device_properties": lambda device=None: types.SimpleNamespace(
        name="NVIDIA Fake", uuid="00000000-0000-0000-0000-000000000000", multi_processor_count=2, total_memory=1 << 34,
        major=9, minor=0),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state), "manual_seed_all": lambda seed: None,
    "max_memory_reserved": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0, "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None, "mem_get_info": lambda device=None: (1 << 34, 1 << 34),
}  # fmt: skip
_IN_TRITON = ("ray_ep.moe.cuda.kernels",)
_DEBUG = {0: "", 1: "warn", 2: "error", "default": ""}
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
_FROM_VALUES = {"tensor", "as_tensor", "asarray"}


@contextmanager
def _patched(owner, values):
    """Attributes set for a while; those that the owner only inherits go again."""
    missing = object()
    before = {name: vars(owner).get(name, missing) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            delattr(owner, name) if value is missing else setattr(owner, name, value)


@contextmanager
def fake_cuda(triton=False):
    """Inside: torch has a CUDA device and CuPy has NCCL, in this thread and those started meanwhile.

    Args:
        triton: it is installed; else kernels in it have to be done without. Its interpreter takes 0.1 s a kernel.
    """
    names = [f.__name__ for f in _device_constructors() if getattr(torch, f.__name__, None) is f]
    factories = {n: _factory(getattr(torch, n), n in _FROM_VALUES) for n in [*names, *_LIKE]}
    made = {n: _factory(getattr(Tensor, n)) for n in ("new_empty", "new_zeros", "new_ones", "new_full")}
    made["new_tensor"] = lambda self, data, dtype=None, device=None, **_: torch.tensor(
        data, dtype=dtype or self.dtype, device=device or self.device
    )
    executor = interpreter() if triton else None
    cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cupy.cuda, cuda.nccl = cuda, fake_nccl
    modules = {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": fake_nccl}
    if not triton:
        modules |= dict.fromkeys(_IN_TRITON)  # None: importing it fails
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    place, started = (HERE.process, HERE.stream), []
    HERE.enter(Process())
    try:
        with (
            _patched(torch, factories),
            _patched(Tensor, _TENSOR | made),
            _patched(torch.cuda, _MODULE | {"default_generators": (torch.Generator(),)}),
            _patched(torch.autograd, {"_engine_run_backward": _backward}),
            _patched(executor, {"__call__": checked(executor.__call__)}) if executor else nullcontext(),
            _patched(threading.Thread, {"start": _starting(started), "_bootstrap_inner": _begin_thread}),
            Device(),
        ):
            try:
                yield
            finally:
                _leave(started)
    finally:
        HERE.process, HERE.stream = place
        [sys.modules.pop(name) for name in modules]
        sys.modules.update(before)


@contextmanager
def host_syncs():
    """Notes (kind, "file:line") of every time that this thread waits for the device inside."""
    before, HERE.syncs = HERE.syncs, []
    try:
        yield HERE.syncs
    finally:
        HERE.syncs = before


def in_own_process(work):
    """`work` of one rank, in a thread of its own: with a device that is not that of whoever started the thread."""

    def alone(*args):
        HERE.enter(Process())
        return work(*args)

    return alone


def nccl_ranks(size, work, timeout_s=30.0):
    """Results of work(group) over NcclGroup on `size` ranks, threads with a device each; raises the first error."""
    store, errors = HashStore(), []

    def rank(number):
        group = nccl(store, number, size, timeout_s=timeout_s)
        try:
            return work(group)
        except BaseException as e:
            errors.append(e)
            fake_nccl.lose(group._communicator)  # so that peers do not wait
            raise
        finally:
            group.close()

    try:
        return in_threads(*(functools.partial(in_own_process(rank), number) for number in range(size)))
    except GroupError:
        if cause := next((e for e in errors if not isinstance(e, GroupError)), None):  # peers only heard of it
            raise cause from None
        raise
