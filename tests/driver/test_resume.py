"""Before a cluster is touched, everything that can be seen in the files of a checkpoint is checked."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file

import ray_ep
from ray_ep.cli import main
from ray_ep.collective import SoloGroup
from ray_ep.driver.run.rundir import find_checkpoint
from ray_ep.driver.start import check_run
from ray_ep.errors import CheckpointError
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.trainer import Trainer

NOW = datetime(2026, 7, 1, 12, 30, 5)
TINY = [
    "model.overrides={hidden_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2, num_experts: 8}",
    "data.files=[text.txt]", "batch.sequences=2", "batch.length=32", "cluster.ranks=1", "topology.measure=false",
]  # fmt: skip
RUN = "my run"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory with checkpoints of steps 1 and 2, as a run leaves it."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        Path("text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 200)
        cfg = ray_ep.load_config(None, [*TINY, f"run_dir={RUN}"])
        plan = check_run(cfg, NOW)
        plan.run.create(cfg)
        rank = Trainer(ModelRank(cfg, plan.config, SoloGroup(), plan.placement), plan.corpus)
        directory = Directory(f"{RUN}/checkpoints")
        for step in (1, 2):
            rank.train_step(step - 1)
            with directory.saving(step):
                manifest = {"format": 1, "step": step, "serial": step, "tensors": rank.save(directory.url, step)}
                manifest |= {"signature": plan.signature, "model": plan.config.to_dict()}
                manifest |= {"config": OmegaConf.to_container(cfg), "data": plan.corpus.source}
                directory.commit(step, manifest, rank.rank.statistics())
    return place


@pytest.fixture
def newest(made, tmp_path, monkeypatch):
    """The newest checkpoint, of a copy of that run."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path(RUN, "checkpoints", "step-000002")


