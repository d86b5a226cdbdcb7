"""What ranks compute on and exchange over, given the configuration and what the cluster has."""

import pytest

from ray_ep.config import load_config
from ray_ep.driver.actors.cluster import Device, device_of, transports
from ray_ep.errors import ClusterError


def cluster(**keys):
    return load_config(None, [f"cluster.{k}={v}" for k, v in keys.items()]).cluster


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 1, "cpu"), ("auto", 2, "cuda"), ("cpu", 8, "cpu"), ("cuda", 2, "cuda")],
)
def test_ranks_sit_on_gpus_if_there_is_one_for_each(device, gpus, expected):
    found = device_of(cluster(device=device, ranks=2), {"CPU": 4.0, "GPU": float(gpus)}, built=True, local=False)
    assert found.kind == expected


@pytest.mark.parametrize(("device", "gpus"), [("auto", 0), ("auto", 2), ("cpu", 1), ("cuda", 2)])
def test_of_gpus_that_are_wanted_and_enough_or_not_there_nobody_hears(device, gpus):
    assert not device_of(cluster(device=device, ranks=2), {"GPU": float(gpus)}, built=True, local=True).note


def test_gpus_that_are_too_few_are_left_and_an_operator_hears_how_many_ranks_take_them():
    found = device_of(cluster(device="auto", ranks=2), {"CPU": 4.0, "GPU": 1.0}, built=True, local=True)
    assert found == Device(
        "cpu",
        "ranks compute on CPUs: GPUs in the cluster: 1, but 2 ranks need 2: cluster.ranks=1 takes them "
        "(cluster.device=cpu: no GPUs)",
    )


@pytest.mark.parametrize("built", [True, False])
def test_too_few_gpus_of_this_machine_are_refused_with_what_there_is(built):
    with pytest.raises(ClusterError, match=r"2 ranks need 2 GPUs, the cluster has 0 \(and 4 CPUs\)"):
        device_of(cluster(device="cuda", ranks=2), {"CPU": 4.0}, built, local=True)


@pytest.mark.parametrize("have", [{}, {"GPU": 1.0}])
def test_gpus_that_a_cluster_does_not_have_yet_are_waited_for_where_cuda_is_asked_for(have):
    """An autoscaler starts machines once somebody waits for them."""
    assert device_of(cluster(device="cuda", ranks=2), have, built=True, local=False) == Device("cuda")
    assert device_of(cluster(device="auto", ranks=2), have, built=True, local=False).kind == "cpu"
    with pytest.raises(ClusterError, match="torch was built without CUDA"):
        device_of(cluster(device="cuda", ranks=2), have, built=False, local=False)


def test_gpus_that_torch_was_not_built_for_are_left_and_an_operator_hears_what_to_install():
    for gpus in (1.0, 2.0):
        found = device_of(cluster(device="auto", ranks=2), {"CPU": 4.0, "GPU": gpus}, built=False, local=True)
        assert found.kind == "cpu"
        assert f": {gpus:g}, but torch was built without CUDA: install torch's build for CUDA" in found.note
    assert device_of(cluster(device="cpu", ranks=2), {"GPU": 2.0}, built=False, local=True).note == ""
    with pytest.raises(ClusterError, match=r"cluster\.device=cuda: torch was built without CUDA: install"):
        device_of(cluster(device="cuda", ranks=2), {"CPU": 4.0, "GPU": 2.0}, built=False, local=True)


ALL, BARE = ["gloo", "nccl", "torch_nccl", "deepep"], ["gloo", "torch_nccl"]


@pytest.mark.parametrize(
    ("wanted", "device", "usable", "expected"),
    [
        ("auto", "cpu", [ALL, ALL], ["gloo"]),
        ("auto", "cuda", [ALL, ALL], ["nccl", "torch_nccl"]),
        ("auto", "cuda", [ALL, BARE], ["torch_nccl"]),
        ("gloo", "cuda", [ALL, ALL], ["gloo"]),
        ("nccl", "cuda", [BARE, BARE], ["nccl"]),  # the rank itself says what is missing
        ("deepep", "cuda", [ALL, ALL], ["torch_nccl"]),  # what its kernels go over
    ],
)
def test_transports_to_choose_from_are_those_that_every_rank_can_use(wanted, device, usable, expected):
    assert transports(wanted, device, usable) == expected


def test_nccl_for_cpu_ranks_and_gpus_without_any_nccl_are_refused():
    with pytest.raises(ClusterError, match=r"exchange\.transport=nccl .* allowed are auto, gloo"):
        transports("nccl", "cpu", [["gloo"]])
    said = r"no NCCL can be used by every rank \(rank 0 and others: gloo, nccl, torch_nccl; rank 1: gloo\)"
    with pytest.raises(ClusterError, match=said):
        transports("auto", "cuda", [ALL[:3], ["gloo"], ALL[:3]])


def test_deepep_is_refused_for_cpu_ranks_and_where_a_rank_lacks_it():
    with pytest.raises(ClusterError, match=r"exchange\.transport=deepep .* allowed are auto, gloo"):
        transports("deepep", "cpu", [ALL])
    with pytest.raises(ClusterError, match=r"not every rank has deep_ep and torch's NCCL .*built from source"):
        transports("deepep", "cuda", [ALL, BARE])
