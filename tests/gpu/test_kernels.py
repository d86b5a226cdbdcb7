"""Triton's kernels on the device, at sizes that its interpreter could not do; small ones are in tests/moe.

Not run on a GPU yet.
"""

import pytest
import torch

kernels = pytest.importorskip("ray_ep.moe.cuda.kernels", reason="needs Triton")
reference = pytest.importorskip("ray_ep.moe.cuda.reference")

pytestmark = pytest.mark.cuda
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""rtol: a step or two of the dtype."""


def draws(device, dtype, *shapes):
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1000, 1408])
def test_swiglu_and_its_backward_equal_their_torch_paths(device, dtype, width):
    pairs = 30011
    gate_up, dh, weight = draws(device, dtype, (pairs, 2 * width), (pairs, width), (pairs,))
    pair = torch.randperm(pairs, device=device)
    close = {"rtol": DTYPES[dtype], "atol": 1e-5}
    torch.testing.assert_close(kernels.swiglu(gate_up, weight, pair), reference.swiglu(gate_up, weight, pair), **close)
    mine, theirs = torch.empty_like(weight), torch.empty_like(weight)
    got = kernels.swiglu_backward(gate_up, weight, pair, dh, mine)
    want = reference.swiglu_backward(gate_up, weight, pair, dh, theirs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **close)
    torch.testing.assert_close(mine, theirs, rtol=DTYPES[dtype], atol=1e-3 * width**0.5)  # another order of the sum


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2048, 2880])
def test_segment_sums_equal_their_torch_path_and_are_the_same_bits_each_time(device, dtype, width):
    (rows,) = draws(device, dtype, (20000, width))
    lengths = torch.randint(0, 9, (5000,), generator=torch.Generator().manual_seed(1))
    start = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    member = torch.randint(0, 20000, (int(lengths.sum()),), generator=torch.Generator().manual_seed(2)).to(device)
    for parts in ([rows], [rows[:7777], rows[7777:]]):
        got = kernels.segment_sum(parts, start, member)
        torch.testing.assert_close(got, reference.segment_sum(parts, start, member), rtol=DTYPES[dtype], atol=1e-5)
        assert torch.equal(got, kernels.segment_sum(parts, start, member))


def test_rows_beyond_two_to_the_31_elements_are_found(device):
    pairs, width = 3_000_000, 768
    if torch.cuda.mem_get_info(device)[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory on the device")
    gate_up = torch.zeros(pairs, 2 * width, dtype=torch.bfloat16, device=device)  # 4.6e9 elements
    gate_up[-1] = 1
    weight, pair = torch.ones(pairs, device=device), torch.arange(pairs, device=device)
    h = kernels.swiglu(gate_up, weight, pair)
    assert not h[:-1].any()
    last = reference.swiglu(gate_up[-1:], weight[-1:], pair[:1])
    torch.testing.assert_close(h[-1:], last, rtol=DTYPES[torch.bfloat16], atol=0)
    start = torch.tensor([0, 1, 2], device=device)
    sums = kernels.segment_sum([h], start, torch.tensor([pairs - 1, 0], device=device))
    assert torch.equal(sums, h[[pairs - 1, 0]])
