"""Triton's kernels on the CUDA that is not there, by Triton's own interpreter: one at a time, and checked for races.

The interpreter is the process's: threads would take each other's place in the grid. It knows no streams, so around each
kernel its tensors count as read, and as written if their bytes are others afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading

import torch

from tests.fake_streams import HERE, memory_of, spot, touch

_ONE_AT_A_TIME = threading.Lock()


def interpreter():
    """The class that runs kernels without a GPU; None: Triton is not installed."""
    try:
        return importlib.import_module("triton.runtime.interpreter").GridExecutor
    except ImportError:
        return None


def checked(run):
    """`GridExecutor.__call__` as a use of its tensors' memory on the current stream."""

    @functools.wraps(run)
    def launch(executor, *args, **kwargs):
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        known = [t for t in tensors if memory_of(t) is not None]
        name, where = executor.fn.__name__, spot()
        if len(known) < len(tensors) and known:
            raise ValueError(f"{name}: Pointer argument cannot be accessed from Triton (cpu tensor?) ({where})")
        if not known:
            return run(executor, *args, **kwargs)
        line, tick = HERE.launch()
        for tensor in known:
            touch(tensor, name, line, tick, False, where)
        with _ONE_AT_A_TIME:
            before = [_bytes_of(t) for t in known]
            out = run(executor, *args, **kwargs)
        for tensor, old in zip(known, before, strict=True):
            if _bytes_of(tensor) != old:
                touch(tensor, name, line, tick, True, where)
        return out

    return launch


def _bytes_of(tensor):
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if tensor.numel() else b""
