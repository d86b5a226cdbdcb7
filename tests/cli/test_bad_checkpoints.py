"""What is wrong with a transformers checkpoint or a tokenizer is said before a cluster is touched, in one sentence."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_bad_input import place, refused  # noqa: F401 (a fixture)
from tests.rank.quantise import FP8, fp8, mxfp4, tiny, write

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
FOREIGN = re.compile(
    r"trust_remote_code|ignore_mismatched|use_safetensors|pip install|https?:|upgrade|Config, \w+Config,"
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    tiny(path / "deepseek_v3", vocab_size=256)
    tiny(path / "gpt_oss", "gpt_oss", vocab_size=256)
    return path


def weights(d):
    return load_file(d / "model.safetensors")


def config(d, **changes):
    write(d, weights(d), **changes)


def replace(d, **changes):
    """Tensors of the checkpoint by name: changed, added, or dropped (None)."""
    tensors = {**weights(d), **changes}
    write(d, {k: t for k, t in tensors.items() if t is not None})


def shards(d, index=None):
    tensors = weights(d)
    names = sorted(tensors)
    (d / "model.safetensors").unlink()
    for name, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
        save_file({k: tensors[k] for k in part}, d / name)
    where = {k: "a.safetensors" if k in names[:9] else "b.safetensors" for k in names}
    (d / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where | (index or {})}))


def cut(d):
    data = (d / "model.safetensors").read_bytes()
    (d / "model.safetensors").write_bytes(data[:-100])


def overlapping(d):
    """The header gives one expert's weights the place of another's: the length is still right."""
    data = (d / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[UP]["data_offsets"] = header[UP.replace(".3.", ".4.")]["data_offsets"]
    text = json.dumps(header).encode()
    (d / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def twice(d):
    shards(d)
    part = load_file(d / "a.safetensors")
    save_file({**load_file(d / "b.safetensors"), **{k: part[k] for k in [min(part)]}}, d / "b.safetensors")


def renamed(d, name):
    (d / "model.safetensors").rename(d / name)


def foreign(d, **more):
    config(
        d, model_type="kimi_k3", architectures=["KimiForCausalLM"], auto_map={"AutoConfig": "configuration_k.X"}, **more
    )
    (d / "configuration_k.py").write_text("open('ran', 'w')\nprint('RAN')\n")


def odd_experts(d):
    replace(d, **{k: None for k in weights(d) if re.search(r"layers\.2\.mlp\.experts\.[4-7]\.", k)})


def quantised(d, **changes):
    write(d, fp8(weights(d))[0], **changes)


def rows(t):
    return {f"model.layers.1.self_attn.o_proj.{k}": v for k, v in t.items()}


I32, ONE = torch.ones(4, 4, dtype=torch.int32), torch.ones(4)
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
CASES = {
    "git-lfs pointer": (lambda d: (d / "model.safetensors").write_text(LFS), ["model.safetensors", "git lfs pull"]),
    "git-lfs pointer as config": (lambda d: (d / "config.json").write_text(LFS), ["config.json", "git lfs pull"]),
    "cut off": (cut, ["model.safetensors is damaged", "cut off"]),
    "cut off in the header": (lambda d: (d / "model.safetensors").write_bytes(b"\x10\0\0\0"), ["unreadable", "4 byt"]),
    "no safetensors at all": (lambda d: (d / "model.safetensors").write_bytes(b"PK" * 900), ["unreadable"]),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), ["model.safetensors is unreadable", "0 bytes"]),
    "absent shard": (lambda d: [shards(d), (d / "b.safetensors").unlink()], ["b.safetensors", "1 of the 2 files"]),
    "git-lfs shard": (lambda d: [shards(d), (d / "b.safetensors").write_text(LFS)], ["b.safetensors", "git lfs pull"]),
    "index of other keys": (lambda d: shards(d, {"x.weight": "a.safetensors"}), ["x.weight", "a.safetensors", "index"]),
    "damaged index": (
        lambda d: [shards(d), (d / "model.safetensors.index.json").write_text("[1]")],
        ["index.json is damaged", "weight_map"],
    ),
    "index of files elsewhere": (lambda d: shards(d, {O_PROJ: "../a.safetensors"}), ["index.json is damaged"]),
    "index without a file's name": (lambda d: shards(d, {O_PROJ: None}), ["index.json is damaged", "name of its file"]),
    "tensors that overlap": (overlapping, ["model.safetensors is unreadable", "place of model.layers.1.mlp.experts."]),
    "a key in two files": (twice, ["is in two files", "a.safetensors and b.safetensors"]),
    "pickled only": (lambda d: renamed(d, "pytorch_model.bin"), ["pytorch_model.bin", "save_pretrained"]),
    "another name": (lambda d: renamed(d, "consolidated.safetensors"), ["consolidated.safetensors", "name it model."]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["no .safetensors files"]),
    "missing weight": (lambda d: replace(d, **{O_PROJ: None}), ["1 weights are missing", O_PROJ]),
    "missing expert": (lambda d: replace(d, **{UP: None}), [f"{UP} is missing", "8 experts"]),
    "another shape": (lambda d: replace(d, **{O_PROJ: torch.ones(3, 3)}), [O_PROJ, "[3, 3]"]),
    "another shape of an expert": (lambda d: replace(d, **{UP: torch.ones(3, 3)}), [UP, "[3, 3]", "expert 0"]),
    "other numbers of experts": (odd_experts, ["model.layers.2.mlp.experts holds 4 experts", "config says 8"]),
    "another number in all": (lambda d: config(d, n_routed_experts=16), ["holds 8 experts", "config says 16"]),
    "another model": (lambda d: config(d, model_type="mixtral"), ["another model than Mixtral"]),
    "unknown type with code": (foreign, ["model_type='kimi_k3'", "never run", "model.type"]),
    "no model type": (lambda d: config(d, model_type=None), ["no model_type"]),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), ["config.json holds a list"]),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("{'a': 1}"), ["config.json is not JSON"]),
    "config of wrong types": (lambda d: config(d, hidden_size="big"), ["DeepseekV3Config refuses", "hidden_size"]),
    "no language model": (lambda d: config(d, model_type="vit", hidden_act="gelu"), ["ViTConfig", "language model"]),
    "fp8 that is not declared": (quantised, ["fp8", "_scale_inv", "quantization_config", "weight_block_size"]),
    "fp8 in blocks of one number": (
        lambda d: quantised(d, quantization_config=FP8 | {"weight_block_size": 16}),
        ["weight_block_size=16: expected rows and columns"],
    ),
    "fp8 in blocks of words": (
        lambda d: quantised(d, quantization_config=FP8 | {"weight_block_size": ["16", "16"]}),
        ["weight_block_size=['16', '16']: expected"],
    ),
    "fp8 without its scales": (
        lambda d: write(d, {k: t for k, t in fp8(weights(d))[0].items() if "scale" not in k}, quantization_config=FP8),
        ["float8 without scales"],
    ),
    "fp8 with scales that do not fit": (
        lambda d: write(
            d, fp8(weights(d))[0] | {f"{UP}_scale_inv": torch.ones(7, 1)}, quantization_config=FP8,
        ),
        [UP, "[7, 1]"],
    ),
    "GPTQ in the config": (
        lambda d: config(d, quantization_config={"quant_method": "gptq", "bits": 4}), ["'gptq'", "quantised"],
    ),
    "bitsandbytes without a method": (
        lambda d: config(d, quantization_config={"load_in_4bit": True}), ["'bitsandbytes'"],
    ),
    "GPTQ in the tensors": (
        lambda d: replace(d, **{O_PROJ: None, **rows({"qweight": I32, "qzeros": I32, "g_idx": I32})}), ["GPTQ"],
    ),
    "scales of smoothed activations": (
        lambda d: replace(d, **rows({"pre_quant_scale": ONE})), ["smoothed for quantisation"],
    ),
    "packed": (lambda d: replace(d, **rows({"weight_packed": I32, "weight_scale": ONE})), ["compressed-tensors"]),
    "int8 with a scale": (
        lambda d: replace(d, **{O_PROJ: torch.ones(32, 32, dtype=torch.int8), **rows({"weight_scale": ONE})}),
        ["o_proj", "quantised", "no quantization_config"],
    ),
    "a scale beside a weight": (lambda d: replace(d, **rows({"scales": ONE})), ["scaled weights", "o_proj.scales"]),
    "int8 without": (lambda d: replace(d, **{O_PROJ: torch.ones(32, 32, dtype=torch.int8)}), [O_PROJ, "I8"]),
    "bitsandbytes, 8 bits": (lambda d: replace(d, **rows({"SCB": ONE})), ["bitsandbytes, 8 bits"]),
    "bitsandbytes, 4 bits": (lambda d: replace(d, **rows({"weight.absmax": ONE})), ["bitsandbytes, 4 bits"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_bad_checkpoint_is_refused_in_one_sentence_before_anything_starts(place, checkpoints, name):  # noqa: F811
    spoil, says = CASES[name]
    shutil.copytree(checkpoints / "deepseek_v3", place / "d")
    spoil(place / "d")
    message = refused(place, ["model.path=d", "data.files=[text.txt]", "batch.length=32"])
    assert [s for s in says if s not in message] == [], message
    assert not FOREIGN.search(message), message
    assert len(message) < 600
    assert not (place / "ran").exists()


GPT_OSS = {
    "mxfp4 that is not declared": (lambda d: write(d, mxfp4(weights(d))), ["mxfp4", "no quantization_config"]),
    "stacks of other heights": (
        lambda d: replace(d, **{GATE_UP: weights(d)[GATE_UP][:4]}),
        ["model.layers.0.mlp.experts holds 4 experts", "config says 6"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GPT_OSS)
def test_stacks_of_experts_too(place, checkpoints, name):  # noqa: F811
    spoil, says = GPT_OSS[name]
    shutil.copytree(checkpoints / "gpt_oss", place / "d")
    spoil(place / "d")
    message = refused(place, ["model.path=d", "data.files=[text.txt]", "batch.length=32"])
    assert [s for s in says if s not in message] == [], message


def make_tokenizer(path, added=None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(path)
    if added is not None:
        raw = json.loads((path / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        raw["model"]["vocab"]["<extra>"] = added
        raw["added_tokens"] = [{"id": added, "content": "<extra>", **flags}]
        (path / "tokenizer.json").write_text(json.dumps(raw))


def test_a_token_above_the_vocabulary_is_found_whatever_the_number_of_entries(place, checkpoints):  # noqa: F811
    shutil.copytree(checkpoints / "deepseek_v3", place / "d")
    make_tokenizer(place / "t", added=300)
    (place / "text.txt").write_text("w1 w2 <extra> " * 500)
    arguments = ["model.path=d", "data.tokenizer=t", "data.files=[text.txt]", "batch.length=32"]
    message = refused(place, arguments)
    assert "vocab_size=256" in message
    assert "301" in message


TOKENIZERS = {
    "code of its own": (
        lambda d: (d / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "KTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_k.X", None]}})
        ), ["never run"],
    ),
    "git-lfs pointer": (lambda d: (d / "tokenizer.json").write_text(LFS), ["tokenizer.json", "git lfs pull"]),
    "nothing there": (lambda d: [f.unlink() for f in d.iterdir()], ["no tokenizer is in that directory"]),
    "a model without one": (
        lambda d: [f.unlink() for f in d.iterdir()] and (d / "config.json").write_text('{"model_type": "qwen3_moe"}'),
        ["no tokenizer is in that directory"],
    ),
    "no tokenizer.json": (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_bad_tokenizer_is_refused_in_one_sentence(place, name):  # noqa: F811
    spoil, says = TOKENIZERS[name]
    make_tokenizer(place / "t")
    (place / "t" / "tokenization_k.py").write_text("open('ran', 'w')\n")
    spoil(place / "t")
    message = refused(place, ["data.tokenizer=t", "data.files=[text.txt]", "batch.length=32"])
    assert [s for s in [f"data.tokenizer='{place / 't'}'", *says] if s not in message] == [], message
    assert not FOREIGN.search(message), message
    assert not (place / "ran").exists()


def test_a_tokenizer_beside_a_config_with_code_is_read_without_that_code(place):  # noqa: F811
    make_tokenizer(place / "t")
    (place / "t" / "config.json").write_text(
        '{"model_type": "kimi_k3", "auto_map": {"AutoConfig": "configuration_k.X"}}'
    )
    (place / "t" / "configuration_k.py").write_text("open('ran', 'w')\n")
    message = refused(place, ["model.path=nope", "data.tokenizer=t", "data.files=[text.txt]", "batch.length=32"])
    assert "nope" in message, "the tokenizer was read"
    assert not (place / "ran").exists()
