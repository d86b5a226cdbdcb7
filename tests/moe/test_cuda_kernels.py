"""Triton's kernels equal their torch paths: on a GPU where there is one, else in Triton's interpreter."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from ray_ep.moe.cuda import reference
from ray_ep.moe.cuda.order import expert_order
from tests.test_structure import FILES, ROOT, imported

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
from ray_ep.moe.cuda import kernels

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # in the interpreter: inf, as it should

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: (1e-6, 1e-6), torch.float16: (2**-10, 1e-6), torch.bfloat16: (2**-7, 1e-6)}
"""rtol and atol. One step of the dtype: the interpreter cuts bfloat16 off where a GPU rounds."""

SIZES = {"odd": (37, 200), "one pair": (1, 64), "wide": (3, 1100), "narrow": (50, 24), "no pair": (0, 48)}


def close(got, want):
    rtol, atol = DTYPES[want.dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def draws(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


@pytest.mark.parametrize(
    ("size", "weight_dtype"), [*((size, torch.float32) for size in SIZES), ("odd", torch.bfloat16)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_with_weights_equals_its_torch_path(dtype, size, weight_dtype):
    pairs, width = SIZES[size]
    gate_up, dh, weight = draws(dtype, (pairs, 2 * width), (pairs, width), (pairs,))
    if pairs > 1:
        gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -20.0])  # saturated on both sides
    weight, pair = weight.to(weight_dtype), torch.randperm(pairs).to(DEVICE)
    close(kernels.swiglu(gate_up, weight, pair), reference.swiglu(gate_up, weight, pair))
    d_weight, wanted = torch.empty_like(weight), torch.empty_like(weight)
    got = kernels.swiglu_backward(gate_up, weight, pair, dh, d_weight)
    want = reference.swiglu_backward(gate_up, weight, pair, dh, wanted)
    for a, b in zip(got, want, strict=True):
        close(a, b)
    # The sums over a row are added in another order.
    torch.testing.assert_close(d_weight, wanted, rtol=DTYPES[weight_dtype][0], atol=1e-4)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("width", [24, 320])
@pytest.mark.parametrize("dtype", DTYPES)
def test_segment_sums_equal_their_torch_path(dtype, width, parts):
    (rows,) = draws(dtype, (20, width))
    lengths = torch.tensor([0, 3, 1, 8, 0, 5, 4, 0])
    start = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    member = torch.randint(0, 20, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    split = [rows] if parts == 1 else [rows[7:].clone(), rows[:7].clone()]
    rows = torch.cat(split)
    got, want = (by.segment_sum(split, start, member) for by in (kernels, reference))
    slow = torch.stack([rows[member[a:b]].float().sum(0) for a, b in pairwise(start.tolist())])
    torch.testing.assert_close(want, slow.to(dtype), rtol=2 * DTYPES[dtype][0], atol=1e-5)
    if dtype == torch.bfloat16:
        close(got, want)
    else:
        assert torch.equal(got, want), "the order of a sum is that of its members"


def test_no_segments_and_segments_of_nothing_are_sums_too():
    (rows,), none = draws(torch.float32, (0, 24)), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for by in (kernels, reference):
        assert by.segment_sum([rows], none.new_zeros(1), none).shape == (0, 24)
        assert by.segment_sum([rows], none.new_zeros(4), none).tolist() == [[0.0] * 24] * 3


def test_experts_without_pairs_get_zeros_and_others_keep_what_they_have():
    ends = torch.tensor([0, 2, 2, 7, 7], dtype=torch.int32, device=DEVICE)
    for by in (kernels, reference):
        out = torch.full((5, 3, 700), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        out[[1, 3]] = 1
        by.zero_empty(out, ends)
        assert out.float().sum((1, 2)).tolist() == [0, 2100, 0, 2100, 0]


def test_pairs_are_grouped_by_expert_in_the_order_in_which_they_came():
    """The drawing of order.py."""
    row, expert = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 0, 1, 0, 2])
    order = expert_order(row, expert, 4)
    assert order.pair.tolist() == [1, 3, 0, 2, 4]
    assert order.row.tolist() == [0, 2, 0, 1, 2]
    assert order.place.tolist() == [2, 0, 3, 1, 4]
    assert order.ends.tolist() == [2, 4, 5, 5]


@pytest.mark.parametrize("experts", [1, 256, 257, 1000])
def test_keys_are_wide_enough_for_every_expert(experts):
    expert = torch.randint(0, experts, (3000,), generator=torch.Generator().manual_seed(0))
    expert[:2] = torch.tensor([experts - 1, 0])
    order = expert_order(torch.arange(3000), expert, experts)
    assert torch.equal(order.pair, torch.argsort(expert, stable=True))
    assert torch.equal(order.ends, torch.bincount(expert, minlength=experts).cumsum(0).int())
    assert torch.equal(order.pair[order.place], torch.arange(3000))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ray_ep.moe.cuda import kernels

NUMBERS = {"pair": "*i64", "start": "*i64", "member": "*i64", "ends": "*i32", "weight": "*fp32", "d_weight": "*fp32",
           "pairs": "i32", "width": "i32", "first_more": "i32", "size": "i32"}

def loads(kernel, **constants):
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in constants else NUMBERS.get(n, "*bf16") for n in names}
    odd = (*constants, "pairs", "first_more")
    whole = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in odd}
    source = ASTSource(kernel, kinds, constants, whole)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}).asm["ptx"]
    return ptx.count("ld.global.v4"), ptx.count("atom.")

print(loads(kernels._swiglu, ROWS=8, COLUMNS=256))
print(loads(kernels._swiglu_backward, ROWS=8, COLUMNS=256))
print(loads(kernels._segment_sum, TWO=False, COLUMNS=1024))
print(loads(kernels._segment_sum, TWO=True, COLUMNS=1024))
print(loads(kernels._zero_empty, PROGRAMS=64, COLUMNS=1024))
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper_with_loads_of_16_bytes_and_no_atomics():
    """Without a GPU too: Triton brings its own assembler."""
    command = [sys.executable, "-W", "error", "-c", COMPILE]
    run = subprocess.run(command, env={"PATH": "/usr/bin:/bin", "HOME": "/tmp"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [eval(line) for line in run.stdout.splitlines()]
    assert found == [(4, 0), (6, 0), (4, 0), (4, 0), (0, 0)]


def test_triton_is_needed_by_the_kernels_alone_and_they_by_a_cuda_pass_alone():
    assert [p.relative_to(ROOT).as_posix() for p in FILES if "triton" in imported(p)] == ["moe/cuda/kernels.py"]
    users = [p.relative_to(ROOT).as_posix() for p in FILES if "import ray_ep.moe.cuda.kernels" in p.read_text()]
    assert users == ["moe/cuda/__init__.py"], "in kernels_for"
