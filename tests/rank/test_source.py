"""Checkpoints are read as transformers reads them: the files that count, dequantised, nothing dropped unsaid."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ray_ep.collective import SoloGroup
from ray_ep.config import load_config
from ray_ep.errors import CheckpointError, ModelError
from ray_ep.moe import find_experts
from ray_ep.placement import contiguous, random
from ray_ep.rank.model import build, meta_model, model_config
from ray_ep.rank.pretrained import load as pretrained
from ray_ep.rank.pretrained.quantised import declared
from ray_ep.rank.pretrained.source import Stored, WeightSource
from tests.models import VOCAB
from tests.rank.quantise import FP8, fp8, mxfp4, tiny, write
from tests.rank.test_model import Rank, experts_by_name


def look(path, *overrides):
    """What is told of a checkpoint before a run."""
    cfg = load_config(None, [f"model.path={path}", *overrides]).model
    return dict(pretrained.inspect(path, meta_model(model_config(cfg, VOCAB), cfg.dtype)))


def loaded(path, *overrides, ranks=1):
    """{name: weight} of a build on so many ranks, experts under (layer, parameter, number)."""
    cfg = load_config(None, [f"model.path={path}", *overrides]).model
    config = model_config(cfg, VOCAB)
    modules = find_experts(meta_model(config))
    experts = next(iter(modules.values())).num_experts
    placement = random(len(modules), experts, ranks, seed=1) if ranks > 1 else contiguous(len(modules), experts, 1)
    out = {}
    for r in range(ranks):
        model = build(cfg, config, 0, Rank(r, ranks) if ranks > 1 else SoloGroup(), placement)
        stacks = model.ray_ep.expert_parameter_names()
        out |= {n: p for n, p in model.state_dict().items() if n not in stacks} | experts_by_name(model)
    return out


def transformers_reads(path, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    stacks = {f"{n}.{p}": m for n, m in find_experts(model).items() for p, _ in m.named_parameters(recurse=False)}
    out = {n: t for n, t in model.state_dict().items() if n not in stacks}
    for name in stacks:
        module, _, p = name.rpartition(".")
        out |= {(module, p, e): t for e, t in enumerate(model.get_parameter(name))}
    return out


def same(got, want):
    assert got.keys() == want.keys()
    assert [k for k in want if got[k].dtype != want[k].dtype or not torch.equal(got[k], want[k])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_block_scaled_float8_is_dequantised_as_it_was_meant(tmp_path, ranks, dtype):
    """24 rows in blocks of 16: the last block is cut off, as DeepSeek-V3's 576 rows are by 128."""
    tensors = tiny(tmp_path / "q")
    assert any(t.shape[0] % 16 for k, t in tensors.items() if "_proj" in k)
    shutil.copytree(tmp_path / "q", tmp_path / "plain")
    quantised, meant = fp8(tensors)
    write(tmp_path / "q", quantised, quantization_config=FP8)
    write(tmp_path / "plain", meant)
    notes = look(tmp_path / "q")
    assert notes.keys() == {"dequantised"}
    assert "fp8" in notes["dequantised"]
    want = transformers_reads(tmp_path / "plain", getattr(torch, dtype))
    same(loaded(tmp_path / "q", f"model.dtype={dtype}", ranks=ranks), want)


@pytest.mark.parametrize("scales", ["float32", "float8_e8m0fnu", "one", "uint8"])
def test_scales_of_any_kind_give_what_transformers_own_dequantisation_gives(tmp_path, scales):
    quantised, _ = fp8(tiny(tmp_path))
    for k in [k for k in quantised if k.endswith("_scale_inv")]:
        if scales == "one":
            quantised[k] = quantised[k].amax().reshape(1, 1)
        elif scales == "uint8":
            quantised[k] = (quantised[k].log2().round() + 127).to(torch.uint8)
        else:
            quantised[k] = quantised[k].to(getattr(torch, scales))
    write(tmp_path, quantised, quantization_config=FP8)
    source, theirs = WeightSource(tmp_path), Fp8Dequantize(None)
    even = 0
    for key in source.quantised:
        scale = quantised[f"{key}_scale_inv"]
        if any(n % b for n, b in zip(quantised[key].shape, scale.shape, strict=True)) or 24 in quantised[key].shape:
            continue  # transformers cannot, or takes 2 x 12 rows for 16 + 8
        even += 1
        want = theirs._dequantize_one(quantised[key], scale, torch.float32)
        assert torch.equal(source.tensors[key][...], want), key
    assert even > 10


