"""Adapters beside frozen weights: training follows PEFT in one process, and PEFT loads what is exported."""

import copy
from datetime import datetime

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ray_ep.collective import SoloGroup
from ray_ep.config import load_config
from ray_ep.driver.start import check_run
from ray_ep.errors import ConfigError, GroupError, ModelError
from ray_ep.placement import RoutingStatistics, Topology, contiguous, random
from ray_ep.rank.model import model_config
from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.saved.export import export_checkpoint
from ray_ep.rank.snapshot.copies import Key
from ray_ep.rank.snapshot.restore import Rewind, restore
from tests.conftest import in_threads, run_ranks, slow
from tests.rank.test_migration import drawn, train
from tests.rank.test_snapshots import Member
from tests.rank.test_training import (
    EXPERTS,
    GPT_OSS,
    LAYERS,
    MAKING,
    QWEN,
    Reference,
    assert_follows,
    configure,
    make_rank,
)

STEPS = 4
LORA = ("lora.rank=3", "lora.alpha=12", "optim.learning_rate=0.02")
KINDS = {
    "dense and experts": (),
    "experts alone": ("lora.targets=[]",),
    "one weight of experts": ("lora.target_parameters=[experts.down_proj]",),
    "dense alone": ("lora.target_parameters=[]",),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of small models."""
    found = {}
    for name, model in (("qwen3_moe", QWEN), ("gpt_oss", GPT_OSS)):
        _, config = configure(model=model)
        found[name] = tmp_path_factory.mktemp(name)
        with MAKING:
            torch.manual_seed(3)
            AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(found[name])
    return found


def written(url, step, cfg, config, parts):
    """A checkpoint of what ranks saved, as the driver commits it."""
    manifest = {"format": 1, "step": step, "model": config.to_dict(), "config": OmegaConf.to_container(cfg)}
    tensors = {k: v for part, _ in parts for k, v in part.items()}
    Directory(url).commit(step, {**manifest, "tensors": tensors}, RoutingStatistics.merge([s for _, s in parts], 64))
    return Checkpoint(Directory(url), step)


def exported(trainers, step, cfg, config, where):
    """The adapter that ranks have now, as PEFT reads it."""
    url = str(where / "checkpoints")
    Directory(url).clear(step)
    parts = [(t.save(url, step), t.rank.statistics()) for t in trainers]
    export_checkpoint(written(url, step, cfg, config, parts), where / f"adapter-{step}")
    return where / f"adapter-{step}"


class Peft(Reference):
    """PEFT and transformers, in one process, from the adapter that a run begins with."""

    def __init__(self, cfg, config, base, where):
        solo = make_rank(cfg, config, SoloGroup(), contiguous(LAYERS, EXPERTS, 1))
        self.cfg, self.rate = cfg, solo.optimizer.learning_rate
        start = exported([solo], 0, cfg, config, where)
        plain = AutoModelForCausalLM.from_pretrained(base, experts_implementation="grouped_mm")
        self.model = PeftModel.from_pretrained(plain, start, is_trainable=True)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == sum(p.numel() for p in solo.model.parameters() if p.requires_grad), (
            "the same adapters"
        )
        betas = cfg.optim.beta1, cfg.optim.beta2
        groups = [{"params": trained, "weight_decay": cfg.optim.weight_decay}]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=cfg.optim.eps)


@pytest.mark.parametrize("name", ["qwen3_moe", *slow("gpt_oss")])
@pytest.mark.parametrize("kind", ["dense and experts", *slow("experts alone", "one weight of experts", "dense alone")])
@pytest.mark.parametrize("size", [2, *slow(1)])
def test_losses_and_gradients_are_those_of_peft_over_migrations_and_peft_loads_the_result(
    bases, tmp_path, name, kind, size
):
    overrides = (f"model.path={bases[name]}", *LORA, *KINDS[kind])
    cfg, config = configure(*overrides, model=())
    peft = Peft(cfg, config, bases[name], tmp_path)
    wanted = [peft.step(number) for number in range(STEPS)]
    ranks = train([drawn(size, seed, True) for seed in range(2)], *overrides, model=(), steps=STEPS)
    assert_follows([r.results for r in ranks], wanted)
    assert ranks[0].results[-1].loss < ranks[0].results[0].loss
    adapter = exported([r.rank for r in ranks], STEPS, cfg, config, tmp_path)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(bases[name], experts_implementation="grouped_mm")
    before = plain(input_ids=ids).logits.detach()
    got = PeftModel.from_pretrained(plain, adapter).eval()(input_ids=ids).logits
    want = peft.model.eval()(input_ids=ids).logits
    assert (got - want).abs().max() < 2e-3
    assert (got - before).abs().max() > 0.05, "it has learnt something"


WAYS = {
    "all_gather": ("exchange.kind=all_gather", "balance.in_step=off"),
    "guests": ("balance.in_step=always",),
    "recomputed": ("model.gradient_checkpointing=true",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("way", WAYS)
def test_however_tokens_travel_the_curve_is_pefts(bases, tmp_path, name, way):
    overrides = (f"model.path={bases[name]}", *LORA, *WAYS[way])
    cfg, config = configure(*overrides, model=())
    wanted = [step for peft in [Peft(cfg, config, bases[name], tmp_path)] for step in map(peft.step, range(STEPS))]

    def before(rank):
        rank.ep.exchange_by(kind="all_gather" if way == "all_gather" else "flat")
        rank.ep.balancer.assume(1e-3, 1e12)

    ranks = train([drawn(2, seed, True) for seed in range(2)], *overrides, model=(), steps=STEPS, before=before)
    assert_follows([r.results for r in ranks], wanted)


def test_a_checkpoint_holds_adapters_alone_and_any_number_of_ranks_goes_on_from_it(bases, tmp_path):
    cfg, config = configure(f"model.path={bases['qwen3_moe']}", *LORA, model=())
    url = str(tmp_path / "c")
    Directory(url).clear(2)

    def run(group, steps, load=0):
        trainer = make_rank(cfg, config, group, random(LAYERS, EXPERTS, group.size, seed=group.size))
        if load:
            trainer.load(url, load)
        return [trainer.train_step(step) for step in steps], trainer

    def first(group):
        _, trainer = run(group, range(2))
        part = trainer.save(url, 2), trainer.rank.statistics()
        return part, [trainer.train_step(step).loss for step in range(2, 4)]

    parts, losses = zip(*run_ranks(2, first), strict=True)
    checkpoint = written(url, 2, cfg, config, parts)
    assert all("lora_" in key for key in checkpoint.tensors)
    for size in (1, 3):
        again = run_ranks(size, lambda group: run(group, range(2, 4), load=2)[0])
        assert [r.loss for r in again[0]] == pytest.approx(losses[0], rel=1e-5)


def test_after_a_rank_is_lost_adapters_and_their_experts_are_those_of_the_snapshot(bases, tmp_path):
    overrides = (f"model.path={bases['qwen3_moe']}", *LORA)
    cfg, config = configure(*overrides, model=())
    peft = Peft(cfg, config, bases["qwen3_moe"], tmp_path)
    wanted = [peft.step(number) for number in range(STEPS)]
    store, first, nodes = dist.HashStore(), drawn(3, 1, True), [0, 1, 2]
    members = [Member(store, cfg, config, first) for _ in range(3)]

    def live(rank):
        me = members[rank]
        me.start(rank, 3)
        me.train(0, 1)
        me.snapshots.take(2, nodes)
        me.snapshots.wait()
        if rank == 1:
            me.close()
            return
        with pytest.raises(GroupError):
            me.trainer.train_step(2)
        me.trainer.discard()
        me.side.abort()
        me.snapshots.regroup()
        me.form({0: 0, 2: 1}[rank], 2, 1)
        mid = first.primaries().among([0, 2], {1: 1})
        topology = Topology.of_nodes(nodes).among([0, 2], [0, 2])
        restore(me.trainer, me.snapshots.get(Key(0, 2)), Rewind(Key(0, 2), first, mid, topology, {1: [1]}))
        me.train(*range(2, STEPS))
        me.close()

    in_threads(*(lambda rank=rank: live(rank) for rank in range(3)))
    assert_follows([members[0].results, members[2].results], wanted)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("lora.targets=[q_prj]",), r"lora\.targets=\['q_prj'\]: .*q_prj.* not found"),
        (
            ("lora.target_parameters=[experts.up_proj]",),
            r"lora\.target_parameters='experts\.up_proj' is no weight of this model's experts; they are "
            r"model\.layers\.0\.mlp\.experts\.gate_up_proj, .*down_proj",
        ),
    ],
)
def test_an_adapter_that_matches_nothing_is_refused_before_a_cluster_is_touched(tmp_path, overrides, says):
    config = model_config(load_config(None, QWEN).model, 256)
    with MAKING:
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    here = (f"run_dir={tmp_path}/run", f"data.files={tmp_path}/a.txt", "batch.length=16")
    cfg = load_config(None, [*here, f"model.path={tmp_path}/base", *LORA, *overrides])
    with pytest.raises(ModelError, match=says):
        check_run(cfg, datetime.now())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "adapters need the weights that they adapt: give model.path"),
        (("model.path=x", "lora.dropout=0.1"), "PEFT has no dropout for adapters of experts"),
        (("model.path=x", "lora.targets=[]", "lora.target_parameters=[]"), "are both empty"),
        (("model.path=x", "optim.freeze=[lm_head.*]"), "all weights but the adapters are frozen"),
        (("model.path=x", "lora.alpha=0"), "must be above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load_config(None, ["lora.rank=2", *overrides])
