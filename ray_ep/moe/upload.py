"""Small arrays of the host to the model's device, without waiting for it."""

from __future__ import annotations

import numpy as np
import torch


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of the array on the device; on the CPU it shares the array's memory.

    Copies from ordinary memory make the host wait for a GPU; from pinned memory they do not. Not run on a GPU yet.
    """
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
