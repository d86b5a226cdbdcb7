"""Responses of SGLang and vLLM as records, what is there twice, and other engines' maps of more or fewer layers."""

import base64
import json
import shutil

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_ep.cli import main
from ray_ep.cli.engines.files import read_map, read_placement, read_record, write_placement
from ray_ep.errors import PlacementError
from ray_ep.placement import contiguous, random

RNG = np.random.default_rng(3)
TOKENS = np.zeros((20, 4, 3), np.int32)  # [tokens, layers, top_k], layer 0 dense
TOKENS[:, 1:] = np.argsort(RNG.random((20, 3, 16)), axis=2)[:, :, :3]
LOAD = np.stack([np.bincount(TOKENS[:, n].ravel(), minlength=16) for n in (1, 2, 3)])


def b64(array):
    return base64.b64encode(np.ascontiguousarray(array, np.int32).tobytes()).decode()


def generated(rows=TOKENS, **more):
    """What SGLang's /generate answers: the last token was not routed any more."""
    meta = {"prompt_tokens": len(rows) - 4, "completion_tokens": 5, "routed_experts": b64(rows), **more}
    return {"text": "x", "output_ids": [1] * 5, "meta_info": meta}


def chat(rows=TOKENS):
    usage = {"prompt_tokens": len(rows) - 4, "completion_tokens": 5, "total_tokens": len(rows) + 1}
    return {"choices": [{"index": 0, "message": {}}], "usage": usage, "sglext": {"routed_experts": b64(rows)}}


def partitioned():
    schema = {"dtype": "int32", "num_layers": 4, "top_k": 3, "moe_layer_ids": [1, 2, 3]}
    parts = {"input_expert_ids": b64(TOKENS[:16]), "output_expert_ids": b64(TOKENS[16:])}
    return {"choices": [], "sglext": {**parts, "expert_ids_schema": schema}}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(generated()),
        json.dumps([generated(TOKENS[:9]), generated(TOKENS[9:])]),
        "\n".join(json.dumps(x) for x in (generated(TOKENS[:9]), generated(TOKENS[9:]))),
        json.dumps(chat()),
        json.dumps({"choices": [{"index": 0, "meta_info": generated()["meta_info"]}]}),
        json.dumps(partitioned()),
    ],
    ids=["one", "list", "lines", "chat", "choice", "partitioned"],
)
def test_sglangs_responses_are_a_record(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    got = read_record(tmp_path / "r.json", 16)
    assert (got.engine, got.layer_ids, got.num_layers) == ("sglang", (1, 2, 3), 4)
    assert got.statistics.load.tolist() == LOAD.tolist()
    assert any("routing of 4 layers, top 3" in n for n in got.notes)


def test_without_token_counts_the_shape_is_asked_for_and_given(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"text": "x", "meta_info": {"routed_experts": b64(TOKENS)}}))
    with pytest.raises(PlacementError, match="give --routed LAYERSxTOP_K"):
        read_record(tmp_path / "r.json")
    assert read_record(tmp_path / "r.json", 16, (4, 3)).statistics.load.tolist() == LOAD.tolist()
    (tmp_path / "c.yaml").write_text(
        "{nodes: 1, ranks_per_node: 4, links: {inside: {bandwidth: 1 GB/s}, across: 1 GB/s}}"
    )
    arguments = ["simulate", str(tmp_path / "r.json"), "--experts", "16", "--nodes", "1", "--routed"]
    assert CliRunner().invoke(main, [*arguments, "4x3"]).exit_code == 0
    bad = CliRunner().invoke(main, [*arguments, "4by3"])
    assert (bad.exit_code, "--routed '4by3': expected LAYERSxTOP_K" in bad.stderr) == (2, True)


