"""The optimizer: one norm over everything, every expert counted and updated once, copies that never part."""

import copy

import numpy as np
import pytest
import torch

from ray_ep.collective import SoloGroup
from ray_ep.moe import routing
from ray_ep.moe.routing import forced
from ray_ep.placement import Placement, contiguous, random
from ray_ep.rank.data.corpus import global_batch
from ray_ep.rank.model import build
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.step.optimizer import MasterOptimizer
from tests.conftest import run_ranks, slow
from tests.rank.test_training import CORPUS, EXPERTS, GPT_OSS, LAYERS, MAKING, Reference, configure, make_rank, train

LAYOUTS = {
    "one rank": contiguous(LAYERS, EXPERTS, 1),
    "contiguous on 2": contiguous(LAYERS, EXPERTS, 2),
    "contiguous on 3": contiguous(LAYERS, EXPERTS, 3),
    "contiguous on 4": contiguous(LAYERS, EXPERTS, 4),
    "replicas on 2": random(LAYERS, EXPERTS, 2, 6, seed=1),
    "replicas on 3": random(LAYERS, EXPERTS, 3, 5, seed=2),
    "replicas on 4": random(LAYERS, EXPERTS, 4, 4, seed=3),
    "everything on both of 2": contiguous(LAYERS, EXPERTS, 2, EXPERTS),
    "experts on rank 0 of 3 alone": random(LAYERS, EXPERTS, 3, [EXPERTS, 0, 0], seed=4),
    "no expert on rank 0 of 2": random(LAYERS, EXPERTS, 2, [0, EXPERTS], seed=5),
    "replicas and a rank without experts": random(LAYERS, EXPERTS, 4, [EXPERTS, 3, 2, 0], seed=6),
}
FEW = ["replicas and a rank without experts", "no expert on rank 0 of 2"]
MANY = [*FEW, *slow(*(name for name in LAYOUTS if name not in FEW))]
REPLICATED = [name for name in LAYOUTS if "replicas" in name or "both" in name]
SGD = ("optim.kind=sgd", "optim.beta1=0", "optim.weight_decay=0", "optim.learning_rate=1", "optim.warmup_steps=0")


def state(rank):
    """{kind/parameter, or kind/parameter/expert: tensor} of what a rank owns; kinds weight, moments, buffer."""
    out = {f"buffer/{n}": b.clone() for n, b in rank.model.named_buffers() if "correction_bias" in n}
    for w in rank.optimizer.weights:
        owned = [""] if w.layer is None else [f"/{e}" for e in rank.ep.layers[w.layer].experts[: len(w.master)]]
        for kind, t in {"weight": w.master.detach(), **w.moments}.items():
            rows = zip(owned, t[None] if w.layer is None else t, strict=True)
            out.update({f"{kind}/{w.name}{expert}": row.clone() for expert, row in rows})
    return out


def logical(rank):
    """Only the weights, by parameter and expert."""
    return {k.partition("/")[2]: t for k, t in state(rank).items() if k.startswith("weight/")}


def together(made):
    """All that the ranks own; every expert is owned once."""
    parts = [logical(rank) for rank in made]
    owned = [k for part in parts for k in part if "/" in k]
    assert len(owned) == len(set(owned)) == LAYERS * EXPERTS * 2, "each of two parameters of each expert has one owner"
    return {k: t for part in parts for k, t in part.items()}


def split(named):
    """{parameter, or parameter/expert: tensor} of plain tensors by name."""
    out = {}
    for name, t in named:
        rows = {f"{name}/{e}": row for e, row in enumerate(t)} if ".experts." in name else {name: t}
        out.update({k: row.detach().clone() for k, row in rows.items()})
    return out


@pytest.mark.parametrize("layout", MANY)
def test_the_global_norm_is_torchs_norm_of_the_single_process_gradients(layout):
    overrides = ("optim.clip_norm=0", "router.aux_coefficient=0.2")
    plain = Reference(*configure(*overrides))
    plain.backward(0)
    want = torch.nn.utils.get_total_norm([p.grad for p in plain.model.parameters()])
    placement = LAYOUTS[layout]
    results, _ = train(placement.num_ranks, 1, *overrides, placement=placement)
    assert [r[0].grad_norm for r in results] == pytest.approx([float(want)] * placement.num_ranks, rel=1e-6)


