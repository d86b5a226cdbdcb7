"""A small engine of one process: a plain transformers model, all open requests in turn, a token of each at a time."""

import contextlib
import queue
import threading

import torch
from transformers import DynamicCache

from ray_ep.errors import RequestError
from ray_ep.rank.generate.admission import refusal
from ray_ep.rank.generate.requests import CANCELLED, ERROR, LENGTH, STOP, Delta, Limits, RankStatus, TokenLogprob


class _Open:
    def __init__(self, request):
        self.request, self.cache, self.left = request, DynamicCache(), request.max_new_tokens
        self.ids = torch.tensor([request.prompt])
        seed = request.sampling.seed
        self.generator = torch.Generator().manual_seed(seed) if seed is not None else torch.Generator()
        if seed is None:
            self.generator.seed()


class LocalEngine:
    """As `ray_ep.serve.answering.Answering`; `pace`, when given, is waited for before each round of tokens."""

    def __init__(self, model, on_deltas, context=64, requests=8, pace=None):
        self.model, self._deliver, self.pace = model, on_deltas, pace
        self.limits = Limits(vocabulary=model.config.vocab_size, context=context, cache_tokens=1024, requests=requests)
        self.failed = ""
        self.open, self.cancelled, self.rounds = {}, set(), 0
        self._coming = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request):
        why = self.failed or refusal(request, self.limits)
        if why:
            raise RequestError(why)
        self._coming.put(request)

    def cancel(self, id):
        self._coming.put(id)

    def status(self):
        cached = sum(r.cache.get_seq_length() for r in list(self.open.values()))
        return [RankStatus(rank=0, requests=len(self.open), cached_tokens=cached)]

    def stop(self):
        self._coming.put(None)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def break_down(self, why):
        """From now on nothing is answered, as after the loss of a rank."""
        self.failed = why
        self._coming.put("")

    def _run(self):
        while True:
            with contextlib.suppress(queue.Empty):
                while True:
                    item = self._coming.get(block=not self.open)
                    if item is None:
                        self._deliver([Delta(id=i, done=CANCELLED) for i in self.open])
                        return
                    if isinstance(item, str):
                        if self.open.pop(item, None):
                            self.cancelled.add(item)
                            self._deliver([Delta(id=item, done=CANCELLED)])
                    else:
                        self.open[item.id] = _Open(item)
            if self.failed:
                self._deliver([Delta(id=i, done=ERROR, error=self.failed) for i in self.open])
                self.open.clear()
            if self.pace and self.open:
                self.pace()
            self.rounds += 1
            try:
                self._deliver([self._step(one) for one in list(self.open.values())])
            except Exception as e:
                self.failed = f"a rank failed: {e!r}"  # told in the next round

    @torch.no_grad()
    def _step(self, one):
        logits = self.model(input_ids=one.ids, past_key_values=one.cache).logits[0, -1].float()
        token, r = int(self._choose(logits, one)), one.request
        one.ids, one.left = torch.tensor([[token]]), one.left - 1
        done = STOP if token in r.eos else LENGTH if not one.left else ""
        if done:
            del self.open[r.id]
        told = ()
        if r.logprobs is not None:
            all_ = logits.log_softmax(-1)
            top = all_.topk(r.logprobs)
            pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            told = (TokenLogprob(token, float(all_[token]), pairs),)
        return Delta(id=r.id, tokens=(token,), done=done, logprobs=told)

    def _choose(self, logits, one):
        s = one.request.sampling
        if not s.temperature:
            return logits.argmax()
        p = (logits / s.temperature).softmax(-1)
        if s.top_k:
            p[p < p.topk(min(s.top_k, len(p))).values[-1]] = 0
        order = p.sort(descending=True)
        p[order.indices[order.values.cumsum(0) - order.values >= s.top_p * p.sum()]] = 0
        return torch.multinomial(p, 1, generator=one.generator)
