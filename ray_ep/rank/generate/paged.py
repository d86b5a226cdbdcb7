"""Continuous batching: transformers' own manager on every rank, in lockstep. Its scheduler, cache and thread are its.

The seam is internal to transformers; tests/rank/generate/test_seam.py holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.model_runner import ModelRunner, infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from ray_ep.config.schema import GenerateConfig
from ray_ep.rank.generate.batches import Batches
from ray_ep.rank.generate.lockstep import FLUSH, HARD, NAP_S, Lockstep
from ray_ep.rank.generate.mla import padded_values, room_for_keys
from ray_ep.rank.generate.requests import CANCELLED, ERROR, LENGTH, STOP, Delta, Request, TokenLogprob
from ray_ep.rank.generate.sampling import next_tokens

PAGE = 16
"""Tokens of a page of the cache."""

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what it says of errors is told in deltas


class _Errors(OutputRouter):
    """Requests that transformers gives up; all else is told by the manager itself."""

    def __init__(self, tell: Callable[[str, str], None]):
        super().__init__()
        self.tell = tell

    def deliver(self, output: Any) -> None:
        if output.error is not None:
            self.tell(output.request_id, output.error)

    def deliver_batch(self, outputs: Any) -> None:
        """Ends of requests: `PagedBatches` sees them itself."""


class _Runner(ModelRunner):
    """Chooses tokens request by request."""

    requests: dict[str, Request]
    logprobs: dict[str, TokenLogprob]

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """scores [1, n, V] of the n requests that get a token -> output_ids [0, :n]."""
        batch: Any = self.inputs_and_outputs
        states = [f.state for f in batch.requests_in_batch if f.has_new_token]
        requests = [self.requests[state.request_id] for state in states]
        found = next_tokens(scores[0, : len(states)], requests, [_given(state) for state in states])
        output_ids[0, : len(states)] = torch.tensor([token for token, _ in found])
        self.logprobs.update((r.id, told) for r, (_, told) in zip(requests, found, strict=True) if told)


def _given(state: RequestState) -> int:
    """Tokens of the answer so far: a request that had to give its pages up has some of them in its prompt."""
    before = len(state.initial_tokens) - state._true_initial_tokens if state._true_initial_tokens else 0
    return before + len(state.generated_tokens)


class PagedBatches(ContinuousBatchingManager, Batches):
    """A loop over one rank's requests: each pass has whatever tokens are due.

    Args:
        model: parallelized. lockstep: with the other ranks.
        tell: is given what is new, from the loop's thread.
    """

    def __init__(self, model: Any, lockstep: Lockstep, cfg: GenerateConfig, tell: Callable[[list[Delta]], None]):
        settings = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=-(-cfg.cache_tokens // PAGE), max_batch_tokens=cfg.pass_tokens,
            max_requests_per_batch=cfg.requests, max_blocks_per_request=0, auto_switch_to_flash=False,
            use_cuda_graph=False, use_async_batching=False,  # layers exchange, which the host plans
        )  # fmt: skip
        greedy = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
        super().__init__(model, greedy, settings)
        self.distributed_helper = self.lockstep = lockstep
        self.tell = tell
        self.output_router = _Errors(self._failed)
        self.requests: dict[str, Request] = {}
        self.logprobs: dict[str, TokenLogprob] = {}
        self._cancelled: set[str] = set()
        self.current_batch = 0
        self._padded = ExitStack()
        self._padded.enter_context(padded_values(model))
        self.batch_processor = self._create_batch_processor()

    def _create_batch_processor(self) -> Any:
        if self.batch_processor is not None:
            return self.batch_processor
        with room_for_keys(self.model.config.get_text_config()):
            processor = super()._create_batch_processor()
        self.lockstep.has_work = processor.scheduler.has_pending_requests
        runner: Any = processor.model_runner
        runner.__class__ = _Runner
        runner.requests, runner.logprobs = self.requests, self.logprobs
        return processor

    @property
    def longest(self) -> int:
        """Tokens of the longest request, answer included, that the cache holds."""
        processor: Any = self.batch_processor
        return int(infer_max_single_request_tokens(processor.cache))

    @property
    def cached_tokens(self) -> int:
        """Of the cache, that are in use; about."""
        processor = self.batch_processor
        if processor is None:
            return 0
        return int((1 - processor.cache.compute_free_capacity()) * processor.cache.num_blocks * PAGE)

    def submit(self, request: Request) -> None:
        self.requests[request.id] = request
        taken = self.add_request(
            list(request.prompt), request.id, request.max_new_tokens, eos_token_id=list(request.eos)
        )
        if taken is None:
            why = self.background_thread_status.fatal_error or "generation has stopped"
            self._failed(request.id, str(why))

    def cancel(self, id: str) -> None:
        if id in self.requests:
            self.cancel_request(id)
            self._cancelled.add(id)

    def wake(self) -> None:
        self._wake_up_loop.set()

    @property
    def failed(self) -> str:
        return str(self.background_thread_status.fatal_error or "")

    def end(self, hard: bool) -> None:
        if self.is_running():
            self.stop(hard_stop=hard)
        self._padded.close()

    @torch.no_grad()
    def answer(self, request: Request) -> None:
        """Compute one request without the thread (collective: every rank has one that takes as many passes)."""
        self.submit(request)
        while request.id in self.requests:
            self._generation_loop_body(self.batch_processor, bootstrapping=False)

    def _generation_loop_body(self, processor: Any, bootstrapping: bool) -> bool:
        """One round: agree, then a pass over own tokens, or an idle one, or none; False: the loop ends."""
        try:
            ready = processor.prepare_next_batch()
            self._tell_cancelled(processor)
        except Exception:
            if self.lockstep.any_work:
                self.idle()  # the others are on their way into this round's pass; in the next one they hear of the end
            raise
        stop = self.background_thread_status.tp_status
        if ready:
            self._pass(processor)
        elif stop == HARD:
            return False
        elif self.lockstep.any_work:
            self.idle()
        elif stop == FLUSH:
            return False
        else:
            self._wake_up_loop.wait(timeout=NAP_S)
            self._wake_up_loop.clear()
        return True

    def _pass(self, processor: Any) -> None:
        try:
            with self.timed():
                self._generation_step()
        except Exception:
            self.lockstep.group.close()  # the others wait in a layer's exchange: this releases them
            raise
        self.current_batch += 1
        self.passes += 1
        told = [f.state for f in processor.inputs_and_outputs.requests_in_batch if f.has_new_token]
        processor.update_batch()
        self.tell([self._delta(state) for state in told])

    def _delta(self, state: RequestState) -> Delta:
        """Of a request that has got one token."""
        request, token = self.requests[state.request_id], state.generated_tokens[-1]
        done = (STOP if token in request.eos else LENGTH) if state.status == RequestStatus.FINISHED else ""
        logprob = self.logprobs.pop(request.id, None)
        if done:
            self.requests.pop(request.id)
        self.tokens += 1
        return Delta(id=request.id, tokens=(token,), done=done, logprobs=(logprob,) if logprob else ())

    def _tell_cancelled(self, processor: Any) -> None:
        """A cancelled request is dropped by transformers without a word."""
        scheduler, waiting = processor.scheduler, {state.request_id for state in list(self.input_queue.queue)}
        known = (waiting, scheduler.active_requests, scheduler.waiting_requests)
        gone = [id for id in list(self._cancelled) if not any(id in ids for ids in known)]
        self._cancelled -= set(gone)
        told = [Delta(id=id, done=CANCELLED) for id in gone if self.requests.pop(id, None)]
        if told:
            self.tell(told)

    def _fail_all_remaining_requests(self, error: Exception, batch_processor: Any) -> None:
        """The loop has ended. What it took from the queue in its last round is known to no scheduler."""
        super()._fail_all_remaining_requests(error, batch_processor)
        for id in list(self.requests):
            self._failed(id, str(error))

    def _failed(self, id: str, error: str) -> None:
        if self.requests.pop(id, None):
            self.tell([Delta(id=id, done=ERROR, error=error)])
