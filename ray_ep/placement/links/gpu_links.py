"""What the driver of the GPUs says of their links, put together: which kind joins each two ranks. Pure.

Asking it is ray_ep.collective.nvml's; comparing it with what was measured is groups.py's. R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ray_ep.placement.placement import Ints

LINK_KINDS = ("not known", "PCIe", "PCIe across sockets", "NVLink", "one GPU")
"""Names of the numbers in `Topology.joined`."""
PCIE, SOCKETS, NVLINK, SAME = 1, 2, 3, 4
"""Numbers of the kinds in LINK_KINDS."""


@dataclass(frozen=True, slots=True)
class GpuLinks:
    """What one rank's machine says of the rank's GPU.

    Args:
        gpu: its UUID. links: kind (a number of LINK_KINDS) of the link to each other GPU of the machine, by UUID.
        fabric: name of the NVLink fabric and the part of it that the GPU belongs to, over machines; "": none.
    """

    gpu: str
    links: Mapping[str, int]
    fabric: str = ""


def joined(said: Sequence[GpuLinks | None]) -> Ints | None:
    """[R, R] kind of link between the GPUs of two ranks, a number of LINK_KINDS; None where nobody says anything.

    Two GPUs of one NVLink fabric are joined by it, be they of different machines.

    Args:
        said: [R] of each rank; None: its machine says nothing.
    """
    if not any(said):
        return None
    out = np.zeros((len(said), len(said)), np.int64)
    for a, one in enumerate(said):
        for b, other in enumerate(said):
            if a == b or one is None or other is None:
                continue
            if one.gpu == other.gpu:
                out[a, b] = SAME
            elif one.fabric and one.fabric == other.fabric:
                out[a, b] = NVLINK
            else:
                out[a, b] = max(one.links.get(other.gpu, 0), other.links.get(one.gpu, 0))
    return out
