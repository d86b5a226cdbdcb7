"""Frozen parameters: what is trained beside them follows one process, and they stay as they are in every path."""

from datetime import datetime
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_ep.collective import SoloGroup
from ray_ep.config import load_config
from ray_ep.driver.start import check_run
from ray_ep.errors import ModelError
from ray_ep.placement import contiguous, random
from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.saved.export import export_checkpoint
from ray_ep.rank.trained.frozen import freeze
from tests.conftest import run_ranks, slow
from tests.rank.test_migration import drawn, train
from tests.rank.test_training import EXPERTS, GPT_OSS, LAYERS, QWEN, Reference, assert_follows, configure, make_rank

STEPS = 4
KINDS = {
    "all experts": "*.experts.*",
    "one of two weights of experts": "*.experts.gate_up_proj",
    "all but experts": "lm_head.*, model.norm.*, model.embed_tokens.*, *.self_attn.*, *layernorm.*, *.gate.*",
    "the first layer and what is before it": "model.embed_tokens.*, model.layers.0.*",
}


def frozen_reference(patterns, model, *overrides):
    cfg, config = configure(*overrides, model=model)
    plain = Reference(cfg, config)
    freeze(plain.model, patterns.split(", "))
    return [plain.step(number) for number in range(STEPS)], plain


@pytest.mark.parametrize("way", ["fused", *slow("guests", "all_gather", "recomputed", "gpt_oss", "gpt_oss all_gather")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_beside_frozen_parameters_follows_one_process_over_migrations(kind, way):
    model = GPT_OSS if "gpt_oss" in way else QWEN
    patterns = KINDS[kind].replace("*.gate.*", "*.router.*") if model is GPT_OSS else KINDS[kind]
    exchange = "all_gather" if "all_gather" in way else "flat"
    overrides = (f"optim.freeze=[{patterns}]", f"exchange.kind={exchange}", "balance.in_step=off")
    if way == "guests":
        overrides = (*overrides[:2], "balance.in_step=always")
    if way == "recomputed":
        overrides = (*overrides, "model.gradient_checkpointing=true")

    def before(rank):
        rank.ep.exchange_by(kind=exchange)
        rank.ep.balancer.assume(1e-3, 1e12)

    wanted, plain = frozen_reference(patterns, model)
    placements = [drawn(2, seed, True) for seed in range(2)]
    ranks = train(placements, *overrides, model=model, steps=STEPS, before=before)
    assert_follows([r.results for r in ranks], wanted)
    start = dict(make_start(model).named_parameters())
    names = {n for n in start if any(fnmatchcase(n, p) for p in patterns.split(", "))}
    for r in ranks:
        assert {w.name for w in r.rank.optimizer.frozen} == names
        for w in r.rank.optimizer.frozen:
            experts = slice(None) if w.layer is None else r.rank.ep.layers[w.layer].experts
            assert torch.equal(w.param, start[w.name][experts]), w.name
    if way != "guests":  # plain transformers leaves them alone, too
        assert all(torch.equal(p, start[n]) for n, p in plain.model.named_parameters() if n in names)


def make_start(model):
    cfg, config = configure(model=model)
    return make_rank(cfg, config, SoloGroup(), contiguous(LAYERS, EXPERTS, 1)).model


def test_a_run_that_freezes_otherwise_goes_on_from_the_checkpoint_and_its_export_is_whole(tmp_path):
    url, out = str(tmp_path / "c"), tmp_path / "out"
    placement = random(LAYERS, EXPERTS, 2, 5, seed=3)

    def run(steps, overrides, load=None, save=None):
        cfg, config = configure(*overrides)

        def work(group):
            rank = make_rank(cfg, config, group, placement)
            if load:
                for t in rank.model.state_dict().values():
                    t.fill_(torch.nan)  # frozen weights are read as well
                rank.load(url, load)
            losses = [rank.train_step(step).loss for step in steps]
            part = rank.save(url, save) if save else {}
            return losses, part, rank.rank.statistics(), {w.name: w for w in rank.optimizer.weights}

        Directory(url).clear(save) if save else None
        done = run_ranks(2, work)
        if save:
            parts = {k: v for _, part, *_ in done for k, v in part.items()}
            model = {
                "model": config.to_dict(),
                "config": {"model": {"dtype": "float32"}, "data": {"tokenizer": "bytes"}},
            }
            Directory(url).commit(save, {"format": 1, "step": save, "tensors": parts, **model}, done[0][2])
        return done

    first = run(range(4), ("optim.freeze=[*.experts.*]",), save=2 + 2)
    assert not any("exp_avg/" in k and ".experts." in k for k in first[0][1])
    again = run(range(4, 6), ("optim.freeze=[*.self_attn.*]",), load=4)
    assert np.isfinite(again[0][0]).all()
    assert (again[0][3]["model.layers.0.mlp.experts.down_proj"].moments["exp_avg"] != 0).any(), "trained from now on"
    done = export_checkpoint(Checkpoint(Directory(url), 4), out)
    assert done["tensors"] > 0
    model = AutoModelForCausalLM.from_pretrained(out)
    start, trained = dict(make_start(QWEN).named_parameters()), dict(model.named_parameters())
    assert torch.equal(trained["model.layers.0.mlp.experts.down_proj"], start["model.layers.0.mlp.experts.down_proj"])
    assert not torch.equal(trained["model.layers.0.mlp.gate.weight"], start["model.layers.0.mlp.gate.weight"])


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ("[model.embed_token.weight]", "names no parameter of the model; one of them is model.embed_tokens.weight"),
        ("['*']", "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused_before_a_cluster_is_touched(tmp_path, patterns, says):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    here = (f"run_dir={tmp_path}/run", f"data.files={tmp_path}/a.txt", "batch.length=16")
    with pytest.raises(ModelError, match=f"optim.freeze=.*{says}"):
        check_run(load_config(None, [*here, f"optim.freeze={patterns}"]), datetime.now())
    assert not (tmp_path / "run").exists()
