"""Generators on ranks that are threads, and what they tell, to be compared with plain `transformers.generate`."""

import copy
import threading

import torch
from transformers import GenerationConfig

from ray_ep.config import load_config
from ray_ep.moe import find_experts
from ray_ep.placement import contiguous
from ray_ep.rank.generate.generator import Generator
from ray_ep.rank.generate.requests import Request
from ray_ep.rank.model_rank import ModelRank
from tests.models import VOCAB, build

NEW = 10
"""Tokens of an answer, at most."""


class Told:
    """What a rank tells, by request."""

    def __init__(self):
        self.tokens, self.done, self.logprobs = {}, {}, {}
        self.first = lambda id: None  # called with the first token of each request, in the loop's thread
        self.changed = threading.Condition()

    def __call__(self, deltas):
        with self.changed:
            new = [d.id for d in deltas if d.id not in self.tokens]
            for d in deltas:
                assert d.id not in self.done, "a delta after the last one"
                self.tokens.setdefault(d.id, []).extend(d.tokens)
                self.logprobs.setdefault(d.id, []).extend(d.logprobs)
                if d.done:
                    self.done[d.id] = d.error or d.done
            self.changed.notify_all()
        [self.first(id) for id in new]

    def wait(self, condition, limit_s=60):
        with self.changed:
            assert self.changed.wait_for(condition, limit_s), f"told {self.done} of {list(self.tokens)}"

    def wait_for(self, *ids):
        self.wait(lambda: set(ids) <= set(self.done))


def prompts(count, seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 30, (count,), generator=g).tolist()
    return [tuple(torch.randint(3, VOCAB, (n,), generator=g).tolist()) for n in lengths]


def requests(count, seed, **more):
    """Greedy ones, which token 2 ends."""
    asked = prompts(count, seed)
    return [Request(id=f"{seed}-{i}", prompt=p, max_new_tokens=NEW, eos=(2,), **more) for i, p in enumerate(asked)]


def greedy(model, asked):
    """{id: tokens} by one process of transformers."""
    found = {}
    for r in asked:
        how = GenerationConfig(do_sample=False, max_new_tokens=r.max_new_tokens, eos_token_id=2, pad_token_id=0)
        found[r.id] = model.generate(torch.tensor([r.prompt]), generation_config=how)[0, len(r.prompt) :].tolist()
    return found


def saved(name, path):
    """A model of tests/models.py, and its checkpoint."""
    model = build(name)
    model.generation_config = GenerationConfig()
    model.save_pretrained(path)
    return model


def configured(path, *overrides):
    small = ["generate.cache_tokens=256", "generate.pass_tokens=32", "balance.in_step=off"]
    return load_config(None, [f"model.path={path}", *small, *overrides])


def rank_of(group, path, model, *overrides):
    """The rank that has loaded the checkpoint."""
    modules = find_experts(model)
    placement = contiguous(len(modules), next(iter(modules.values())).num_experts, group.size)
    config = copy.deepcopy(model.config)  # each process has its own
    return ModelRank(configured(path, *overrides), config, group, placement)


def generator_of(group, path, model, *overrides):
    """A generator on one rank, and what it tells."""
    told = Told()
    return Generator(rank_of(group, path, model, *overrides), told), told
