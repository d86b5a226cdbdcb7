"""Files of other engines, written here as those engines write them, opened by content; and the files that they open."""

import base64
import contextlib
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ray_ep.cli.engines.files import read_placement, read_record, write_placement
from ray_ep.errors import PlacementError
from ray_ep.placement import Placement, RoutingStatistics, contiguous, random

ROUTES = np.array([[[0, 0], [3, 1]], [[0, 0], [1, 2]]], np.int16)  # [tokens, layers, top_k], layer 0 dense
LOAD = [[0, 2, 1, 1]]


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return base64.b64encode(out.getvalue()).decode()


def stat_dump():
    count = torch.zeros(5, 3, 4, dtype=torch.int32)
    count[0, 1], count[3, 2] = torch.tensor([1, 2, 3, 4]), torch.tensor([4, 0, 0, 1])
    return {"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None}


def token_dump(rank, ids):
    """[T][K] physical ids in the one MoE layer of two."""
    topk = torch.full((2, len(ids), 8), -1, dtype=torch.int32)
    topk[1, :, : len(ids[0])] = torch.tensor(ids, dtype=torch.int32)
    count = torch.stack([torch.bincount(row[row >= 0], minlength=4) for row in topk]).int()
    record = {
        "forward_pass_id": 7, "rank": rank, "gatherer_key": "primary", "input_ids": [5] * len(ids),
        "positions": list(range(len(ids))), "extend_seq_lens": None, "forward_mode": 1, "topk_ids_of_layer": topk,
        "misc_objects": [], "global_physical_count": count,
    }  # fmt: skip
    return {"records": [record], "last_physical_to_logical_map": torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])}


def test_sglang_stat_file_and_init_location_counts(tmp_path):
    torch.save(stat_dump(), tmp_path / "expert_distribution_recorder_1.5.pt")
    got = read_record(tmp_path / "expert_distribution_recorder_1.5.pt")
    assert got.statistics.load.tolist() == [[1, 2, 3, 4], [4, 0, 0, 1]]
    assert (got.engine, got.layer_ids, got.num_layers) == ("sglang", (1, 2), 3)
    (tmp_path / "counts.json").write_text(json.dumps({"logical_count": [[0, 0], [3, 1]]}))
    assert read_record(tmp_path / "counts.json").statistics.load.tolist() == [[3, 1]]


def test_sglang_per_token_directory_has_a_file_a_rank(tmp_path):
    torch.save(token_dump(0, [[0, 1], [1, 2]]), tmp_path / "expert_distribution_recorder_1.5_0.pt")
    torch.save(token_dump(1, [[3, 2]]), tmp_path / "expert_distribution_recorder_1.5_1.pt")
    got = read_record(tmp_path)
    assert got.statistics.load.tolist() == [[2, 3, 1]]
    assert got.statistics.sample.tolist() == [[[2, 1], [1, 0], [1, 0]]]
    assert got.layer_ids == (1,)


def test_vllm_arrays_and_responses_of_both_kinds(tmp_path):
    np.save(tmp_path / "a.npy", ROUTES)
    np.savez(tmp_path / "b.npz", prompt=ROUTES[:1], answer=ROUTES[1:])
    old = {"choices": [{"routed_experts": ROUTES[1:].tolist()}], "prompt_routed_experts": ROUTES[:1].tolist()}
    (tmp_path / "c.json").write_text(json.dumps(old))
    new = {"choices": [{"index": 0, "routed_experts": npy(ROUTES.astype(np.uint8))}, {"routed_experts": None}]}
    (tmp_path / "d.json").write_text(json.dumps([new]))
    for name in ("a.npy", "b.npz", "c.json", "d.json"):
        got = read_record(tmp_path / name)
        assert (got.engine, got.layer_ids, got.statistics.load.tolist()) == ("vllm", (1,), LOAD), name
    (tmp_path / "e.jsonl").write_text(json.dumps(old) + "\n" + json.dumps(new) + "\n")
    assert read_record(tmp_path / "e.jsonl").statistics.load.tolist() == [[0, 4, 2, 2]]
    assert read_record(tmp_path).statistics.load.tolist() == [[0, 12, 6, 6]]  # all five
    assert read_record(tmp_path / "a.npy", num_experts=6).statistics.load.tolist() == [[0, 2, 1, 1, 0, 0]]