@pytest.mark.parametrize("empty", [[], "", None])
def test_an_empty_routing_among_others_is_left_out_and_said(tmp_path, empty):
    vllm = {"choices": [{"routed_experts": TOKENS.tolist()}]}
    for good, none in (
        (vllm, {"choices": [{"routed_experts": empty}]}),
        (generated(), {"text": "", "meta_info": {"routed_experts": empty}}),
        (generated(), {"error": {"message": "aborted"}}),
    ):
        (tmp_path / "r.json").write_text(json.dumps([good, none]))
        got = read_record(tmp_path / "r.json", 16)
        assert got.statistics.load.tolist() == LOAD.tolist()
        assert "1 of 2 responses hold no routing and are left out" in got.notes
    (tmp_path / "r.json").write_text(json.dumps([{"meta_info": {"routed_experts": empty}}]))
    with pytest.raises(PlacementError, match="responses without routed experts: start vLLM"):
        read_record(tmp_path / "r.json")


def test_what_is_there_twice_is_counted_once_or_said(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(generated()))
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")
    got = read_record(tmp_path, 16)
    assert got.statistics.load.tolist() == LOAD.tolist()
    assert "b.json is the same as a.json and is counted once" in got.notes
    (tmp_path / "b.json").write_text(json.dumps([generated()]))
    assert any("holds the same routing as" in n for n in read_record(tmp_path, 16).notes)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps([generated(id="r1")] * (1 + (name == "b"))))
    got = read_record(tmp_path, 16)
    assert got.statistics.load.tolist() == LOAD.tolist()
    assert "2 of 3 responses are there twice (same id) and are counted once" in got.notes
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": [[1, 2]]}))
    (tmp_path / "b.json").write_text(json.dumps({"logical_count": [[[1, 1]], [[0, 1]]]}))
    got = read_record(tmp_path)
    assert got.statistics.load.tolist() == [[1, 2]]
    assert any("the same counts as" in n for n in got.notes)


ONLINE = {"num_slots": 288, "layer_updates_per_iter": 1}


@pytest.mark.parametrize("tree", [ONLINE, {"moe_config": {"backend": "WIDEEP", "load_balancer": ONLINE}}])
def test_tensorrts_online_balancer_is_called_what_it_is(tmp_path, tree):
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(tree))
    for read in (lambda: read_placement(tmp_path / "e.yaml", 8), lambda: read_record(tmp_path / "e.yaml")):
        with pytest.raises(PlacementError, match="TensorRT-LLM's"):
            read()
    with pytest.raises(
        PlacementError, match=r"num_slots 288, layer_updates_per_iter 1\) without initial_global_assign"
    ):
        read_placement(tmp_path / "e.yaml", 8)


def test_tensorrts_map_is_read_inline_and_by_its_path(tmp_path):
    p = random(2, 6, 2, 4, seed=1)
    write_placement(p, "tensorrt-llm", tmp_path / "m.yaml", layer_ids=[1, 2])
    inline = {"moe_config": {"load_balancer": yaml.safe_load((tmp_path / "m.yaml").read_text())}}
    (tmp_path / "i.yaml").write_text(yaml.safe_dump(inline))
    (tmp_path / "p.yaml").write_text("moe_config: {load_balancer: m.yaml}")
    for name in ("i.yaml", "p.yaml"):
        assert (read_placement(tmp_path / name, 2, [1, 2]).slots == p.slots).all()
    (tmp_path / "p.yaml").write_text("moe_config: {load_balancer: gone.yaml}")
    with pytest.raises(PlacementError, match=r"p\.yaml: its load_balancer is the file gone\.yaml, which is not there"):
        read_placement(tmp_path / "p.yaml", 2)


def test_vllm_ascend_maps_read_without_layer_id_after_a_dense_layer_and_before_an_mtp_layer(tmp_path):
    p = random(3, 6, 2, 4, seed=1)
    write_placement(p, "vllm-ascend", tmp_path / "a.json", layer_ids=[1, 2, 3])
    assert (read_placement(tmp_path / "a.json", 2, [1, 2, 3]).slots == p.slots).all()
    tree = json.loads((tmp_path / "a.json").read_text())
    for layer in tree["layer_list"]:
        del layer["layer_id"]
    (tmp_path / "b.json").write_text(json.dumps(tree))
    assert (read_placement(tmp_path / "b.json").slots == p.slots).all()
    for how in ({"layer_ids": [1, 2]}, {"layers": 2}):
        got, notes = read_map(tmp_path / "b.json", 2, **how)
        assert (got.slots == p.slots[:2]).all()
        assert (
            "a placement of 3 layers, the statistics are of 2: its last (2), as an MTP layer is, are left out"
            in notes[0]
        )
    with pytest.raises(PlacementError, match="a placement of 3 MoE layers, the statistics are of 4"):
        read_map(tmp_path / "b.json", 2, layers=4)


