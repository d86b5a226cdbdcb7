"""`ray-ep generate` and `eval` as users start them: real Ray, real processes, a rank killed in the middle."""

import json
import math
import os
import re
import signal

import pytest
import torch
from transformers import GenerationConfig

from tests.models import build

NEW = 24


@pytest.fixture(scope="module")
def model(shared):
    """Of bytes, with its checkpoint in `checkpoint` and prompts in `prompts.jsonl`."""
    it = build("qwen3_moe", vocab_size=256, max_position_embeddings=128)
    it.generation_config = GenerationConfig(eos_token_id=2)
    it.save_pretrained(shared.path / "checkpoint")
    lines = [json.dumps({"prompt": f"number {i} {'x' * (i % 20)}"}) for i in range(300)]
    (shared.path / "prompts.jsonl").write_text("\n".join(lines))
    return it


def greedy(model, prompt):
    ids = torch.tensor([list(prompt.encode())])
    how = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=2, pad_token_id=0)
    return model.generate(ids, generation_config=how)[0, ids.shape[1] :].tolist()


def generate(shared, *overrides):
    asked = ["--prompts", "prompts.jsonl", "--out", "out.jsonl", "--max-new-tokens", str(NEW)]
    few = ["cluster.cpus_per_rank=0.5", "cluster.wait_s=600", "generate.requests=2", "balance.in_step=off"]
    return shared.ray_ep("generate", "checkpoint", *asked, "--json", *few, *overrides)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_answers_equal_generate_and_a_second_start_goes_on_after_a_killed_rank(shared, model, lines):
    out = shared.path / "out.jsonl"
    first = generate(shared)
    first.until(lambda: out.exists() and out.stat().st_size, 600, "an answer")
    victim = next(pid for pid, line in first.offspring().items() if line.startswith("ray::GeneratorActor"))
    os.kill(victim, signal.SIGKILL)
    assert first.wait(120) == 1, first.err
    assert re.search(r"ray-ep: rank \d on \S+ died", first.err)
    assert "the same command goes on behind the answers in out.jsonl" in first.err
    assert first.left() == {}
    before = out.read_bytes()
    there = len(before.splitlines())
    assert 0 < there < 300

    second = generate(shared)
    assert second.wait(700) == 0, second.err
    assert out.read_bytes().startswith(before)
    answers = lines(out)
    assert sorted(int(a["id"]) for a in answers) == list(range(300))
    for answer in answers[:5] + answers[-5:]:
        assert answer["tokens"] == greedy(model, answer["prompt"])
    figures = json.loads(second.out.splitlines()[-1])
    assert figures["answers"] == 300 - there
    assert figures["tokens"] == sum(len(a["tokens"]) for a in answers[there:])
    assert figures["tokens_per_second"] > 0
    assert 0 < figures["exchange_share"] < 1
    assert re.search(r"tokens/s on 2 ranks; exchange \d+% of their passes", second.err)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_perplexity_is_that_of_one_process(shared, model):
    text = "All work and no play makes Jack a dull boy. " * 20
    (shared.path / "held-out.txt").write_text(text)
    asked = ["--window", "64", "--stride", "16", "--json", "cluster.cpus_per_rank=0.5", "cluster.wait_s=600"]
    command = shared.ray_ep("eval", "checkpoint", "held-out.txt", *asked)
    assert command.wait(700) == 0, command.err
    tokens, losses, done = list(text.encode()), [], 1
    with torch.no_grad():
        while done < len(tokens):
            end = min(done + 16 if done > 1 else 64, len(tokens))
            ids = torch.tensor([tokens[max(0, end - 64) : end]])
            logits = model(input_ids=ids).logits[0, done - end - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, done - end :], reduction="sum").double())
            done = end
    found = json.loads(command.out)
    assert found["tokens"] == len(tokens) - 1
    assert found["loss"] == pytest.approx(float(sum(losses)) / (len(tokens) - 1), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
