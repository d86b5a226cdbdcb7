"""Generation on ranks that are threads over real gloo: tokens are those of one process of transformers."""

import threading
from dataclasses import replace

import pytest
import torch

from ray_ep.errors import PlacementError
from ray_ep.placement import random
from ray_ep.rank.generate.requests import CANCELLED, Request, Sampling
from ray_ep.rank.generate.score import Row
from ray_ep.rank.generate.whole import WholeBatches
from tests.conftest import slow
from tests.models import MODELS
from tests.rank.generate.answering import NEW, generator_of, greedy, prompts, rank_of, requests, saved

STATIC = {"nemotron_h", "llama4_text"}
"""Models whose state is no paged cache."""
FIRST = ["deepseek_v3", "nemotron_h"]  # latent attention, Mamba layers


@pytest.mark.parametrize("name", [*FIRST, *slow(*(m for m in MODELS if m not in FIRST))])
def test_greedy_tokens_equal_generate_while_experts_move(ranks, tmp_path, name):
    model = saved(name, tmp_path)
    asked = [requests(3, seed=0), [replace(r, max_new_tokens=1) for r in requests(1, seed=1)]]
    want = [greedy(model, a) for a in asked]

    def work(group):
        generator, told = generator_of(group, tmp_path, model)
        limits = generator.open()
        mine, ep = asked[group.rank], generator.rank.ep
        generator.submit(mine)
        moved = generator.move(random(len(ep.layers), ep.num_experts, group.size, seed=3), 1.0)
        told.wait_for(*want[group.rank])
        status, batches = generator.status(), generator.batches
        generator.close(hard=False)  # once no rank has anything left
        return told, moved, status, batches.idle_passes, limits, generator.note

    results = ranks(2, work)
    for (told, moved, status, _, limits, note), expected in zip(results, want, strict=True):
        assert told.tokens == expected
        assert moved.moves > 0
        assert status.tokens == sum(map(len, expected.values()))
        assert status.passes > 0
        assert status.pass_seconds > 0
        assert bool(note) == (name in STATIC)
        assert limits.context == 64
    assert results[1][3] > 0  # its one request ends after one pass


def test_a_model_that_could_be_paged_gives_the_same_tokens_in_static_batches(ranks, tmp_path):
    model = saved("qwen3_moe", tmp_path)
    asked = requests(3, seed=0)
    asked.append(replace(asked[0], id="alike", max_new_tokens=4, logprobs=2))  # in one batch with the first
    want = {**greedy(model, asked[:3]), "alike": greedy(model, asked[:1])["0-0"][:4]}

    def work(group):
        generator, told = generator_of(group, tmp_path, model)
        generator.note = "as if it did not fit"
        generator.open()
        if group.rank == 0:
            generator.submit(asked)
            told.wait_for(*want)
        generator.close(hard=False)
        return told

    told = ranks(2, work)[0]
    assert told.tokens == want
    assert [p.token for p in told.logprobs["alike"]] == want["alike"]


def drawn(ranks, size, tmp_path, model, asked):
    def work(group):
        generator, told = generator_of(group, tmp_path, model)
        generator.open()
        mine = asked[group.rank :: group.size]
        generator.submit(mine)
        told.wait_for(*(r.id for r in mine))
        generator.close(hard=False)
        return told

    results = ranks(size, work)
    return {k: v for told in results for k, v in told.tokens.items()}, results


