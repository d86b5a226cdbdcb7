"""Experts move between ranks: the model computes what plain transformers computes, after any moves and after none."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.collective import SoloGroup
from ray_ep.errors import GroupError, ModelError, PlacementError
from ray_ep.moe import apply_placement, parallelize
from ray_ep.placement import Placement, contiguous, moves, random
from tests.conftest import run_ranks
from tests.models import BASE, VOCAB, build, even_shards, gather_gradients, loss_sum, reference

LAYERS = BASE["num_hidden_layers"]
IDS = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))
MODELS = {name: build(name) for name in ("qwen3_moe", "gpt_oss")}
EXPERTS = {"qwen3_moe": 8, "gpt_oss": 6}
WANT = {name: reference(model, IDS) for name, model in MODELS.items()}
KIB = 1 / 1024


def drawn(name, size, seed):
    """A random placement: unlike slots a rank, ranks without any, replicas, primaries anywhere among the holders."""
    rng, experts = np.random.default_rng(seed), EXPERTS[name]
    room = rng.integers(0, experts + 1, size)
    while room.sum() < experts:
        room = rng.integers(0, experts + 1, size)
    p = random(LAYERS, experts, size, room.tolist(), seed=seed)
    primary = [[int(rng.choice(p.ranks_of(i, e))) for e in range(experts)] for i in range(LAYERS)]
    return Placement(p.slots, experts, seed, primary=primary)


def step(model, group):
    """Logits of this rank's rows and all gradients, which are then cleared."""
    low, high = even_shards(len(IDS), group.size)[group.rank :][:2]
    if low < high:
        loss, logits = loss_sum(model, IDS[low:high])
    else:
        with model.ray_ep.idle():
            loss, logits = loss_sum(model, IDS[:1, :2])
            loss = 0 * loss
    (loss / IDS[:, 1:].numel()).backward()
    gradients = gather_gradients(model, group)
    model.zero_grad()
    return logits.detach()[: high - low], gradients


def assert_plain(name, results):
    _, logits, grads = WANT[name]
    assert (torch.cat([r[0] for r in results]) - logits).abs().max() <= 1e-5
    for _, got in results:
        for n, g in grads.items():
            assert (got[n] - (0 if g is None else g)).abs().max() <= 1e-5, n


def assert_in_place(name, model, placement, rank):
    """Every trace of the placement on this rank; rows bit for bit those of the plain model."""
    ep = model.ray_ep
    assert ep.placement is placement
    for i, (module, layer) in enumerate(zip(ep.modules, ep.layers, strict=True)):
        experts = placement.experts_of(i, rank)
        assert layer.experts == module.ray_ep_rows == experts
        assert module.num_experts == layer.slots.held == len(experts)
        assert layer.owned == sum(placement.owner[i, e] == rank for e in experts)
        for n, p in ep.parameters(i).items():
            plain = MODELS[name].get_parameter(f"{layer.name}.{n}")
            assert torch.equal(p, plain[experts]), f"{n} of layer {i} on rank {rank}"
            assert isinstance(p, torch.nn.Parameter)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)), st.integers(1, 4), st.lists(st.integers(0, 999), min_size=2, max_size=4),
    st.sampled_from([0.5 * KIB, 7 * KIB, 256]), st.booleans(),
)  # fmt: skip
def test_any_sequence_of_placements_computes_what_plain_transformers_computes(name, size, seeds, buffer, every):
    placements = [drawn(name, size, seed) for seed in seeds]

    def work(group):
        model = parallelize(copy.deepcopy(MODELS[name]), group, placements[0])
        objects = list(model.named_parameters())
        seen = [step(model, group)]
        for placement in placements[1:]:
            apply_placement(model, placement, buffer_mb=buffer)
            assert_in_place(name, model, placement, group.rank)
            if every or placement is placements[-1]:
                seen.append(step(model, group))
        assert [(n, id(p)) for n, p in objects] == [(n, id(p)) for n, p in model.named_parameters()]
        return seen

    for results in zip(*run_ranks(size, work, timeout_s=30), strict=True):
        assert_plain(name, results)


