"""The NCCL backends of ray.util.collective where they cannot be used: they say so before anybody waits."""

import pytest
import torch

from ray_ep.collective.ray_backend import BACKENDS, join
from ray_ep.errors import BadInput


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(BadInput, match="'mpi': allowed are gloo, nccl, torch_nccl"):
        join("group", 0, 1, backend="mpi")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("backend", ["nccl", "torch_nccl"])
def test_without_cuda_a_join_fails_at_once_and_ray_hears_that_the_backend_is_not_available(backend):
    with pytest.raises(BadInput, match="no GPU can be used here"):
        join("group", 0, 1, backend=backend)
    assert not BACKENDS[backend].check_backend_availability()
    assert BACKENDS["gloo"].check_backend_availability()


def test_each_backend_has_a_name_of_its_own_in_ray():
    assert {b.backend() for b in BACKENDS.values()} == {"RAY_EP_GLOO", "RAY_EP_NCCL", "RAY_EP_TORCH_NCCL"}
