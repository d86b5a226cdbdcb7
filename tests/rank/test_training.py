"""Training on any layout of ranks follows a plain single-process trainer (transformers and torch.optim alone)."""

import copy
import functools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from ray_ep.collective import SoloGroup
from ray_ep.config import load_config
from ray_ep.moe.balance.balancer import Balancer
from ray_ep.placement import contiguous, random
from ray_ep.rank.data.corpus import Corpus, global_batch
from ray_ep.rank.model import model_config
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.trainer import Trainer
from tests.conftest import run_ranks, slow

LAYERS, EXPERTS, TOP_K, VOCAB = 2, 8, 2, 64
SIZES = f"hidden_size: 32, intermediate_size: 32, num_hidden_layers: {LAYERS}, num_attention_heads: 4, head_dim: 8, \
num_key_value_heads: 2, num_experts_per_tok: {TOP_K}, initializer_range: 0.15"
QWEN = (f"model.overrides={{{SIZES}, num_experts: {EXPERTS}, moe_intermediate_size: 16}}",)
GPT_OSS = ("model.type=gpt_oss", f"model.overrides={{{SIZES}, num_local_experts: {EXPERTS}, sliding_window: 8}}")
# All that a curve depends on, so that new defaults leave it alone. Some gradient norms are above clip_norm, some below.
TINY = ["batch.sequences=4", "batch.length=32", "optim.steps=30", "optim.warmup_steps=4", "optim.clip_norm=1.5",
        "optim.learning_rate=0.01", "optim.weight_decay=0.1", "optim.beta2=0.95", "optim.schedule=cosine",
        "router.aux_loss=layer", "router.aux_coefficient=0.02", "router.z_coefficient=0", "seed=0",
        "statistics.sample=64"]  # fmt: skip
FIGURES = ("loss", "aux_loss", "z_loss", "grad_norm")
MAKING = threading.Lock()  # a Rank draws its weights from torch's global generator, and ranks here are threads


def _corpus():
    """Each token follows from the one before it, up to a choice of two: there is something to learn."""
    rng, tokens = np.random.default_rng(0), np.zeros(6000, np.int64)
    for i in range(1, len(tokens)):
        tokens[i] = (5 * tokens[i - 1] + rng.integers(2)) % VOCAB
    return Corpus(tokens[:5000].astype(np.uint8), tokens[5000:].astype(np.uint8), VOCAB, 1, "drawn")


CORPUS = _corpus()


def configure(*overrides, model=QWEN):
    """(configuration, transformers config) of a tiny run."""
    cfg = load_config(None, [*model, *TINY, *overrides])
    return cfg, model_config(cfg.model, VOCAB)


def make_rank(cfg, config, group, placement, node_of=None):
    with MAKING:
        return Trainer(ModelRank(cfg, copy.deepcopy(config), group, placement, node_of), CORPUS)


def train(size, steps, *overrides, placement=None, model=QWEN):
    """[rank][step] results, and the ranks."""
    cfg, config = configure(*overrides, model=model)
    placement = placement or random(LAYERS, EXPERTS, size, seed=1)

    def work(group):
        rank = make_rank(cfg, config, group, placement)
        return [rank.train_step(step) for step in range(steps)], rank

    results, made = zip(*run_ranks(size, work, timeout_s=15), strict=True)
    assert all(layer.calls for rank in made for layer in rank.ep.layers)
    return results, made


class Reference:
    """One process that knows nothing of ray_ep but the initial weights, the batches and the learning rates."""

    def __init__(self, cfg, config):
        solo = make_rank(cfg, config, SoloGroup(), contiguous(LAYERS, EXPERTS, 1))
        self.cfg, self.rate = cfg, solo.optimizer.learning_rate
        self.model = AutoModelForCausalLM.from_config(copy.deepcopy(config), experts_implementation="grouped_mm")
        self.model.load_state_dict(solo.model.state_dict())
        self.model.train()
        groups = {0.0: [], cfg.optim.weight_decay: []}
        for name, p in self.model.named_parameters():
            vector = name.endswith("bias") or p.dim() - (".experts." in name) < 2  # one expert's part is meant
            groups[0.0 if vector else cfg.optim.weight_decay].append(p)
        groups = [{"params": p, "weight_decay": decay} for decay, p in groups.items()]
        self.optimizer = (
            torch.optim.SGD(groups, lr=1.0, momentum=cfg.optim.beta1)
            if cfg.optim.kind == "sgd"
            else torch.optim.AdamW(groups, lr=1.0, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=cfg.optim.eps)
        )

    def step(self, number):
        figures, load = self.backward(number)
        limit = self.cfg.optim.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return SimpleNamespace(**dict(zip(FIGURES, [*figures, float(norm)], strict=True)), load=load)

    def backward(self, number):
        """Gradients of one step's loss; returns [loss, aux, z] and the load [L, E]."""
        cfg, passes = self.cfg, self.cfg.batch.accumulation
        batch = global_batch(CORPUS.train, cfg.seed, number, cfg.batch.sequences, cfg.batch.length)
        weights = torch.tensor([1, cfg.router.aux_coefficient, cfg.router.z_coefficient])
        total, load = np.zeros(3), np.zeros((LAYERS, EXPERTS), int)
        for ids in torch.from_numpy(batch).chunk(passes):
            out = self.model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
            main = cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
            z = torch.stack([x.logsumexp(-1).square().mean() for x in out.router_logits]).mean()
            figures = torch.stack([main, self.auxiliary(out.router_logits), z]) / passes
            (weights * figures).sum().backward()
            total += figures.detach().double().numpy()
            load += [np.bincount(x.topk(TOP_K).indices.flatten(), minlength=EXPERTS) for x in out.router_logits]
        return total.tolist(), load

    def auxiliary(self, logits):
        if self.cfg.router.aux_loss == "off":
            return logits[0].new_zeros(())
        if self.cfg.router.aux_loss == "pooled":
            return load_balancing_loss_func(logits, EXPERTS, TOP_K)
        return sum(load_balancing_loss_func((x,), EXPERTS, TOP_K) for x in logits)