@pytest.mark.parametrize("layout", MANY)
def test_clipping_counts_every_expert_once(layout):
    before = Reference(*configure(*SGD, "optim.clip_norm=0.25"))
    start = split(before.model.named_parameters())
    before.backward(0)
    torch.nn.utils.clip_grad_norm_(before.model.parameters(), 0.25)
    gradients = split((n, p.grad) for n, p in before.model.named_parameters())
    placement = LAYOUTS[layout]
    _, made = train(placement.num_ranks, 1, *SGD, "optim.clip_norm=0.25", placement=placement)
    after = together(made)
    assert after.keys() == start.keys()
    moved = {k: start[k] - after[k] for k in start}  # the rate is 1 and there is no momentum
    assert torch.nn.utils.get_total_norm(list(moved.values())) == pytest.approx(0.25, rel=1e-4)
    for k, g in gradients.items():
        torch.testing.assert_close(moved[k], g, rtol=1e-4, atol=1e-6, msg=k)


def test_a_norm_below_the_limit_and_a_limit_of_zero_clip_nothing():
    weights = [together(train(2, 1, *SGD, f"optim.clip_norm={limit}")[1]) for limit in (0, 100)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", REPLICATED)
def test_replicas_are_bit_identical_to_the_primary_and_dense_weights_on_all_ranks_after_each_step(layout, dtype):
    placement = LAYOUTS[layout]
    cfg, config = configure(f"model.dtype={dtype}")

    def work(group):
        rank = make_rank(cfg, config, group, placement)
        seen = []
        for step in range(3):
            rank.train_step(step)
            seen.append(copies(rank))
        return seen

    seen, replicas = run_ranks(placement.num_ranks, work), 0
    for step in range(3):
        for rank, held in enumerate(seen):
            for (name, layer, expert), row in held[step].items():
                primary = 0 if layer is None else int(placement.owner[layer, expert])
                assert torch.equal(row, seen[primary][step][name, layer, expert]), f"{name}/{expert}: rank {rank}"
                replicas += layer is not None and primary != rank
    slots = sum(len(placement.experts_of(layer, r)) for layer in range(LAYERS) for r in range(placement.num_ranks))
    assert replicas == 3 * 2 * (slots - LAYERS * EXPERTS) > 0
    assert not any(torch.equal(row, seen[0][2][key]) for key, row in seen[0][0].items()), "every weight moves"


def copies(rank):
    """{(parameter, layer, expert): compute weights}, replicas' too."""
    out = {}
    for w in rank.optimizer.weights:
        rows = [(None, w.param)] if w.layer is None else zip(rank.ep.layers[w.layer].experts, w.param, strict=True)
        out.update({(w.name, w.layer, e): row.detach().clone() for e, row in rows})
    return out


@pytest.mark.parametrize("sequences", [4, 1], ids=["tokens on both ranks", "no token on rank 0"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_expert_and_a_rank_without_tokens_decay_all_the_same(kind, sequences, monkeypatch):
    # Forced routes leave experts 4 and 5 out, and rank 1 has no others: no gradient ever comes to its experts.
    used = torch.tensor([0, 1, 2, 3, 6, 7])
    monkeypatch.setattr(routing, "forced", lambda kind, *args: used[forced("balanced", *args) % len(used)])
    slots = np.full((LAYERS, 2, 6), -1)
    slots[:, 0], slots[:, 1, :2] = [0, 1, 2, 3, 6, 7], [4, 5]
    overrides = (f"optim.kind={kind}", "optim.beta1=0", "optim.weight_decay=2", "router.force=skewed")
    cfg, _ = configure(*overrides, f"batch.sequences={sequences}")
    start = split(Reference(*configure()).model.named_parameters())
    placement = Placement(slots, EXPERTS)
    results, made = train(2, 3, *overrides, f"batch.sequences={sequences}", placement=placement)
    assert all((r.load[:, 4:6] == 0).all() and (r.load[:, 0] > 0).all() for r in results[0])
    factor = np.prod([1 - 2 * r.lr for r in results[0]])
    assert factor < 0.975
    unused = {k: t for k, t in logical(made[1]).items() if "/" in k}
    assert {k.rpartition("/")[2] for k in unused} == {"4", "5"}
    for k, row in unused.items():
        torch.testing.assert_close(row, start[k] * factor, rtol=1e-5, atol=0, msg=k)
    rates = [made[0].optimizer.learning_rate(step) for step in range(3)]
    assert rates == [r.lr for r in results[0]] == [cfg.optim.learning_rate * n / 4 for n in (1, 2, 3)]


def test_biases_norms_and_vectors_of_experts_do_not_decay():
    cfg, config = configure(model=GPT_OSS)
    rank = make_rank(cfg, config, SoloGroup(), LAYOUTS["one rank"])
    of_name = {w.name.removeprefix("model.layers.0."): w.decays for w in rank.optimizer.weights}
    assert [of_name[f"mlp.experts.{n}"] for n in ("gate_up_proj", "down_proj")] == [True, True]
    assert [of_name[f"mlp.experts.{n}_bias"] for n in ("gate_up_proj", "down_proj")] == [False, False]
    assert (of_name["mlp.router.weight"], of_name["mlp.router.bias"]) == (True, False)
    assert (of_name["self_attn.sinks"], of_name["input_layernorm.weight"]) == (False, False)
    assert (of_name["self_attn.q_proj.weight"], of_name["self_attn.q_proj.bias"]) == (True, False)


def test_frozen_parameters_are_left_alone_and_out_of_the_norm():
    cfg, config = configure("optim.clip_norm=0", "router.aux_loss=off")
    frozen = ("model.embed_tokens.weight", "model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.gate.weight")
    plain = Reference(cfg, config)
    plain.backward(0)
    want = torch.nn.utils.get_total_norm([p.grad for n, p in plain.model.named_parameters() if n not in frozen])

    def work(group):
        with MAKING:
            model = build(cfg.model, copy.deepcopy(config), cfg.seed, group, random(LAYERS, EXPERTS, 2, 5, seed=1))
        for n, p in model.named_parameters():
            p.requires_grad_(n not in frozen)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = MasterOptimizer(model, cfg.optim)
        ids = torch.from_numpy(global_batch(CORPUS.train, cfg.seed, 0, 4, 32)).chunk(2)[group.rank]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / 2
        loss.backward()
        optimizer.accumulate()
        optimizer.reduce()
        norm = optimizer.norm(torch.zeros(0, dtype=torch.float64))
        optimizer.update(0, norm)
        optimizer.publish()
        return norm, {n for n, p in model.named_parameters() if torch.equal(p, before[n])}

    for norm, same in run_ranks(2, work):
        assert same == set(frozen)
        assert norm == pytest.approx(float(want), rel=1e-6)


def test_the_learning_rate_warms_up_from_above_zero_and_ends_above_zero():
    cfg, config = configure("optim.learning_rate=1", "optim.steps=12", "optim.warmup_steps=4")
    optimizer = make_rank(cfg, config, SoloGroup(), LAYOUTS["one rank"]).optimizer
    cosine = [(1 + np.cos(np.pi * n / 8)) / 2 for n in range(8)]
    assert [optimizer.learning_rate(n) for n in range(12)] == pytest.approx([0.25, 0.5, 0.75, 1, *cosine])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_lies_transposed_in_memory_is_updated_like_others(dtype):
    cfg, config = configure(f"model.dtype={dtype}")
    plain, other = (make_rank(cfg, config, SoloGroup(), LAYOUTS["one rank"]) for _ in range(2))
    for p in other.model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()
    other.optimizer = MasterOptimizer(other.model, cfg.optim)
    for step in range(2):
        plain.train_step(step)
        other.train_step(step)
    assert all(torch.equal(t, state(other)[k]) for k, t in state(plain).items())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("steps", [0, 1, 3])  # 0: interrupted before the first step, when there are no moments yet
def test_an_optimizer_given_the_moments_of_another_goes_on_like_it(tmp_path, kind, steps):
    cfg, config = configure(f"optim.kind={kind}")
    first, second = (make_rank(cfg, config, SoloGroup(), LAYOUTS["one rank"]) for _ in range(2))
    for step in range(steps):
        first.train_step(step)
    directory = Directory(str(tmp_path))
    directory.clear(steps)
    manifest = {"step": steps, "tensors": first.save(str(tmp_path), steps)}
    directory.commit(steps, manifest, first.rank.statistics())
    second.load(str(tmp_path), steps)
    for step in range(steps, steps + 2):
        assert second.train_step(step).loss == first.train_step(step).loss
    assert all(torch.equal(t, state(second)[k]) for k, t in state(first).items())
