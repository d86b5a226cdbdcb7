import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_ep.collective import SoloGroup
from ray_ep.config import load_config
from ray_ep.errors import CheckpointError, ModelError
from ray_ep.moe import find_experts
from ray_ep.placement import contiguous, random
from ray_ep.rank.model import build, load_pretrained, meta_model, model_config
from tests.models import MODELS
from tests.models import build as plain


def tiny(*overrides):
    return load_config(None, ["model.overrides.num_hidden_layers=2", *overrides]).model


def experts_by_name(model):
    """(module, parameter, expert id) -> weights."""
    out = {}
    for layer, module in zip(model.ray_ep.layers, model.ray_ep.modules, strict=True):
        for n, p in module.named_parameters(recurse=False):
            out.update({(layer.name, n, e): p[i].detach() for i, e in enumerate(layer.experts)})
    return out


class Rank(SoloGroup):
    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size


@pytest.mark.parametrize("name", MODELS)
def test_drawn_weights_are_the_same_on_any_number_of_ranks_and_all_written(name):
    cfg = load_config(None, [f"model.type={name}"]).model
    config = plain(name).config
    whole = build(cfg, config, 5, SoloGroup(), contiguous(2, _experts(config), 1))
    dense = {n: p for n, p in whole.named_parameters() if n not in whole.ray_ep.expert_parameter_names()}
    seen = {}
    for rank in range(2):
        part = build(cfg, config, 5, Rank(rank, 2), random(2, _experts(config), 2, seed=3))
        for n, p in part.named_parameters():
            if n in dense:
                assert torch.equal(p, dense[n]), n
        seen.update(experts_by_name(part))
    want = experts_by_name(whole)
    assert seen.keys() == want.keys()
    assert all(torch.equal(seen[k], want[k]) for k in want)
    first, second = (want[k] for k in list(want)[:2])
    assert not torch.equal(first, second), "experts differ from one another"


@pytest.mark.parametrize("name", MODELS)
def test_partial_load_gives_every_rank_its_own_experts(name, tmp_path):
    model = plain(name)
    model.save_pretrained(tmp_path)
    ref = AutoModelForCausalLM.from_pretrained(tmp_path)
    stacks = {(n, pn): p.detach() for n, m in find_experts(ref).items() for pn, p in m.named_parameters(recurse=False)}
    cfg = load_config(None, [f"model.path={tmp_path}"]).model
    config = model_config(cfg, 60)
    for rank in range(2):
        part = build(cfg, config, 0, Rank(rank, 2), random(2, _experts(config), 2, seed=1))
        names = part.ray_ep.expert_parameter_names()
        want = dict(ref.named_parameters())
        for n, p in part.named_parameters():
            if n not in names:
                assert torch.equal(p, want[n]), n
        for (layer, pname, e), w in experts_by_name(part).items():
            assert torch.equal(w, stacks[layer, pname][e]), (layer, pname, e)
        for (n, b), (_, c) in zip(part.named_buffers(), ref.named_buffers(), strict=True):
            assert torch.equal(b, c), n


def _experts(config):
    return next(iter(find_experts(meta_model(config)).values())).num_experts


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.type=qwen3_mo"], "did you mean qwen3_moe"),
        (["model.overrides.num_expert=4"], "did you mean 'num_experts'"),
        (["model.type=llama", "model.overrides={hidden_size: 32, num_hidden_layers: 1}"], "has no experts"),
        (["model.overrides.vocab_size=100"], "smaller than the tokenizer's 256"),
        (["model.path=/nowhere"], "/nowhere"),
        (["model.overrides.hidden_act=nope"], "nope"),
        (["model.type=mixtral", "model.overrides={num_local_experts: 0}"], "experts of no size: .*gate_up_proj"),
        (["model.overrides.moe_intermediate_size=0"], "experts of no size"),
        (["model.overrides.num_experts_per_tok=99"], "num_experts_per_tok=99 of [0-9]+ experts: expected 1 to [0-9]+"),
        (["model.overrides.num_experts_per_tok=0"], "=0 of [0-9]+ experts: expected 1 to"),
        (["model.overrides.num_key_value_heads=3"], "num_key_value_heads=3 does not divide it"),
    ],
)
def test_bad_models_are_named(overrides, says):
    cfg = tiny(*overrides)
    with pytest.raises(ModelError, match=says):
        meta_model(model_config(cfg, 256))


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    plain("mixtral").save_pretrained(tmp_path / "a")
    other = meta_model(plain("qwen3_moe").config)
    rows = {n: [0] for n in find_experts(other)}
    with pytest.raises(CheckpointError, match="another model"):
        load_pretrained(other, tmp_path / "a", rows)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(CheckpointError, match="unreadable"):
        load_pretrained(other, tmp_path / "a", rows)