@functools.cache
def reference(steps, *overrides, model=QWEN):
    """(steps of the reference trainer, its model after them)."""
    plain = Reference(*configure(*overrides, model=model))
    return [plain.step(n) for n in range(steps)], plain.model


def assert_follows(results, want, rel=1e-4):
    """Every rank says the same, and what the reference says, at every step."""
    for rank, got in enumerate(results):
        for step, (g, w) in enumerate(zip(got, want, strict=True)):
            for f in FIGURES:
                where = f"{f} of step {step} on rank {rank} of {len(results)}"
                assert getattr(g, f) == pytest.approx(getattr(w, f), rel=rel, abs=1e-7), where
                assert getattr(g, f) == getattr(results[0][step], f), where
            if step < 5:  # later a score may flip by rounding
                assert np.array_equal(g.load, w.load), f"load of step {step} on rank {rank}"


CASES = {
    "auxiliary loss off": ("router.aux_loss=off",),
    "pooled": ("router.aux_loss=pooled", "router.aux_coefficient=0.2", "router.z_coefficient=0.01"),
    "a layer": ("router.aux_loss=layer", "router.aux_coefficient=0.2"),
    "sgd": ("router.aux_loss=off", "optim.kind=sgd", "optim.learning_rate=0.3", "optim.weight_decay=0.01"),
}


@pytest.mark.parametrize("case", ["a layer", "sgd", *slow("auxiliary loss off", "pooled")])
@pytest.mark.parametrize("batch", [(3, 5), *slow((1, 4), (2, 4), (4, 4), (4, 3))])
def test_thirty_steps_follow_the_single_process_trainer(case, batch):
    size, sequences = batch
    overrides = (*CASES[case], f"batch.sequences={sequences}")
    want, _ = reference(30, *overrides)
    assert want[-1].loss < want[0].loss - 0.2, "the reference learns"
    assert {s.grad_norm > 1.5 for s in want} == {True, False}, "some steps are clipped, some are not"
    assert_follows(train(size, 30, *overrides)[0], want)


@pytest.mark.parametrize("size", [3, *slow(2, 4)])
def test_balance_inside_the_step_keeps_thirty_losses_to_1e_5_and_evens_skewed_ranks(size, monkeypatch):
    free = lambda self, *_: (np.ones(self.group.size), 1e12)  # noqa: E731 so that a tiny layer has guests
    monkeypatch.setattr(Balancer, "_measure", free)
    overrides = ("router.aux_loss=off", "batch.sequences=8", "batch.length=64")
    skewed = contiguous(LAYERS, EXPERTS, size)
    without, _ = train(size, 30, *overrides, "balance.in_step=off", placement=skewed)
    results, ranks = train(size, 30, *overrides, "balance.in_step=always", placement=skewed)
    assert [r.loss for r in results[0]] == pytest.approx([r.loss for r in without[0]], rel=1e-5)
    done = ranks[0].ep.balancer.done
    assert done.guests > 30
    assert done.after / done.layers < 1.02 < 1.1 < done.before / done.layers


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("model", [QWEN, GPT_OSS], ids=["qwen3_moe", "gpt_oss with biased experts"])
def test_every_weight_is_that_of_the_reference_after_three_steps(model, kind):
    overrides = (f"optim.kind={kind}", "optim.weight_decay=1.0", "optim.eps=1e-4", "optim.warmup_steps=0")
    want, plain = reference(3, *overrides, model=model)
    results, made = train(3, 3, *overrides, model=model)
    assert_follows(results, want)
    plain = dict(plain.named_parameters())
    for rank in made:
        for w in rank.optimizer.weights:
            rows = slice(None) if w.layer is None else rank.ep.layers[w.layer].experts
            torch.testing.assert_close(w.param.data, plain[w.name].data[rows], rtol=1e-4, atol=3e-6, msg=w.name)


