"""What ranks record of sampled tokens is what one process of plain transformers does, on any ranks, over migrations."""

import numpy as np
import pytest
import torch

from ray_ep.moe import find_experts
from ray_ep.placement import contiguous
from ray_ep.rank.data.corpus import Corpus, global_batch, load_corpus, window_starts
from ray_ep.rank.recorded import AFTER, BEFORE, KINDS
from ray_ep.rank.step.recording import sampled
from tests.conftest import run_ranks
from tests.rank.test_migration import drawn
from tests.rank.test_training import CORPUS, EXPERTS, LAYERS, Reference, configure, make_rank

STEPS = 3
SEQUENCES, LENGTH = 4, 32
NODES = {1: [0], 2: [0, 0], 3: [0, 0, 1], 4: [0, 0, 1, 1]}
OFF = ("balance.in_step=off",)
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "flat"), (3, "all_gather"))]


def train(size, *overrides, steps=STEPS, kind="flat", placements=(), before=lambda rank: None):
    """[rank][step] of what was recorded; before each step the next placement is taken on."""
    cfg, config = configure("provenance.sample=0.3", *overrides)
    placements = placements or [contiguous(LAYERS, EXPERTS, size)] * steps

    def work(group):
        rank = make_rank(cfg, config, group, placements[0], np.array(NODES[size]))
        rank.ep.exchange_by(kind=kind)
        before(rank)
        found = []
        for step in range(steps):
            rank.migrate(placements[step])
            found.append(rank.train_step(step).recorded)
        return found

    return run_ranks(size, work, timeout_s=60)


def by_position(parts):
    """Arrays of one step of all ranks, by position in the global batch."""
    order = np.argsort(np.concatenate([p.position for p in parts]))
    out = {name: np.concatenate([getattr(p, name) for p in parts])[order] for name in ("position", "context", "offset")}
    for name in ("experts", "weights", "ranks", "kinds"):
        out[name] = np.concatenate([getattr(p, name) for p in parts], 1)[:, order]
    return out


@pytest.fixture(scope="module")
def replayed():
    """[step][layer] of (experts, weights) [T, K]: plain transformers, trained beside, in one process."""
    cfg, config = configure()
    plain, out = Reference(cfg, config), []
    for step in range(STEPS):
        seen = []
        hooks = [
            m.register_forward_pre_hook(lambda m, args, seen=seen: seen.append((args[1].detach(), args[2].detach())))
            for m in find_experts(plain.model).values()
        ]
        plain.step(step)
        [hook.remove() for hook in hooks]
        out.append(seen)
    return out


def assert_replays(ranks, replayed):
    """Every recorded path is that of the replay; over steps rounding may turn a near tie, of one token in a hundred."""
    for step in range(STEPS):
        got = by_position([r[step] for r in ranks])
        assert len(got["position"]) > 20
        for layer, (experts, weights) in enumerate(replayed[step]):
            same = (got["experts"][layer] == experts.numpy()[got["position"]]).all(1)
            assert same.mean() >= (1 if not step else 0.99)
            there = weights.numpy()[got["position"]]
            np.testing.assert_allclose(got["weights"][layer][same], there[same], atol=1e-3 if step else 1e-6)


@pytest.mark.parametrize(("size", "kind"), [(2, "flat"), (4, "two_level"), *SLOW])
def test_a_recorded_path_is_that_of_single_process_transformers_over_migrations(size, kind, replayed):
    placements = [drawn(size, seed, replicas=True) for seed in range(STEPS)]
    assert_replays(train(size, *OFF, kind=kind, placements=placements), replayed)


@pytest.mark.parametrize(("size", "kind"), [(2, "flat"), (4, "two_level")])
def test_with_balance_in_the_step_guests_are_recorded_and_the_path_is_the_same(size, kind, replayed):
    before = lambda rank: rank.ep.balancer.assume(1e-3, 1e12)  # noqa: E731
    placements = [drawn(size, seed, replicas=True) for seed in range(STEPS)]
    ranks = train(size, "balance.in_step=always", kind=kind, placements=placements, before=before)
    assert_replays(ranks, replayed)
    kinds = np.concatenate([p.kinds.ravel() for rank in ranks for p in rank])
    assert {KINDS[k] for k in np.unique(kinds)} == set(KINDS)
    for rank in ranks:
        for step, p in enumerate(rank):
            assert (p.version, p.epoch, p.rank) == (placements[step].version, 0, ranks.index(rank))
            for layer, token, choice in np.ndindex(p.experts.shape):
                e, r = int(p.experts[layer, token, choice]), int(p.ranks[layer, token, choice])
                holds = r in placements[step].ranks_of(layer, e)
                kind = "guest" if not holds else "primary" if placements[step].owner[layer, e] == r else "replica"
                assert KINDS[p.kinds[layer, token, choice]] == kind