def test_a_map_with_an_mtp_layer_is_planned_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "{nodes: 1, ranks_per_node: 2, links: {inside: {bandwidth: 1 GB/s}, across: {bandwidth: 1 GB/s}}}"
    )
    (tmp_path / "r.json").write_text(json.dumps({"logical_count": [[0] * 6, [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]}))
    write_placement(contiguous(3, 6, 2, 4), "tensorrt-llm", tmp_path / "m.yaml", layer_ids=[1, 2, 3])
    done = CliRunner().invoke(main, ["plan", "r.json", "-t", "c.yaml", "--current", "m.yaml"])
    assert done.exit_code == 0, done.output
    assert "m.yaml: 1 of its layers are not among the statistics' and are left out" in done.stdout


VALID = [
    generated(), chat(), partitioned(), {"logical_count": [[1, 2]]}, ONLINE, {"moe_config": {"load_balancer": ONLINE}},
    {"moe_config": {"load_balancer": "x.yaml"}}, {"physical_to_logical_map": [[0, 1, 1, 0]]},
    {"num_slots": 4, "initial_global_assignments": {"0": [0, 1, 1, 0]}, "layer_updates_per_iter": 0},
    {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_list": [{"device_id": 0, "device_expert": [0, 1]}]}]},
    {"records": [{"rank": 0, "global_physical_count": [[1, 2]], "topk_ids_of_layer": [[[0, 1], [1, 0]]]}],
     "last_physical_to_logical_map": [[0, 1]]},
    {"slots": [[[0, 1]]], "num_experts": 2, "primary": [[0, 0]], "shares": [[[1, 1]]], "version": 1},
    {"choices": [{"routed_experts": TOKENS.tolist()}], "prompt_routed_experts": TOKENS.tolist()},
]  # fmt: skip
ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "AAAA",
        [],
        {},
        [[]],
        [None],
        [[1], [1, 2]],
        {"a": 1},
    ]
)


def mutated(draw, tree):
    """The tree with one place replaced, removed or wrapped."""
    if isinstance(tree, (dict, list)) and tree and draw(st.integers(0, 4)):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = draw(st.sampled_from(keys))
        found = tree.copy()
        if draw(st.integers(0, 6)) == 0:
            del found[key]
        else:
            found[key] = mutated(draw, tree[key])
        return found
    return draw(ODD)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(VALID), st.sampled_from(["json", "yaml"]))
def test_a_damaged_document_is_a_value_or_one_sentence_without_a_python_name(tmp_path_factory, data, tree, suffix):
    file = tmp_path_factory.mktemp("x") / f"x.{suffix}"
    damaged = mutated(data.draw, tree)
    file.write_text(json.dumps(damaged) if suffix == "json" else yaml.safe_dump(damaged))
    for read in (lambda: read_record(file), lambda: read_map(file, 2), lambda: read_map(file, 1, [0])):
        try:
            read()
        except PlacementError as e:
            text = str(e)
            assert "x." in text
            for name in ("Error", "Exception", "Traceback", "NoneType", "<class", "object is not"):
                assert name not in text, text


@pytest.mark.parametrize("key", ["num_layers", "top_k"])
def test_true_is_no_number_of_layers_or_choices(tmp_path, key):
    tree = partitioned()
    tree["sglext"]["expert_ids_schema"][key] = True
    (tmp_path / "x.json").write_text(json.dumps(tree))
    with pytest.raises(PlacementError, match="expected positive numbers"):
        read_record(tmp_path / "x.json")
