"""How NVML is asked, against a small stand-in with its functions: no GPU is here. Its names are the real library's."""

import ctypes
import sys

import pytest
import torch

from ray_ep.collective.nvml import ask, gpu_links, library
from ray_ep.placement.links.gpu_links import NVLINK, PCIE, SOCKETS, GpuLinks


class Info(ctypes.Structure):
    _fields_ = [("clusterUuid", ctypes.c_uint8 * 16), ("cliqueId", ctypes.c_uint32), ("state", ctypes.c_uint)]


class Machine:
    """A machine's NVML: GPUs by name, pairs on NVLink, pairs on two sockets; fails at the function named."""

    class NVMLError(Exception):
        pass

    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK, NVML_TOPOLOGY_SYSTEM, NVML_GPU_FABRIC_STATE_COMPLETED = 2, 0, 50, 3
    c_nvmlGpuFabricInfoV_t = Info

    def __init__(self, gpus, nvlink=(), sockets=(), fabric=0, fails=None):
        self.gpus, self.nvlink, self.sockets, self.fabric, self.fails = gpus, nvlink, sockets, fabric, fails
        self.open = 0

    def check(self, name):
        if name == self.fails:
            raise self.NVMLError(name)

    def nvmlInit(self):
        self.check("init")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.gpus:
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, i):
        return self.gpus[i]

    def nvmlDeviceGetUUID(self, handle):
        return handle.encode()  # older versions return bytes

    def nvmlDeviceGetP2PStatus(self, a, b, index):
        self.check("p2p")
        return 0 if index == 2 and {a, b} in map(set, self.nvlink) else 5

    def nvmlDeviceGetTopologyCommonAncestor(self, a, b):
        return 50 if {a, b} in map(set, self.sockets) else 30

    def nvmlDeviceGetGpuFabricInfoV(self, handle, reference):
        self.check("fabric")
        info = reference._obj
        info.state, info.cliqueId, info.clusterUuid[0] = (3, 7, self.fabric) if self.fabric else (0, 0, 0)


def test_each_other_gpu_has_its_kind_of_link_and_the_library_is_left():
    machine = Machine(["GPU-a", "GPU-b", "GPU-c", "GPU-d"], nvlink=[("GPU-a", "GPU-b")], sockets=[("GPU-a", "GPU-d")])
    assert ask("GPU-a", machine) == GpuLinks("GPU-a", {"GPU-b": NVLINK, "GPU-c": PCIE, "GPU-d": SOCKETS})
    assert machine.open == 0
    assert ask("GPU-a", Machine(["GPU-a"], fabric=0xAB)).fabric == "ab" + "00" * 15 + "/7"


@pytest.mark.parametrize(("fails", "uuid"), [("init", "GPU-a"), ("p2p", "GPU-a"), (None, "GPU-z")])
def test_no_answer_is_none(fails, uuid):
    machine = Machine(["GPU-a", "GPU-b"], fails=fails)
    assert ask(uuid, machine) is None
    assert machine.open == 0


def test_without_a_fabric_call_the_links_are_told_all_the_same():
    assert ask("GPU-a", Machine(["GPU-a", "GPU-b"], fails="fabric")) == GpuLinks("GPU-a", {"GPU-b": PCIE})


def test_without_a_gpu_or_the_library_nothing_is_asked(monkeypatch):
    assert gpu_links(torch.device("cpu"), Machine(["GPU-a"])) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert library() is None
    assert gpu_links(torch.device("cuda", 0), library()) is None
