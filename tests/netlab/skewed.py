"""A small model whose experts co-fire in groups and unevenly, and the text that makes them: a checkpoint directory.

Letters belong to topics, and a topic's letters lie close together in the embedding; in each layer the router's rows of
a group of experts lie close to one topic. A token so fires mostly the experts of its topic's group, not always the
same, and topics are more or less frequent. Groups are scattered over the experts' numbers, in each layer otherwise.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOPICS, LETTERS = 8, 11
EXPERTS, TOP_K, LAYERS, HIDDEN = 32, 4, 2, 128
CLOSE = 1.0
"""How far topics are apart, over how far letters of a topic and experts of a group are."""
SHARES = np.arange(1, TOPICS + 1) ** -0.7


def letters(topic):
    """The printable characters of a topic."""
    return [33 + topic * LETTERS + i for i in range(LETTERS)]


def text(length, seed=0):
    """Bytes, each drawn by the one before, in runs of a topic: short, so that every rank's share of a batch has all."""
    rng = np.random.default_rng(seed)
    after = rng.dirichlet(np.full(LETTERS, 0.3), (TOPICS, LETTERS))
    out, letter = [], 0
    while len(out) < length:
        topic = rng.choice(TOPICS, p=SHARES / SHARES.sum())
        for _ in range(rng.integers(3, 9)):
            letter = rng.choice(LETTERS, p=after[topic, letter])
            out.append(letters(topic)[letter])
        if rng.random() < 0.1:
            out.append(10)
    return bytes(out[:length])


def model(seed=0):
    """A qwen3_moe with that embedding and those routers; the rest as transformers draws it."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=256, hidden_size=HIDDEN, intermediate_size=32, moe_intermediate_size=32,
        num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, norm_topk_prob=True, tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((HIDDEN, TOPICS)))[0].T * CLOSE  # [topics, H]

    def near(topic, count):
        return axes[topic] + rng.standard_normal((count, HIDDEN)) / HIDDEN**0.5

    with torch.no_grad():
        embedding = made.get_input_embeddings().weight
        for topic in range(TOPICS):
            embedding[letters(topic)] = torch.from_numpy(0.2 * near(topic, LETTERS)).float()
        for layer in made.model.layers:
            order = rng.permutation(EXPERTS).reshape(TOPICS, -1)
            for topic, group in enumerate(order):
                layer.mlp.gate.weight[group] = torch.from_numpy(0.2 * near(topic, len(group))).float()
    return made


def write(folder, length=400_000):
    """The checkpoint in folder/model and the text in folder/text.txt; overrides of a run that reads them."""
    folder = Path(folder)
    model().save_pretrained(folder / "model")
    (folder / "text.txt").write_bytes(text(length))
    return [f"model.path={folder / 'model'}", f"data.files=[{folder / 'text.txt'}]"]


if __name__ == "__main__":
    print(" ".join(write(sys.argv[1])))
