"""A step that is not finite ends the run on every rank before the update, and says where it comes from."""

import functools

import pytest
import torch
from ray.exceptions import RayTaskError

from ray_ep.collective import SoloGroup
from ray_ep.driver.actors.cause import root_cause
from ray_ep.errors import BadInput, DivergedError
from ray_ep.placement import random
from ray_ep.rank.saved.checkpoint import Directory
from tests.conftest import run_ranks
from tests.rank.test_training import EXPERTS, LAYERS, configure, make_rank

NAN, INF = float("nan"), float("inf")
LAST = -1  # rank


def state(rank):
    found = {n: p.detach().clone() for n, p in rank.model.named_parameters()}
    for w in rank.optimizer.weights:
        found |= {f"{w.name} {k}": t.clone() for k, t in w.moments.items()}
    return found


def train(size, *overrides, steps=3, harm=None, at=0):
    """(message, steps that were done) of a run that diverges; `harm` changes a rank before step `at`."""
    cfg, config = configure(*overrides)

    def work(group):
        rank = make_rank(cfg, config, group, random(LAYERS, EXPERTS, size, seed=1))
        for step in range(steps):
            if harm and step == at:
                harm(rank)
            before = state(rank)
            try:
                rank.train_step(step)
            except DivergedError as e:
                after = state(rank)
                assert all(torch.equal(after[n].nan_to_num(7.0), t.nan_to_num(7.0)) for n, t in before.items())
                assert (rank.optimizer.pending(), rank.optimizer.updates) == ("", step)
                return str(e), step
        return "", steps

    found = run_ranks(size, work, timeout_s=15)
    assert len(set(found)) == 1, "all ranks say the same and leave together"
    return found[0]


def on_last(change):
    @functools.wraps(change)
    def harm(rank):
        if rank.group.rank == rank.group.size + LAST:
            change(rank.model.model.layers)

    return harm


def first_weight(rank):
    rank.model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = NAN


def an_expert(rank):
    if rank.group.rank == 0:
        rank.ep.modules[1].gate_up_proj.data[0, 0, 0] = INF


@on_last
def one_token(layers):
    token = torch.tensor([3])
    layers[0].self_attn.register_forward_hook(lambda m, a, out: (out[0].index_fill(1, token, NAN), *out[1:]))


@on_last
def of_an_moe_layer(layers):
    layers[1].mlp.experts.register_forward_hook(lambda m, a, out: out * INF)


@on_last
def a_gradient(layers):
    def spoil(module, args):
        if args[0].requires_grad:
            args[0].register_hook(lambda gradient: gradient * NAN)

    layers[1].self_attn.o_proj.register_forward_pre_hook(spoil)


CASES = {
    first_weight: ("started from are not finite, first model.layers.1.self_attn.q_proj.weight on", "every rank"),
    an_expert: (
        "started from are not finite, first model.layers.1.mlp.experts.gate_up_proj (MoE layer 1) on",
        "rank 0",
    ),
    one_token: ("the first are in the output of model.layers.0.self_attn on", "rank {last}"),
    of_an_moe_layer: ("the first are in the output of model.layers.1.mlp.experts (MoE layer 1) on", "rank {last}"),
    a_gradient: (
        "the first in the backward are in the gradient of model.layers.1.self_attn.v_proj.weight on",
        "rank {last}",
    ),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("harm", CASES, ids=lambda f: f.__name__)
def test_the_message_names_step_rank_and_where(harm, size):
    message, step = train(size, harm=harm)
    where, rank = CASES[harm]
    rank = "rank 0" if size == 1 else rank.format(last=size - 1)
    assert step == 0
    assert message.startswith("step 1 diverged (loss ")
    assert f"{where} {rank}" in message


@pytest.mark.parametrize("overrides", [(), ("batch.accumulation=2",), ("model.gradient_checkpointing=true",)])
def test_a_later_step_says_which_update_did_it(overrides):
    message, step = train(1, *overrides, harm=first_weight, at=2)
    assert step == 2
    assert "since the update of step 2, first model.layers.1.self_attn.q_proj.weight on rank 0" in message
    assert train(1, *overrides, harm=a_gradient, at=1)[1] == 1


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.learning_rate=1e30",),
        ("optim.learning_rate=1e38",),
        ("optim.learning_rate=1e30", "model.dtype=bfloat16"),
        ("optim.learning_rate=1e30", "optim.kind=sgd", "optim.clip_norm=0"),
        ("router.aux_coefficient=1e39",),
        ("router.z_coefficient=1e300",),
    ],
    ids=lambda o: " ".join(o),
)
def test_a_run_that_cannot_be_trained_stops_at_its_second_step_at_the_latest(size, overrides):
    message, step = train(size, "optim.warmup_steps=0", *overrides)
    assert step <= 1
    assert "Lower optim.learning_rate" in message


def test_what_an_update_broke_is_not_saved(tmp_path):
    cfg, config = configure()
    rank = make_rank(cfg, config, SoloGroup(), random(LAYERS, EXPERTS, 1, seed=1))
    rank.train_step(0)
    for broken in (rank.optimizer.weights[3].master.data, *rank.optimizer.weights[2].moments.values()):
        kept = broken.clone()
        broken.flatten()[0] = INF
        with pytest.raises(DivergedError, match="step 1 diverged: its update left"):
            rank.save(str(tmp_path), 1)
        assert not list(tmp_path.iterdir())
        broken.copy_(kept)
    Directory(str(tmp_path)).clear(1)
    assert rank.save(str(tmp_path), 1)


def test_the_driver_tells_a_rank_that_diverged_as_the_ranks_own_words():
    error = RayTaskError("train_step", "a traceback", DivergedError("step 3 diverged")).as_instanceof_cause()
    told = root_cause({1: error}, [0], [])
    assert type(told) is DivergedError
    assert str(told) == "step 3 diverged"
    assert not isinstance(told, BadInput), "exit status 1"
