"""Operations on tensors of the CUDA that is not there: refused, noted where the host waits, checked for races.

A tensor is on the device if its storage has a `fake_memory` that is not pinned. What is known of an operation comes
from its schema: which arguments it writes, whether it gives a view, and that it reads the others.
"""

from __future__ import annotations

import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_streams import HERE, Memory, memory_of, spot, touch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

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
    if isinstance(tensor, torch.Tensor) and not (there and on_device(tensor)):
        storage, line = tensor.untyped_storage(), HERE.stream if there else HERE.host
        if there:
            line.allocate()
        storage.fake_memory = Memory(line, storage.nbytes(), pinned, spot()) if there or pinned else None
    return tensor


def tensors_in(value):
    """Tensors of an argument or a result of an operation."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


class Device(TorchDispatchMode):
    """What every operation of this thread does to memory: checked and noted, then computed on the CPU."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # there is no compiler here to be kept away, and the wrapper costs as much as the rest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, writes, views, fresh = _known_of(func)
        given = dict(zip(writes, args, strict=False)) | kwargs
        uses = [(t, writes[n]) for n, value in given.items() for t in tensors_in(value)]
        there = [on_device(t) for t, _ in uses]
        if not any(there):
            if not views:
                _use(uses, name, HERE.host)
            out = func(*args, **kwargs)
            return claim(out, CUDA) if HERE.fills and not uses and fresh else out
        if name == "copy_":
            return _copy(func, *args, **kwargs)
        if name in _INDEXED:
            waits = _index(name, *args[: _INDEXED[name]])
        else:
            waits = _WAITS.get(name, "")
            _refuse_mixed(name, given, uses)
        if name == "_grouped_mm" and args[0].dtype != torch.bfloat16:
            waits = name  # torch has a kernel for bfloat16, else one product each, for which it reads the offsets
        if name == "repeat_interleave" and given.get("output_size") is None:
            waits = name
        if not views and name not in _SHAPE_ONLY:
            _use(uses, name, HERE.stream)
        out = _computed(name, func, args, kwargs)
        if waits:
            HERE.synchronise(waits, HERE.stream)
        for tensor in tensors_in(out) if fresh and not views else ():
            if memory_of(tensor) is None:
                claim(tensor, CUDA)
        return out


@functools.cache
def _known_of(func):
    """Of an operation: name, which arguments it writes, whether it gives a view, whether a result has own memory."""
    schema = func._schema
    writes = {a.name: bool(a.alias_info and a.alias_info.is_write) for a in schema.arguments}
    views = not any(writes.values()) and any(r.alias_info is not None for r in schema.returns)
    return schema.name.partition("::")[2], writes, views, any(r.alias_info is None for r in schema.returns)


def _computed(name, func, args, kwargs):
    if name == "histc" and not args[0].is_floating_point():  # the CPU's is of floats only
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _use(uses, name, line):
    known = [(t, writes) for t, writes in uses if memory_of(t) is not None]
    if known or line is HERE.stream:
        tick, where = HERE.launch()[1] if line is HERE.stream else line.tick(), spot()
        for tensor, writes in known:
            touch(tensor, name, line, tick, writes, where)


def _refuse_mixed(name, given, uses):
    """CUDA takes no tensor of the host but a number, and that not in a list."""
    listed = [t for value in given.values() if isinstance(value, (list, tuple)) for t in tensors_in(value)]
    if not all(on_device(t) for t in listed) or any(t.dim() and not on_device(t) for t, _ in uses):
        raise RuntimeError(f"{name}: expected all tensors on one device, got some on cpu, some on cuda:0 ({spot()})")


def _index(name, into, indices, values=None):
    """Why the host waits: for a mask, unless it is a fill, and for indices of its own, which travel."""
    indices = [i for i in indices if i is not None]
    if not on_device(into) or (values is not None and values.dim() and not on_device(values)):
        raise RuntimeError(f"{name}: tensor, indices and values are some on cpu, some on cuda:0 ({spot()})")
    masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
    fills = values is not None and values.numel() == 1 and not on_device(values) and len(masks) == len(indices) == 1
    if masks and not fills:
        return f"{name} by a mask"
    return f"{name} by indices of the host" if any(not on_device(i) and i.numel() for i in indices) else ""


def _copy(func, into, source, non_blocking=False):
    """Between devices: beside the host only with pinned memory and non_blocking."""
    to, of = on_device(into), on_device(source)
    host = memory_of(source if to else into)
    _use([(into, True), (source, False)], "copy_", HERE.stream)
    out = func(into, source)
    if to != of and source.numel() and not (non_blocking and host is not None):
        HERE.synchronise("copy to the host" if of else "copy to the device", HERE.stream)
    return out
