"""Checkpoints: written by any number of ranks, read by any other, whole or refused, one layer in memory at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ray_ep.collective import SoloGroup
from ray_ep.errors import CheckpointError, SaveError
from ray_ep.placement import RoutingStatistics, contiguous, random
from ray_ep.rank.saved import writing as module
from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.saved.disk import checksum
from tests.conftest import run_ranks, slow
from tests.rank.test_optimizer import LAYOUTS, state
from tests.rank.test_training import EXPERTS, LAYERS, QWEN, SIZES, configure, make_rank

HEADS = SIZES.replace("value_heads: 2", "value_heads: 4")
DEEPSEEK = ("model.type=deepseek_v3", f"model.overrides={{{HEADS}, n_routed_experts: 8, moe_intermediate_size: 16, \
first_k_dense_replace: 0, q_lora_rank: 16, kv_lora_rank: 16, qk_rope_head_dim: 8, n_group: 2, \
qk_nope_head_dim: 8, v_head_dim: 8, topk_group: 1, n_shared_experts: 1}}")  # fmt: skip
ADAM = {"weight", "exp_avg", "exp_avg_sq"}
VARIANTS = {  # overrides, model, kinds of tensors in the checkpoint
    "adamw": ((), QWEN, ADAM),
    "sgd": (("optim.kind=sgd", "optim.learning_rate=0.3"), QWEN, {"weight", "momentum_buffer"}),
    "bfloat16": (("model.dtype=bfloat16",), QWEN, ADAM),
    "frozen": (("optim.freeze=[*.down_proj, model.embed_tokens.*]",), QWEN, ADAM),
    "correction bias": (("router.bias_rate=0.01",), DEEPSEEK, ADAM | {"buffer"}),
}
WRITTEN_BY, ALONE = LAYOUTS["replicas on 4"], LAYOUTS["one rank"]
READ_BY = {"a random half on each of 2": random(LAYERS, EXPERTS, 2, seed=7)} | {
    n: LAYOUTS[n] for n in ("one rank", "replicas on 2", "replicas on 3", "experts on rank 0 of 3 alone")
}


def commit(url, step, parts):
    """Make a checkpoint of what each rank gave: (its part of the manifest's tensors, its statistics)."""
    manifest = {"format": 1, "step": step, "tensors": {k: v for part, _ in parts for k, v in part.items()}}
    Directory(url).commit(step, manifest, RoutingStatistics.merge([s for _, s in parts], 64))


def save(rank, url, step):
    Directory(url).clear(step)
    commit(url, step, [(rank.save(url, step), rank.rank.statistics())])


def run(url, placement, steps, *overrides, model=QWEN, load=None, save=None):
    """Train `steps` from a fresh rank, or from checkpoint `load`; returns what each rank saw."""
    cfg, config = configure(*overrides, model=model)
    if save is not None:
        Directory(url).clear(save)

    def work(group):
        rank, seen = make_rank(cfg, config, group, placement), SimpleNamespace(results=[])
        if load is not None:
            for t in rank.model.state_dict().values():
                t.fill_(torch.nan)  # whatever the load does not write shows in the next loss
            rank.load(url, load)
        seen.rank, seen.start = rank, state(rank)
        seen.counts = {rank.optimizer.updates} if any(w.moments for w in rank.optimizer.weights) else set()
        for step in steps:
            seen.results.append(rank.train_step(step))
            if step + 1 == save:
                seen.part, seen.state = (rank.save(url, save), rank.rank.statistics()), state(rank)
        return seen

    ranks = run_ranks(placement.num_ranks, work, timeout_s=20)
    if save is not None:
        commit(url, save, [r.part for r in ranks])
    return ranks


@pytest.fixture(scope="module", params=["adamw", "correction bias", *slow("frozen", "sgd", "bfloat16")])
def written(request, tmp_path_factory):
    """Eight steps on four ranks with a checkpoint after the fourth."""
    overrides, model, kinds = VARIANTS[request.param]
    url = str(tmp_path_factory.mktemp("written"))
    ranks = run(url, WRITTEN_BY, range(8), *overrides, model=model, save=4)
    whole, tensors = {k: t for r in ranks for k, t in r.state.items()}, Checkpoint(Directory(url), 4).tensors
    return SimpleNamespace(variant=request.param, url=url, ranks=ranks, state=whole, kinds=kinds, tensors=tensors)


@pytest.mark.parametrize("layout", ["replicas on 3", *slow(*sorted(READ_BY.keys() - {"replicas on 3"}))])
def test_training_goes_on_from_any_layout_as_if_undisturbed(written, layout):
    overrides, model, _ = VARIANTS[written.variant]
    ranks = run(written.url, READ_BY[layout], range(4, 8), *overrides, model=model, load=4)
    got = {k: t for r in ranks for k, t in r.start.items()}
    assert {k.partition("/")[0] for k in got} == written.kinds
    assert got.keys() == written.state.keys()
    assert [k for k, t in got.items() if not torch.equal(t, written.state[k])] == []
    assert all(r.counts == ({4} if written.kinds else set()) for r in ranks)
    for r in ranks:
        for after, before in zip(r.results, written.ranks[0].results[4:], strict=True):
            rel = 1e-2 if written.variant == "bfloat16" else 1e-4
            assert after.loss == pytest.approx(before.loss, rel=rel), f"step {after.step}"
            assert after.grad_norm == pytest.approx(before.grad_norm, rel=10 * rel), f"step {after.step}"


@pytest.mark.parametrize("layout", READ_BY)
@pytest.mark.parametrize("written", ["adamw"], indirect=True)
def test_every_rank_holds_its_own_experts_after_a_load(written, layout):
    sums = {k: crc for k, (_, crc) in written.tensors.items() if k.startswith("weight/") and k.count("/") == 2}
    assert len(set(sums.values())) == len(sums) == LAYERS * EXPERTS * 2, "no two experts are alike"
    for r in run(written.url, READ_BY[layout], [], load=4):
        for i, layer in enumerate(r.rank.ep.layers):
            assert layer.experts == READ_BY[layout].experts_of(i, r.rank.group.rank)
            for name, p in r.rank.ep.parameters(i).items():
                rows = {e: checksum(row) for e, row in zip(layer.experts, p, strict=True)}  # replicas, too
                assert rows == {e: sums[f"weight/{layer.name}.{name}/{e}"] for e in layer.experts}


@pytest.mark.parametrize("written", ["adamw"], indirect=True)
def test_the_manifest_counts_every_expert_once_and_its_owner_wrote_it(written):
    experts = {k: name for k, (name, _) in written.tensors.items() if k.count("/") == 2}
    assert len(experts) == LAYERS * EXPERTS * 2 * 3
    assert sum(k.count("/") == 2 for r in written.ranks for k in r.part[0]) == len(experts)
    for k, name in experts.items():
        layer, expert = int(k.split(".")[2]), int(k.rpartition("/")[2])
        assert name == f"experts-L{layer:03d}-r{WRITTEN_BY.owner[layer, expert]:03d}.safetensors"
    names = [n for n, _ in written.ranks[0].rank.model.named_parameters() if ".experts." not in n]
    assert written.tensors.keys() - experts == {f"{kind}/{n}" for n in names for kind in ADAM}


def test_checkpoints_live_at_fsspec_urls(tmp_path):
    directory = Directory(url := f"memory:/{tmp_path}")
    ranks = run(url, LAYOUTS["replicas on 2"], range(2), save=2)
    got = run(url, ALONE, range(2, 3), load=2, save=3)[0]
    assert all(torch.equal(got.start[k], t) for r in ranks for k, t in r.state.items())
    assert np.array_equal(Checkpoint(directory, 2).statistics().load, sum(r.part[1].load for r in ranks))
    directory.clear(4)
    assert (directory.steps(), directory.prune(1), directory.steps()) == ([2, 3], [2], [3])
    assert not list(tmp_path.iterdir())


def test_a_save_hands_over_one_layer_of_a_ranks_share_or_a_chunk_of_dense_weights_at_a_time(tmp_path, monkeypatch):
    chunk, handed, inner = 1 << 14, {}, Directory.write_tensors

    def write(self, step, name, tensors):
        handed[name] = sum(t.numel() * t.element_size() for t in tensors.values())
        return inner(self, step, name, tensors)

    monkeypatch.setattr(module, "FILE_BYTES", chunk)
    monkeypatch.setattr(Directory, "write_tensors", write)
    rank = run(str(tmp_path), WRITTEN_BY, range(1), save=1)[0].rank
    expert = sum(p[0].numel() for p in rank.ep.parameters(0).values()) * 4 * 3  # bytes of one, all kinds
    owned = [(i, r, int((owner == r).sum())) for i, owner in enumerate(WRITTEN_BY.owner) for r in range(4)]
    want = {f"experts-L{i:03d}-r{r:03d}.safetensors": n * expert for i, r, n in owned}
    assert {n: size for n, size in handed.items() if n.startswith("experts")} == want
    largest = 4 * max(w.master.numel() for w in rank.optimizer.weights if w.layer is None)
    dense = [size for n, size in handed.items() if n.startswith("dense")]
    assert max(dense) < chunk + largest < sum(dense) / 3, "a chunk ends with the tensor that fills it"


@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    """For damage and accidents one rank is enough."""
    return run(str(tmp_path_factory.mktemp("solo")), ALONE, range(1), save=1)[0].rank


def full():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "deleted"])
@pytest.mark.parametrize("name", ["dense-0000", "experts-L001-r000", "manifest", "statistics"])
def test_a_damaged_file_is_named(solo, tmp_path, name, how):
    save(solo, str(tmp_path), 1)
    path = next((tmp_path / "step-000001").glob(f"{name}.*"))
    data = bytearray(path.read_bytes())
    path.unlink()
    if how != "deleted":
        data[len(data) * 3 // 4] ^= 0x80
        path.write_bytes({"flipped": data, "truncated": data[: len(data) // 2], "emptied": b""}[how])

    with pytest.raises(CheckpointError, match=name):
        (Checkpoint(Directory(str(tmp_path)), 1).statistics(), solo.load(str(tmp_path), 1))


def test_a_flipped_bit_anywhere_in_a_file_of_tensors_is_found_or_changes_nothing(solo, tmp_path):
    save(solo, str(tmp_path), 1)
    path, rng, found = tmp_path / "step-000001" / "experts-L000-r000.safetensors", np.random.default_rng(0), 0
    header = 8 + int.from_bytes((data := path.read_bytes())[:8], "little")
    for at in [*range(8), *rng.integers(8, header, 40), *rng.integers(header, len(data), 20)]:
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            Checkpoint(Directory(str(tmp_path)), 1).verify()
            assert at < header, "a changed weight is always found"
        except CheckpointError as e:
            found += path.name in str(e)
    assert found > 55


def test_a_save_that_dies_midway_leaves_the_earlier_checkpoint_and_can_be_repeated(solo, tmp_path, monkeypatch):
    url, directory, inner, calls = str(tmp_path), Directory(str(tmp_path)), Directory.write_tensors, iter([True, False])
    save(solo, url, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Directory, "write_tensors", lambda *args: inner(*args) if next(calls) else full())
        with pytest.raises(OSError, match="No space"):
            save(solo, url, 2)
    broken = tmp_path / "step-000002"
    assert (directory.steps(), len(list(broken.iterdir()))) == ([1], 1)
    solo.load(url, 1)
    with pytest.raises(CheckpointError, match="step-000002"):
        Checkpoint(directory, 2)
    (broken / "note.txt").touch()
    save(solo, url, 2)
    assert (directory.steps(), (broken / "note.txt").exists()) == ([1, 2], True), "what is not ours stays"
    Checkpoint(directory, 2).verify()


def test_a_save_that_dies_while_it_writes_the_manifest_is_not_listed(solo, tmp_path):
    directory, part = Directory(str(tmp_path)), tmp_path / "step-000002" / "manifest.json.part"
    save(solo, str(tmp_path), 1)
    directory.clear(2)
    part.write_text('{"format": 1, "st')
    assert directory.steps() == [1]
    save(solo, str(tmp_path), 2)
    assert (directory.steps(), part.exists()) == ([1, 2], False)
    directory.clear(3)
    tensors = solo.save(str(tmp_path), 3)
    (tmp_path / "step-000003" / "manifest.json.part").mkdir()
    with pytest.raises(SaveError, match=r"manifest\.json.*step 2 is untouched"):
        directory.commit(3, {"step": 3, "tensors": tensors}, solo.rank.statistics())
    assert directory.steps() == [1, 2]


def test_pruning_keeps_the_newest_and_whatever_is_not_finished(tmp_path):
    directory, nothing = Directory(str(tmp_path)), RoutingStatistics(np.zeros((LAYERS, EXPERTS), np.int64))
    for step in (2, 10, 9, 1_000_000):
        directory.clear(step)
        directory.commit(step, {"step": step, "tensors": {}}, nothing)
    [directory.clear(broken) for broken in (5, 2_000_000)]
    assert (directory.prune(0), directory.steps()) == ([], [2, 9, 10, 1_000_000])
    assert (directory.prune(2), directory.prune(3), directory.steps()) == ([2, 9], [], [10, 1_000_000])
    assert {int(p.name[5:]) for p in tmp_path.iterdir()} == {5, 10, 1_000_000, 2_000_000}


@pytest.mark.parametrize("change", ["hidden_size: 48", "num_experts: 12", "num_hidden_layers: 3", "num_experts: 6"])
def test_a_checkpoint_of_another_model_is_refused(solo, tmp_path, change):
    save(solo, str(tmp_path), 1)
    cfg, config = configure(f"model.overrides={{{change}}}")
    other = make_rank(cfg, config, SoloGroup(), contiguous(config.num_hidden_layers, config.num_experts, 1))
    with pytest.raises(CheckpointError, match="another model"):
        other.load(str(tmp_path), 1)


@pytest.mark.parametrize("written", ["sgd"], indirect=True)
def test_a_checkpoint_of_another_optimizer_is_refused(written):
    with pytest.raises(CheckpointError, match="optim"):
        run(written.url, ALONE, range(4, 6), load=4)
