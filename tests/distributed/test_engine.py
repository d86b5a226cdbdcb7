"""The engine on real rank actors: requests while experts move, refusals, cancellation, and a rank that is killed."""

import os
import signal
import threading

import pytest
import torch
from transformers import GenerationConfig

from ray_ep.config import load_config
from ray_ep.driver.interrupt import Interrupt
from ray_ep.errors import PlacementError, RequestError
from ray_ep.placement import random
from ray_ep.rank.generate.requests import CANCELLED, Request, Sampling
from ray_ep.serve.checked import check_checkpoint
from ray_ep.serve.engine import engine
from tests.models import build
from tests.rank.generate.answering import Told

NEW = 16


def request(id, text, new=NEW, **more):
    return Request(id=id, prompt=tuple(text.encode()), max_new_tokens=new, **more)


def greedy(model, it):
    how = GenerationConfig(do_sample=False, max_new_tokens=it.max_new_tokens, pad_token_id=0)
    return model.generate(torch.tensor([it.prompt]), generation_config=how)[0, len(it.prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_requests_go_on_while_experts_move_and_end_with_a_killed_rank(cluster, tmp_path):
    model = build("qwen3_moe", vocab_size=256, max_position_embeddings=4096)
    model.generation_config = GenerationConfig()
    model.save_pretrained(tmp_path)
    few = ["cluster.cpus_per_rank=0.5", f"cluster.address={cluster.driver}", "cluster.wait_s=300"]
    cfg = load_config(None, [f"model.path={tmp_path}", *few])
    told, asked = Told(), [request(f"r{i}", f"request {i}") for i in range(6)]
    with engine(cfg, check_checkpoint(cfg), told, Interrupt()) as it:
        assert it.note == ""
        assert it.limits.context == 4096
        for one in asked:
            it.submit(one)
        assert it.move(random(2, 8, 2, seed=1)) > 0
        with pytest.raises(PlacementError):
            it.move(random(3, 8, 2))
        drawn = request("drawn", "x", sampling=Sampling(temperature=1.0), logprobs=1)
        it.submit(drawn)
        told.wait_for("drawn", *(r.id for r in asked))
        assert {r.id: told.tokens[r.id] for r in asked} == {r.id: greedy(model, r) for r in asked}
        assert len(told.logprobs["drawn"]) == NEW
        with pytest.raises(RequestError, match="not in the model's vocabulary"):
            it.submit(Request(id="wrong", prompt=(256,), max_new_tokens=1))

        begun = threading.Event()
        told.first = lambda id: begun.set() if id == "long" else None
        it.submit(request("long", "y", new=4000))
        with pytest.raises(RequestError, match="'long' is open"):
            it.submit(request("long", "z"))
        assert begun.wait(60)
        it.cancel("long")
        it.cancel("unknown")
        told.wait_for("long")
        assert told.done["long"] == CANCELLED
        status = it.status()
        assert [s.rank for s in status] == [0, 1]
        assert all(s.passes for s in status)
        assert sum(s.outstanding_tokens for s in status) == 0

        for id in ("one", "two"):  # one on each rank
            it.submit(request(id, "y", new=4000))
        assert sorted(s.requests for s in it.status()) == [1, 1]
        os.kill(it._ranks.where[1]["pid"], signal.SIGKILL)
        told.wait_for("one", "two")
        assert "rank 1" in told.done["one"] == told.done["two"] == it.failed
        assert "died" in it.failed
        with pytest.raises(RequestError, match="rank 1"):
            it.submit(request("late", "a"))
