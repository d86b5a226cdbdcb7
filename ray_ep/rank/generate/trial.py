"""Which kind of batches a model can have: its answers over the paged cache are held against those of a plain forward.

Nothing here knows a model by name. Every rank tries the same at once (collective) and finds the same.
"""

from __future__ import annotations

from typing import Any

import torch

from ray_ep.config.schema import GenerateConfig
from ray_ep.errors import GroupError, brief
from ray_ep.rank.generate.lockstep import Lockstep
from ray_ep.rank.generate.paged import PAGE, PagedBatches
from ray_ep.rank.generate.requests import Delta, Request

_FAR = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Logarithmic probabilities of a token that are further apart do not come from rounding."""


def fault_of_pages(model: Any, lockstep: Lockstep) -> str:
    """Why a model cannot have `PagedBatches`; "": it can (collective). The model is as before."""
    told: list[Delta] = []
    attention = model.config._attn_implementation
    vocabulary = model.config.get_text_config().vocab_size
    prompt = tuple((7 * i + 3) % vocabulary for i in range(PAGE + 5))
    request = Request(id="trial", prompt=prompt, max_new_tokens=4, logprobs=0)
    try:
        batches = PagedBatches(model, lockstep, _small(), told.extend)
        try:
            batches.answer(request)
        finally:
            batches.end(hard=True)
    except GroupError:
        raise
    except Exception as e:  # whatever a model's attention says of another cache than its own
        return f"its state does not fit transformers' paged cache ({brief(e)})"
    finally:
        model.set_attn_implementation(attention)
    return _difference(model, prompt, told)


def _small() -> GenerateConfig:
    return GenerateConfig(cache_tokens=4 * PAGE, pass_tokens=PAGE, requests=1)


@torch.no_grad()
def _difference(model: Any, prompt: tuple[int, ...], told: list[Delta]) -> str:
    """Why the answer is not the model's own; "": it is."""
    logprobs = [p for delta in told for p in delta.logprobs]
    tokens = [p.token for p in logprobs]
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()  # [n, V]
    plain = logits.log_softmax(-1).gather(-1, torch.tensor(tokens, device=model.device)[:, None])[:, 0]
    apart = float((plain.cpu() - torch.tensor([p.logprob for p in logprobs])).abs().max())
    if apart <= _FAR.get(model.dtype, 0.5):
        return ""
    return f"over transformers' paged cache its logarithmic probabilities are off by {apart:.3g}"