def test_tensorrt_directory(tmp_path):
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 3, "num_experts_per_token": 2}))
    save_file({"50_3": torch.tensor([1, 0, 2]), "51_3": torch.tensor([1, 1, 0])}, tmp_path / "rank0.safetensors")
    save_file({"50_3": torch.tensor([0, 5, 0])}, tmp_path / "rank1.safetensors")
    save_file({"50_3": torch.ones(3, 3)}, tmp_path / "cooccurrence_rank0.safetensors")
    got = read_record(tmp_path)
    assert (got.engine, got.layer_ids, got.statistics.load.tolist()) == ("tensorrt-llm", (3,), [[2, 6, 2]])


def test_our_own_statistics(tmp_path):
    RoutingStatistics(np.array([[1, 2]]), sample=np.zeros((1, 3, 1), np.int32)).save(tmp_path / "s.npz")
    got = read_record(tmp_path / "s.npz")
    assert (got.engine, got.statistics.load.tolist(), got.statistics.sample.shape) == ("ray_ep", [[1, 2]], (1, 3, 1))


def test_a_record_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exit, (3,))

    torch.save({"logical_count": Evil()}, tmp_path / "x.pt")
    with pytest.raises(PlacementError, match=r"x.pt: torch cannot load it as plain tensors"):
        read_record(tmp_path / "x.pt")


def test_written_files_are_what_the_engines_load(tmp_path):
    p = random(2, 6, 2, 4, seed=1)
    write_placement(p, "sglang", tmp_path / "m.json", layer_ids=[1, 2], num_layers=4)
    write_placement(p, "sglang", tmp_path / "m.pt", layer_ids=[1, 2], num_layers=4)
    write_placement(p, "tensorrt-llm", tmp_path / "m.yaml", layer_ids=[1, 2])
    write_placement(p, "vllm-ascend", tmp_path / "a.json")
    write_placement(p, "ray_ep", tmp_path / "own.json")
    # SGLang passes the document on as keyword arguments: one key, [layers, physical experts].
    as_json = json.loads((tmp_path / "m.json").read_text())
    as_pt = torch.load(tmp_path / "m.pt", weights_only=True)
    assert list(as_json) == list(as_pt) == ["physical_to_logical_map"]
    assert torch.tensor(as_json["physical_to_logical_map"]).equal(as_pt["physical_to_logical_map"])
    assert as_pt["physical_to_logical_map"].shape == (4, 8)
    # TensorRT-LLM looks layers up by int and checks each list against num_slots.
    config = yaml.safe_load((tmp_path / "m.yaml").read_text())
    assert {len(config["initial_global_assignments"][layer]) for layer in (1, 2)} == {config["num_slots"]} == {8}
    assert (tmp_path / "m.yaml").read_text().count("\n") < 8  # a line a layer
    for name, kwargs in {"m.json": {"ranks": 2, "layer_ids": [1, 2]}, "m.pt": {"ranks": 2, "layer_ids": [1, 2]},
                         "m.yaml": {"ranks": 2}, "a.json": {}, "own.json": {}}.items():  # fmt: skip
        assert (read_placement(tmp_path / name, **kwargs).slots == p.slots).all(), name
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.json", "m.json", "m.pt", "m.yaml", "own.json"]


