"""Routing statistics counted on a rank: by hand, against exact counts, and the reservoir of token expert sets."""

import numpy as np
import pytest
import torch

import ray_ep
from ray_ep.moe.counters import Counters
from tests.models import VOCAB, build, loss_sum

EXPERTS = 4


def counted(passes, experts=EXPERTS, **options):
    """Counters that saw passes; a pass is the choices [T, K] of every layer."""
    counters = Counters(len(passes[0]), experts, **options)
    for layers in passes:
        for i, index in enumerate(layers):
            counters.count(i, torch.as_tensor(index))
    return counters


def some_passes(tokens, layers=3, experts=EXPERTS, top_k=2, seed=0):
    rng = np.random.default_rng(seed)
    draws = ([rng.permutation(experts)[:top_k] for _ in range(layers * t)] for t in tokens)
    return [np.array(d, np.int64).reshape(layers, t, top_k) for d, t in zip(draws, tokens, strict=True)]


def test_three_tokens_in_two_layers_are_counted_as_worked_out_by_hand():
    found = counted([[[[0, 1], [1, 2], [0, 1]], [[3, 0], [3, 1], [2, 3]]]]).statistics()
    assert found.load.tolist() == [[2, 3, 1, 0], [1, 1, 1, 3]]
    # [a][b]: tokens that chose both a and b; the diagonal is the load.
    assert found.coactivation.tolist() == [
        [[2, 2, 0, 0], [2, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
        [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 3]],
    ]
    # [a][b]: tokens that chose a in layer 0 and b in layer 1: {0,1}->{3,0}, {1,2}->{3,1}, {0,1}->{2,3}.
    assert found.transitions.tolist() == [[[1, 0, 1, 2], [1, 1, 1, 3], [0, 1, 0, 1], [0, 0, 0, 0]]]


def test_counts_of_passes_add_up_and_a_steps_load_starts_anew():
    passes = some_passes([5, 0, 7])
    counters = counted(passes)
    step = counters.take_step()
    counters.count(0, torch.tensor([[1, 3]]))
    parts = [counted([p]).statistics() for p in passes]
    assert torch.equal(step, torch.from_numpy(sum(p.load for p in parts)))
    assert counters.take_step().tolist() == [[0, 1, 0, 1], [0] * 4, [0] * 4]
    assert counters.take_step().sum() == 0
    found = counters.statistics()
    assert (found.transitions == sum(p.transitions for p in parts)).all()
    assert found.load.sum() == sum(p.load.sum() for p in parts) + 2


def test_switched_off_counters_still_give_the_load_of_a_pass():
    counters = Counters(1, EXPERTS, sample=4)
    with counters.off():
        assert counters.count(0, torch.tensor([[0, 2], [2, 3]])).tolist() == [1, 0, 2, 1]
    assert (counters.total.sum(), counters.coactivation.sum(), counters.seen) == (0, 0, 0)
    with pytest.raises(RuntimeError), counters.off():
        counters.count(0, torch.tensor([[-1, 2]]))
    counters.count(0, torch.tensor([[0, 2]]))
    assert (counters.total.sum(), counters.seen) == (2, 1), "an error inside leaves them on"


@pytest.mark.parametrize("tokens", [1000, 4096, 6001])
def test_subsampled_pair_counts_are_close_to_the_exact_ones_and_have_their_sum(tokens):
    rng = np.random.default_rng(0)
    popular = np.log([8, 5, 3, 2, 1, 1])
    # The two highest of noisy scores that are correlated between layers: pairs and transitions far from uniform.
    noise = rng.gumbel(size=(tokens, 6))
    layers = [np.argsort(-(popular + noise + 0.7 * rng.gumbel(size=(tokens, 6))), 1)[:, :2] for _ in range(2)]
    rough, exact = (counted([layers], 6, pair_tokens=n).statistics() for n in (1024, tokens))
    assert (rough.load == exact.load).all()
    for name in ("coactivation", "transitions"):
        a, b = getattr(rough, name), getattr(exact, name)
        assert abs(a.sum() - b.sum()) <= 36, "rounding of each cell at most"
        assert abs(a - b).max() <= 0.04 * tokens
        assert abs(a - b).sum() <= 0.1 * b.sum()
    assert (rough.transitions != exact.transitions).any() == (tokens > 1024)


@pytest.mark.parametrize("size", [1, 2])
def test_a_recomputation_is_not_counted_again(ranks, size):
    ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))

    def one(group, checkpointed):
        model = ray_ep.moe.parallelize(build("qwen3_moe"), group, sample=8).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss_sum(model, ids[group.rank :: size])[0].backward()
        ep = model.ray_ep
        assert all(layer.calls == 1 + checkpointed for layer in ep.layers), "the block was (not) computed twice"
        return ep.counters.statistics(), ep.pass_load(), ep.meter.pairs.copy()

    plain, twice = (ranks(size, lambda g: one(g, c)) for c in (False, True))
    for (a, load, _), (b, other_load, _) in zip(plain, twice, strict=True):
        assert b.load.sum(1).tolist() == [ids.numel() // size * 3] * 2
        assert torch.equal(load, other_load)
        assert all((getattr(a, n) == getattr(b, n)).all() for n in ("load", "coactivation", "transitions", "sample"))
    assert sum(pairs for _, _, pairs in twice).tolist() == [ids.numel() * 3] * 2


def token_sets(tokens, start=0, layers=3):
    """Choices [L, T, K] that tell the token: its number in base 10, another digit pair in every layer."""
    number = np.arange(start, start + tokens)
    return np.stack([np.stack([(number + i) % 1000 // 10, 100 + (number + i) % 10], 1) for i in range(layers)])


def numbers(sample):
    """[L, capacity] which token each sampled set is of."""
    return np.stack([(sample[i, :, 0] * 10 + sample[i, :, 1] - 100 - i) % 1000 for i in range(len(sample))])


def test_the_reservoir_holds_the_same_real_tokens_in_every_layer():
    for seed in range(20):
        passes = [token_sets(t, s) for t, s in ((30, 0), (0, 30), (170, 30), (1, 200), (99, 201))]
        found = numbers(counted(passes, 110, sample=16, seed=seed).statistics().sample)
        assert found.shape == (3, 16)
        assert (found == found[0]).all(), "a set of one layer belongs to another token than that of layer 0"
        assert len(set(found[0])) == 16
        assert found.max() < 300


def test_a_reservoir_larger_than_the_tokens_seen_keeps_all_in_order():
    sample = counted([token_sets(5), token_sets(6, 5)], 110, sample=50).statistics().sample
    assert numbers(sample).tolist() == [list(range(11))] * 3
    full = counted([token_sets(50)], 110, sample=50).statistics().sample
    assert numbers(full)[0].tolist() == list(range(50))


def test_every_token_is_as_likely_in_the_reservoir_as_any_other():
    tokens, capacity, trials = 60, 6, 1500
    passes = [token_sets(t, s, layers=1) for t, s in ((10, 0), (25, 10), (25, 35))]
    hits = np.zeros(tokens)
    for seed in range(trials):
        hits[numbers(counted(passes, 110, sample=capacity, seed=seed).statistics().sample)[0]] += 1
    expected = trials * capacity / tokens
    chi_square = ((hits - expected) ** 2 / expected).sum()
    assert chi_square < 110  # 59 degrees of freedom: mean 59 (less, without replacement), standard deviation 11
    slots = np.zeros((capacity, 3))  # each place also holds tokens of every pass
    for seed in range(300):
        found = numbers(counted(passes, 110, sample=capacity, seed=seed).statistics().sample)[0]
        slots[np.arange(capacity), np.searchsorted([10, 35], found, "right")] += 1
    assert (abs(slots / 300 - np.array([10, 25, 25]) / tokens) < 0.12).all()


def test_with_a_window_old_tokens_leave_the_reservoir_at_its_pace():
    half_life, capacity, tokens = 80, 32, 960
    window = round(half_life / np.log(2))
    passes = [token_sets(40, s, layers=1) for s in range(0, tokens, 40)]
    ages = np.concatenate([
        tokens - numbers(counted(passes, 110, sample=capacity, seed=s, window=window).statistics().sample)[0]
        for s in range(60)
    ])  # fmt: skip
    assert np.mean(ages <= half_life) == pytest.approx(0.5, abs=0.06)
    assert np.mean(ages <= 2 * half_life) == pytest.approx(0.75, abs=0.06)


def test_ranks_choose_their_samples_independently_and_a_sample_of_none_is_empty(ranks):
    assert counted(some_passes([5])).statistics().sample.shape == (3, 0, 1)
    a, b = (numbers(counted([token_sets(300)], 110, sample=8, seed=s).statistics().sample)[0] for s in (0, 1))
    assert a.tolist() != b.tolist()
    counters = ranks(2, lambda g: ray_ep.moe.parallelize(build("mixtral"), g, sample=8).ray_ep.counters)
    for c in counters:
        for layer, index in enumerate(some_passes([300], layers=2, experts=6)[0]):
            c.count(layer, torch.from_numpy(index))
    assert not torch.equal(counters[0].sample, counters[1].sample)


def test_the_sample_is_shared_out_anew_when_ranks_leave_and_come():
    passes = some_passes([40], layers=2, experts=9, top_k=3)
    counters = counted(passes, experts=9, sample=20, window=600)
    before = {tuple(map(tuple, t)) for t in counters.sets().transpose(1, 0, 2).tolist()}
    counters.share(2, 4)
    assert (counters.capacity, counters.window, counters.sets().shape) == (10, 300, (2, 10, 3))
    after = {tuple(map(tuple, t)) for t in counters.sets().transpose(1, 0, 2).tolist()}
    assert after <= before, "tokens keep their sets in all layers"
    counters.share(4, 1)
    assert (counters.capacity, counters.window, counters.sets().shape) == (40, 1200, (2, 10, 3))
    for i, index in enumerate(some_passes([25], layers=2, experts=9, top_k=3, seed=1)[0]):
        counters.count(i, torch.as_tensor(index))
    assert counters.sets().shape == (2, 35, 3), "new places are filled first"
    assert counters.statistics().load.sum() == 2 * 65 * 3, "loads count on"


def test_part_of_a_sample_is_no_matter_of_when_a_token_came():
    kept = np.zeros(12)
    for seed in range(400):
        counters = counted([[np.arange(12)[:, None] % 12]], experts=12, sample=12, seed=seed)
        counters.share(1, 3)
        kept[counters.sets().ravel()] += 1
    assert kept.sum() == 400 * 4
    assert kept.min() > 90  # 133 expected, 10 the standard deviation
