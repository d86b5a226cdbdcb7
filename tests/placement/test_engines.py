"""What other engines record, as statistics, and placements as their documents: by hand, and there and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.errors import PlacementError
from ray_ep.placement import Placement, contiguous, random
from ray_ep.placement.engines.maps import document, map_of
from ray_ep.placement.engines.records import sglang_record, tensorrt_record, vllm_record

# 3 layers, the first dense; 3 experts on 4 slots; slot 3 is a replica of another expert in each MoE layer.
MAP = [[0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 1]]


def from_document(*arguments):
    return map_of(*arguments)[0]


def sglang_dump(passes, topk=False):
    """A detail-mode dump of one rank: `passes` are lists of tokens, each [layer][k] physical ids."""
    records = []
    for number, tokens in enumerate(passes):
        ids = np.full((3, len(tokens), 8), -1, np.int32)
        for t, layers in enumerate(tokens):
            for layer, chosen in enumerate(layers, 1):
                ids[layer, t, : len(chosen)] = chosen
        count = np.stack([np.bincount(row[row >= 0], minlength=4) for row in ids])
        record = {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "global_physical_count": count}
        if topk:
            record["topk_ids_of_layer"] = ids
        records.append(record)
    return {"records": records, "last_physical_to_logical_map": np.array(MAP)}


PASSES = [[([0, 1], [0, 3]), ([3, 2], [1, 2])], [([1, 2], [0, 1])]]


def test_sglang_stat_adds_passes_and_leaves_dense_layers_out():
    count = np.zeros((2, 3, 4), np.int32)
    count[0, 1], count[1, 1], count[1, 2] = [1, 2, 3, 0], [1, 0, 0, 0], [0, 0, 0, 9]
    got = sglang_record([("a.pt", {"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None})])
    assert got.statistics.load.tolist() == [[2, 2, 3, 0], [0, 0, 0, 9]]
    assert (got.engine, got.layer_ids, got.num_layers) == ("sglang", (1, 2), 3)
    assert "1 of 3 layers" in got.notes[0]
    assert got.statistics.sample is None


def test_sglang_per_pass_counts_physical_experts_under_their_logical_ones():
    got = sglang_record([("a.pt", sglang_dump(PASSES))])
    # Layer 1: slots 0 1 | 3 2 | 1 2 are experts 0 1 | 0 2 | 1 2. Layer 2: slots 0 3 | 1 2 | 0 1 are 2 1 | 1 0 | 2 1.
    assert got.statistics.load.tolist() == [[2, 2, 2], [1, 3, 2]]
    assert got.layer_ids == (1, 2)


def test_sglang_per_token_gives_pairs_transitions_and_a_sample_too():
    got = sglang_record([("a.pt", sglang_dump(PASSES[:1], topk=True)), ("b.pt", sglang_dump(PASSES[1:], topk=True))])
    s = got.statistics
    assert s.load.tolist() == [[2, 2, 2], [1, 3, 2]]
    assert s.coactivation.tolist() == [[[2, 1, 1], [1, 2, 1], [1, 1, 2]], [[1, 1, 0], [1, 3, 2], [0, 2, 2]]]
    assert s.transitions.tolist() == [[[1, 2, 1], [0, 2, 2], [1, 2, 1]]]
    assert s.sample.tolist() == [[[0, 1], [0, 2], [1, 2]], [[2, 1], [1, 0], [2, 1]]]


def test_vllm_counts_whole_tokens_only():
    dense = [0, 0]
    prompt = np.array([[dense, [3, 1]], [dense, [-1, -1]]], np.int16)  # the second came from the prefix cache
    answer = np.array([[dense, [1, 2]], [dense, [0, 0]]], np.uint8)  # the second was never captured
    got = vllm_record([("p", prompt), ("a", answer)])
    assert got.statistics.load.tolist() == [[0, 2, 1, 1]]
    assert got.statistics.sample.tolist() == [[[3, 1], [1, 2]]]
    assert (got.layer_ids, got.num_layers) == ((1,), 2)
    assert "2 of 4 tokens" in got.notes[1]
    assert vllm_record([("p", prompt)], num_experts=8).statistics.load.shape == (1, 8)


def test_tensorrt_adds_iterations_and_ranks_by_layer_number():
    rank0 = {"50_3": np.array([1, 0, 2]), "51_3": np.array([1, 1, 0]), "50_5": np.array([0, 0, 7])}
    rank1 = {"50_3": np.array([0, 5, 0]), "50_5": np.array([1, 0, 0])}
    got = tensorrt_record("dir", {"num_experts": 3, "num_experts_per_token": 2}, [("r0", rank0), ("r1", rank1)])
    assert got.statistics.load.tolist() == [[2, 6, 2], [1, 0, 7]]
    assert got.layer_ids == (3, 5)


def logits(tokens, layers, experts, k, seed):
    return np.argsort(np.random.default_rng(seed).random((tokens, layers, experts)), 2)[:, :, :k]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(2, 6), st.integers(0, 99))
def test_counts_are_those_of_a_slow_count(tokens, layers, experts, seed):
    k = min(2, experts)
    routed = logits(tokens, layers, experts, k, seed)
    if not routed.any((0, 2)).all():
        return  # a layer whose every token went to expert 0 alone cannot be told from a dense one
    s = vllm_record([("x", routed)], experts).statistics
    load, pairs = np.zeros((layers, experts)), np.zeros((layers, experts, experts))
    follow = np.zeros((layers - 1, experts, experts))
    for token in routed:
        for layer, chosen in enumerate(token):
            for a in chosen:
                load[layer, a] += 1
                for b in chosen:
                    pairs[layer, a, b] += 1
                for b in token[layer + 1] if layer + 1 < layers else ():
                    follow[layer, a, b] += 1
    assert (s.load == load).all()
    assert (s.coactivation == pairs).all()
    assert (s.transitions == follow).all()
    assert s.sample.shape == (layers, tokens, k)


def broken(**change):
    return {**sglang_dump(PASSES, topk=True), **change}


def broken_tokens(ids):
    dump = sglang_dump(PASSES)
    dump["records"][0]["topk_ids_of_layer"] = ids
    return dump


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda: sglang_record([("a.pt", {"x": 1})]), r"a.pt: not an SGLang.*keys are \['x'\].*logical_count"),
        (lambda: sglang_record([("a", {"logical_count": [[-1, 2]]})]), "a: logical_count has a negative count, -1"),
        (
            lambda: sglang_record([("a", {"logical_count": [[0.5, 2]]})]),
            "a: logical_count .*float64: expected integers",
        ),
        (lambda: sglang_record([("a", {"logical_count": [[1], [1, 2]]})]), "a: logical_count"),
        (lambda: sglang_record([("a", {"logical_count": [[0, 0]]})]), "a: no token was recorded"),
        (lambda: sglang_record([("a", {"logical_count": [[1, 1]]})], 4), "a: counts of 2 experts, .* has 4"),
        (
            lambda: sglang_record([("a", {"logical_count": [[1, 1]]}), ("b", {"logical_count": [[1, 1, 1]]})]),
            r"b: sglang statistics of \(1, 3\).*a has \(1, 2\)",
        ),
        (lambda: sglang_record([("a", broken(records=3))]), "a: records is not a list"),
        (lambda: sglang_record([("a", broken(records=[{}]))]), r"a: records\[0\]: expected global_physical_count"),
        (
            lambda: sglang_record([("a", broken(last_physical_to_logical_map=np.zeros((3, 5), int)))]),
            r"records\[0\]: global_physical_count has shape \(3, 4\).*\(3, 5\)",
        ),
        (
            lambda: sglang_record([("a", broken(last_physical_to_logical_map=np.full((3, 4), 9)))], 3),
            r"a: last_physical_to_logical_map names experts outside 0 to 2",
        ),
        (
            lambda: sglang_record([("a", broken_tokens(np.full((3, 1, 8), 4)))]),
            r"records\[0\]: topk_ids_of_layer has shape \(3, 1, 8\) and ids up to 4: expected 3 layers and ids below 4",
        ),
        (lambda: vllm_record([]), "--enable-return-routed-experts"),
        (lambda: vllm_record([("a", np.zeros((2, 2), int))]), r"a: routed experts has shape \(2, 2\).*3 dimensions"),
        (lambda: vllm_record([("a", np.zeros((4, 2, 2), int))]), "a: 4 tokens and no routing: every id is 0 or -1"),
        (lambda: vllm_record([("a", np.full((4, 2, 2), 1 << 40))]), "expert 1099511627776: allowed are 0 to 4095"),
        (lambda: vllm_record([("a", np.full((4, 2, 2), 3))]), "a: none of 4 tokens has 2 different experts"),
        (lambda: vllm_record([("a", logits(5, 2, 6, 2, 0))], 3), "a: a token names expert 5: allowed are 0 to 2"),
        (
            lambda: vllm_record([("a", logits(5, 2, 6, 2, 0)), ("b", logits(5, 3, 6, 2, 0))]),
            "b: routed experts of 3 layers and top 2, but a has 2 and 2",
        ),
        (lambda: tensorrt_record("d", {}, []), "d: meta_info.json has num_experts None"),
        (lambda: tensorrt_record("d", {"num_experts": 2}, []), "d: no counts: expected rank0.safetensors"),
        (
            lambda: tensorrt_record("d", {"num_experts": 2}, [("r", {"iter": np.ones(2, int)})]),
            "r: tensor 'iter': expected names like 50_3",
        ),
        (
            lambda: tensorrt_record("d", {"num_experts": 2}, [("r", {"1_1": np.ones(3, int)})]),
            "r: tensor 1_1 counts 3 experts, meta_info.json 2",
        ),
    ],
)
def test_a_malformed_record_is_named_with_what_is_allowed(read, says):
    with pytest.raises(PlacementError, match=says):
        read()


def logical_to_physical(rows, experts):
    """SGLang's own reading of a map (_compute_logical_to_all_physical_map): where each expert of a layer lies."""
    return [[[x for x, e in enumerate(row) if e == expert] for expert in range(experts)] for row in rows]


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2), st.integers(0, 9))
def test_every_filled_placement_survives_each_format(layers, experts, ranks, spare, seed):
    slots = min(-(-experts // ranks) + spare, experts)
    p = random(layers, experts, ranks, slots, seed=seed)
    ids = [2 * n + 1 for n in range(layers)]
    for engine in ("sglang", "tensorrt-llm", "vllm-ascend"):
        q = from_document(document(p, engine, ids), engine, ranks, range(layers) if engine == "vllm-ascend" else ids)
        assert (q.slots == p.slots).all()
        assert q.num_experts == experts
    lies = logical_to_physical(document(p, "sglang", ids)["physical_to_logical_map"], experts)
    for n, layer in enumerate(ids):
        assert [[x // slots for x in at] for at in lies[layer]] == [
            [r for r in range(ranks) for e in p.slots[n, r] if e == expert] for expert in range(experts)
        ]


def test_sglang_map_has_only_the_key_that_its_loader_takes_and_a_row_for_dense_layers():
    p = Placement([[[1, 0], [2, 1]]], 3)
    got = document(p, "sglang", layer_ids=[1], num_layers=3)
    assert got == {"physical_to_logical_map": [[0, 1, 2, 0], [1, 0, 2, 1], [0, 1, 2, 0]]}


def test_tensorrt_and_ascend_documents_by_hand():
    p = Placement([[[1, 0], [2, 1]]], 3)
    assert document(p, "tensorrt-llm", [3], layer_updates_per_iter=2) == {
        "num_slots": 4,
        "initial_global_assignments": {3: [1, 0, 2, 1]},
        "layer_updates_per_iter": 2,
    }
    devices = [{"device_id": 0, "device_expert": [1, 0]}, {"device_id": 1, "device_expert": [2, 1]}]
    assert document(p, "vllm-ascend") == {
        "moe_layer_count": 1,
        "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": devices}],
    }


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (
            lambda: document(contiguous(1, 4, 2), "vllm"),
            "vLLM cannot be started from a given expert map.*Allowed: ray_ep",
        ),
        (lambda: document(contiguous(1, 4, 2), "megatron"), "'megatron': allowed are ray_ep, sglang"),
        (lambda: document(contiguous(1, 4, 2, [3, 1]), "sglang"), "rank 1 fills 1 of 3 slots in layer 0: sglang wants"),
        (lambda: document(contiguous(2, 4, 2), "sglang", [1]), r"layer_ids \[1\]: expected 2 different numbers"),
        (lambda: document(contiguous(2, 4, 2), "sglang", [1, 1]), "expected 2 different numbers"),
        (lambda: document(contiguous(2, 4, 2), "sglang", [1, 4], 4), "layer number 4 in a model of 4 layers"),
        (lambda: document(Placement([[[0, 0], [1, 0]]], 2), "vllm-ascend"), "rank 0 holds an expert twice in layer 0"),
        (lambda: from_document({"a": 1}, "f"), r"f: not a placement: its keys are \['a'\]; expected slots"),
        (lambda: from_document({"physical_to_logical_map": [[0, 1]]}, "f"), "f: .*how many ranks its 2 slots lie on"),
        (lambda: from_document({"physical_to_logical_map": [[0, 1, 0]]}, "f", 2), "f: 3 slots do not divide over 2"),
        (lambda: from_document({"physical_to_logical_map": [[0, 2]]}, "f", 2), "f: .*1 of 3 experts have no slot"),
        (lambda: from_document({"physical_to_logical_map": [[0], [0, 1]]}, "f", 1), "f: .*different numbers of slots"),
        (lambda: from_document({"physical_to_logical_map": [["a"]]}, "f", 1), "f: physical_to_logical_map has shape"),
        (lambda: from_document({"physical_to_logical_map": [[0]]}, "f", 1, [1]), r"layers \[1\] are missing"),
        (lambda: from_document({"initial_global_assignments": [1]}, "f", 1), "f: .*under each layer number"),
        (
            lambda: from_document({"initial_global_assignments": {0: [0, 1]}, "num_slots": 3}, "f", 1),
            "f: num_slots is 3, but a layer lists 2",
        ),
        (lambda: from_document({"layer_list": [{}]}, "f"), "f: layer_list is not a list of layers"),
    ],
)
def test_what_an_engine_cannot_take_is_refused_with_the_reason(write, says):
    with pytest.raises(PlacementError, match=says):
        write()
