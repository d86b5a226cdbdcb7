"""Dropout and router noise are the same on any number of ranks, with accumulation, after a resume, when recomputed."""

import functools

import pytest
import torch
from torch.nn import functional as F

from ray_ep.collective import SoloGroup
from ray_ep.moe import Draws
from ray_ep.placement import random
from ray_ep.rank.saved.checkpoint import Directory
from tests.conftest import run_ranks, slow
from tests.rank.test_training import EXPERTS, LAYERS, QWEN, SIZES, configure, make_rank

DROPOUT = (f"model.overrides={{{SIZES}, num_experts: {EXPERTS}, moe_intermediate_size: 16, attention_dropout: 0.3}}",)
LOCAL = f"{SIZES}, num_local_experts: {EXPERTS}"
MODELS = {
    "dropout in attention": DROPOUT,
    "jitter of mixtral": ("model.type=mixtral", f"model.overrides={{{LOCAL}, router_jitter_noise: 0.3}}"),
    "sparsemixer of phimoe": (
        "model.type=phimoe",
        f"model.overrides={{{LOCAL}, input_jitter_noise: 0.1, attention_dropout: 0.1}}",
    ),
}
STEPS, CHECKPOINTED = 4, "model.gradient_checkpointing=true"
WAYS = {  # ranks, and what is overridden
    "2 ranks": (2, ()),
    "3 ranks": (3, ()),
    "accumulated": (2, ("batch.accumulation=2",)),
    "recomputed": (1, (CHECKPOINTED,)),
    "both": (1, (CHECKPOINTED, "batch.accumulation=2")),
}


def losses(size, *overrides, model, resume=None):
    """Loss of every step; with `resume`, a directory, by ranks that end after half of them and others that go on."""
    cfg, config = configure("router.aux_loss=off", "batch.sequences=4", *overrides, model=model)
    half = STEPS // 2

    def work(steps, load, group):
        rank = make_rank(cfg, config, group, random(LAYERS, EXPERTS, size, seed=1))
        if load:
            rank.load(str(resume), half)
        group.barrier()  # ranks are threads: none draws weights any more
        results = [rank.train_step(step) for step in steps]
        if resume and not load:
            Directory(str(resume)).clear(half) if group.rank == 0 else None
            group.barrier()
            parts = rank.save(str(resume), half)
            return results, parts, rank
        return results, {}, rank

    def run(steps, load=False):
        return run_ranks(size, functools.partial(work, steps, load), timeout_s=15)

    if resume is None:
        made = run(range(STEPS))
        assert not any(r.warning for results, _, _ in made for r in results)
        return [r.loss for r in made[0][0]]
    made = run(range(half))
    tensors = {k: v for _, parts, _ in made for k, v in parts.items()}
    Directory(str(resume)).commit(half, {"step": half, "tensors": tensors}, made[0][2].rank.statistics())
    torch.rand(7)  # whatever torch's generator is at
    return [r.loss for r in made[0][0]] + [r.loss for r in run(range(half, STEPS), True)[0][0]]


@functools.cache
def alone(model):
    return losses(1, model=MODELS[model])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ["3 ranks", "both", *slow("2 ranks", "accumulated", "recomputed")])