def test_only_the_difference_travels_and_within_the_buffer(ranks):
    name, size = "qwen3_moe", 3
    old, new = drawn(name, size, 3), drawn(name, size, 4)
    row = {n: p[0].nbytes for n, p in MODELS[name].named_parameters() if ".0.mlp.experts." in n}
    found, limit = [m for m in moves(old, new) if m.weights], 7 * 1024

    class Counting(Watched):
        def before(self, output, input):
            if input.dtype == torch.uint8:
                assert len(input) <= limit
                assert len(output) <= limit

    def work(group):
        model = parallelize(copy.deepcopy(MODELS[name]), Counting(group), old)
        return apply_placement(model, new, buffer_mb=7 * KIB), apply_placement(model, new, buffer_mb=7 * KIB)

    for rank, (moved, again) in enumerate(ranks(size, work)):
        assert moved.sent == sum(m.source == rank for m in found) * sum(row.values())
        assert moved.received == sum(m.target == rank for m in found) * sum(row.values())
        assert moved.rounds > 1
        assert (again.moves, again.rounds, again.sent, again.received) == (0, 0, 0, 0)


def test_replicas_come_from_the_own_node(ranks):
    slots = np.full((LAYERS, 4, 8), -1)
    slots[:, 0], slots[:, 2] = np.arange(8), np.arange(8)
    full = slots.copy()
    full[:, [1, 3]] = np.arange(8)

    def work(group):
        nodes = np.array([0, 0, 1, 1])
        model = parallelize(copy.deepcopy(MODELS["qwen3_moe"]), group, Placement(slots, 8), node_of=nodes)
        moved = apply_placement(model, Placement(full, 8, 1))
        assert model.ray_ep.num_nodes == 2, "nodes are as they were"
        return moved

    sent = [m.sent for m in ranks(4, work)]
    assert sent[0] == sent[2] > 0
    assert sent[1] == sent[3] == 0


class Watched:
    """A group whose exchanges are seen first, by the `before(output, input)` of a subclass."""

    def __init__(self, group):
        self.group = group

    def __getattr__(self, name):
        return getattr(self.group, name)

    def all_to_all(self, output, input, output_sizes, input_sizes):
        self.before(output, input)
        self.group.all_to_all(output, input, output_sizes, input_sizes)


class Failing(Watched):
    """A rank whose k-th exchange fails; `groups` are aborted then, as a driver does for the peers of a dead rank."""

    def __init__(self, group, k, groups=()):
        super().__init__(group)
        self.left, self.groups = k, groups

    def before(self, output, input):
        self.left -= 1
        if self.left < 0:
            [group.abort() for group in self.groups]
            raise GroupError("the rank died")

    def all_gather(self, input):
        self.before(None, input)
        return self.group.all_gather(input)


def join(model, group):
    """Let a model go on over another group."""
    model.ray_ep.group.use(group)