def test_from_a_record_to_the_engines_own_layer_numbers(tmp_path):
    torch.save(stat_dump(), tmp_path / "r.pt")
    got = read_record(tmp_path / "r.pt")
    placed = random(2, 4, 2, 3, seed=2)
    write_placement(placed, got.engine, tmp_path / "m.json", got.layer_ids, got.num_layers)
    rows = json.loads((tmp_path / "m.json").read_text())["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 3, 0, 1], *placed.slots.reshape(2, 6).tolist()]


FILES = {
    "empty.json": b"",
    "text.json": b"hello",
    "cut.json": b'{"logical_count": [[1',
    "cut.jsonl": b'{"choices": []}\n{"choi',
    "other.json": b'{"a": 1}',
    "map.json": b'{"physical_to_logical_map": [[0, 1]]}',
    "list.json": b"[1, 2]",
    "b64.json": b'{"routed_experts": "%%"}',
    "notnpy.json": b'{"routed_experts": "aGVsbG8="}',
    "off.json": b'{"choices": [{"routed_experts": null}]}',
    "cut.npy": b"\x93NUMPY\x01\x00",
    "cut.npz": b"PK\x03\x04 and nothing",
}
SAYS = {
    "empty.json": "an empty file; allowed are ray_ep's own statistics",
    "text.json": "content that starts with b'hello'; allowed are",
    "cut.json": "not JSON: .*line 1 column",
    "cut.jsonl": "line 2: not JSON",
    "other.json": r"not a routing record, it holds keys \['a'\]; allowed are",
    "map.json": r"keys \['physical_to_logical_map'\]; allowed are",
    "list.json": "it holds a list; allowed are",
    "b64.json": "routed_experts: expected base64 of a .npy file",
    "notnpy.json": "routed_experts: expected base64 of a .npy file",
    "off.json": "--enable-return-routed-experts",
    "cut.npy": "a damaged NumPy file",
    "cut.npz": "a damaged zip archive",
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_is_named_with_what_is_wrong(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    with pytest.raises(PlacementError, match=f"{re.escape(name)}.*{SAYS[name]}"):
        read_record(tmp_path / name)


KEYS = st.sampled_from(
    ["logical_count", "records", "last_physical_to_logical_map", "global_physical_count", "topk_ids_of_layer",
     "choices", "outputs", "routed_experts", "prompt_routed_experts", "slots", "num_experts", "physical_to_logical_map",
     "initial_global_assignments", "num_slots", "layer_list", "device_list", "layer_id", "device_expert", "0"]
)  # fmt: skip
NUMBERS = st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=2), min_size=1, max_size=2)
LEAVES = st.none() | st.booleans() | st.integers(-2, 4) | st.floats() | st.text(max_size=4) | NUMBERS
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=3) | st.dictionaries(KEYS, t, max_size=4), max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=4) | st.lists(TREES, max_size=3))
def test_no_json_ends_in_anything_but_a_result_or_bad_input(tmp_path_factory, tree):
    file = tmp_path_factory.mktemp("x") / "x.json"
    file.write_text(json.dumps(tree))
    with contextlib.suppress(PlacementError):
        read_record(file)
    with contextlib.suppress(PlacementError):
        read_placement(file, ranks=1)