def test_a_model_that_draws_has_one_curve(model, way):
    size, overrides = WAYS[way]
    assert losses(size, *overrides, model=MODELS[model]) == pytest.approx(alone(model), rel=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_a_resume_draws_what_would_have_been_drawn(tmp_path, size):
    assert losses(size, model=DROPOUT, resume=tmp_path) == pytest.approx(alone("dropout in attention"), rel=1e-6)


def test_steps_and_seeds_draw_different_numbers():
    frozen = ("optim.learning_rate=0",)
    assert alone("dropout in attention") != pytest.approx(losses(1, model=QWEN), rel=1e-4)
    cfg, config = configure(*frozen, model=DROPOUT)
    rank = make_rank(cfg, config, SoloGroup(), random(LAYERS, EXPERTS, 1, seed=1))
    first = rank.train_step(0).loss
    assert rank.train_step(0).loss == first
    rank.draws.seed += 1
    assert rank.train_step(0).loss != first


def test_torchs_own_random_state_is_left_alone_and_an_evaluation_draws_nothing():
    cfg, config = configure(model=DROPOUT)
    rank = make_rank(cfg, config, SoloGroup(), random(LAYERS, EXPERTS, 1, seed=1))
    before = torch.get_rng_state()
    rank.train_step(0)
    assert rank.evaluate()[0] == rank.evaluate()[0]
    assert torch.equal(torch.get_rng_state(), before)


B, L, H = 4, 6, 8
KINDS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "of tokens": lambda x: F.dropout(x.reshape(-1, H), 0.5).view_as(x),
    "feature dropout": lambda x: F.dropout1d(x, 0.5),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "fused attention": lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3, dropout_p=0.5)[:, 0],
    "fused attention with a mask of all": lambda x: F.scaled_dot_product_attention(
        *[x[:, None, :B]] * 3, attn_mask=torch.ones(B, B).tril().bool(), dropout_p=0.5
    )[:, 0],
    "attention by heads": lambda x: F.dropout((x @ x.mT).repeat(1, 2, 1).view(-1, L, L), 0.5),
    "filled in place": lambda x: x * torch.empty_like(x).uniform_(0.5, 1.5),
    "exponential": lambda x: x + torch.empty(len(x), L, H).exponential_(),
    "a factory": lambda x: x + torch.randn(len(x), L, H),
    "like": lambda x: x + torch.rand_like(x) + torch.randint_like(x, 9),
    "chosen": lambda x: torch.multinomial(x.abs().view(-1, H), 2).view(len(x), L, 2).float(),
    "drop path": lambda x: x * torch.rand(len(x), 1, 1),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "of the layer": lambda x: x * torch.rand(()) + torch.randn(H),
    "two": lambda x: F.dropout(F.dropout(x, 0.5) + torch.rand_like(x), 0.3),
}


def drawn(draw, parts, seed=0, step=3):
    """What `draw` gives for sequences that are divided among ranks as `parts`."""
    x, out, first = torch.arange(B * L * H).view(B, L, H).sin(), [], 0
    for n in parts:
        rank = Draws(seed, torch.device("cpu"))
        with rank.forward(step, first, n, L):
            out.append(draw(x[first : first + n]))
        first += n
        assert rank.news() == ""
        assert rank.watching
    return torch.cat(out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_draw_is_that_of_its_sequences(kind):
    torch.manual_seed(1)
    whole = drawn(KINDS[kind], [B])
    torch.manual_seed(2)
    for parts in ([2, 2], [1, 3], [1, 1, 1, 1]):
        assert torch.equal(drawn(KINDS[kind], parts), whole), parts
    for other in (drawn(KINDS[kind], [B], seed=1), drawn(KINDS[kind], [B], step=4)):
        assert not torch.equal(other, whole)
    if kind != "of the layer":
        same = drawn(lambda x: KINDS[kind](x[:1].expand_as(x).contiguous()), [B]).view(B, -1)
        assert not torch.equal(same[0], same[1]), "each sequence has its own"


def test_what_cannot_be_followed_is_told_once():
    for draw in (lambda: torch.rand(L, 3), lambda: F.dropout(torch.ones(L, B, H), 0.5)):
        rank = Draws(0, torch.device("cpu"))
        with rank.forward(0, 0, B, L):
            draw()
        assert "depend on the number of ranks" in rank.news()
        assert rank.news() == ""
    rank = Draws(0, torch.device("cpu"))
    for _ in range(2):
        with rank.forward(0, 0, B, L):
            pass
    assert (rank.watching, rank.news()) == (False, ""), "a model that draws nothing is not watched"
    with rank.forward(0, 0, B, L):
        torch.rand(B, L)  # from now on
    assert "depend on the number of ranks" in rank.news()
    assert rank.watching


def test_a_generator_of_the_models_own_is_its_own_affair():
    rank = Draws(0, torch.device("cpu"))
    with rank.forward(0, 0, B, L):
        torch.rand(B, L, generator=torch.Generator().manual_seed(1))
    assert (rank.watching, rank.news()) == (False, "")
