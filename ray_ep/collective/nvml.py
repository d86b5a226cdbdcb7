"""Asking the driver of NVIDIA's GPUs how they are joined: nvidia-ml-py, optional. It has not run on a GPU yet.

What the answers mean together is ray_ep.placement.links.gpu_links's. Imports no Ray.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch

from ray_ep.placement.links.gpu_links import NVLINK, PCIE, SOCKETS, GpuLinks


def library() -> Any | None:
    """The module `pynvml` of nvidia-ml-py (extras cuda12, cuda13); None where it is not installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def gpu_links(device: torch.device, nvml: Any | None) -> GpuLinks | None:
    """What NVML says of this device and the machine's other GPUs; None where there is no GPU, no NVML, or no answer.

    Never raises: a run does without.

    Args:
        nvml: `library()`.
    """
    if nvml is None or device.type != "cuda":
        return None
    return ask(f"GPU-{torch.cuda.get_device_properties(device).uuid}", nvml)


def ask(uuid: str, nvml: Any) -> GpuLinks | None:
    """The same of the GPU with this UUID, such as "GPU-5a1c…"; `nvml` has pynvml's functions and constants."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        own = nvml.nvmlDeviceGetHandleByUUID(uuid)
        links: dict[str, int] = {}
        for i in range(nvml.nvmlDeviceGetCount()):
            other = nvml.nvmlDeviceGetHandleByIndex(i)
            name = _text(nvml.nvmlDeviceGetUUID(other))
            if name != uuid:
                links[name] = _kind(own, other, nvml)
        return GpuLinks(uuid, links, _fabric(own, nvml))
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _kind(own: Any, other: Any, nvml: Any) -> int:
    """NVLink where the two reach each other over it, else how far apart they are on PCIe."""
    if nvml.nvmlDeviceGetP2PStatus(own, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
        return NVLINK
    above = nvml.nvmlDeviceGetTopologyCommonAncestor(own, other)
    return SOCKETS if above >= nvml.NVML_TOPOLOGY_SYSTEM else PCIE


def _fabric(own: Any, nvml: Any) -> str:
    """Cluster and clique of an NVLink fabric over machines; "" where there is none, or the library is too old."""
    try:
        info = nvml.c_nvmlGpuFabricInfoV_t()
        nvml.nvmlDeviceGetGpuFabricInfoV(own, ctypes.byref(info))
        if info.state != nvml.NVML_GPU_FABRIC_STATE_COMPLETED:
            return ""
    except (nvml.NVMLError, AttributeError):
        return ""
    cluster = bytes(info.clusterUuid).hex()
    return f"{cluster}/{info.cliqueId}" if cluster.strip("0") else ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
