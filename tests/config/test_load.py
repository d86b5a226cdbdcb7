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


def test_file_and_overrides_merge_and_the_override_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    f = tmp_path / "c.yaml"
    f.write_text("optim: {steps: 7, learning_rate: 0.1}\nmodel: {overrides: {num_experts: 4}}\n")
    cfg = load_config(f, ["optim.steps=9", "model.overrides.num_hidden_layers=1", "data.files=[a.txt, b.txt]"])
    assert (cfg.optim.steps, cfg.optim.learning_rate) == (9, 0.1)
    assert (cfg.model.overrides.num_experts, cfg.model.overrides.num_hidden_layers) == (4, 1)
    assert cfg.model.overrides.hidden_size == 128
    assert list(cfg.data.files) == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]


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
        ("cluster.block_label=ep.block=A", "expected the key of a node label alone"),
        ("cluster.block_label=-block", "expected the key of a node label alone"),
        ("model.overrides=5", "expected a mapping"),
        ("batch.accumulation=3", "not a multiple"),
        ("data.held_out=0.9", "between 0 and 0.5"),
        ("model.overrides={num_experts: [1", "not YAML"),
        ("data.files=[a.txt", "a list that nothing closes"),
        ("exchange.kind=ring", "allowed are auto, flat, two_level, all_gather"),
        ("exchange.transport=mpi", "allowed are auto, gloo, nccl, torch_nccl, deepep"),
        ("exchange.chunks=0", "at least 1"),
        ("exchange.chunks=33", "must be from 1 to 32"),
        ("exchange.tokens=100", "a rank has up to 4096 tokens in one pass"),
        ("elastic.min_ranks=3", "more than cluster.ranks=2"),
        ("elastic.max_ranks=1", "less than cluster.ranks=2"),
        ("elastic.policy=available", "needs elastic.max_ranks"),
        ("elastic.policy=greedy", "allowed are fixed, available, throughput"),
        ("elastic.efficiency=0", "above 0 and at most 1"),
        ("elastic.efficiency=1.5", "above 0 and at most 1"),
        ("elastic.wait_s=-1", "at least 0"),
        ("elastic.mode=watch", "allowed are act, advise"),
        ("placement.mode=watch", "allowed are act, advise"),
        ("provenance.sample=1.5", "a share is from 0 to 1; one step is steps:1.5"),
        ("provenance.sample=-0.1", "a share is from 0 to 1"),
        ("provenance.sample=nan", "a share is from 0 to 1"),
        ("provenance.sample=often", "allowed are off, a share of the tokens of every step such as 0.01, or steps"),
        ("provenance.sample=steps:", "steps count from 1"),
        ("provenance.sample=steps:0", "steps count from 1"),
        ("provenance.sample=steps:9-3", "the first of a span comes first"),
        ("provenance.sample=steps:1000,2000-3000", "none of these is a step of the run: optim.steps=200"),
        ("provenance.disk_mb=0", "at least 1"),
    ],
)
def test_a_bad_override_is_named_with_what_is_allowed(override, says):
    with pytest.raises(ConfigError, match=says) as e:
        load_config(None, [override])
    assert override.split("=")[0].split(".")[-1] in str(e.value)


def test_ranks_that_come_and_go_are_refused_where_they_cannot():
    with pytest.raises(ConfigError, match=r"elastic\.min_ranks=3 is more than elastic\.max_ranks=2"):
        load_config(None, ["elastic.min_ranks=3", "elastic.max_ranks=2"])
    grows = ["elastic.policy=throughput", "elastic.max_ranks=4"]
    with pytest.raises(ConfigError, match=r"elastic\.policy='throughput' .* needs topology\.measure=true"):
        load_config(None, [*grows, "topology.measure=false"])
    assert load_config(None, grows).elastic.max_ranks == 4
    deepep = ["exchange.transport=deepep", "model.dtype=bfloat16"]
    for keys in (grows, ["elastic.max_ranks=4"], ["elastic.evict_stragglers=true"]):
        with pytest.raises(ConfigError, match=r"exchange\.transport=deepep the number of ranks stays as it is"):
            load_config(None, [*deepep, *keys])
    assert load_config(None, [*deepep, "elastic.max_ranks=2"]).elastic.max_ranks == 2


@pytest.mark.parametrize("transport", ["nccl", "torch_nccl", "deepep"])
def test_a_transport_between_gpus_is_refused_for_cpu_ranks(transport):
    keys = [f"exchange.transport={transport}", "model.dtype=bfloat16"]
    with pytest.raises(ConfigError, match=rf"exchange\.transport='{transport}'.*allowed are auto, gloo"):
        load_config(None, [*keys, "cluster.device=cpu"])
    assert load_config(None, keys).cluster.device == "auto"  # the cluster may have GPUs


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("model.dtype=float32", "bfloat16"),
        ("exchange.kind=two_level", "auto or flat"),
        ("exchange.chunks=2", "1"),
        ("exchange.float8=true", "False"),
        ("balance.in_step=always", "auto or off"),
        ("snapshot.to_disk=true", "False"),
    ],
)
def test_what_deepep_does_not_do_is_refused_and_balance_that_was_left_to_it_is_off(override, allowed):
    keys = ["exchange.transport=deepep", "model.dtype=bfloat16"]
    with pytest.raises(
        ConfigError, match=rf"{override.split('=')[0]}=.*: with exchange\.transport=deepep.* {allowed}$"
    ):
        load_config(None, [*keys, override])
    settled = load_config(None, keys)
    assert (settled.balance.in_step, settled.snapshot.every) == ("off", 0), "a lost rank ends such a run"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "snapshot.every=0",
            r"snapshot\.every=0 takes none .*: give snapshot\.every at least 1, or snapshot\.to_disk=fa",
        ),
        (
            "checkpoint.dir=s3://bucket/run",
            r"checkpoint\.dir='s3://bucket/run' is a URL: allowed is a directory that all",
        ),
    ],
)
def test_snapshots_on_disk_are_refused_where_there_are_none_or_there_is_no_disk(override, says):
    assert load_config(None, ["snapshot.to_disk=true", "checkpoint.dir=/shared/run"]).snapshot.to_disk
    with pytest.raises(ConfigError, match=f"snapshot\\.to_disk=true.*{says}"):
        load_config(None, ["snapshot.to_disk=true", override])


def test_the_bound_on_tokens_counts_those_of_a_rank_a_pass_and_a_chunk():
    # 16 sequences of 8 in 2 passes on 4 ranks: 2 sequences a rank; the evaluation has 12: 3 a rank, 24 tokens, 2 chunks
    sizes = ["batch.sequences=16", "batch.length=8", "batch.accumulation=2", "cluster.ranks=4", "eval.sequences=12"]
    cfg = load_config(None, [*sizes, "exchange.chunks=2", "exchange.tokens=12"])
    assert cfg.exchange.tokens == 12
    with pytest.raises(ConfigError, match="give at least 12, or 0"):
        load_config(None, [*sizes, "exchange.chunks=2", "exchange.tokens=11"])
    assert load_config(None, [*sizes, "exchange.tokens=16", "eval.every=0"]).exchange.tokens == 16


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not YAML"):
        load_config(bad)


def test_every_key_is_documented():
    text = reference()
    assert len([*fields()]) > 50
    for key, f, _ in fields():
        assert f"`{key}`" in text
        assert f.metadata["help"]


def test_package_import_is_light():
    import subprocess
    import sys

    code = "import sys, ray_ep, ray_ep.cli; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert ray_ep.__version__
