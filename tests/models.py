"""Tiny models of every expert layout that transformers has, and the comparison with plain transformers."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ray_ep
from ray_ep.placement import contiguous, random

VOCAB = 64
BASE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64, "head_dim": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "moe_intermediate_size": 16, "num_key_value_heads": 4,
            "num_hidden_layers": 3}  # fmt: skip
MODELS = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8,
                "layer_types": ["full_attention"] * 2},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "nemotron_h": {"hybrid_override_pattern": "*E*E", "layers_block_type": ["attention", "moe", "attention", "moe"],
                   "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                   "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "num_hidden_layers": 4,
                   "moe_latent_size": 24, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
                   "use_mamba_kernels": False},
    "llama4_text": {"num_local_experts": 6, "num_experts_per_tok": 1, "intermediate_size_mlp": 32,
                    "attention_chunk_size": 8},
}  # fmt: skip


def build(name, seed=0, dtype=torch.float32, **overrides):
    """A plain transformers model with weights that make routing and gates matter."""
    config = AutoConfig.for_model(name, **{**BASE, **MODELS[name], **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **grouped(name))
    return random_weights(model, seed).to(dtype).eval()


def grouped(name):
    """How to have transformers compute a model's experts as ray_ep does: Llama 4's know one way only."""
    return {} if name.startswith("llama4") else {"experts_implementation": "grouped_mm"}


def random_weights(model, seed, spread=0.3):
    """Give a model weights that make routing and gates matter, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * (spread if p.dim() > 1 else 0.1) + (p.dim() == 1))
        for n, b in model.named_buffers():
            if "correction_bias" in n:
                b.copy_(torch.randn(b.shape, generator=generator) * 0.05)
    return model


def placement_of(model, kind, ranks, seed=0):
    """contiguous, shuffled, replicated (spare slots) or uneven (different slots per rank)."""
    modules = ray_ep.moe.find_experts(model)
    layers, experts = len(modules), next(iter(modules.values())).num_experts
    need = -(-experts // ranks)
    if kind == "contiguous":
        return contiguous(layers, experts, ranks)
    if kind == "shuffled":
        return random(layers, experts, ranks, seed=seed)
    if kind == "replicated":
        return random(layers, experts, ranks, min(need + 2, experts), seed=seed)
    if kind == "uneven":
        return random(layers, experts, ranks, [experts - 1] + [need] * (ranks - 1) if ranks > 1 else experts, seed=seed)
    assert kind == "empty_rank"  # the last rank holds no expert at all
    return random(layers, experts, ranks, [experts] + [0] * (ranks - 1), seed=seed)


def loss_sum(model, ids):
    """Summed next-token loss of ids [B, L], and the logits."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
    ), logits


def reference(model, ids):
    """Logits and gradients of the mean loss in one process, by plain transformers."""
    model = copy.deepcopy(model)
    loss, logits = loss_sum(model, ids)
    loss = loss / ids[:, 1:].numel()
    loss.backward()
    return loss.detach(), logits.detach(), {n: p.grad for n, p in model.named_parameters()}


def parallel_pass(model, ids, group, placement, shards, before=None, node_of=None):
    """One rank's forward and backward over its rows of ids; gradients as the optimizer would see them."""
    model = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement, node_of=node_of)
    if before:
        before(model)
    return one_pass(model, ids, group, shards)


def one_pass(model, ids, group, shards):
    """`parallel_pass` of a model that is parallelized."""
    part = ids[shards[group.rank] : shards[group.rank + 1]]
    if len(part):
        loss, logits = loss_sum(model, part)
    else:
        with model.ray_ep.idle():
            loss, logits = loss_sum(model, ids[:1, :2])
            loss = loss * 0
    loss = loss / ids[:, 1:].numel()
    loss.backward()
    total = loss.detach().clone()
    group.all_reduce(total)
    return model, total, logits.detach()[: len(part)], gather_gradients(model, group)


def assert_equals(results, model, ids, tolerance=1e-5):
    """All ranks' `parallel_pass` together give plain transformers' loss, logits and every gradient."""
    loss, logits, grads = reference(model, ids)
    assert logits_differ(torch.cat([r[2] for r in results if len(r[2])]), logits) <= tolerance
    for _, total, _, got in results:
        assert abs(total - loss) <= tolerance
        for n, g in grads.items():
            assert (got[n] - (g if g is not None else 0)).abs().max() <= tolerance, n


def logits_differ(got, logits):
    """Largest difference, relative to the largest logit where that is above 1.

    Those of granitemoe reach 6.6: there plain transformers itself is 1.9e-5 from float64 on processors with AMX.
    """
    return (got - logits).abs().max() / max(1.0, logits.abs().max())


def gather_gradients(model, group):
    """Every gradient in full: dense ones summed over ranks, each expert's from its primary."""
    ep = model.ray_ep
    expert_names = ep.expert_parameter_names()
    out = {}
    for n, p in model.named_parameters():
        if n not in expert_names:
            out[n] = p.grad.clone() if p.grad is not None else torch.zeros_like(p)
            group.all_reduce(out[n])
    for i, name in enumerate(ep.names):
        owner = ep.placement.owner[i]
        for pn, p in ep.parameters(i).items():
            rows = (p.grad if p.grad is not None else torch.zeros_like(p)).flatten(1).clone()
            ep.replicas[i].sum_to_owner(rows)
            full = torch.zeros(ep.num_experts, rows.shape[1], dtype=rows.dtype, device=rows.device)
            mine = [r for r, e in enumerate(ep.layers[i].experts) if owner[e] == group.rank]
            full[[ep.layers[i].experts[r] for r in mine]] = rows[mine]
            group.all_reduce(full)
            out[f"{name}.{pn}"] = full.view(ep.num_experts, *p.shape[1:])
    return out


def even_shards(rows, ranks):
    """Row boundaries of an even split, the first ranks taking what is over."""
    return [rows * r // ranks for r in range(ranks + 1)]
