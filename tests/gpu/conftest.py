"""Everything here needs one CUDA device; without it every test is skipped and says why. Not run on a GPU yet."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ray_ep.collective.nccl import nccl
from ray_ep.collective.torch_nccl import torch_nccl
from ray_ep.errors import BadInput

os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")  # torch shall not end the process of an aborted group

MAKERS = {"nccl": nccl, "torch_nccl": torch_nccl}


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"needs a CUDA device; torch {torch.__version__} sees none")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=MAKERS)
def group(request, device):
    """A group of this process alone over real NCCL, by either implementation."""
    try:
        made = MAKERS[request.param](dist.HashStore(), 0, 1, timeout_s=60)
    except BadInput as e:
        if "pip install" not in str(e):
            raise
        pytest.skip(str(e))
    yield made
    made.close()
