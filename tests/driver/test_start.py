"""A run that goes on is the run it was: its configuration, its directory; what is changed is told, or refused."""

import shutil
from datetime import datetime
from math import prod

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from omegaconf import OmegaConf

import ray_ep
from ray_ep.cli import main
from ray_ep.config import load_config
from ray_ep.driver.start import check_run
from ray_ep.errors import BadInput, CheckpointError, ConfigError
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.saved.directory import Directory
from tests.models import build

NOW = datetime(2026, 7, 1, 12, 30, 5)
OWN = [
    "model.overrides={hidden_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2, num_experts: 8}",
    "data.files=[text.txt]", "batch.sequences=8", "batch.length=32", "optim.steps=40", "optim.learning_rate=1e-4",
    "seed=7", "checkpoint.keep=5", "router.aux_coefficient=0.01",
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 200)
    return tmp_path


def ran(*overrides, step=3):
    """A run that got to `step` and was stopped; without a step it was stopped before it saved."""
    cfg = load_config(None, [*OWN, *overrides])
    plan = check_run(cfg, NOW)
    plan.run.create(cfg)
    if step:
        save(plan, cfg, step)
    plan.run.release()
    return plan.run.path


def save(plan, cfg, step):
    """A whole checkpoint of zeros."""
    directory = Directory(cfg.checkpoint.dir or str(plan.run.path / "checkpoints"))
    zeros = {f"weight/{name}": torch.zeros(shape) for name, shape in plan.signature.items()}
    with directory.saving(step):
        manifest = {
            "format": 1, "step": step, "serial": directory.next_serial(), "signature": plan.signature,
            "config": OmegaConf.to_container(cfg), "tensors": directory.write_tensors(step, "dense.safetensors", zeros),
        }  # fmt: skip
        directory.commit(step, manifest, RoutingStatistics(np.zeros((2, 8)), np.zeros((2, 8, 8))))


def resumed(*overrides):
    """(plan, cfg) of a start with `overrides`; the directory is given back."""
    cfg = load_config(None, overrides)
    plan = check_run(cfg, datetime(2026, 7, 2))
    plan.run.release()
    return plan, cfg


def told(plan, kind="config-changed"):
    return [note.words for note in plan.notes if note.kind == kind]


def settings(cfg):
    return {k: v for k, v in OmegaConf.to_container(cfg).items() if k not in ("run_dir", "resume")}


HOW = {
    "auto": ["resume=auto"],
    "named": ["run_dir=r", "resume=auto"],
    "into a new directory": ["resume=r"],
    "checkpoints": ["resume=r/checkpoints"],
    "one checkpoint": ["resume=r/checkpoints/step-000003"],
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_resume_goes_on_with_the_configuration_of_the_run(how, place):
    ran("run_dir=r")
    plan, cfg = resumed(*how)
    assert settings(cfg) == settings(load_config(None, OWN))
    assert plan.checkpoint.step == 3
    assert {note.kind for note in plan.notes} == {"router"}
    assert (plan.run.path == place / "r") == ("resume=auto" in how)


def test_the_newest_run_is_found_wherever_it_is_and_from_its_directory_alone(place, monkeypatch):
    ran()
    ran("run_dir=deep/inside")
    assert resumed("resume=auto")[0].run.path == place / "deep" / "inside"
    shutil.rmtree(place / "deep")
    assert resumed("resume=auto")[0].run.path == place / "runs" / "20260701-123005"
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    plan, _ = resumed("resume=auto", *OWN[:1], f"data.files={place}/text.txt", *OWN[2:4])
    assert plan.checkpoint is None


def test_what_is_changed_is_told_key_by_key_with_old_and_new(place):
    ran("run_dir=r")
    (place / "c.yaml").write_text("optim: {steps: 60}\n")
    cfg = load_config("c.yaml", ["resume=auto", "optim.learning_rate=2e-4", "model.dtype=bfloat16", "seed=7"])
    plan = check_run(cfg, NOW)
    plan.run.release()
    assert told(plan) == [
        "model.dtype: 'float32' -> 'bfloat16'",
        "optim.steps: 40 -> 60",
        "optim.learning_rate: 0.0001 -> 0.0002",
    ]


def test_one_key_of_the_model_that_keeps_its_shapes_is_told_alone():
    ran("run_dir=r")
    plan, cfg = resumed("resume=auto", "model.overrides.rms_norm_eps=1e-6")
    assert told(plan) == ["model.overrides.rms_norm_eps: none -> 1e-06"]
    assert cfg.model.overrides.num_experts == 8


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.kind=sgd", "optim.kind='sgd': the run to go on with has 'adamw', and that cannot change"),
        ("data.tokenizer=gpt2", "data.tokenizer='gpt2'"),
        ("model.type=mixtral", "model.type='mixtral'"),
        ("model.path=text.txt", "model.path="),
        ("model.overrides.hidden_size=64", "is of another model"),
    ],
)
def test_what_the_checkpoint_does_not_allow_is_refused_and_the_run_is_as_it_was(override, says, place):
    ran("run_dir=r")
    before = (place / "r" / "config.yaml").read_text()
    with pytest.raises(BadInput) as e:
        resumed("resume=auto", override)
    assert says in str(e.value)
    assert (place / "r" / "config.yaml").read_text() == before