def test_packed_4_bit_floats_and_names_of_other_families_scales(tmp_path):
    tensors = tiny(tmp_path)
    quantised, _ = fp8(tensors, suffix=".scale")
    key = next(k for k in tensors if "experts.3.up_proj" in k)
    packed = torch.randint(-128, 128, (16, 16), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scales = torch.rand(16, 1).to(torch.float8_e8m0fnu)
    quantised |= {key: packed, key.replace("weight", "scale"): scales}
    write(tmp_path, quantised, quantization_config=FP8 | {"weight_block_size": [128, 128]})
    want = Fp8Dequantize(None)._dequantize_one(packed, scales, torch.float32)
    assert torch.equal(WeightSource(tmp_path).tensors[key][...], want)
    assert look(tmp_path).keys() == {"dequantised"}


def test_stacked_experts_in_float8_are_dequantised_row_by_row(tmp_path):
    model_tensors = tiny(tmp_path, "gpt_oss")
    quantised, meant = fp8(model_tensors, stacked=True)
    write(tmp_path, quantised, quantization_config=FP8)
    got = loaded(tmp_path, ranks=2)
    write(tmp_path, meant, quantization_config=None)
    same(got, transformers_reads(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2])
def test_mxfp4_experts_are_those_that_transformers_unpacks(tmp_path, ranks):
    packed = mxfp4(tiny(tmp_path, "gpt_oss"))
    write(tmp_path, packed, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.norm"]})
    assert look(tmp_path).keys() == {"dequantised"}
    got = loaded(tmp_path, ranks=ranks)
    meant = {k: t for k, t in packed.items() if not k.endswith(("_blocks", "_scales"))}
    for k in [k for k in packed if k.endswith("_blocks")]:
        scales = packed[k.replace("_blocks", "_scales")]
        meant[k.removesuffix("_blocks")] = convert_moe_packed_tensors(packed[k], scales, dtype=torch.float32)
    write(tmp_path, meant, quantization_config=None)
    same(got, transformers_reads(tmp_path))


def test_a_rank_reads_its_own_experts_only_and_the_check_none_at_all(tmp_path, monkeypatch):
    write(tmp_path, fp8(tiny(tmp_path))[0], quantization_config=FP8)
    read, inner = [], Stored.__getitem__
    monkeypatch.setattr(Stored, "__getitem__", lambda self, index: read.append(self.key) or inner(self, index))
    look(tmp_path)
    assert read == []
    cfg = load_config(None, [f"model.path={tmp_path}"]).model
    config = model_config(cfg, VOCAB)
    placement = contiguous(len(find_experts(meta_model(config))), 8, 2)
    build(cfg, config, 0, Rank(0, 2), placement)
    mine = {int(k.split("experts.")[1].split(".")[0]) for k in read if ".experts." in k}
    assert mine == {0, 1, 2, 3}


def test_the_config_that_is_built_and_exported_promises_no_quantisation(tmp_path):
    write(tmp_path, fp8(tiny(tmp_path))[0], quantization_config=FP8, auto_map={"AutoConfig": "x.Y"})
    saved = model_config(load_config(None, [f"model.path={tmp_path}"]).model, VOCAB).to_dict()
    assert not saved.keys() & {"quantization_config", "auto_map"}


def test_files_beside_the_weights_do_not_count(tmp_path):
    tensors = tiny(tmp_path)
    stray = {k: torch.full_like(t, 7.0) for k, t in tensors.items()}
    for name in ("z_old.safetensors", "model.fp16.safetensors", "model-00001-of-00001.safetensors"):
        save_file(stray, tmp_path / name)
    assert look(tmp_path) == {}
    same(loaded(tmp_path), transformers_reads(tmp_path))
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "z_old.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same(loaded(tmp_path), transformers_reads(tmp_path))  # model.safetensors comes before an index
    (tmp_path / "model.safetensors").unlink()
    same(loaded(tmp_path), transformers_reads(tmp_path))


def test_a_file_named_in_the_config_counts_alone(tmp_path):
    tensors = tiny(tmp_path)
    save_file({k: t + 1 for k, t in tensors.items()}, tmp_path / "mine.safetensors", metadata={"format": "pt"})
    write(tmp_path, tensors, transformers_weights="mine.safetensors")
    got = loaded(tmp_path)
    assert torch.equal(got["model.norm.weight"], tensors["model.norm.weight"] + 1)


def test_what_a_family_carries_beside_is_named_as_such_and_the_rest_too(tmp_path):
    tensors = tiny(tmp_path)
    extra = {k.replace("layers.2.", "layers.3."): t for k, t in tensors.items() if "layers.2." in k}
    extra |= {"model.layers.3.eh_proj.weight": torch.ones(4, 4), "visual.blocks.0.weight": torch.ones(2)}
    extra |= {"visual.layers.9.ls1.scale": torch.ones(2)}
    extra |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)}
    extra |= {"model.layers.1.self_attn.q_a_proj.bias": torch.ones(16)}
    write(tmp_path, tensors | extra, num_nextn_predict_layers=1)
    text = look(tmp_path)["checkpoint-leftovers"]
    mtp = sum(k.startswith("model.layers.3.") for k in extra)
    assert f"multi-token prediction (MTP), layers from 3 on: {mtp} (" in text
    assert "a vision tower: 2 (visual.blocks.0.weight, visual.layers.9.ls1.scale)" in text
    assert "rotary buffers: 3 (" in text
    assert "unknown: 1 (model.layers.1.self_attn.q_a_proj.bias)" in text
    same(loaded(tmp_path), transformers_reads(tmp_path))
    cut = look(tmp_path, "model.overrides={num_hidden_layers: 2, num_nextn_predict_layers: 0}")["checkpoint-leftovers"]
    assert "layers from 2 on: " in cut


