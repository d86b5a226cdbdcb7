import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_ep.collective import SoloGroup
from ray_ep.config import load_config
from ray_ep.errors import BadInput, CheckpointError
from ray_ep.moe import find_experts, parallelize
from ray_ep.placement import RoutingStatistics, random
from ray_ep.rank.saved import export
from ray_ep.rank.saved.checkpoint import Checkpoint, save_rank
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.saved.export import export_checkpoint
from ray_ep.rank.step.optimizer import MasterOptimizer
from tests.models import MODELS, VOCAB, grouped
from tests.models import build as plain


def saved(name, path, ranks_of=2):
    """A checkpoint of a plain model, written by as many ranks; and the model."""
    directory = Directory(str(path))
    directory.clear(3)
    tensors = {}
    for rank in range(ranks_of):
        model, group = plain(name), SoloGroup()
        experts = next(iter(find_experts(model).values())).num_experts
        group.rank, group.size = rank, ranks_of
        parallelize(model, group, random(2, experts, ranks_of, experts // 2 + 2, seed=1))
        tensors |= save_rank(directory, 3, model, MasterOptimizer(model, load_config().optim, group))
    config = plain(name).config
    manifest = {"step": 3, "tensors": tensors, "model": config.to_dict(), "config": {"model": {"dtype": "float32"}}}
    directory.commit(3, manifest, RoutingStatistics(torch.zeros(2, experts).numpy()))
    return Checkpoint(directory, 3), plain(name)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_checkpoint_loads_into_plain_transformers_with_the_same_logits(name, tmp_path):
    checkpoint, model = saved(name, tmp_path / "ours")
    written = export_checkpoint(checkpoint, tmp_path / "plain")
    assert written["shards"] == 3, "the dense part and one shard for each of two MoE layers"
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", attn_implementation="eager", **grouped(name)
    ).eval()
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_export_into_files_or_from_too_few_experts_is_refused(tmp_path):
    checkpoint, _ = saved("mixtral", tmp_path / "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(BadInput, match="full already exists"):
        export_checkpoint(checkpoint, tmp_path / "full")
    lost = next(k for k in checkpoint.tensors if k.endswith("/5"))
    del checkpoint.tensors[lost]
    with pytest.raises(CheckpointError, match="first that differs is") as e:
        export_checkpoint(checkpoint, tmp_path / "out")
    assert lost in str(e.value)
    assert not (tmp_path / "out").exists()


def test_an_export_holds_one_layer_at_a_time(tmp_path, monkeypatch):
    handed, inner = [], export._Writer.write

    def write(self, weights, buffers=None):
        handed.append(sorted(n for n in weights if ".experts." in n))
        return inner(self, weights, buffers)

    monkeypatch.setattr(export._Writer, "write", write)
    checkpoint, model = saved("mixtral", tmp_path / "ours")
    export.export_checkpoint(checkpoint, tmp_path / "plain")
    layers = [[f"{n}.{p}" for p, _ in m.named_parameters(recurse=False)] for n, m in find_experts(model).items()]
    assert handed == [[], *map(sorted, layers)]
