"""Experts of a model that transformers loaded move between ranks; results, updates and checkpoints stay the same."""

import copy

import pytest
import torch

import ray_ep
from ray_ep.errors import ModelError, PlacementError
from ray_ep.placement import contiguous, random
from tests.conftest import slow
from tests.hf.loaded import IDS, assert_equals_one_process, hf, load, mean_loss, rows_of, saved
from tests.models import build


def steps(model, optimizer, ids, count):
    """Losses of a few updates."""
    losses = []
    for _ in range(count):
        loss, _ = mean_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def moved_between_updates(rank, path, into):
    """Three updates, experts moved before, between, and back; saved where they are elsewhere."""
    model = load(path)
    ep = hf.experts_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    ids, losses = IDS[rows_of(rank)], []
    for seed in (1, 2):
        hf.apply_placement(model, random(2, 8, 2, seed=seed), optimizer)
        assert ep.placement.owner.tolist() != contiguous(2, 8, 2).owner.tolist()
        losses += steps(model, optimizer, ids, 1)
    model.save_pretrained(into)
    hf.apply_placement(model, None, optimizer)
    losses += steps(model, optimizer, ids, 1)
    model.save_pretrained(f"{into}-last")
    return losses


def test_updates_go_on_where_experts_have_gone_and_checkpoints_keep_their_order(two, tmp_path):
    plain, path = saved(tmp_path, "qwen3_moe")
    losses = torch.tensor(two(moved_between_updates, path, str(tmp_path / "out"))).mean(0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, foreach=False)
    want = steps(plain, optimizer, IDS, 2)
    after_two = copy.deepcopy(plain)
    want += steps(plain, optimizer, IDS, 1)
    assert losses.tolist() == pytest.approx(want, abs=1e-4)
    for kept, folder in ((after_two, "out"), (plain, "out-last")):
        for (name, p), q in zip(kept.named_parameters(), type(plain).from_pretrained(tmp_path / folder).parameters()):  # noqa: B905
            assert (p - q).abs().max() < 1e-3, name  # an update is 1e-2: a row elsewhere, or a moment lost, is more


def saved_in_shards(rank, path, into):
    model = load(path)
    hf.apply_placement(model, random(2, 8, 2, seed=1))
    model.save_pretrained(into, distributed_checkpoint=True)
    assert_equals_one_process(build("qwen3_moe"), load(into), rows_of(rank))


@pytest.mark.slow
def test_transformers_distributed_checkpoints_keep_the_order_too(two, tmp_path):
    two(saved_in_shards, saved(tmp_path, "qwen3_moe")[1], str(tmp_path / "out"))


def moved_and_computed(rank, path, name):
    model = load(path)
    ep = hf.experts_of(model)
    layers, experts = len(ep.layers), ep.num_experts
    with torch.no_grad():
        before = model(input_ids=IDS[rows_of(rank)]).logits
        hf.apply_placement(model, random(layers, experts, 2, seed=3))
        after = model(input_ids=IDS[rows_of(rank)]).logits
    assert (after - before).abs().max() < 1e-5
    held = [layer.slots.experts for layer in ep.layers]
    hf.apply_placement(model, None)
    assert_equals_one_process(build(name), model, rows_of(rank))
    return held


@pytest.mark.parametrize("name", ["gpt_oss", *slow("deepseek_v3")])
def test_every_row_of_an_expert_moves(two, tmp_path, name):
    plain, path = saved(tmp_path, name)
    layers, experts = len(ray_ep.moe.find_experts(plain)), plain.config.num_local_experts
    there = two(moved_and_computed, path, name)
    for layer in range(layers):
        owner = random(layers, experts, 2, seed=3).owner[layer]
        assert there[0][layer] == [e for e in range(experts) if owner[e] == 0]
        assert there[1][layer] == [e for e in range(experts) if owner[e] == 1]


def refused(rank, path):
    """Sentences for what cannot be done; nothing has moved after any of them."""
    model = load(path)
    words = []

    def refuse(kind, call):
        with pytest.raises(kind) as caught:
            call()
        words.append(str(caught.value))

    move = hf.apply_placement
    refuse(PlacementError, lambda: move(model, random(2, 8, 2, 6)))
    refuse(PlacementError, lambda: move(model, random(2, 8, 2, [6, 2])))
    refuse(PlacementError, lambda: move(model, contiguous(2, 8, 4)))
    refuse(PlacementError, lambda: move(model, contiguous(3, 8, 2)))
    refuse(ModelError, lambda: move(build("qwen3_moe"), None))
    mean_loss(model, IDS)[0].backward()
    refuse(ModelError, lambda: move(model, random(2, 8, 2)))
    model.zero_grad()
    move(model, random(2, 8, 2))
    refuse(ModelError, lambda: model.load_state_dict(model.state_dict()))
    move(model, None)
    model.load_state_dict(model.state_dict())
    assert_equals_one_process(build("qwen3_moe"), model, rows_of(rank))
    return words


def test_what_transformers_cannot_express_is_refused_in_words(two, tmp_path):
    first, second = two(refused, saved(tmp_path, "qwen3_moe")[1])
    assert first == second
    replicas, shares, ranks, layers, plain, gradients, order = first
    assert "each expert once, so replicas and uneven shares need" in replicas
    assert "has 6 experts on rank 0 in layer 0: transformers keeps 4 on every rank" in shares
    assert "8 experts on 4 ranks; the model has 2 MoE layers x 8 experts and its expert mesh 2 ranks" in ranks
    assert "placement is for 3 layers" in layers
    assert "was not loaded with ray_ep" in plain
    assert "gradients are present (layer 0, gate_up_proj)" in gradients
    assert "call ray_ep.hf.apply_placement(model, None) before load_state_dict" in order


def at_odds(rank, path):
    """One rank is given another placement, then one has gradients: nobody hangs, and nothing moves."""
    model = load(path)
    with pytest.raises(PlacementError, match="ranks 0 and 1 were given different placements"):
        hf.apply_placement(model, random(2, 8, 2, seed=rank))
    loss, _ = mean_loss(model, IDS[rows_of(rank)])
    loss.backward()
    if rank:
        model.zero_grad()
    with pytest.raises(
        PlacementError if rank else ModelError, match="rank 0 refuses" if rank else "gradients are present"
    ):
        hf.apply_placement(model, random(2, 8, 2, seed=1))
    assert_equals_one_process(build("qwen3_moe"), model, rows_of(rank))


def test_ranks_at_odds_are_told_so_and_nothing_moves(two, tmp_path):
    two(at_odds, saved(tmp_path, "qwen3_moe")[1])


def shared_out(rank, path):
    model = load(path, fsdp_size=4, ep_size=2)
    with pytest.raises(ModelError, match="several ranks share out each expert"):
        hf.apply_placement(model, random(2, 8, 2))


@pytest.mark.slow
def test_experts_that_several_ranks_share_out_stay(four, tmp_path):
    four(shared_out, saved(tmp_path, "qwen3_moe")[1])
