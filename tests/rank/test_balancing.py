"""Which losses balance the router: those that the model was trained with, unless the configuration says otherwise."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_ep.moe import find_experts
from ray_ep.placement import random
from ray_ep.rank.balancing import balancing
from ray_ep.rank.data.corpus import global_batch
from ray_ep.rank.model import model_config
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.trainer import Trainer
from tests import models
from tests.conftest import run_ranks
from tests.rank.test_training import CORPUS, MAKING, VOCAB, load_config

PLAIN_SGD = ["batch.sequences=4", "batch.length=16", "optim.kind=sgd", "optim.beta1=0", "optim.clip_norm=0",
             "optim.learning_rate=1", "optim.weight_decay=0", "optim.warmup_steps=0", "router.bias_rate=0",
             "optim.schedule=constant_with_warmup"]  # fmt: skip
SIGMOID = {"num_local_experts": 8, "num_experts_per_tok": 3}  # with a bias that its loss in transformers ignores
FAMILIES = {**models.MODELS, "minimax_m2": SIGMOID}


def of(*overrides):
    cfg = load_config(None, overrides)
    return balancing(cfg, model_config(cfg.model, VOCAB))


def saved(path, name, **fields):
    """A config.json as on a hub, with `fields` in it."""
    models.AutoConfig.for_model(name, **{**models.BASE, **FAMILIES[name]}).save_pretrained(path)
    file = path / "config.json"
    tree = json.loads(file.read_text())
    tree.pop("router_aux_loss_coef", None)
    file.write_text(json.dumps(tree | fields))
    return f"model.path={path}"


def test_without_a_path_it_is_a_loss_a_layer_of_0_05():
    for model in ([], ["model.type=deepseek_v3"], ["model.type=mixtral"]):
        found = of(*model)
        assert (found.form, found.coefficient, found.z) == ("layer", 0.05, 0.0)
        assert found.words == "balancing: auxiliary loss a layer x 0.05 (the default without model.path)"


def test_with_a_path_it_is_that_of_the_config_and_the_words_say_so(tmp_path):
    path = saved(tmp_path, "qwen3_moe", router_aux_loss_coef=0.002)
    found = of(path)
    assert (found.form, found.coefficient) == ("transformers", 0.002)
    assert found.words == f"balancing: pooled auxiliary loss x 0.002 (router_aux_loss_coef of {tmp_path}/config.json)"
    assert "default of Qwen3MoeConfig" in of(saved(tmp_path, "qwen3_moe")).words
    assert of(saved(tmp_path, "qwen3_moe", router_z_loss_coef=0.01)).z == 0.01


@pytest.mark.parametrize(
    ("name", "fields", "want", "word"),
    [
        ("deepseek_v3", {"aux_loss_alpha": 0.001, "seq_aux": True}, ("off", 0.0), "correction bias"),
        ("nemotron_h", {}, ("off", 0.0), "correction bias"),
        ("mixtral", {"router_aux_loss_coef": 0.0}, ("transformers", 0.0), "no auxiliary loss"),
        ("gpt_oss", {"router_aux_loss_coef": 0.9}, ("transformers", 0.9), "pooled"),
    ],
)
def test_each_family_has_its_own(tmp_path, name, fields, want, word):
    found = of(saved(tmp_path, name, **fields))
    assert (found.form, found.coefficient) == want
    assert word in found.words


def test_a_loss_that_counts_each_choice_once_is_divided_by_the_choices(tmp_path):
    models.AutoConfig.for_model("deepseek_v2", num_experts_per_tok=4, vocab_size=VOCAB).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"aux_loss_alpha": 0.002}))
    found = of(f"model.path={tmp_path}")
    assert (found.form, found.coefficient) == ("layer", 0.0005)
    assert "aux_loss_alpha" in found.words


def test_what_the_configuration_says_wins(tmp_path):
    path = saved(tmp_path, "mixtral", router_aux_loss_coef=0.002)
    assert of(path, "router.aux_loss=off").form == "off"
    found = of(path, "router.aux_coefficient=0.3", "router.z_coefficient=1e-3")
    assert (found.form, found.coefficient, found.z) == ("transformers", 0.3, 0.001)
    assert "(router.aux_coefficient); z-loss x 0.001 (router.z_coefficient)" in found.words
    found = of(path, "router.aux_loss=layer", "router.aux_coefficient=0.05")
    assert (found.form, found.coefficient) == ("layer", 0.05)
    biased = saved(tmp_path, "deepseek_v3")
    assert of(biased, "router.aux_loss=layer").coefficient == 0.05
    assert (of(biased, "router.aux_coefficient=0.1").form, of(biased, "router.aux_coefficient=0").form) == (
        "layer",
        "off",
    )
    named = of("model.type=mixtral", "model.overrides={router_aux_loss_coef: 0.01}")
    assert (named.form, named.coefficient) == ("transformers", 0.01)
    assert "of model.overrides" in named.words


def test_the_keys_take_numbers_and_null(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("router: {aux_coefficient: null, z_coefficient: 1}\n")
    assert (load_config(file).router.aux_coefficient, load_config(file).router.z_coefficient) == (None, 1.0)
    for value in ("much", "-1", "[1]", "true"):
        with pytest.raises(models.ray_ep.errors.ConfigError, match=r"router\.aux_coefficient"):
            load_config(None, [f"router.aux_coefficient={value}"])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "minimax_m2"])
def test_gradients_of_a_step_are_those_of_transformers_with_its_own_loss(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(models, "MODELS", FAMILIES)
    models.build(name, router_aux_loss_coef=0.3).save_pretrained(tmp_path)
    cfg = load_config(None, [f"model.path={tmp_path}", *PLAIN_SGD])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    ids = torch.from_numpy(global_batch(CORPUS.train, 0, 0, 4, 16))
    labels = {"labels": ids[:, :-1], "shift_labels": ids[:, 1:].contiguous()}
    out = plain(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False, **labels)
    out.loss.backward()
    want = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in plain.named_parameters()}
    layers, experts = len(find_experts(plain)), next(iter(find_experts(plain).values())).num_experts

    def work(group):
        with MAKING:
            placement = random(layers, experts, size, seed=1)
            rank = Trainer(ModelRank(cfg, model_config(cfg.model, VOCAB), group, placement), CORPUS)
        before = {n: p.detach().clone() for n, p in rank.model.named_parameters()}
        result = rank.train_step(0)
        assert result.aux_loss == pytest.approx(float(out.aux_loss.detach()), rel=1e-5)
        layer_of = dict(zip(rank.ep.names, rank.ep.layers, strict=True))
        for n, p in rank.model.named_parameters():
            layer = layer_of.get(n.rpartition(".")[0])
            gradient = want[n][layer.experts] if layer else want[n]
            assert (before[n] - p.detach() - gradient).abs().max() < 1e-5, n

    run_ranks(size, work)
