"""CuPy's binding of NCCL: finding it, and where its versions 13 and 14 differ.

The import and the communicator's id were tried with both versions without a GPU; the rest has not run on one yet.
"""

from __future__ import annotations

from typing import Any

import torch

from ray_ep.collective.device import cuda_device
from ray_ep.errors import BadInput


def library() -> Any:
    """The module cupy.cuda.nccl; raises BadInput if it cannot be used here."""
    cuda_device(None)
    try:
        from cupy.cuda import nccl as api
    except ImportError as e:
        raise BadInput(
            "the NCCL exchange needs CuPy: pip install 'ray_ep[cuda12]' or 'ray_ep[cuda13]', whichever torch is for "
            f"(torch {torch.__version__}); {e}"
        ) from e
    if not api.available:
        raise BadInput("CuPy finds no NCCL: pip install nvidia-nccl-cu12 or nvidia-nccl-cu13, whichever CuPy is for")
    return api


def communicator(api: Any, size: int, identity: bytes, rank: int) -> Any:
    """An NcclCommunicator (blocks until all ranks are there): CuPy 14 takes the id as bytes, 13 as signed numbers."""
    try:
        return api.NcclCommunicator(size, identity, rank)
    except TypeError:
        return api.NcclCommunicator(size, tuple(memoryview(identity).cast("b")), rank)


def reduction_type(api: Any, dtype: torch.dtype) -> int:
    """NCCL's number for the element type of a reduction; raises BadInput for one that it cannot add."""
    numbers = {
        torch.float32: api.NCCL_FLOAT32, torch.float64: api.NCCL_FLOAT64, torch.float16: api.NCCL_FLOAT16,
        torch.bfloat16: api.NCCL_BFLOAT16, torch.int64: api.NCCL_INT64, torch.int32: api.NCCL_INT32,
        torch.int8: api.NCCL_INT8, torch.uint8: api.NCCL_UINT8,
    }  # fmt: skip
    if dtype not in numbers:
        raise BadInput(f"NCCL does not reduce {dtype}: allowed are {', '.join(str(d) for d in numbers)}")
    return int(numbers[dtype])