def test_a_seed_gives_the_same_tokens_on_any_number_of_ranks(ranks, tmp_path):
    model = saved("qwen3_moe", tmp_path)
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.95)
    asked = [replace(r, sampling=replace(sampling, seed=i), eos=(), logprobs=3) for i, r in enumerate(requests(4, 5))]
    alone, told = drawn(ranks, 1, tmp_path, model, asked)
    together, _ = drawn(ranks, 2, tmp_path, model, asked)
    assert alone == together
    assert len({tuple(t) for t in alone.values()}) == len(asked)
    again = [replace(r, sampling=replace(sampling, seed=9)) for r in asked[:1]]
    assert drawn(ranks, 1, tmp_path, model, again)[0][asked[0].id] != alone[asked[0].id]
    request = asked[0]
    ids = torch.tensor([[*request.prompt, *alone[request.id]]])
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
    for logprob, row in zip(told[0].logprobs[request.id], plain, strict=True):
        assert logprob.logprob == pytest.approx(float(row[logprob.token]), abs=1e-4)
        assert [t for t, _ in logprob.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("static", [False, True])
def test_a_cancelled_request_ends_and_the_others_do_not(ranks, tmp_path, static):
    model = saved("qwen3_moe", tmp_path)
    (long,), others = requests(1, seed=7), requests(2, seed=8)
    long = replace(long, max_new_tokens=32, eos=())
    want = greedy(model, others)
    over = threading.Event()

    def work(group):
        generator, told = generator_of(group, tmp_path, model, "generate.requests=4")
        generator.note = "static" if static else ""
        generator.open()
        if group.rank == 0:
            cancel = [long.id, "unknown"]
            told.first = lambda id: generator.submit(others, cancel) if id == long.id else None
            generator.submit([long])
            told.wait_for(long.id, *want)
            over.set()
        over.wait(60)
        generator.close(hard=False)
        return told

    told = ranks(2, work)[0]
    assert told.done[long.id] == CANCELLED
    assert len(told.tokens[long.id]) < 32
    assert {k: v for k, v in told.tokens.items() if k in want} == want


def test_the_longest_request_that_is_let_in_has_room(ranks, tmp_path):
    model = saved("qwen3_moe", tmp_path)
    (prompt,) = prompts(1, seed=2)

    def work(group):
        generator, told = generator_of(group, tmp_path, model, "generate.cache_tokens=48")
        limits = generator.open()
        full = Request(id="full", prompt=prompt, max_new_tokens=limits.context - len(prompt))
        generator.submit([full, replace(full, id="another")])
        told.wait_for("full", "another")
        generator.close(hard=False)
        return limits.context, {k: len(v) for k, v in told.tokens.items()}

    for context, lengths in ranks(2, work):
        assert context == 48
        assert lengths == {"full": 48 - len(prompt), "another": 48 - len(prompt)}


def test_a_placement_that_does_not_fit_is_refused_and_requests_go_on(ranks, tmp_path):
    model = saved("qwen3_moe", tmp_path)
    asked = requests(1, seed=4)

    def work(group):
        generator, told = generator_of(group, tmp_path, model)
        generator.note = ""
        generator.open()
        with pytest.raises(PlacementError):
            generator.move(random(5, 8, 2), 1.0)
        generator.submit(asked)
        told.wait_for(asked[0].id)
        generator.close(hard=False)
        return told.tokens

    assert ranks(2, work)[1] == greedy(model, asked)


def test_whoever_is_open_is_told_when_all_stop_at_once(ranks, tmp_path):
    model = saved("qwen3_moe", tmp_path)
    asked = [replace(r, max_new_tokens=30, eos=()) for r in requests(1, seed=3)]

    def work(group, static):
        generator, told = generator_of(group, tmp_path, model)
        generator.note = "static" if static else ""
        generator.open()
        generator.submit(asked)
        generator.close(hard=True)
        told.wait_for(asked[0].id)
        return told.done[asked[0].id]

    for static in (False, True):
        for done in ranks(2, lambda group: work(group, static)):
            assert done == "length" or "stop" in done or "finished before" in done


@pytest.mark.parametrize("size", [2, *slow(1, 3)])
def test_scores_are_those_of_plain_transformers(ranks, tmp_path, size):
    model = saved("qwen3_moe", tmp_path)
    rows = [Row(p, first=1 + i % 2) for i, p in enumerate(prompts(5, seed=6))]

    def work(group):
        generator, _ = generator_of(group, tmp_path, model)
        return generator.score(rows if group.rank == 0 else rows[:1] * (group.rank == 1))

    results = ranks(size, work)
    for row, scored in zip(rows, results[0], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.tokens])).logits[0].log_softmax(-1)
        targets = torch.tensor(row.tokens[row.first :])
        own = logits[row.first - 1 : -1]
        assert scored.logprob == pytest.approx(float(own.gather(1, targets[:, None]).sum()), abs=1e-4)
        assert scored.greedy == bool((own.argmax(-1) == targets).all())


def test_a_rank_whose_pass_fails_releases_the_others(ranks, tmp_path):
    model = saved("qwen3_moe", tmp_path)
    wrong = Request(id="wrong", prompt=(1, 2, 999), max_new_tokens=NEW)  # which admission would have refused
    begun, there = threading.Event(), threading.Event()

    def work(group):
        generator, told = generator_of(group, tmp_path, model)
        generator.note = ""
        generator.open()
        mine = wrong if group.rank else Request(id="mine", prompt=(1, 2, 3), max_new_tokens=30)
        told.first = lambda id: (begun.set(), there.wait(30)) if group.rank == 0 else None
        if group.rank:
            begun.wait(30)
        generator.submit([mine])
        if group.rank:
            there.set()
        told.wait_for(mine.id)
        generator.batches._generation_thread.join(30)
        return told.done[mine.id], generator.failed

    (first, lost), (second, own) = ranks(2, work)
    assert "index out of range" in second
    assert "index out of range" in own
    assert first == lost != "length"
    assert "index" not in lost


def test_batches_are_of_one_length(ranks, tmp_path):
    model = saved("qwen3_moe", tmp_path)

    def work(group):
        rank = rank_of(group, tmp_path, model, "generate.requests=2")
        batches = WholeBatches(rank.model, _NoRounds(), rank.cfg.generate, None)
        for n, length in enumerate((3, 4, 3, 3)):
            batches._waiting.append(Request(id=str(n), prompt=(1,) * length, max_new_tokens=2))
        return [[r.id for r in batches._next()] for _ in range(4)]

    assert ranks(1, work)[0] == [["0", "2"], ["1"], ["3"], []]


class _NoRounds:
    """Nobody is met."""
