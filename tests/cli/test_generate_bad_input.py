"""A checkpoint or prompts that cannot be generated from: said in a sentence, exit status 2, before Ray is touched."""

import json
import shutil

import pytest
import ray
from click.testing import CliRunner
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ray_ep.cli import main
from tests.models import BASE, build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of bytes, in two shards."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = build("qwen3_moe", vocab_size=256, max_position_embeddings=96)
    model.save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copied")


def refused(*arguments):
    """What is said; nothing was started."""
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert not ray.is_initialized()
    last = result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    return last


def changed(path, **values):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return path


def test_a_dense_model_is_refused(tmp_path):
    config = AutoConfig.for_model("llama", **{**BASE, "vocab_size": 256})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    assert "no experts that ray_ep can place" in refused("generate", tmp_path / "dense", "--prompt", "a")


def test_a_tokenizer_that_does_not_fit_is_refused(copied):
    words = {f"w{i}": i for i in range(300)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))).save_pretrained(copied)
    said = refused("generate", copied, "--prompt", "w1")
    assert "vocab_size=256 is smaller than the tokenizer's 300" in said
    assert "smaller than the tokenizer's 300" in refused("eval", copied, copied / "config.json")


def test_a_model_that_wants_code_of_its_own_is_refused_and_the_code_not_run(copied):
    changed(copied, model_type="mine", architectures=["Mine"], auto_map={"AutoModelForCausalLM": "code.Mine"})
    (copied / "code.py").write_text("raise SystemExit('was run')")
    assert "the code that comes with it is never run" in refused("generate", copied, "--prompt", "a")


def test_missing_and_truncated_shards_are_named(copied):
    first, second, *_ = sorted(copied.glob("*.safetensors"))
    second.write_bytes(second.read_bytes()[:-100])
    assert second.name in refused("generate", copied, "--prompt", "a")
    second.unlink()
    assert second.name in refused("generate", copied, "--prompt", "a")
    with safe_open(first, "pt") as f:
        assert list(f.keys())  # the other one is whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x" * 90, "--max-new-tokens", "8"], "are 98: allowed are 96 together"),
        (["--prompt", ""], "no tokens"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "a", "--top-p", "0"], "top_p=0.0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "a", "--prompts", "b"], "one of the two"),
        ([], "one of the two"),
        (["--prompts", "no.jsonl"], "No such file"),
        (["--prompt", "a", "--out", "no/out.jsonl"], "no such directory"),
        (["--prompt", "a", "--max-new-tokens", "8", "generate.cache_tokens=5"], "must be at least 32"),
        (["--prompt", "a", "cluster.ranks=9", "placement.initial=no.json"], "no.json"),
    ],
)
def test_what_cannot_be_answered_is_refused(checkpoint, arguments, words):
    assert words in refused("generate", checkpoint, *arguments)


def test_a_run_is_to_be_exported_first(tmp_path):
    (tmp_path / "config.yaml").write_text("{}\n")
    assert f"ray-ep export {tmp_path} OUT" in refused("generate", tmp_path, "--prompt", "a")
    assert "no such directory" in refused("generate", tmp_path / "none", "--prompt", "a")


def test_what_cannot_be_scored_is_refused(checkpoint, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    assert "nothing to predict" in refused("eval", checkpoint, tmp_path / "one.txt")
    assert "--window 97: allowed are 2 to 96" in refused("eval", checkpoint, tmp_path / "one.txt", "--window", "97")
    assert "--stride 96: allowed are 1 to 95" in refused("eval", checkpoint, tmp_path / "one.txt", "--stride", "96")
    assert "no.txt" in refused("eval", checkpoint, tmp_path / "no.txt")


def test_nothing_to_do_is_said_without_a_start(checkpoint, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "out.jsonl").write_text('{"id": "0", "prompt": "a", "text": "b"}\n')
    asked = ["--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out.jsonl"]
    result = CliRunner().invoke(main, [*map(str, ["generate", checkpoint, *asked])])
    assert result.exit_code == 0, result.output
    assert "nothing to do: all 1 answers are in" in result.stderr
    assert not ray.is_initialized()