@pytest.mark.parametrize("who", ["everyone", "one rank"])
@pytest.mark.parametrize("name", MODELS)
def test_a_failure_midway_leaves_the_old_placement_whole_and_usable_over_another_group(ranks, name, who):
    size, (old, new) = 3, (drawn(name, 3, 11), drawn(name, 3, 12))
    models, groups = [None] * size, [None] * size

    def work(group):
        model = models[group.rank] = parallelize(copy.deepcopy(MODELS[name]), group, old)
        before = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
        twin = parallelize(copy.deepcopy(MODELS[name]), group, old)
        last = 1 + apply_placement(twin, new, buffer_mb=2 * KIB).rounds  # the agreement after the last round
        assert last > 5
        if who == "one rank":
            if group.rank == 1:
                join(model, Failing(group, 3, groups))
            with pytest.raises(GroupError):
                apply_placement(model, new, buffer_mb=2 * KIB)
        for k in (0, 1, 2, last // 2, last) if who == "everyone" else ():
            join(model, Failing(group, k))
            with pytest.raises(GroupError, match="died"):
                apply_placement(model, new, buffer_mb=2 * KIB)
        assert {n: (p, p.data_ptr()) for n, p in model.named_parameters()} == before
        assert_in_place(name, model, old, group.rank)

    run_ranks(size, work, timeout_s=10, groups=groups)

    def again(group):
        join(models[group.rank], group)
        first = step(models[group.rank], group)
        apply_placement(models[group.rank], new)
        return first, step(models[group.rank], group)

    for results in zip(*ranks(size, again), strict=True):
        assert_plain(name, results)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: contiguous(LAYERS, 8, 3), "2 layers x 8 experts on 3 ranks"),
        (lambda: contiguous(LAYERS + 1, 8, 2), "3 layers x 8 experts on 2 ranks"),
        (lambda: contiguous(LAYERS, 9, 2), "2 layers x 9 experts on 2 ranks"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused_before_anything_moves(ranks, make, says):
    def work(group):
        old = contiguous(LAYERS, 8, 2)
        model = parallelize(copy.deepcopy(MODELS["qwen3_moe"]), NoExchange(group), old)
        with pytest.raises(PlacementError, match=says):
            apply_placement(model, make())
        assert_in_place("qwen3_moe", model, old, group.rank)

    ranks(2, work)


class NoExchange(Watched):
    def before(self, output, input):
        raise AssertionError("something moved")


def test_ranks_that_disagree_or_refuse_move_nothing_and_all_say_so(ranks):
    old, new = contiguous(LAYERS, 8, 2), drawn("qwen3_moe", 2, 5)

    def work(group):
        model = parallelize(copy.deepcopy(MODELS["qwen3_moe"]), NoExchange(group), old)
        odd = group.rank == 1
        with pytest.raises(PlacementError, match="ranks 0 and 1 were given different placements"):
            apply_placement(model, drawn("qwen3_moe", 2, 6) if odd else new)
        with pytest.raises(PlacementError, match="given different"):
            apply_placement(model, new, buffer_mb=1 + group.rank)
        with pytest.raises(PlacementError, match="node_of has shape" if odd else "rank 1 refuses"):
            apply_placement(model, new, node_of=np.zeros(2 + odd, int))
        with pytest.raises(PlacementError, match="buffer_mb=0"):
            apply_placement(model, new, buffer_mb=0)
        name, p = next((n, p) for n, p in model.named_parameters() if "experts" in n)
        if odd:
            p.grad = torch.zeros_like(p)
        with pytest.raises(ModelError if odd else PlacementError, match=f"present .{name}" if odd else "rank 1 ref"):
            apply_placement(model, new)
        p.grad = None
        assert_in_place("qwen3_moe", model, old, group.rank)

    ranks(2, work)
    with pytest.raises(ModelError, match="not parallelized"):
        apply_placement(copy.deepcopy(MODELS["qwen3_moe"]), contiguous(LAYERS, 8, 1))


def test_frozen_experts_stay_frozen_packed_weights_are_dropped_and_kept_graphs_do_no_harm(ranks):
    name, placements = "qwen3_moe", [drawn("qwen3_moe", 2, seed) for seed in (21, 22, 23)]
    _, logits, grads = WANT[name]

    def work(group):
        model = parallelize(copy.deepcopy(MODELS[name]), group, placements[0])
        frozen = model.model.layers[0].mlp.experts.down_proj
        frozen.requires_grad_(False)
        outputs = []
        for placement in placements[1:]:
            outputs.append(loss_sum(model, IDS))  # its graph holds on to the old rows
            with model.ray_ep.inference(), torch.no_grad():
                loss_sum(model, IDS)
                apply_placement(model, placement)
                assert all(layer.packed is None for layer in model.ray_ep.layers)
                assert (loss_sum(model, IDS)[1] - logits).abs().max() <= 1e-5
        got = step(model, group)[1]
        assert not frozen.requires_grad
        assert model.model.layers[0].mlp.experts.gate_up_proj.requires_grad
        return got

    for got in ranks(2, work):
        for n, g in grads.items():
            want = torch.zeros_like(got[n]) if n == "model.layers.0.mlp.experts.down_proj" else g
            assert (got[n] - want).abs().max() <= 1e-5, n


def test_one_rank_takes_on_a_placement_too():
    model = parallelize(copy.deepcopy(MODELS["gpt_oss"]), SoloGroup())
    new = Placement(np.tile(np.array([[[3, 1, 0, 5, 4, 2]]]), (LAYERS, 1, 1)), 6, version=7)
    moved = apply_placement(model, new)
    assert (moved.moves, moved.sent, model.ray_ep.placement.version) == (0, 0, 7)
    assert_plain("gpt_oss", [step(model, SoloGroup())])
