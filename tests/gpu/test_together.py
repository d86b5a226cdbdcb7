"""Ranks that share the one GPU: over NCCL, each taken for a host of its own, and over gloo through CPU memory.

Over NCCL not run on a GPU yet. With `--device cpu` the same job runs over gloo.
"""

import pytest

from ray_ep.collective.cupy_nccl import library
from ray_ep.collective.torch_nccl import check_torch_nccl
from ray_ep.errors import BadInput
from tests.gpu.ranks import run_job
from tests.gpu.together import SECTIONS

JOBS = [("nccl", 2), ("torch_nccl", 2), ("staged", 2), ("staged", 3), ("gloo", 3)]
LIMIT_S = 90.0


@pytest.fixture(scope="module", params=JOBS, ids=lambda job: f"{job[0]}-{job[1]}")
def outcome(request, device, tmp_path_factory):
    """Of one job, which goes through all sections."""
    kind, size = request.param
    over_nccl = "nccl" in kind
    if (kind == "gloo" and device.type == "cuda") or (over_nccl and device.type == "cpu"):
        pytest.skip(f"{kind} is not for {device.type}")
    if over_nccl:
        try:
            library() if kind == "nccl" else check_torch_nccl()
        except BadInput as e:
            pytest.skip(str(e))
    return run_job(kind, size, device.type, tmp_path_factory.mktemp("ranks"), LIMIT_S)


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("section", SECTIONS)
def test_all_ranks_get_through(outcome, section):
    outcome.check(section, SECTIONS)
