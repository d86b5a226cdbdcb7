"""A CUDA device that is not there: tensors of the CPU that claim to be on cuda:0, and behave like it.

    with fake_cuda():                                  # patches torch, and takes all of it back
        ranks(3, work)                                 # each rank a thread, with a device of its own, as under Ray
        with host_syncs() as syncs: layer(...)         # [(kind, "file:line")] of the host waiting for the device

What it does like CUDA: operations on tensors of both devices are refused, so is `numpy()`; whatever lets the host wait
is noted; streams and events order work, and a use that they do not order raises Race (fake_streams.py); cupy.cuda.nccl
works between threads (fake_nccl.py). What it does not: numbers are the CPU's, memory is not limited, time is not a
GPU's, graphs are not captured, and kernels other than torch's own do not run.

A tensor is on the device if its storage has a `fake_memory` that is not pinned. Three places see to that: patched
methods and factories (what names a device), a dispatch mode in every thread (what computes), hooks on backward.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from tests import fake_nccl
from tests.fake_streams import HERE, Backward, Event, Memory, Process, Stream, memory_of, on, spot, touch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
Tensor = torch.Tensor

_WAITS = {  # operations whose result has a shape, or is a number, that only the device knows
    "_local_scalar_dense": "item", "nonzero": "nonzero", "masked_select": "masked_select", "bincount": "bincount",
    "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique", "equal": "equal",
    "_linalg_check_errors": "linalg",
}  # fmt: skip
_SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
               "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}  # fmt: skip
_INDEXED = {"index": 2, "index_put": 3, "index_put_": 3, "_index_put_impl_": 3, "_unsafe_index": 2}


def on_device(tensor):
    memory = memory_of(tensor)
    return memory is not None and not memory.pinned


def claim(tensor, device, pinned=False):
    """Say where a tensor with memory of its own is; returns it."""
    there = device.type == "cuda"
    if isinstance(tensor, Tensor) and not (there and on_device(tensor)):
        storage, line = tensor.untyped_storage(), HERE.stream if there else HERE.host
        storage.fake_memory = Memory(line, storage.nbytes(), pinned, spot()) if there or pinned else None
    return tensor


def copied(source, device, dtype=None, non_blocking=False):
    """A copy on a device, without a graph."""
    target = claim(torch.empty_like(_plain(source), dtype=dtype or source.dtype), device)
    return target.copy_(source, non_blocking=non_blocking)


def _plain(tensor):
    """The same numbers for the eyes of this module: no mode, no memory checked."""
    return tensor.detach()


class _Move(torch.autograd.Function):
    """A copy to another device; the gradient comes back."""

    @staticmethod
    def forward(ctx, source, device, dtype, non_blocking):
        ctx.back = source.device, source.dtype
        return copied(source, device, dtype, non_blocking)

    @staticmethod
    def backward(ctx, gradient):
        return copied(gradient, *ctx.back), None, None, None


# ---------------------------------------------------------------- what computes


@functools.cache
def _arguments(func):
    """(name, written, only aliased) of an operation's arguments, and whether it gives a view."""
    schema = func._schema
    writes = [bool(a.alias_info and a.alias_info.is_write) for a in schema.arguments]
    views = not any(writes) and any(r.alias_info is not None for r in schema.returns)
    fresh = any(r.alias_info is None for r in schema.returns)
    return {a.name: w for a, w in zip(schema.arguments, writes, strict=True)}, views, fresh


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class Device(TorchDispatchMode):
    """What every operation does to memory: checked and noted, then computed on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        names, views, fresh = _arguments(func)
        given = dict(zip(names, args, strict=False)) | kwargs
        uses = [(t, names[name]) for name, value in given.items() for t in _tensors(value)]
        if not any(memory_of(t) is not None for t, _ in uses):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if not any(on_device(t) for t, _ in uses):
            if not views:
                self.use(uses, name, HERE.host)
            return func(*args, **kwargs)
        if name == "copy_":
            return self.copy(func, *args, **kwargs)
        if name in _INDEXED:
            self.index(name, *args[: _INDEXED[name]])
        else:
            self.same_device(name, given, uses)
        if name in _WAITS or (name == "repeat_interleave" and given.get("output_size") is None):
            HERE.note(_WAITS.get(name, name))
        if not views and name not in _SHAPE_ONLY:
            self.use(uses, name, HERE.stream)
        if name in _WAITS:
            HERE.host.after(HERE.stream.clock)
        out = self.compute(name, func, args, kwargs)
        if fresh and not views:
            written = {id(t) for t, w in uses if w}
            for tensor in _tensors(out):
                if id(tensor) not in written and memory_of(tensor) is None:
                    claim(tensor, CUDA)
        return out

    @staticmethod
    def compute(name, func, args, kwargs):
        if name == "histc" and not args[0].is_floating_point():  # the CPU's is of floats only
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    @staticmethod
    def use(uses, name, line):
        tick = HERE.launch()[1] if line is HERE.stream else line.tick()
        where = spot()
        for tensor, writes in uses:
            touch(tensor, name, line, tick, writes, where)

    @staticmethod
    def same_device(name, given, uses):
        """CUDA takes no tensor of the host but a number, and that not in a list."""
        listed = [t for value in given.values() if isinstance(value, (list, tuple)) for t in _tensors(value)]
        if any(not on_device(t) for t in listed) or any(t.dim() and not on_device(t) for t, _ in uses):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got some on cpu and some on cuda:0 ({spot()})"
            )

    @staticmethod
    def index(name, into, indices, values=None):
        """Indices of the host travel; those with a mask make the host wait, unless it is a fill."""
        indices = [i for i in indices if i is not None]
        if not on_device(into) or (values is not None and values.dim() and not on_device(values)):
            raise RuntimeError(f"{name}: indices or values on cuda:0, indexed tensor or values on cpu ({spot()})")
        masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        fills = values is not None and values.numel() == 1 and not on_device(values) and len(masks) == len(indices) == 1
        if masks and not fills:
            HERE.synchronise(f"{name} by a mask", HERE.stream)
        if any(not on_device(i) and i.numel() for i in indices):
            HERE.synchronise(f"{name} by indices of the host", HERE.stream)

    def copy(self, func, into, source, non_blocking=False):
        """Between devices: beside the host only with pinned memory and non_blocking."""
        to, of = on_device(into), on_device(source)
        host = memory_of(source if to else into)
        self.use([(into, True), (source, False)], "copy_", HERE.stream)
        out = func(into, source)
        if to != of and source.numel() and not (non_blocking and host is not None):
            HERE.synchronise("copy to the host" if of else "copy to the device", HERE.stream)
        return out


# ---------------------------------------------------------------- what names a device


def _device_of(value):
    return value if isinstance(value, torch.device) else torch.device("cuda", value) if isinstance(value, int) else (
        torch.device(value))  # fmt: skip


def _factory(real, values=False):
    """A factory that takes device= and pin_memory=; `values`: from numbers of the host, so they travel."""

    @functools.wraps(real)
    def make(*args, **kwargs):
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
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
    backward = Backward([root.grad_fn for root in roots])
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


def _start_thread(self):
    self.fake_origin = HERE.process, dict(HERE.host.clock)
    _REAL["start"](self)


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
_FROM_VALUES = {"tensor", "as_tensor", "asarray", "scalar_tensor"}


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
def fake_cuda():
    """Inside: torch has a CUDA device and CuPy has NCCL, in this thread and those started meanwhile."""
    constructors = {f.__name__: f for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
    factories = {n: _factory(f, n in _FROM_VALUES) for n, f in constructors.items()}
    made = {n: _factory(getattr(Tensor, n)) for n in ("new_empty", "new_zeros", "new_ones", "new_full")}
    made["new_tensor"] = lambda self, data, dtype=None, device=None, **_: torch.tensor(
        data, dtype=dtype or self.dtype, device=device or self.device
    )
    cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cupy.cuda, cuda.nccl = cuda, fake_nccl
    modules = {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": fake_nccl}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    place = HERE.process, HERE.stream
    HERE.enter(Process())
    try:
        with (
            _patched(torch, factories),
            _patched(Tensor, _TENSOR | made),
            _patched(torch.cuda, _MODULE | {"default_generators": (torch.Generator(),)}),
            _patched(torch.autograd, {"_engine_run_backward": _backward}),
            _patched(threading.Thread, {"start": _start_thread, "_bootstrap_inner": _begin_thread}),
            Device(),
        ):
            yield
    finally:
        HERE.process, HERE.stream = place
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


@contextmanager
def host_syncs():
    """Notes (kind, "file:line") of every time that this thread waits for the device inside."""
    before, HERE.syncs = HERE.syncs, []
    try:
        yield HERE.syncs
    finally:
        HERE.syncs = before


def nccl_ranks(size, work, timeout_s=30.0):
    """Results of work(group) on `size` ranks, each a thread with a device of its own, over NcclGroup; the first error."""
    from tests.conftest import in_threads
    from torch.distributed import HashStore

    from ray_ep.collective.nccl import nccl

    store = HashStore()

    def rank(number):
        HERE.enter(Process())
        group = nccl(store, number, size, timeout_s=timeout_s)
        try:
            return work(group)
        except BaseException:
            group.abort()  # so that peers do not wait
            raise
        finally:
            group.close()

    return in_threads(*(functools.partial(rank, number) for number in range(size)))
