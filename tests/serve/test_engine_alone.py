"""The engine over one rank of this process, and the lm-evaluation-harness on it. With Ray: tests/distributed."""

import json
import math
import threading

import pytest
import torch

from ray_ep.driver.interrupt import Interrupt
from ray_ep.errors import BadInput, PlacementError, RequestError
from ray_ep.placement import contiguous, random
from ray_ep.rank.generate.requests import CANCELLED, Request, Sampling
from ray_ep.serve.checked import Checked, Text
from ray_ep.serve.engine import engine_on
from ray_ep.serve.job import answer_on
from ray_ep.serve.prompts import Prompt
from tests.rank.generate.answering import Told, configured, greedy, requests, saved
from tests.serve.local_ranks import LocalRanks


@pytest.fixture
def alone(tmp_path):
    model = saved("qwen3_moe", tmp_path)
    ranks = LocalRanks(tmp_path, model)
    ranks.generator.note = ""
    yield configured(tmp_path), model, ranks
    ranks.generator.close(hard=True)


def test_requests_are_answered_and_what_cannot_be_is_refused(alone):
    cfg, model, ranks = alone
    told, asked = Told(), requests(3, seed=1)
    with engine_on(cfg, ranks, told) as it:
        [it.submit(r) for r in asked]
        with pytest.raises(PlacementError):
            it.move(random(3, 8, 1))
        it.submit(Request(id="drawn", prompt=(5,), max_new_tokens=3, sampling=Sampling(temperature=1.0)))
        with pytest.raises(RequestError, match="not in the model's vocabulary"):
            it.submit(Request(id="wrong", prompt=(64,), max_new_tokens=1))
        told.wait_for("drawn", *(r.id for r in asked))
        (status,) = it.status()
        assert (status.outstanding_tokens, status.requests) == (0, 0)
    assert told.tokens.pop("drawn")
    assert told.tokens == greedy(model, asked)
    with pytest.raises(RequestError, match="stopped"):
        it.submit(asked[0])


def test_what_is_open_is_told_apart_cancelled_and_failed_with_the_ranks(alone):
    cfg, _, ranks = alone
    told, open_ = Told(), threading.Event()
    told.first = lambda id: (open_.set(), hold.wait(30)) if id == "long" else None  # the engine's thread waits here
    hold = threading.Event()
    with engine_on(cfg, ranks, told) as it:
        it.submit(Request(id="long", prompt=(5, 6), max_new_tokens=60))
        assert open_.wait(30)
        with pytest.raises(RequestError, match="'long' is open"):
            it.submit(Request(id="long", prompt=(5,), max_new_tokens=1))
        assert it.status()[0].outstanding_tokens > 0
        it.cancel("long")
        it.cancel("unknown")
        hold.set()
        told.wait_for("long")
        assert told.done["long"] in (CANCELLED, "length")  # it may have been at its end

        ranks.lost = "rank 0 on host died: killed"

        def until_refused():
            for n in range(10_000):
                it.submit(Request(id=f"{n}", prompt=(5,), max_new_tokens=60))
                told.wait_for(f"{n}")

        with pytest.raises(RequestError, match="rank 0"):
            until_refused()
    assert "rank 0 on host died" in it.failed


def test_all_prompts_of_a_job_are_answered_however_many_there_are(alone):
    cfg, model, ranks = alone
    asked, answers = requests(5, seed=2), []
    prompts = [Prompt(list(r.prompt), r) for r in asked]
    tokens = answer_on(cfg, ranks, prompts, answers.append, Interrupt())
    assert {a.prompt.request.id: list(a.tokens) for a in answers} == greedy(model, asked)
    assert tokens == sum(len(a.tokens) for a in answers)


TASKS = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{w}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.mark.slow
def test_tasks_of_the_harness_have_the_figures_of_one_process(alone, tmp_path, monkeypatch):
    harness = pytest.importorskip("ray_ep.serve.harness")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cfg, model, ranks = alone
    text = Text(lambda t: [3 + b % 61 for b in t.encode()], lambda ids: "".join(chr(48 + i) for i in ids), None, 64)
    checked = Checked(model.config, contiguous(2, 8, 1), text, (2,), 64, ())

    @torch.no_grad()
    def logprob(context, continuation):
        ids = torch.tensor([[*context, *continuation]])
        rows = model(input_ids=ids).logits[0].log_softmax(-1)[len(context) - 1 : -1]
        return float(rows.gather(1, ids[0, len(context) :, None]).sum())

    questions = ["one plus one is", "the sky looks", "dogs like to"]
    tokens = [text.encode(q) for q in questions]
    best = [max(range(3), key=lambda c: logprob(q, text.encode(f" {'abc'[c]}"))) for q in tokens]
    given = [(best[0] + 1) % 3, *best[1:]]  # the first one wrongly
    asked = [Request(id=str(i), prompt=tuple(q), max_new_tokens=6) for i, q in enumerate(tokens)]
    written = [text.decode(t[:-1] if t[-1] == 2 else t) for t in greedy(model, asked).values()]
    docs = [{"q": q, "c": ["a", "b", "c"], "a": a, "w": w} for q, a, w in zip(questions, given, written, strict=True)]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"our_{name}", "test_split": "test", **data, **task}))

    names = [f"our_{name}" for name in TASKS]
    manager = harness.check_tasks(names, str(folder))
    with pytest.raises(BadInput, match="knows no nothing_such"):
        harness.check_tasks(["nothing_such"], str(folder))
    found = harness.run_tasks(harness.RanksLM(cfg, checked, ranks, 64, Interrupt()), names, manager, None)
    assert found["our_choices"]["acc,none"] == pytest.approx(2 / 3)
    whole, size = sum(logprob([2], q) for q in tokens), sum(len(q.encode()) for q in questions)
    assert found["our_rolling"]["bits_per_byte,none"] == pytest.approx(-whole / math.log(2) / size, rel=1e-4)
    assert found["our_written"]["exact_match,none"] == 1