def test_the_same_tokens_are_sampled_on_any_number_of_ranks_and_passes():
    tokens = []
    for size, more in ((1, ()), (3, ()), (2, ("batch.accumulation=2",))):
        ranks = train(size, *OFF, *more, steps=2)
        tokens.append([by_position([r[step] for r in ranks]) for step in range(2)])
    for other in tokens[1:]:
        for a, b in zip(tokens[0], other, strict=True):
            for name in ("position", "context", "offset"):
                assert np.array_equal(a[name], b[name]), name
    assert not np.array_equal(tokens[0][0]["position"], tokens[0][1]["position"])


def test_context_and_offset_say_where_in_the_text_a_token_stands():
    ((first,),) = train(1, *OFF, steps=1)
    batch = global_batch(CORPUS.train, 0, 0, SEQUENCES, LENGTH)
    row, column = first.position // LENGTH, first.position % LENGTH
    assert np.array_equal(first.context[:, BEFORE], batch[row, column])
    assert np.array_equal(CORPUS.train[first.offset], batch[row, column])
    for i, (r, c) in enumerate(zip(row, column, strict=True)):
        around = batch[r, max(0, c - BEFORE) : c + AFTER + 1]
        assert first.context[i][first.context[i] >= 0].tolist() == around.tolist()
    assert (first.document == 0).all()


def test_chosen_steps_are_recorded_whole_and_others_not_at_all():
    ((none, whole, nothing),) = train(1, *OFF, "provenance.sample=steps:2")
    assert none is None
    assert nothing is None
    assert whole.position.tolist() == list(range(SEQUENCES * LENGTH))


def test_a_step_that_is_broken_off_leaves_no_record_and_made_again_records_the_same():
    cfg, config = configure("provenance.sample=0.3", *OFF)

    def work(group):
        rank, other = (make_rank(cfg, config, group, contiguous(LAYERS, EXPERTS, 2)) for _ in range(2))
        rank._begin()
        for forward in rank._passes(0):
            forward()[0].backward()
        rank.discard()
        return rank.train_step(0).recorded, other.train_step(0).recorded

    for again, control in run_ranks(2, work):
        assert np.array_equal(again.position, control.position)
        assert np.array_equal(again.experts, control.experts)
        assert np.array_equal(again.ranks, control.ranks)


def test_a_sample_has_its_rate_and_is_part_of_a_greater_one():
    positions = np.arange(200_000)
    few, many = (sampled(3, 7, positions, rate) for rate in (0.01, 0.1))
    assert 0.009 < few.mean() < 0.011
    assert not (few & ~many).any()
    assert sampled(3, 7, positions, 1.0).all()
    assert not sampled(3, 7, positions, 0.0).any()
    for seed, step in ((4, 7), (3, 8)):
        both = few & sampled(seed, step, positions, 0.01)
        assert both.sum() < 60, "samples of other seeds and steps have nothing to do with it"
    parts = np.concatenate([sampled(3, 7, part, 0.01) for part in np.array_split(positions, 7)])
    assert np.array_equal(few, parts)


def test_documents_are_counted_among_those_that_are_trained_on(tmp_path):
    from ray_ep.config import load_config

    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"Document {i} says {i * 'so '}. " * 5)
    cfg = load_config(None, [f"data.files=[{tmp_path}/*.txt]", "data.held_out=0.3", "batch.length=16"])
    corpus = load_corpus(cfg.data, 16, 0)
    ends = np.flatnonzero(corpus.train == 0)
    assert corpus.starts.tolist() == [0, *(ends[:-1] + 1).tolist()]
    assert 10 < len(corpus.starts) < 30
    tail = load_corpus(load_config(None, [f"data.files=[{tmp_path}/00.txt]", "batch.length=16"]).data, 16, 0)
    assert tail.starts.tolist() == [0]
    starts = window_starts(len(corpus.train), 0, 5, 4, 16)
    assert np.array_equal(global_batch(corpus.train, 0, 5, 4, 16)[:, 0], corpus.train[starts])
    assert Corpus(corpus.train, corpus.held_out, 256, 1, "").starts.tolist() == [0]


def test_a_model_that_is_torch_dtype_bfloat16_has_its_weights_as_float32():
    ((first,),) = train(1, *OFF, "model.dtype=bfloat16", steps=1)
    assert first.weights.dtype == np.float32
    assert torch.from_numpy(first.weights).sum() > 0
