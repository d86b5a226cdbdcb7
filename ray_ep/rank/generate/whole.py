"""Static batches: prompts of one length go through `model.generate` together, until the last of them has its answer.

For models whose state transformers' paged cache does not keep (Mamba layers, say). Lengths are not mixed, so nothing is
padded and tokens are those of `generate`. B requests of a batch, P tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus

from ray_ep.config.schema import GenerateConfig
from ray_ep.rank.generate.batches import Batches
from ray_ep.rank.generate.lockstep import FLUSH, HARD, NAP_S, Lockstep
from ray_ep.rank.generate.requests import CANCELLED, ERROR, GOES_ON, LENGTH, STOP, Delta, Request, TokenLogprob
from ray_ep.rank.generate.sampling import next_tokens

Tell = Callable[[list[Delta]], None]
"""Is given what is new of requests."""


class StoppedError(Exception):
    """All ranks have agreed to stop now."""


class _Batch:
    """What `generate` asks after each pass: the next token of each request, and who has all of them."""

    def __init__(self, requests: list[Request], cancelled: set[str], tell: Tell):
        self.requests, self.cancelled, self.tell = requests, cancelled, tell
        self.open = {r.id for r in requests}
        self.logprobs: dict[str, TokenLogprob] = {}
        self.given = 0  # tokens of each answer so far

    def choose(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] -> the same, with nothing left but the token that was chosen."""
        chosen = torch.full_like(scores, -torch.inf)
        found = next_tokens(scores, self.requests, [self.given] * len(self.requests))
        chosen[range(len(found)), [token for token, _ in found]] = 0
        self.logprobs.update((r.id, told) for r, (_, told) in zip(self.requests, found, strict=True) if told)
        return chosen

    def ended(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """ids [B, P + n] after the n-th token -> [B], whose answer is whole. Tells the tokens."""
        self.given += 1
        pairs = zip(self.requests, ids[:, -1].tolist(), strict=True)
        deltas = [self._delta(request, token) for request, token in pairs if request.id in self.open]
        self.open -= {d.id for d in deltas if d.done}
        self.tell(deltas)
        return torch.tensor([r.id not in self.open for r in self.requests], device=ids.device)

    def _delta(self, request: Request, token: int) -> Delta:
        if request.id in self.cancelled:
            return Delta(id=request.id, done=CANCELLED)
        done = STOP if token in request.eos else LENGTH if self.given == request.max_new_tokens else GOES_ON
        logprob = self.logprobs.get(request.id)
        return Delta(id=request.id, tokens=(token,), done=done, logprobs=(logprob,) if logprob else ())


class WholeBatches(Batches):
    """A loop over one rank's requests, one batch after the other. The arguments are those of `PagedBatches`."""

    def __init__(self, model: Any, lockstep: Lockstep, cfg: GenerateConfig, tell: Tell):
        self.model, self.lockstep, self.cfg, self.tell = model.eval(), lockstep, cfg, tell
        self._status, self._wake = BackgroundThreadStatus(), threading.Event()
        self._lock = threading.Lock()
        self._waiting: list[Request] = []
        self._open: set[str] = set()
        self._cancelled: set[str] = set()
        self._cached = 0
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        lockstep.has_work = bool  # each round says it

    @property
    def longest(self) -> int:
        return int(self.cfg.cache_tokens)

    @property
    def cached_tokens(self) -> int:
        return self._cached

    @property
    def failed(self) -> str:
        return str(self._status.fatal_error or "")

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        with self._lock:
            why = self._status.can_accept_new_requests()
            if why is None:
                self._open.add(request.id)
                self._waiting.append(request)
        if why is not None:
            self.tell([Delta(id=request.id, done=ERROR, error=why)])
        self._wake.set()

    def cancel(self, id: str) -> None:
        with self._lock:
            waits = next((r for r in self._waiting if r.id == id), None)
            if waits is not None:
                self._waiting.remove(waits)
                self._open.discard(id)
            elif id in self._open:
                self._cancelled.add(id)  # its batch sees it after the next token
        if waits is not None:
            self.tell([Delta(id=id, done=CANCELLED)])

    def wake(self) -> None:
        self._wake.set()

    @contextmanager
    def pause(self) -> Iterator[None]:
        self._status.acquire_pause(self._wake)
        try:
            yield
        finally:
            self._status.release_pause()

    def end(self, hard: bool) -> None:
        self._status.request_stop(HARD if hard else FLUSH, self.lockstep.group.rank)
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        hooks = [
            self.model.register_forward_pre_hook(self._before_pass),
            self.model.register_forward_hook(self._after_pass),
        ]
        try:
            while self._turn():
                pass
            self._fail("generation was stopped")
        except StoppedError:
            self._fail("generation was stopped")
        except Exception as e:
            self.lockstep.group.close()  # the others wait for this rank: this releases them
            self._status.record_fatal_error(e)
            self._fail(str(e))
        finally:
            for hook in hooks:
                hook.remove()
            self._status.mark_as_stopped()

    def _turn(self) -> bool:
        """One batch, or one round without; False: the loop ends."""
        batch = self._next()
        if batch:
            self._generate(batch)
            return True
        stop = self._agree(work=False)
        if stop == HARD:
            return False
        if self.lockstep.any_work:
            self.idle()
        elif stop == FLUSH:
            return False
        else:
            self._wake.wait(NAP_S)
            self._wake.clear()
        return True

    def _next(self) -> list[Request]:
        """The oldest requests of the oldest one's length, as many as there is room for."""
        with self._lock:
            alike = [r for r in self._waiting if len(r.prompt) == len(self._waiting[0].prompt)]
            batch: list[Request] = []
            most = 0
            for request in alike[: self.cfg.requests]:
                most = max(most, len(request.prompt) + request.max_new_tokens)
                if batch and most * (len(batch) + 1) > self.cfg.cache_tokens:
                    break
                batch.append(request)
            self._waiting = [r for r in self._waiting if r not in batch]
        return batch

    @torch.no_grad()
    def _generate(self, requests: list[Request]) -> None:
        batch = _Batch(requests, self._cancelled, self._tell)
        ids = torch.tensor([r.prompt for r in requests], device=self.model.device)  # [B, P]
        most = max(r.max_new_tokens for r in requests)
        settings: Any = GenerationConfig(do_sample=False, max_new_tokens=most, pad_token_id=0)  # type: ignore[no-untyped-call]
        self._cached = len(requests) * (ids.shape[1] + most)
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings,
            logits_processor=LogitsProcessorList([batch.choose]),
            stopping_criteria=StoppingCriteriaList([batch.ended]),
        )  # fmt: skip
        self._cached = 0

    def _tell(self, deltas: list[Delta]) -> None:
        """Of a batch, after a pass over it."""
        self.tokens += sum(len(d.tokens) for d in deltas)
        with self._lock:
            over = {d.id for d in deltas if d.done}
            self._open -= over
            self._cancelled -= over
        self.tell(deltas)

    def _before_pass(self, module: Any, args: Any) -> None:
        """Each pass of `generate` is one round."""
        if self._agree(work=True) == HARD:
            raise StoppedError
        self._began = time.perf_counter()

    def _after_pass(self, module: Any, args: Any, output: Any) -> None:
        self.passes += 1
        self.pass_seconds += time.perf_counter() - self._began

    def _agree(self, work: bool) -> int:
        paused = self._status.is_pause_requested()
        _, stop, pause = self.lockstep.tp_all_reduce_state(int(work), self._status.local_status, int(paused))
        self._status.update_with_tp_status(stop)
        if stop != HARD and pause:
            self._status.pause_and_wait()
        return int(stop)

    def _fail(self, error: str) -> None:
        with self._lock:
            failed, self._open, self._waiting = list(self._open), set(), []
        if failed:
            self.tell([Delta(id=id, done=ERROR, error=error) for id in failed])
