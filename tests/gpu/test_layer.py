"""What a layer costs the host on a GPU, what its meter says, and that its bounded way can be captured in a graph.

Not run on a GPU yet.
"""

import copy

import pytest
import torch

import ray_ep
from ray_ep.bench.contenders import Work, block
from ray_ep.bench.device import device_seconds
from ray_ep.collective import SoloGroup
from tests.gpu.together import has_grouped_kernel, host_waits
from tests.models import build, placement_of

WORK = Work(8192, 2048, 768, 64, 8)


def one_layer(group, device, dtype=torch.bfloat16, sample=0):
    model = build("qwen3_moe", dtype=dtype, num_hidden_layers=1).to(device)
    return ray_ep.moe.parallelize(model, group, placement_of(model, "contiguous", 1), sample=sample)


@pytest.mark.cuda
@pytest.mark.parametrize("sample", [0, 64])
@pytest.mark.parametrize(("way", "most"), [("flat", 1), ("all_gather", 0)])
def test_the_host_waits_for_the_sizes_only_and_with_a_bound_for_nothing(group, device, way, most, sample):
    if not has_grouped_kernel(device):
        pytest.skip("torch has no grouped kernel for this GPU: its products one by one wait for sizes")
    model = one_layer(group, device, sample=sample)
    model.ray_ep.exchange_by(kind=way, tokens=64)
    forward, backward = host_waits(model, device)
    assert len(forward) <= most, forward
    assert backward == []
    assert model.ray_ep.meter.pairs.tolist() == [3 * 64 * 3]


@pytest.mark.cuda
def test_phases_of_a_layer_add_up_to_its_time_on_the_device_and_not_to_its_enqueueing(device):
    with torch.device(device):
        module = ray_ep.moe.parallelize(block(WORK, torch.bfloat16), SoloGroup())
        x = torch.randn(1, WORK.tokens, WORK.hidden, dtype=torch.bfloat16)
    meter = module.ray_ep.meter

    def step():
        with torch.no_grad():
            module(x)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = dict(meter.seconds)
    took = sum(device_seconds(step, device) for _ in range(5))
    spent = {phase: seconds - before[phase] for phase, seconds in meter.seconds.items()}
    assert 0.6 * took < sum(spent.values()) < 1.05 * took, spent  # the router's own work is none of the phases
    assert spent["experts"] > 0.3 * took


@pytest.mark.cuda
def test_the_bounded_way_can_be_captured_and_replayed_on_other_tokens(group, device):
    if not has_grouped_kernel(device):
        pytest.skip("torch has no grouped kernel for this GPU: its products one by one cannot be captured")
    if type(group).__name__ == "TorchNcclGroup":
        pytest.skip("torch's group watches its calls by events that a capture does not allow everywhere")
    model = one_layer(group, device)
    model.ray_ep.exchange_by(kind="all_gather", tokens=64)
    layer, module = model.ray_ep.layers[0], model.ray_ep.modules[0]
    generator = torch.Generator().manual_seed(4)

    def draw():
        weights, index = torch.rand(64, 8, generator=generator).topk(3)
        hidden = torch.randn(64, 32, generator=generator)
        return hidden.to(device, torch.bfloat16), index.to(device), weights.to(device, torch.bfloat16)

    fixed, graph = draw(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                layer.forward(module, *fixed)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = layer.forward(module, *fixed)
        for _ in range(2):
            fresh = draw()
            for old, new in zip(fixed, fresh, strict=True):
                old.copy_(new)
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(out, layer.forward(module, *copy.copy(fresh)))
    del graph
