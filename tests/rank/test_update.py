"""One update in blocks gives what torch's own optimizers give."""

import pytest
import torch

from ray_ep.rank.step.update import CPU_BLOCK, Rule, WeightPart, sum_of_squares, update

SIZES = [CPU_BLOCK + 17, 7, 513, 2 * CPU_BLOCK + 1, 1]


def optimizers(kind, weights):
    if kind == "adamw":
        return torch.optim.AdamW(weights, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    return torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_weight_is_bit_for_bit_what_torch_makes_of_it_and_its_copy_follows(kind, dtype):
    torch.manual_seed(0)
    masters = [torch.randn(n) for n in SIZES]
    moments = [tuple(torch.zeros(n) for _ in range(2 if kind == "adamw" else 1)) for n in SIZES]
    copies = [torch.empty(n, dtype=torch.bfloat16) if n % 2 else None for n in SIZES]
    expected = [torch.nn.Parameter(m.clone()) for m in masters]
    theirs = optimizers(kind, expected)
    for number in (1, 2, 3):
        gradients = [torch.randn(n).to(dtype) for n in SIZES]
        for p, g in zip(expected, gradients, strict=True):
            p.grad = g.float() * 0.37
        theirs.step()
        parts = [WeightPart(*each) for each in zip(masters, gradients, moments, copies, strict=True)]
        update(Rule(kind, 0.01, 0.9, 0.95, 1e-8, 0.1, 0.37, number), parts)
        for master, copy, p in zip(masters, copies, expected, strict=True):
            assert torch.equal(master, p)
            assert copy is None or torch.equal(copy, p.bfloat16())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_update_is_the_same_where_new_tensors_are_bfloat16_by_default(kind):
    def updated():
        master, gradient, first, second = torch.rand(4, 7, dtype=torch.float32, generator=torch.Generator()).unbind()
        moments = (first, second) if kind == "adamw" else (first,)
        update(Rule(kind, 0.01, 0.9, 0.999, 1e-8, 0.1, 1, 301), [WeightPart(master, gradient, moments, None)])
        return master

    expected = updated()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(updated(), expected)  # bfloat16 has no 301
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 1 << 16, 300_001])
def test_squares_are_summed_as_exactly_as_in_float64(size, dtype):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    assert float(sum_of_squares(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e-38, 1e-30, 1e-22, 1e-19, 1e-15, 1e18, 1e25])
def test_squares_of_small_and_large_numbers_are_as_exact(value, dtype):
    x = torch.full((300_001,), value).to(dtype)
    assert float(sum_of_squares(x)) == pytest.approx(float(x.double().square().sum()), rel=2e-7, abs=0)
    x[:1000] = 0  # rows of nothing among them
    assert float(sum_of_squares(x)) == pytest.approx(float(x.double().square().sum()), rel=2e-7, abs=0)


def test_squares_are_as_exact_where_new_tensors_are_bfloat16_by_default():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).half()
    expected = float(x.double().square().sum())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert float(sum_of_squares(x)) == pytest.approx(expected, rel=1e-7)
    finally:
        torch.set_default_dtype(torch.float32)


def test_squares_beyond_float32_are_finite_and_what_is_not_finite_stays_so():
    assert float(sum_of_squares(torch.tensor([1e25, 1.0]))) == pytest.approx(1e50)
    assert not sum_of_squares(torch.tensor([1.0, torch.inf])).isfinite()
    assert sum_of_squares(torch.tensor([1.0, torch.nan])).isnan()
