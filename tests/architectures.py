"""Every architecture whose experts transformers decorates, as tiny models: found in its sources, tried as runs do.

`python -m tests.architectures` tries all and writes the table of docs/models.md.
"""

import json
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ray_ep.config import load_config
from ray_ep.moe import find_experts
from ray_ep.placement import RoutingStatistics, random
from ray_ep.rank.model import build, meta_model, model_config
from ray_ep.rank.pretrained.load import inspect
from ray_ep.rank.saved.checkpoint import Checkpoint, save_rank
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.saved.export import export_checkpoint
from ray_ep.rank.step.optimizer import MasterOptimizer
from tests.models import VOCAB, even_shards, grouped, logits_differ, one_pass, random_weights, reference

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m tests.architectures -->", "<!-- end of table -->"
SOURCES = Path(transformers.__file__).parent / "models"
ADAPTED = ("llama4",)
"""Not decorated: ray_ep has an adapter of its own."""

MTP = {"num_nextn_predict_layers", "num_mtp_layers"}
"""What a config says of layers that a causal language model has not: 0 in an export."""

E8, K2 = 8, 2
TINY = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # multi-head latent attention, and attention that an index chooses for
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 8, "index_head_dim": 8, "index_n_heads": 2, "o_groups": 2, "o_lora_rank": 16, "d_rel": 8,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    # linear attention and state spaces
    "linear_head_dim": 8, "linear_num_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_n_heads": 8, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "mamba_d_head": 8, "mamba_d_state": 8, "ssm_state_size": 8, "n_groups": 2,
    "mamba_n_groups": 2, "use_mamba_kernels": False,
    # experts
    "num_experts": E8, "num_local_experts": E8, "n_routed_experts": E8, "moe_num_experts": E8,
    "num_experts_per_tok": K2, "moe_topk": K2, "top_k_experts": K2, "n_group": 2, "topk_group": 1,
    "num_expert_group": 2, "n_shared_experts": 1, "num_shared_experts": 1, "router_hidden_size": 16,
    "intermediate_size": 32, "dense_intermediate_size": 32, "intermediate_size_mlp": 32,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "mlp_only_layers": [], "enable_moe_block": True,
}  # fmt: skip
OWN = {
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size": 16, "moe_layers": [0, 1]},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "per_layer_config": {}},
    "dots3_note": {"vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32}},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "num_hidden_layers": 4},
}
"""What a type needs beside sizes."""


@dataclass(frozen=True)
class Row:
    """What one model type was found to be: a line of the table."""

    architecture: str
    kind: str  # model type
    layout: str

    def __str__(self):
        return f"| {self.architecture} | `{self.kind}` | {self.layout} |"


@cache
def decorated():
    """Folders of transformers' models in whose code experts are decorated -> their model types."""
    mark = re.compile(r"^@use_experts_implementation", re.M)
    folders = {p.parent.name for p in SOURCES.glob("*/modeling_*.py") if mark.search(p.read_text(encoding="utf-8"))}
    types = {folder: [] for folder in sorted(folders | {*ADAPTED})}
    for kind in CONFIG_MAPPING_NAMES:
        folder = model_type_to_module_name(kind)
        if folder in types:
            types[folder].append(kind)
    return types


def tried():
    """{model type: architecture} of all that predict tokens."""
    return {k: a for a, kinds in decorated().items() for k in kinds if k in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def without_language_model():
    """{architecture: classes} of those that transformers has no causal language model of."""
    predict = set(tried().values())
    heads = re.compile(r"^class (\w+For[A-Z]\w+)\(", re.M)
    return {
        a: [
            n for n in heads.findall((SOURCES / a / f"modeling_{a}.py").read_text(encoding="utf-8")) if "PreTr" not in n
        ]
        for a in decorated()
        if a not in predict
    }


def tiny_config(kind):
    """A small config of a model type: its own defaults, sizes replaced, one layer of each kind that it has."""
    cls = CONFIG_MAPPING[kind]
    default = cls().to_dict()
    if isinstance(default.get("text_config"), dict):
        text = tiny_config(default["text_config"]["model_type"])
        return cls(text_config=text.to_dict(), **OWN.get(kind, {}))
    known = default.keys() | cls.attribute_map.keys()
    own = OWN.get(kind, {})
    sizes = {k: v for k, v in TINY.items() if k in known}
    if "kv_lora_rank" in known:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(default.get(key), list):
            kinds = list(dict.fromkeys(default[key]))
            sizes[key] = (kinds * 2)[: sizes["num_hidden_layers"]]
    return cls(**{**sizes, **own})


def layout(module):
    """How an experts module keeps its weights, in words."""
    words = ["gate" if module.has_gate else "no gate"]
    if module.has_gate and not module.is_concatenated:
        words.append("interleaved")
    flags = {"bias": module.has_bias, "transposed": module.is_transposed, "norm after": module.has_post_expert_norm}
    words += [word for word, has in flags.items() if has]
    return ", ".join(words)


def attempt(kind, path, ranks):
    """Load a tiny model on two ranks, compare it with transformers in one process, export it, load that again.

    Args:
        path: an empty directory.
        ranks: calls a function of a group on so many ranks (tests.conftest.run_ranks).

    Returns:
        Its `Row`.
    """
    plain = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    random_weights(plain, 0, spread=0.2).save_pretrained(path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(path / "plain", **grouped(kind)).eval()
    experts = find_experts(plain)
    layers, count = len(experts), next(iter(experts.values())).num_experts
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    loss, logits, grads = reference(plain, ids)
    with torch.no_grad():
        inference = plain(input_ids=ids, use_cache=False).logits

    cfg = load_config(None, [f"model.path={path / 'plain'}", "model.dtype=float32"])
    config = model_config(cfg.model, VOCAB)
    inspect(path / "plain", meta_model(config))
    directory = Directory(str(path / "saved"))
    directory.clear(1)
    placement = random(layers, count, 2, count // 2 + 1, seed=1)

    def rank(group):
        model = build(cfg.model, config, 0, group, placement).eval()
        found = one_pass(model, ids, group, even_shards(len(ids), 2))
        return *found, save_rank(directory, 1, model, MasterOptimizer(model, cfg.optim, group))

    results = ranks(2, rank)
    assert all(layer.calls for r in results for layer in r[0].ray_ep.layers)
    assert logits_differ(torch.cat([r[2] for r in results]), logits) <= 1e-5
    for _, total, _, got, _ in results:
        assert abs(total - loss) <= 1e-5 * max(1, abs(loss))
        for n, g in grads.items():
            worst = (got[n] - (0 if g is None else g)).abs().max()
            assert worst <= 1e-5 * max(1, 0 if g is None else g.abs().max()), f"{n}: {worst}"

    manifest = {"step": 1, "tensors": {k: v for r in results for k, v in r[4].items()}, "model": config.to_dict(),
                "config": {"model": {"dtype": "float32"}}}  # fmt: skip
    directory.commit(1, manifest, RoutingStatistics(torch.zeros(layers, count).numpy()))
    export_checkpoint(Checkpoint(directory, 1), path / "out")
    same_tensors(path / "out", path / "plain")
    told, first = (json.loads((path / d / "config.json").read_text()) for d in ("out", "plain"))
    assert {k: v for k, v in told.items() if k not in MTP} == {k: v for k, v in first.items() if k not in MTP}
    again = AutoModelForCausalLM.from_pretrained(path / "out", **grouped(kind)).eval()
    with torch.no_grad():
        after = again(input_ids=ids, use_cache=False).logits
    assert logits_differ(after, inference) <= 1e-5, "weights are the same; where they lie in memory may round otherwise"
    return Row(tried()[kind], kind, layout(results[0][0].ray_ep.modules[0]))


def same_tensors(got, want):
    """Both directories hold the same weights under the same names."""
    a, b = ({k: t for f in sorted(d.glob("*.safetensors")) for k, t in load_file(f).items()} for d in (got, want))
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:4]
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def table(rows):
    """The part of docs/models.md that is made here."""
    head = "| Architecture | Model type | Experts |\n|---|---|---|"
    left = "\n".join(f"| {a} | {', '.join(heads)} |" for a, heads in without_language_model().items())
    return (
        f"{BEGIN}\nWith transformers {transformers.__version__}:\n\n{head}\n{chr(10).join(map(str, rows))}\n\n"
        f"Refused, since transformers has no causal language model of them, only what the second column says:\n\n"
        f"| Architecture | Classes |\n|---|---|\n{left}\n{END}"
    )


def documented():
    """The table as docs/models.md has it."""
    text = DOCS.read_text()
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def main():
    """Try all, write the table."""
    from tests.conftest import run_ranks

    transformers.logging.disable_progress_bar()
    rows = []
    for kind in tried():
        with tempfile.TemporaryDirectory() as tmp:
            rows.append(attempt(kind, Path(tmp), run_ranks))
            print(rows[-1], flush=True)
    DOCS.write_text(DOCS.read_text().replace(documented(), table(rows)))


if __name__ == "__main__":
    main()
