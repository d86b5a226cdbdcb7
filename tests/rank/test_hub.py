"""A checkpoint by its name on the hub: out of the cache as usual, pinned where asked; what cannot be had is said."""

import shutil

import huggingface_hub.constants
import pytest

from ray_ep.config import load_config
from ray_ep.errors import CheckpointError, ModelError
from ray_ep.rank.model import meta_model, model_config
from ray_ep.rank.pretrained.hub import directory
from ray_ep.rank.pretrained.load import inspect
from ray_ep.rank.saved.companions import companions
from tests.models import VOCAB, build
from tests.rank.test_source import loaded, same, transformers_reads

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of a machine that is offline, as the hub's client lays it out, with one model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "hub" / "models--some-lab--Tiny-MoE"
    build("mixtral").save_pretrained(model / "snapshots" / COMMIT)
    (model / "snapshots" / COMMIT / "chat_template.jinja").write_text("{{ messages }}")
    (model / "snapshots" / COMMIT / "modeling_x.py").write_text("raise SystemExit('foreign code ran')")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.chdir(tmp_path)
    return model


def look(name):
    """What is told of a checkpoint before a run."""
    cfg = load_config(None, [f"model.path={name}"]).model
    model = meta_model(model_config(cfg, VOCAB))
    return inspect(directory(cfg.path, weights=True), model)


@pytest.mark.parametrize("name", ["some-lab/Tiny-MoE", "some-lab/Tiny-MoE@main", f"some-lab/Tiny-MoE@{COMMIT}"])
def test_a_name_is_read_from_the_cache_as_its_directory_would_be(cache, name):
    assert look(name) == []
    same(loaded(name, ranks=2), transformers_reads(cache / "snapshots" / COMMIT))
    files, words = companions({"model": {"path": name}})
    assert "generation_config.json" in files
    assert words["generation_config"] == f"{name} (model.path)"


def test_a_directory_here_comes_before_a_name(cache, tmp_path):
    shutil.copytree(cache / "snapshots" / COMMIT, tmp_path / "some-lab" / "Tiny-MoE")
    cfg = load_config(None, ["model.path=some-lab/Tiny-MoE"])
    assert cfg.model.path == str(tmp_path / "some-lab" / "Tiny-MoE")
    assert directory(cfg.model.path) == tmp_path / "some-lab" / "Tiny-MoE"


@pytest.mark.parametrize("name", ["some-lab/Other", "some-lab/Tiny-MoE@other", "some-lab/a--b..c"])
def test_what_is_not_in_the_cache_of_a_machine_offline_is_said_by_name(cache, name):
    with pytest.raises(ModelError) as e:
        model_config(load_config(None, [f"model.path={name}"]).model, 8)
    assert str(e.value).startswith(f"model.path='{name}': no such directory here, and ")
    assert "cache (HF_HOME)" in str(e.value) or "hub: " in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_cache_without_some_of_the_weights_is_refused_like_a_directory_without_them(cache):
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors files there"):
        look("some-lab/Tiny-MoE")
