"""Everything here needs one CUDA device; without it every test is skipped and says why. Not run on a GPU yet.

`pytest tests/gpu --device cpu` runs on the CPU, over gloo, all that needs no NCCL: so the tests themselves are tried.
"""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ray_ep.collective import gloo
from ray_ep.collective.nccl import nccl
from ray_ep.collective.torch_nccl import torch_nccl
from ray_ep.errors import BadInput

os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")  # torch shall not end the process of an aborted group


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cuda", "cpu"], default="cuda", help="where tests/gpu computes")


def where(config):
    """cuda or cpu; a run of the whole suite does not know the option."""
    return config.getoption("--device", "cuda")


def has_cuda():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that torch does not like
        return torch.cuda.is_available()


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: has no meaning on a CPU")


def pytest_collection_modifyitems(config, items):
    on_cpu = where(config) == "cpu"
    reason = f"needs a CUDA device; torch {torch.__version__} sees none"
    skip = pytest.mark.skip(reason="has no meaning on a CPU" if on_cpu else reason)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # Libraries of CUDA warn of many things (a driver, a build, a deprecation): those are no failures.
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
            if (on_cpu and item.get_closest_marker("cuda")) or not (on_cpu or has_cuda()):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def device(request):
    return torch.device("cpu") if where(request.config) == "cpu" else torch.device("cuda", torch.cuda.current_device())


def alone_over_gloo(store, rank, size, timeout_s):
    return gloo(store, rank, size, host="127.0.0.1", timeout_s=timeout_s)


MAKERS = {"nccl": nccl, "torch_nccl": torch_nccl, "gloo": alone_over_gloo}


@pytest.fixture(params=MAKERS)
def group(request, device):
    """A group of this process alone over real NCCL, by either implementation; on the CPU over gloo."""
    if (request.param == "gloo") != (device.type == "cpu"):
        pytest.skip(f"{request.param} is not for {device.type}")
    try:
        made = MAKERS[request.param](dist.HashStore(), 0, 1, timeout_s=60)
    except BadInput as e:
        if "pip install" not in str(e):
            raise
        pytest.skip(str(e))
    yield made
    made.close()
