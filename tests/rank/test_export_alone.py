"""An export stands alone, is whole or not there, and leaves nothing that refuses the next one."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ray_ep.errors import BadInput, CheckpointError, SaveError
from ray_ep.rank.saved import export
from ray_ep.rank.saved.companions import BYTES, companions
from ray_ep.rank.saved.export import export_checkpoint
from tests.rank.test_directory import files_up_to
from tests.rank.test_export import saved

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def source(tmp_path):
    """A transformers checkpoint, weights aside."""
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "sun": 2, "moon": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "source")
    GenerationConfig(eos_token_id=1, temperature=0.7, do_sample=True).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("not ours to copy")
    return tmp_path / "source"


def run_of(checkpoint, **keys):
    """The checkpoint as one of a run with these keys."""
    config = checkpoint.manifest["config"]
    for key, value in keys.items():
        section, _, leaf = key.partition("__")
        config.setdefault(section, {})[leaf] = str(value)
    return checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    return saved("mixtral", tmp_path / "ours")[0]


@pytest.mark.parametrize("keys", [("model__path", "data__tokenizer"), ("model__path",), ("data__tokenizer",)])
def test_an_export_holds_the_tokenizer_with_its_chat_template_and_the_generation_settings(
    checkpoint, source, tmp_path, keys
):
    done = export_checkpoint(run_of(checkpoint, **dict.fromkeys(keys, source)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("sun moon sun").input_ids == [2, 3, 2]
    chat = [{"role": "user", "content": "sun"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>sun"
    assert str(source) in done["tokenizer"]
    assert done["files"] == sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*"))
    for name in {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} & set(done["files"]):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert "README.md" not in done["files"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if "model__path" in keys:
        assert (model.generation_config.eos_token_id, model.generation_config.temperature) == (1, 0.7)
    else:
        assert done["generation_config"] == "none was given"
    assert ("trained on bytes" in done["tokenizer"]) == (keys == ("model__path",))


def test_a_run_on_bytes_says_what_its_tokens_are(checkpoint, tmp_path):
    done = export_checkpoint(checkpoint, tmp_path / "out")
    assert done["tokenizer"] == BYTES
    assert [f for f in done["files"] if "token" in f] == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda source: source.rename(source.with_name("moved")), "gone"),
        (lambda source: (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"), "lfs"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_any_more_is_left_out_and_said(checkpoint, source, tmp_path, damage, says):
    damage(source)
    done = export_checkpoint(run_of(checkpoint, data__tokenizer=source, model__path=source), tmp_path / "out")
    assert done["tokenizer"].startswith("left out: ")
    assert says in done["tokenizer"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "mixtral"


def test_a_tokenizer_with_code_of_its_own_is_copied_without_it(source):
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    (source / "t.py").write_text("raise SystemExit('foreign code ran')")
    files, words = companions({"data": {"tokenizer": str(source)}})
    assert "t.py" not in files
    assert "needs code of its own, which is not copied" in words["tokenizer"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(checkpoint, tmp_path):
    out = tmp_path / "new" / "out"
    with files_up_to(20_000), pytest.raises(SaveError) as e:
        export_checkpoint(checkpoint, out)
    assert str(e.value).startswith(f"{out} could not be written: File too large")
    assert len(str(e.value).splitlines()) == 1
    assert not out.parent.exists()
    assert export_checkpoint(checkpoint, out)["shards"] == 3


def test_too_little_room_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: free)
    with pytest.raises(SaveError, match=r"out has 0\.0 MB free and the weights need 0\.\d MB"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError, OSError])
@pytest.mark.parametrize("empty", [True, False])
def test_an_export_that_ends_early_leaves_what_was_there(checkpoint, tmp_path, monkeypatch, error, empty):
    out = tmp_path / "out"
    if empty:
        out.mkdir()

    def stop(self, dtype):
        assert [p.name for p in out.iterdir()] == [".export.part"], "nothing that looks like a model"
        raise error(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export._Writer, "finish", stop)
        with pytest.raises(SaveError if error is OSError else error):
            export_checkpoint(checkpoint, out)
    assert out.exists() == empty
    assert not empty or list(out.iterdir()) == []
    export_checkpoint(checkpoint, out)
    assert not (out / ".export.part").exists()


@pytest.mark.slow
def test_an_export_that_was_killed_does_not_refuse_the_next_one(checkpoint, tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from ray_ep.rank.saved import export
from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.directory import Directory
export._Writer.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export.export_checkpoint(Checkpoint(Directory({str(tmp_path / "ours")!r}), 3), Path({str(tmp_path / "out")!r}))
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".export.part"]
    export_checkpoint(checkpoint, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / ".export.part").exists()


@pytest.mark.parametrize("where", ["/proc/nowhere/out", "{}/file/out"])
def test_a_place_that_cannot_be_made_is_refused(checkpoint, tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot be written to"):
        export_checkpoint(checkpoint, Path(where.format(tmp_path)))


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(checkpoint, tmp_path):
    file = tmp_path / "ours" / "step-000003" / "experts-L001-r000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum differs"):
        export_checkpoint(checkpoint, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