def test_a_configuration_made_in_python_is_compared_too():
    ran("run_dir=r")
    tree = OmegaConf.to_container(load_config(None, [*OWN, "run_dir=r", "resume=auto"]))
    tree["optim"]["steps"] = 50
    plan = check_run(ray_ep.config.from_dict(tree), NOW)
    plan.run.release()
    assert told(plan) == ["optim.steps: 40 -> 50"]


def test_keys_of_another_version_are_told_and_no_obstacle(place):
    ran("run_dir=r")
    tree = OmegaConf.to_container(OmegaConf.load("r/config.yaml")) | {"gone": 5}
    tree["optim"]["nesterov"] = True
    OmegaConf.save(OmegaConf.create(tree), "r/config.yaml")
    plan, _ = resumed("resume=auto")
    assert told(plan) == [
        "optim.nesterov: it was 'true'; this version has no such key",
        "gone: it was '5'; this version has no such key",
    ]


def test_nothing_to_resume_is_said_and_a_new_run_starts(place):
    plan, _ = resumed("run_dir=r", "resume=auto", *OWN)
    assert told(plan, "resume") == [f"nothing to resume in {place}/r: a new run starts"]
    plan, _ = resumed("resume=auto", *OWN)
    assert told(plan, "resume") == [f"nothing to resume in {place}/runs: a new run starts"]
    assert told(plan) == []
    assert not (place / "r").exists()


def test_a_run_that_was_lost_before_it_saved_starts_anew_as_it_was(place):
    ran("run_dir=r", step=0)
    plan, cfg = resumed("resume=auto", "optim.kind=sgd")  # nothing depends on the old one
    assert settings(cfg) == settings(load_config(None, [*OWN, "optim.kind=sgd"]))
    assert (plan.checkpoint, plan.run.path) == (None, place / "r")
    assert told(plan, "resume") == [f"{place}/r has no checkpoint yet: it starts anew, with its own configuration"]
    assert told(plan) == ["optim.kind: 'adamw' -> 'sgd'"]


@pytest.mark.parametrize(
    "arguments", [["resume=auto"], ["run_dir=r", "resume=auto"], ["resume=auto", "optim.steps=20"]]
)
def test_a_run_that_has_all_its_steps_says_so_and_starts_nothing(arguments, place, monkeypatch):
    ran("run_dir=r", step=40)
    (place / "r" / "report.html").write_text("the page")
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    monkeypatch.setattr("ray_ep.api.drive", lambda *_: pytest.fail("something was started"))
    result = CliRunner().invoke(main, ["train", *arguments])
    steps = 20 if "optim.steps=20" in arguments else 40
    assert f"nothing to do: 40 of {steps} steps are done; optim.steps=80 trains on" in result.stderr
    assert result.stdout == f"done: {place}/r/report.html\n"
    assert result.exit_code == 0
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    assert resumed("resume=auto", "optim.steps=80")[0].nothing_to_do == ""


def test_a_new_run_from_a_checkpoint_with_all_its_steps_is_refused(place):
    ran("run_dir=r", step=40)
    with pytest.raises(CheckpointError, match=r"step-000040: nothing to do: 40 of 40 .* optim\.steps=80 trains on"):
        resumed("resume=r")


def test_a_run_that_was_moved_goes_on_where_it_is_and_saves_there(place):
    ran("run_dir=r", f"checkpoint.dir={place}/r/saved")
    shutil.move("r", "moved")
    plan, cfg = resumed("run_dir=moved", "resume=auto")
    assert (plan.run.path, cfg.run_dir) == (place / "moved", str(place / "moved"))
    assert cfg.checkpoint.dir == str(place / "moved" / "saved")
    assert plan.checkpoint.step == 3
    assert ray_ep.driver.run.rundir.find_checkpoint("moved").step == 3