def test_overrides_change_the_config_of_a_checkpoint_and_the_default_ones_do_not(tmp_path):
    tiny(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    plain = model_config(load_config(None, [f"model.path={tmp_path}"]).model, VOCAB)
    assert (plain.hidden_size, plain.num_hidden_layers) == (own["hidden_size"], own["num_hidden_layers"])
    cfg = load_config(None, [f"model.path={tmp_path}", "model.overrides.num_experts_per_tok=3"]).model
    assert model_config(cfg, VOCAB).num_experts_per_tok == 3
    with pytest.raises(ModelError, match=r"model\.overrides\.num_expert_per_tok: .*did you mean 'num_experts_per_tok'"):
        look(tmp_path, "model.overrides.num_expert_per_tok=3")
    with pytest.raises(ModelError, match=r"rope_theta: .*; give it inside rope_parameters"):
        look(tmp_path, "model.overrides.rope_theta=5.0")
    for name in ("n_routed_experts", "num_local_experts"):  # an alias in the class
        with pytest.raises(CheckpointError, match="holds 8 experts, its config says 4"):
            look(tmp_path, f"model.overrides.{name}=4")
    with pytest.raises(CheckpointError, match="holds 8 experts, its config says 4"):
        look(tmp_path, "model.overrides.n_routed_experts=4")


def test_a_configuration_once_written_down_with_the_defaults_beside_a_path_means_the_checkpoint(tmp_path):
    from ray_ep.config.schema import ModelConfig

    (tmp_path / "run.yaml").write_text(
        json.dumps({"model": {"path": "x", "type": ModelConfig().type, "overrides": ModelConfig().overrides}})
    )
    cfg = load_config(tmp_path / "run.yaml").model
    assert (cfg.type, dict(cfg.overrides)) == ("", {})


def test_kimi_k2_and_any_type_that_the_user_names_are_read_as_that_one(tmp_path):
    tiny(tmp_path)
    want = transformers_reads(tmp_path)
    auto = {"AutoConfig": "configuration_deepseek.X", "AutoModelForCausalLM": "modeling_deepseek.Y"}
    write(tmp_path, load_file(tmp_path / "model.safetensors"), model_type="kimi_k2", auto_map=auto)
    (tmp_path / "configuration_deepseek.py").write_text("raise SystemExit('never run')")
    same(loaded(tmp_path), want)
    write(tmp_path, load_file(tmp_path / "model.safetensors"), model_type="nobody_knows")
    with pytest.raises(ModelError, match=r"model_type='nobody_knows'.*never run; .*give model\.type=deepseek_v3"):
        look(tmp_path)
    same(loaded(tmp_path, "model.type=deepseek_v3"), want)


def test_a_quantisation_is_found_in_the_config_of_the_text_model_too(tmp_path):
    assert declared({"text_config": {"quantization_config": {"quant_method": "gptq"}}})["quant_method"] == "gptq"
    assert declared({"quantization_config": {"load_in_8bit": True}})["quant_method"] == "bitsandbytes"
    assert declared({"quantization_config": None}) == {}
