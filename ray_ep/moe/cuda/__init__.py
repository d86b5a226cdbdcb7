"""The local experts on CUDA: order of pairs, Triton kernels and their torch paths, products, backward by hand."""

from __future__ import annotations

from typing import Any

import torch

from ray_ep.moe.cuda import reference


def kernels_for(device: torch.device, dtype: torch.dtype) -> Any:
    """What works between products: kernels.py on CUDA; reference.py elsewhere, for float64, and without Triton."""
    if device.type != "cuda" or dtype == torch.float64:
        return reference
    try:
        import ray_ep.moe.cuda.kernels as kernels
    except ImportError:
        return reference
    return kernels