def test_a_new_run_does_not_save_where_the_run_that_it_goes_on_from_does(place):
    ran("run_dir=r", f"checkpoint.dir={place}/kept")
    plan, cfg = resumed("resume=r")
    assert cfg.checkpoint.dir == ""
    assert told(plan) == [f"checkpoint.dir: '{place}/kept' -> ''"]
    assert resumed("run_dir=r", "resume=auto")[1].checkpoint.dir == f"{place}/kept"


def test_a_run_without_its_config_goes_on_with_that_of_its_checkpoint(place):
    ran("run_dir=r")
    (place / "r" / "config.yaml").unlink()
    assert settings(resumed("run_dir=r", "resume=auto")[1]) == settings(load_config(None, OWN))


def test_a_damaged_config_of_the_run_is_named(place):
    ran("run_dir=r")
    (place / "r" / "config.yaml").write_text("optim: {steps: 3\n")
    with pytest.raises(ConfigError, match=r"r': its config\.yaml is damaged: is not YAML"):
        load_config(None, ["run_dir=r", "resume=auto"])


def test_paths_are_those_seen_from_where_the_command_was_given(place, monkeypatch):
    for name in ("model", "tok", "set"):
        (place / name).mkdir()
    given = [
        "run_dir=r", "checkpoint.dir=c", "model.path=model", "data.files=[a.txt, ../b*.txt, s3://x/y]",
        "data.tokenizer=tok", "placement.initial=p.json", "resume=no",
    ]  # fmt: skip
    cfg = load_config(None, given)
    monkeypatch.chdir("/")
    assert (cfg.run_dir, cfg.checkpoint.dir, cfg.model.path) == (f"{place}/r", f"{place}/c", f"{place}/model")
    assert list(cfg.data.files) == [f"{place}/a.txt", f"{place.parent}/b*.txt", "s3://x/y"]
    assert (cfg.data.tokenizer, cfg.placement.initial) == (f"{place}/tok", f"{place}/p.json")
    monkeypatch.chdir(place)
    assert load_config(None, ["data.dataset=set"]).data.dataset == f"{place}/set"
    assert load_config(None, ["resume=r"]).resume == f"{place}/r"


def test_names_urls_and_words_are_no_paths_and_home_is(place, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["checkpoint.dir=s3://bucket/run", "data.tokenizer=gpt2", "data.dataset=wikitext", "run_dir=~/runs/1"]
    cfg = load_config(None, given)
    assert (cfg.checkpoint.dir, cfg.data.tokenizer, cfg.data.dataset) == ("s3://bucket/run", "gpt2", "wikitext")
    assert (cfg.run_dir, cfg.placement.initial, cfg.resume) == ("/home/me/runs/1", "contiguous", "no")
    assert load_config().run_dir == load_config().checkpoint.dir == load_config().model.path == ""
    assert load_config(None, ["data.tokenizer=bytes"]).data.tokenizer == "bytes"
    with pytest.raises(ConfigError, match=r"run_dir='s3://b/r': expected a directory of this machine"):
        load_config(None, ["run_dir=s3://b/r"])
    with pytest.raises(ConfigError, match="no path holds a zero byte"):
        load_config(None, ["run_dir=a\0b"])


def test_a_directory_whose_name_looks_like_a_pattern_is_none(place, monkeypatch):
    (place / "[x]").mkdir()
    shutil.copy("text.txt", "[x]/a.txt")
    monkeypatch.chdir(place / "[x]")
    for files in ("a.txt", "*.txt"):
        plan, _ = resumed(*OWN, f"data.files={files}")
        assert plan.corpus.documents == 1


def test_a_model_that_deepep_does_not_carry_is_refused_before_anything_starts():
    keys = ["exchange.transport=deepep", "model.dtype=bfloat16", "cluster.ranks=2"]
    with pytest.raises(BadInput, match="hidden size 32: it moves multiples of 256"):
        check_run(load_config(None, [*OWN, *keys]), NOW)
    plan = check_run(load_config(None, [*OWN, *keys, "model.overrides.hidden_size=256"]), NOW)
    plan.run.release()
    assert told(plan, "balance") == [
        "balance inside the step is off: exchange.transport=deepep carries tokens to slots only"
    ]


def test_a_fine_tune_counts_all_experts_of_its_checkpoint(place):
    model = build("qwen3_moe", vocab_size=256)
    model.save_pretrained(place / "m")
    cfg = load_config(None, ["model.path=m", "data.files=[text.txt]", "batch.length=32"])
    plan = check_run(cfg, NOW)
    plan.run.release()
    whole = {n: list(p.shape) for n, p in model.named_parameters()}
    assert plan.signature == whole
    sizes = [prod(shape[1:]) for n, shape in whole.items() if ".layers.0.mlp.experts." in n]
    assert plan.expert_parameters == sum(sizes)
