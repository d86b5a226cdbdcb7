"""Whatever transformers keeps in float32 is float32 here: built, loaded, updated, saved, read again, exported."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ray_ep.collective import SoloGroup
from ray_ep.config import load_config
from ray_ep.moe import find_experts, update_bias
from ray_ep.placement import RoutingStatistics, contiguous
from ray_ep.rank.model import build, meta_model, model_config
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.saved.checkpoint import Checkpoint, Directory
from ray_ep.rank.saved.export import export_checkpoint
from ray_ep.rank.trainer import Trainer
from tests.models import BASE, DEEPSEEK, VOCAB
from tests.rank.quantise import tiny, write
from tests.rank.test_training import CORPUS

WIDE = {  # what of a class must be float32 beside bfloat16
    "deepseek_v3": (DEEPSEEK, {"e_score_correction_bias"}),
    "ernie4_5_moe": ({"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16},
                     {"e_score_correction_bias", "gate.weight"}),
    "deepseek_v4": ({"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2},
                    {"sinks", "input_layernorm.weight", "ffn_hc.base"}),
}  # fmt: skip


def dtypes(model):
    return {n: t.dtype for n, t in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("name", WIDE)
def test_every_tensor_has_the_dtype_that_transformers_gives_it_in_bfloat16(name, tmp_path):
    sizes, wide = WIDE[name]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**BASE, **sizes})).save_pretrained(tmp_path)
    want = dtypes(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    for end in wide:
        assert {d for n, d in want.items() if n.endswith(end)} == {torch.float32}, end
    for path in (f"model.path={tmp_path}", f"model.type={name}"):
        cfg = load_config(None, [path, "model.dtype=bfloat16"]).model
        config = model_config(load_config(None, [f"model.path={tmp_path}"]).model, VOCAB)
        modules = find_experts(meta_model(config))
        placement = contiguous(len(modules), 8, 1)
        assert dtypes(build(cfg, copy.deepcopy(config), 0, SoloGroup(), placement)) == want


def trained(path, *overrides, steps=2):
    run = ["batch.sequences=2", "batch.length=16", "model.dtype=bfloat16", "seed=0"]
    cfg = load_config(None, [f"model.path={path}", *run, *overrides])
    config = model_config(cfg.model, VOCAB)
    layers = len(find_experts(meta_model(config)))
    rank = Trainer(ModelRank(cfg, copy.deepcopy(config), SoloGroup(), contiguous(layers, 8, 1)), CORPUS)
    for step in range(steps):
        rank.train_step(step)
    return cfg, config, rank


def test_a_correction_bias_survives_training_saving_and_exporting_beside_bfloat16(tmp_path):
    tensors = tiny(tmp_path / "a")
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = 5 + 0.001 * torch.arange(8)
    write(tmp_path / "a", tensors | {key: bias})
    _, config, rank = trained(tmp_path / "a", "router.bias_rate=0", "optim.learning_rate=0", "optim.warmup_steps=0")
    assert torch.equal(rank.model.state_dict()[key], bias)
    directory = Directory(str(tmp_path / "saved"))
    directory.clear(2)
    manifest = {"step": 2, "tensors": rank.save(directory.url, 2), "model": config.to_dict()}
    manifest["config"] = {"model": {"dtype": "bfloat16"}}
    directory.commit(2, manifest, RoutingStatistics(torch.zeros(2, 8).numpy()))
    rank.model.state_dict()[key].zero_()
    rank.load(directory.url, 2)
    assert torch.equal(rank.model.state_dict()[key], bias)
    export_checkpoint(Checkpoint(directory, 2), tmp_path / "out")
    out = {k: t for f in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(f).items()}
    assert torch.equal(out[key], bias)
    assert {t.dtype for k, t in out.items() if k.endswith("correction_bias")} == {torch.float32}
    assert {t.dtype for k, t in out.items() if not k.endswith("correction_bias")} == {torch.bfloat16}
    assert out.keys() == tensors.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(again.state_dict()[key], bias)


def test_a_thousand_small_updates_of_a_bias_are_all_made(tmp_path):
    tiny(tmp_path)
    _, _, rank = trained(tmp_path, steps=0)
    load = torch.tensor([[0.0, 2.0] * 4] * 2)  # below and above the mean
    for _ in range(1000):
        update_bias(rank.ep.routing.routers, load, 0.001)
    for router in rank.ep.routing.routers:
        start = load_file(tmp_path / "model.safetensors")
        moved = router.e_score_correction_bias - next(
            t for k, t in start.items() if k.startswith(_name(rank.model, router)) and k.endswith("correction_bias")
        )
        assert (moved - torch.tensor([1.0, -1.0] * 4)).abs().max() < 1e-4


def _name(model, module):
    return next(n for n, m in model.named_modules() if m is module)


def test_an_exported_config_does_not_promise_layers_that_the_export_lacks(tmp_path):
    tensors = tiny(tmp_path / "a")
    extra = {k.replace("layers.2.", "layers.3."): t for k, t in tensors.items() if "layers.2." in k}
    write(tmp_path / "a", tensors | extra, num_nextn_predict_layers=1)
    _, config, rank = trained(tmp_path / "a", steps=0)
    assert config.num_nextn_predict_layers == 1
    directory = Directory(str(tmp_path / "saved"))
    directory.clear(0)
    manifest = {"step": 0, "tensors": rank.save(directory.url, 0), "model": config.to_dict()}
    manifest["config"] = {"model": {"dtype": "float32"}}
    directory.commit(0, manifest, RoutingStatistics(torch.zeros(2, 8).numpy()))
    export_checkpoint(Checkpoint(directory, 0), tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").num_nextn_predict_layers == 0