FIGURE_LAYOUTS = {
    "contiguous on 2": contiguous(LAYERS, EXPERTS, 2),
    "contiguous on 3": contiguous(LAYERS, EXPERTS, 3),
    "replicas on 2": random(LAYERS, EXPERTS, 2, 7, seed=5),
    "replicas on 3": random(LAYERS, EXPERTS, 3, 5, seed=6),
    "replicas on 4": random(LAYERS, EXPERTS, 4, [8, 3, 2, 1], seed=7),
    "all experts on rank 0 of 3": random(LAYERS, EXPERTS, 3, [8, 0, 0], seed=8),
    "everything everywhere": contiguous(LAYERS, EXPERTS, 3, EXPERTS),
}
BALANCED = ("router.aux_coefficient=0.2", "router.z_coefficient=0.02")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("layout", ["replicas on 3", *slow(*sorted(FIGURE_LAYOUTS.keys() - {"replicas on 3"}))])
def test_logged_figures_do_not_depend_on_the_layout(layout, accumulation):
    overrides = (*BALANCED, f"batch.accumulation={accumulation}")
    placement = FIGURE_LAYOUTS[layout]
    results, _ = train(placement.num_ranks, 5, *overrides, placement=placement)
    assert_follows(results, reference(5, *overrides)[0], rel=1e-5)


def test_accumulation_changes_no_figure_but_the_auxiliary_loss_which_is_the_mean_over_passes():
    off = ("router.aux_loss=off", "router.z_coefficient=0.02")
    results, _ = train(2, 10, *off, "batch.accumulation=2")
    assert_follows(results, train(2, 10, *off)[0][0])
    one, two = (reference(5, *BALANCED, f"batch.accumulation={n}")[0][0] for n in (1, 2))
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert one.aux_loss != pytest.approx(two.aux_loss, rel=1e-3)


@pytest.mark.parametrize("size", [2, *slow(1, 3)])
def test_bfloat16_follows_one_rank_and_keeps_float32_masters(size):
    float32, _ = reference(10)
    results, made = train(size, 10, "model.dtype=bfloat16")
    alone, _ = train(1, 10, "model.dtype=bfloat16")
    for step, (got, one, exact) in enumerate(zip(results[0], alone[0], float32, strict=True)):
        assert got.loss == pytest.approx(one.loss, rel=1e-2)
        assert got.loss == pytest.approx(exact.loss, rel=2e-2)
        if step < 3:  # then rounding has sent a few tokens elsewhere, and norms drift by a tenth
            assert got.grad_norm == pytest.approx(one.grad_norm, rel=2e-2)
            assert got.grad_norm == pytest.approx(exact.grad_norm, rel=5e-2)
    for w in made[-1].optimizer.weights:
        assert (w.param.dtype, w.master.dtype) == (torch.bfloat16, torch.float32), w.name
        owned = w.param.data[: len(w.master)] if w.layer is not None else w.param.data
        assert torch.equal(owned, w.master.bfloat16()), f"{w.name}: computes with the rounded master"
        assert not torch.equal(owned.float(), w.master), f"{w.name}: the master keeps what rounding would lose"


@pytest.mark.parametrize("batch", [(3, 2), *slow((1, 4), (2, 4))])
def test_gradient_checkpointing_changes_no_figure(batch):
    size, sequences = batch
    overrides = ("router.aux_loss=layer", "router.aux_coefficient=0.2", f"batch.sequences={sequences}")
    with set_checkpoint_early_stop(False):  # a global of torch, which ranks in threads would switch for one another
        results, made = train(size, 12, *overrides, "model.gradient_checkpointing=true")
    assert made[0].ep.layers[0].calls == 24, "each step computes a block twice"
    assert_follows(results, reference(12, *overrides)[0])


# Losses of `reference` with torch 2.13.0, transformers 5.23.0 on x86-64: a change keeps them or explains itself.
GOLDEN = [4.525324, 4.582777, 4.367627, 4.320441, 4.319341, 4.158455, 4.163458, 3.966071, 3.986347, 3.919853]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_golden_loss_curve_is_kept(size):
    losses = [result.loss for result in train(size, 10)[0][0]]
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


def test_the_auxiliary_loss_is_switched_off_by_the_word_that_the_schema_names():
    assert load_config(None, ["router.aux_loss=off"]).router.aux_loss == "off"