@pytest.mark.parametrize("name", ["a.pt", "b.npy", "c.npz", "rank0.safetensors"])
def test_damaged_binary_files_end_in_a_result_or_bad_input(name, tmp_path):
    if name == "a.pt":
        torch.save(token_dump(0, [[0, 1]]), tmp_path / name)
    elif name == "b.npy":
        np.save(tmp_path / name, ROUTES)
    elif name == "c.npz":
        RoutingStatistics(np.array([[1, 2]])).save(tmp_path / name)
    else:
        (tmp_path / "meta_info.json").write_text('{"num_experts": 2}')
        save_file({"1_0": torch.tensor([1, 2])}, tmp_path / name)
    whole, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    damaged = [whole[: len(whole) * n // 12] for n in range(12)]
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    refused = []
    for content in damaged:
        (tmp_path / name).write_bytes(content)
        try:
            read_record(tmp_path if name.startswith("rank") else tmp_path / name)
        except PlacementError as e:
            refused.append(str(e))
    assert len(refused) >= 12  # every cut one
    assert all(name in message for message in refused)


def test_directories_that_are_no_record(tmp_path):
    with pytest.raises(PlacementError, match="gone: no such file"):
        read_record(tmp_path / "gone")
    with pytest.raises(PlacementError, match="holds nothing; allowed are"):
        read_record(tmp_path)
    np.save(tmp_path / "a.npy", ROUTES)
    torch.save(stat_dump(), tmp_path / "b.pt")
    with pytest.raises(PlacementError, match=r"SGLang's .*b.pt and vLLM's .*a.npy together"):
        read_record(tmp_path)
    RoutingStatistics(np.array([[1, 2]])).save(tmp_path / "c.npz")
    with pytest.raises(PlacementError, match=r"c.npz: ray_ep's statistics among other files"):
        read_record(tmp_path)
    (tmp_path / "meta_info.json").write_text("[")
    with pytest.raises(PlacementError, match=r"meta_info.json: not JSON"):
        read_record(tmp_path)
    (tmp_path / "meta_info.json").write_text("[]")
    with pytest.raises(PlacementError, match=r"meta_info.json: expected num_experts"):
        read_record(tmp_path)
    (tmp_path / "meta_info.json").write_text('{"num_experts": 2}')
    (tmp_path / "rank0.safetensors").write_bytes(b"junk")
    with pytest.raises(PlacementError, match=r"rank0.safetensors: not a safetensors file"):
        read_record(tmp_path)


def test_placements_that_cannot_be_written_or_read(tmp_path):
    p = contiguous(1, 4, 2)
    with pytest.raises(PlacementError, match="vLLM cannot be started from a given expert map"):
        write_placement(p, "vllm", tmp_path / "v.json")
    with pytest.raises(PlacementError, match=r"m.yaml: SGLang reads a map from names that end in \.json or \.pt"):
        write_placement(p, "sglang", tmp_path / "m.yaml")
    with pytest.raises(PlacementError, match="'x': allowed are ray_ep, sglang"):
        write_placement(p, "x", tmp_path / "m")
    with pytest.raises(PlacementError, match="No such file"):
        write_placement(p, "ray_ep", tmp_path / "no" / "m")
    (tmp_path / "dir").mkdir()
    with pytest.raises(PlacementError, match="dir: "):
        write_placement(p, "ray_ep", tmp_path / "dir")
    assert [f.name for f in tmp_path.iterdir()] == ["dir"]
    for name, text, says in [
        ("a.yaml", "a: [1", "neither JSON nor YAML"),
        ("b.yaml", "- 1", "holds a list: expected a placement"),
        ("c.json", '{"slots": [[[0]]], "num_experts": 2}', "1 of 2 experts have no slot"),
        ("d.json", '{"x": 1}', r"not a placement: its keys are \['x'\]"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(PlacementError, match=f"{re.escape(name)}.*{says}"):
            read_placement(tmp_path / name)
    (tmp_path / "e.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PlacementError, match=r"e\.json: 'utf-8' codec"):
        read_placement(tmp_path / "e.json")
    with pytest.raises(PlacementError, match=r"gone: .*No such file"):
        read_placement(tmp_path / "gone")


def test_reading_without_pt_files_loads_no_torch(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"logical_count": [[3, 1]]}))
    code = (
        "import sys; from ray_ep.cli.engines.files import read_record; "
        f"read_record({str(tmp_path / 'c.json')!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_own_placement_keeps_primaries(tmp_path):
    p = Placement([[[0, 1], [1, 0]]], 2, primary=np.array([[1, 1]]))
    write_placement(p, "ray_ep", tmp_path / "p.json")
    assert read_placement(tmp_path / "p.json").owner.tolist() == [[1, 1]]