def tree(path):
    return {p: p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def rewrite(path, change):
    """Other tensors under a sound header of the same size."""
    with safe_open(path, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    save_file(change(tensors), path)


def first_expert(tensors):
    return next(k for k in sorted(tensors) if k.startswith("weight/") and k.endswith("/3"))


def unsized(path):
    """As checkpoints of before sizes were kept."""
    edit(path, lambda m: (m.pop("files"), m.pop("statistics")))


DENSE, EXPERTS = "dense-0000.safetensors", "experts-L001-r000.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DAMAGE = {
    "a byte": (lambda p: flip(p / EXPERTS, -9), [EXPERTS, "checksum"]),
    "a byte of dense weights": (lambda p: flip(p / DENSE, -9), [DENSE, "checksum"]),
    "a header": (lambda p: flip(p / EXPERTS, 12), [EXPERTS, "damaged"]),
    "a file cut short": (lambda p: (p / EXPERTS).write_bytes((p / EXPERTS).read_bytes()[:-1]), [EXPERTS, "bytes"]),
    "a file cut short, sizes unknown": (
        lambda p: (unsized(p), (p / EXPERTS).write_bytes((p / EXPERTS).read_bytes()[:-1])), [EXPERTS, "bytes"],
    ),
    "a file lost": (lambda p: (p / EXPERTS).unlink(), [EXPERTS, "missing"]),
    "a file lost, sizes unknown": (lambda p: (unsized(p), (p / EXPERTS).unlink()), [EXPERTS, "missing"]),
    "an empty file": (lambda p: (unsized(p), (p / DENSE).write_bytes(b"")), [DENSE, "not a safetensors file"]),
    "a pointer": (lambda p: (p / EXPERTS).write_text(POINTER), [EXPERTS, "git-lfs", "git lfs pull"]),
    "a pointer, sizes unknown": (lambda p: (unsized(p), (p / EXPERTS).write_text(POINTER)), [EXPERTS, "git lfs pull"]),
    "statistics": (lambda p: flip(p / "statistics.npz", (p / "statistics.npz").stat().st_size // 2), ["statistics"]),
    "statistics lost": (lambda p: (unsized(p), (p / "statistics.npz").unlink()), ["statistics.npz"]),
    "a manifest cut short": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text()[:500]), ["unreadable manifest"],
    ),
    "a manifest without an expert": (
        lambda p: edit(p, lambda m: m["tensors"].pop(first_expert(m["tensors"]))), ["/3"],
    ),
    "a manifest without a weight": (
        lambda p: edit(p, lambda m: m["tensors"].pop("weight/model.norm.weight")), ["lacks", "model.norm.weight"],
    ),
    "files of another checkpoint": (
        lambda p: (unsized(p), shutil.copy(p / DENSE, p / EXPERTS)), [EXPERTS, "not in the manifest"],
    ),
    "a tensor of another shape": (
        lambda p: (unsized(p), rewrite(p / EXPERTS, lambda t: {k: x.flatten() for k, x in t.items()})),
        [EXPERTS, "has shape"],
    ),
    "a manifest of a later version": (lambda p: edit(p, lambda m: m.update(format=2)), ["format 2"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_refused_with_the_command_that_takes_the_one_before(newest, damage, says):
    damage(newest)
    before = tree(".")
    run = Path(RUN).absolute()
    advice = f"step 1 is whole: ray-ep train 'run_dir={run}' resume='{run}/checkpoints/step-000001'"
    with pytest.raises(CheckpointError) as e:
        check_run(ray_ep.load_config(None, [*TINY, f"run_dir={RUN}", "resume=auto"]), NOW)
    assert [w for w in ["step-000002", *says, advice] if w not in str(e.value)] == [], str(e.value)
    assert len(str(e.value).splitlines()) == 1
    result = CliRunner().invoke(main, ["export", RUN, "out dir"])
    assert result.exit_code == 2, result.output
    assert f"step 1 is whole: ray-ep export '{RUN}/checkpoints/step-000001' 'out dir'" in result.stderr
    assert tree(".") == before
    assert not Path("out dir").exists()
    plan = check_run(ray_ep.load_config(None, [*TINY, f"run_dir={RUN}", f"resume={newest.parent}/step-000001"]), NOW)
    assert plan.checkpoint.step == 1


def test_a_damaged_checkpoint_is_refused_however_it_is_named(newest):
    flip(newest / EXPERTS, -9)
    for resume in ("auto", RUN, str(newest)):
        with pytest.raises(CheckpointError, match=rf"{EXPERTS}.*checksum differs.*step 1 is whole"):
            check_run(ray_ep.load_config(None, [*TINY, f"run_dir={RUN}", f"resume={resume}"]), NOW)


def test_if_none_is_whole_that_is_said(newest):
    flip(newest / EXPERTS, -9)
    (newest.parent / "step-000001" / DENSE).unlink()
    with pytest.raises(CheckpointError, match=r"checksum differs\); there is no other whole one beside it"):
        check_run(ray_ep.load_config(None, [*TINY, f"run_dir={RUN}", "resume=auto"]), NOW)


def test_a_save_cut_short_is_passed_over_and_named_when_it_is_asked_for(newest):
    (newest / "manifest.json").unlink()
    plan = check_run(ray_ep.load_config(None, [*TINY, f"run_dir={RUN}", "resume=auto"]), NOW)
    assert plan.checkpoint.step == 1
    plan.run.release()
    with pytest.raises(CheckpointError, match=r"step-000002: there is no complete checkpoint.*step 1 is whole"):
        check_run(ray_ep.load_config(None, [*TINY, f"run_dir={RUN}", f"resume={newest}"]), NOW)


def test_a_checkpoint_of_before_sizes_were_kept_is_checked_and_taken(newest):
    for path in newest.parent.iterdir():
        unsized(path)
        edit(path, lambda m: m.pop("serial"))
    assert check_run(ray_ep.load_config(None, [*TINY, f"run_dir={RUN}", "resume=auto"]), NOW).checkpoint.step == 2


@pytest.fixture
def snapshot(newest):
    """A snapshot on disk of step 3, beside the checkpoints of steps 1 and 2."""
    path = newest.parent / "snapshots" / "step-000003"
    shutil.copytree(newest, path)
    edit(path, lambda m: m.update(step=3))
    return path


def resumed():
    plan = check_run(ray_ep.load_config(None, [*TINY, f"run_dir={RUN}", "resume=auto"]), NOW)
    plan.run.release()
    return plan.checkpoint, [e.words for e in plan.notes if e.kind == "resume"]


def test_the_newer_of_checkpoint_and_snapshot_on_disk_is_gone_on_from(snapshot):
    found, said = resumed()
    assert (found.step, found.name, said) == (3, str(snapshot.absolute()), [])
    assert find_checkpoint(RUN).step == 2, "what is exported is a checkpoint"
    edit(snapshot, lambda m: m.update(step=2))
    snapshot = snapshot.rename(snapshot.with_name("step-000002"))
    assert resumed()[0].name == str((snapshot.parents[1] / "step-000002").absolute())
    shutil.rmtree(snapshot.parents[1] / "step-000002")
    shutil.rmtree(snapshot.parents[1] / "step-000001")
    assert resumed()[0].name == str(snapshot.absolute()), "there need not be a checkpoint"


def test_a_snapshot_that_was_cut_short_is_none(snapshot):
    (snapshot / "manifest.json").unlink()
    found, said = resumed()
    assert (found.step, said) == (2, [])


def test_a_damaged_snapshot_is_passed_over_and_that_is_told(snapshot):
    flip(snapshot / EXPERTS, -9)
    found, (said,) = resumed()
    assert found.step == 2
    assert "the snapshot of step 3 on disk is passed over" in said
    assert "checksum differs" in said


def test_checksums_of_a_large_checkpoint_are_left_to_the_ranks(newest):
    flip(newest / EXPERTS, -9)
    checkpoint = find_checkpoint(RUN)
    size = sum(p.stat().st_size for p in newest.glob("*.safetensors"))
    checkpoint.verify(size // 2)
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint.verify(size)


def test_a_checkpoint_is_found_by_run_directory_or_step(newest, tmp_path):
    for where in (RUN, f"{RUN}/", f"{RUN}/checkpoints", str(newest), f"{newest}/", str(tmp_path / newest)):
        assert find_checkpoint(where).step == 2
    assert find_checkpoint(RUN, 1).step == 1
    assert find_checkpoint(f"{RUN}/checkpoints/step-2").step == 2
    (newest.parent / "step-2").mkdir()
    for where, step, says in [
        (f"{RUN}/checkpoints/step-2", None, "such as step-000002"),
        (RUN, 3, r"no complete checkpoint of step 3.*those of steps 1, 2"),
        (str(newest), 1, "not the checkpoint of step 1"),
        ("nowhere", None, "no complete checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            find_checkpoint(where, step)


def test_a_resumed_rank_starts_where_the_checkpoint_was(newest):
    cfg = ray_ep.load_config(None, [*TINY, f"run_dir={RUN}", "resume=auto"])
    plan = check_run(cfg, NOW)
    rank = Trainer(ModelRank(cfg, plan.config, SoloGroup(), plan.placement), plan.corpus)
    rank.load(plan.checkpoint.directory.url, plan.checkpoint.step)
    weight = plan.checkpoint.read("weight/model.norm.weight")
    assert torch.equal(dict(rank.model.named_parameters())["model.norm.weight"].data, weight)
    assert np.array_equal(plan.checkpoint.statistics().load.sum(1), [2 * 2 * 32 * cfg_top_k(plan)] * 2)


def cfg_top_k(plan):
    return plan.config.num_experts_per_tok
