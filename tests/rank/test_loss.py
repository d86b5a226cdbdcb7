"""The cross entropy in blocks of rows is torch's own over all rows at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from ray_ep.rank.step import loss
from ray_ep.rank.step.loss import summed_cross_entropy

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(loss, "WHOLE", 64)
    monkeypatch.setattr(loss, "BLOCK", 256)


def drawn(shape, vocabulary, dtype, seed, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocabulary, generator=generator) * 4).to(dtype)
    targets = torch.randint(vocabulary, shape, generator=generator)
    return logits, targets.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def both(logits, targets, scale=1.0):
    """[ours, torch's] loss and gradient of `scale` times the loss."""
    found = []
    for of in (summed_cross_entropy, whole):
        leaf = logits.clone().requires_grad_()
        value = of(leaf, targets)
        (value * scale).backward()
        found.append((value.detach(), leaf.grad))
    return found


def whole(logits, targets):
    return cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=2),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_gradients_are_torchs_bit_for_bit_and_the_loss_is_its_sum(shape, vocabulary, dtype, seed, ignored):
    (got, gradient), (want, expected) = both(*drawn(shape, vocabulary, dtype, seed, ignored), scale=1 / 37)
    assert got.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_vocabulary_in_blocks_as_they_are(monkeypatch, dtype):
    monkeypatch.undo()
    logits, targets = drawn((35,), 150_001, dtype, 0)
    (got, gradient), (want, expected) = both(logits, targets, scale=1 / 35)
    assert torch.equal(gradient, expected)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_what_fits_in_one_block_is_torchs_loss_bit_for_bit(monkeypatch):
    monkeypatch.undo()
    for dtype in DTYPES:
        (got, gradient), (want, expected) = both(*drawn((64, 64), 257, dtype, 1))
        assert torch.equal(got, want)
        assert torch.equal(gradient, expected)


def test_blocks_keep_no_float32_copy_for_the_backward():
    logits, targets = drawn((400,), 16, torch.bfloat16, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        summed_cross_entropy(logits.requires_grad_(), targets)
    assert {x.data_ptr() for x in kept} == {logits.data_ptr(), targets.data_ptr()}


def test_without_gradients_and_without_rows():
    logits, targets = drawn((3, 40), 33, torch.bfloat16, 3)
    with torch.no_grad():
        got = summed_cross_entropy(logits, targets)
    assert not got.requires_grad
    torch.testing.assert_close(got, whole(logits, targets), rtol=1e-6, atol=0)
    empty = logits[:0].clone().requires_grad_()
    value = summed_cross_entropy(empty, targets[:0])
    value.backward()
    assert value == 0
    assert empty.grad.shape == empty.shape


def test_logits_that_are_used_again_and_views_of_others_have_their_gradients():
    base, targets = drawn((4, 30), 21, torch.float32, 4)
    found = []
    for of in (summed_cross_entropy, whole):
        leaf = base.clone().requires_grad_()
        logits = (leaf * 3)[:, 1:]
        (of(logits, targets[:, 1:]) + logits.square().sum()).backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("rows", [1, 90])
def test_values_that_are_not_finite_and_targets_out_of_range_show(rows):
    logits, targets = drawn((rows,), 9, torch.float32, 5, ignored=0.0)
    with pytest.raises(IndexError):
        summed_cross_entropy(logits, targets + 9)
    logits[-1, 0] = float("nan")
    assert summed_cross_entropy(logits, targets).isnan()
