"""Training goes on over migrations as if there were none: masters and moments move with their primaries."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ray_ep.errors import ModelError, PlacementError
from ray_ep.moe import Balance
from ray_ep.placement import Placement, contiguous, random
from ray_ep.rank.saved.directory import Directory
from tests.conftest import run_ranks, slow
from tests.rank.test_checkpoint import commit
from tests.rank.test_optimizer import copies, state, together
from tests.rank.test_training import EXPERTS, GPT_OSS, LAYERS, QWEN, assert_follows, configure, make_rank, reference

STEPS, EVERY = 10, 2


def drawn(size, seed, replicas):
    """A random placement whose primaries sit anywhere among the holders; with replicas, some rank may hold nothing."""
    rng = np.random.default_rng(seed)
    room = rng.multinomial(EXPERTS, np.ones(size) / size)
    room = np.minimum(room + replicas * rng.integers(0, 4, size), EXPERTS)
    p = random(LAYERS, EXPERTS, size, room.tolist(), seed=seed)
    primary = [[int(rng.choice(p.ranks_of(i, e))) for e in range(EXPERTS)] for i in range(LAYERS)]
    return Placement(p.slots, EXPERTS, seed, primary=primary)


def train(placements, *overrides, model=QWEN, steps=STEPS, before=lambda rank: None):
    """[rank] results after training that takes on the next placement before every other step."""
    cfg, config = configure(*overrides, model=model)

    def work(group):
        rank, results, todo = make_rank(cfg, config, group, placements[0]), [], list(placements[1:])
        before(rank)
        moved = []
        for number in range(steps):
            if number % EVERY == 0 and todo:  # also before the first step, when there are no moments yet
                moved.append(rank.migrate(todo.pop(0), buffer_mb=0.01))
            results.append(rank.train_step(number))
        assert not todo
        return SimpleNamespace(rank=rank, results=results, moved=moved)

    return run_ranks(placements[0].num_ranks, work, timeout_s=60)


@pytest.mark.parametrize("replicas", [False, True], ids=["no replicas", "replicas"])
@pytest.mark.parametrize("size", [3, *slow(1, 2, 4)])
def test_the_loss_curve_over_migrations_is_that_of_one_process(size, replicas):
    ranks = train([drawn(size, seed, replicas) for seed in range(6)])
    assert_follows([r.results for r in ranks], reference(STEPS)[0])
    assert len(together([r.rank for r in ranks])) > 0, "every expert has one owner"
    if size > 1:
        assert sum(m.moves for m in ranks[0].moved) > 5 * EXPERTS
        assert sum(m.sent for r in ranks for m in r.moved) == sum(m.received for r in ranks for m in r.moved) > 0


def test_balance_inside_the_step_plans_by_the_new_placement():
    placements = [drawn(3, seed, True) for seed in range(6)]
    ranks = train(placements, "balance.in_step=always", before=lambda rank: rank.ep.balancer.assume(1e-3, 1e12))
    assert_follows([r.results for r in ranks], reference(STEPS)[0])
    assert all(Balance(*sum(r.usage.balance for r in rank.results)).guests > 0 for rank in ranks), "there were guests"


VARIANTS = {
    "sgd": (("optim.kind=sgd", "optim.learning_rate=0.3"), QWEN),
    "sgd without momentum": (("optim.kind=sgd", "optim.learning_rate=0.3", "optim.beta1=0"), QWEN),
    "gpt_oss": ((), GPT_OSS),
    "bfloat16": (("model.dtype=bfloat16",), QWEN),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_owned_state_travels_bit_for_bit_and_training_goes_on(variant):
    overrides, model = VARIANTS[variant]
    cfg, config = configure(*overrides, model=model)
    first, second, third = drawn(3, 1, True), drawn(3, 2, True), random(LAYERS, EXPERTS, 3, [0, EXPERTS, 0])

    def work(group):
        rank = make_rank(cfg, config, group, first)
        for number in range(2):
            rank.train_step(number)
        seen = [state(rank)]
        for placement in (second, third, first):
            rank.migrate(placement, buffer_mb=0.01)
            seen.append(state(rank))
            held = copies(rank)
        rank.train_step(2)
        return seen, held, placement, [w.param.dtype for w in rank.optimizer.weights if w.layer is not None]

    done = run_ranks(3, work)
    whole = [{k: t for seen, *_ in done for k, t in seen[i].items()} for i in range(4)]
    for after in whole[1:]:
        assert after.keys() == whole[0].keys()
        assert [k for k, t in after.items() if not torch.equal(t, whole[0][k])] == []
    for _, held, _, dtypes in done:  # replicas compute with the rounded master
        for (name, layer, expert), row in held.items():
            if layer is not None:
                assert torch.equal(row, whole[0][f"weight/{name}/{expert}"].to(dtypes[0]))


def test_a_checkpoint_after_migrations_goes_on_on_another_layout(tmp_path):
    url = str(tmp_path)
    Directory(url).clear(4)
    cfg, config = configure()

    def write(group):
        rank = make_rank(cfg, config, group, drawn(3, 1, True))
        for number in range(4):
            rank.train_step(number)
            rank.migrate(drawn(3, number + 2, True))
        return rank.save(url, 4), rank.rank.statistics()

    def read(group):
        rank = make_rank(cfg, config, group, contiguous(LAYERS, EXPERTS, 2))
        rank.migrate(drawn(2, 3, True))  # before the load: there are no moments yet
        rank.load(url, 4)
        rank.migrate(drawn(2, 4, False))
        return [rank.train_step(number) for number in range(4, 8)]

    commit(url, 4, run_ranks(3, write))
    assert_follows_from(4, run_ranks(2, read))


@pytest.mark.parametrize(("wrote", "reads"), [(0, 0.9), (0.9, 0)])
def test_a_run_resumed_with_another_momentum_migrates_before_its_first_update(tmp_path, wrote, reads):
    url, old, new = str(tmp_path), drawn(2, 1, True), drawn(2, 2, True)
    Directory(url).clear(2)
    written, read = (configure("optim.kind=sgd", "optim.learning_rate=0.3", f"optim.beta1={b}") for b in (wrote, reads))

    def write(group):
        rank = make_rank(*written, group, old)
        [rank.train_step(number) for number in range(2)]
        return rank.save(url, 2), rank.rank.statistics()

    def resume(group, migrates):
        rank = make_rank(*read, group, old)
        rank.load(url, 2)
        assert rank.optimizer.updates == 2
        if migrates:
            rank.migrate(new)
        losses = [rank.train_step(number).loss for number in (2, 3, 4)]
        return losses, {len(w.moments) for w in rank.optimizer.weights}

    commit(url, 2, run_ranks(2, write))
    moved, stayed = (run_ranks(2, lambda group, m=m: resume(group, m)) for m in (True, False))
    assert moved[0][1] == ({1} if reads else {0})
    assert moved[0][0] == pytest.approx(stayed[0][0], rel=1e-5)


def assert_follows_from(step, results):
    for got, want in zip(results[0], reference(STEPS)[0][step:], strict=False):
        assert got.loss == pytest.approx(want.loss, rel=1e-4)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)


def test_gradients_that_wait_for_an_update_are_refused_and_nothing_changes():
    cfg, config = configure()
    old, new = drawn(2, 1, True), drawn(2, 2, True)

    def work(group):
        rank = make_rank(cfg, config, group, old)
        rank.train_step(0)
        before = state(rank)
        rank.optimizer.weights[0].gradient = torch.zeros_like(rank.optimizer.weights[0].param)
        with pytest.raises(ModelError, match="gradients are present"):
            rank.migrate(new)
        rank.optimizer.weights[0].gradient = None
        with pytest.raises(PlacementError, match="on 3 ranks"):
            rank.migrate(contiguous(LAYERS, EXPERTS, 3))
        assert rank.ep.placement is old
        assert all(torch.equal(t, state(rank)[k]) for k, t in before.items())
        return [rank.train_step(1)]

    for results in run_ranks(2, work):
        assert results[0].loss == pytest.approx(reference(STEPS)[0][1].loss, rel=1e-4)
