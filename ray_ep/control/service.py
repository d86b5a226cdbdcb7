"""The calls of v1/control.proto: who may make them, what they become in the driver's queue, and what is answered.

Every call runs in the server's event loop; nothing here waits for the driver in any other way.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from ray_ep.control.audit import ASKED, Audit, Entry
from ray_ep.control.board import Board
from ray_ep.control.calls import Caller, Denied, only, parsed
from ray_ep.control.keys import Key, Role, opened_by
from ray_ep.control.messages import placement_message, placement_of, proper_id, proposal_message, text
from ray_ep.control.once import Known, Once, Other, TooMany
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.rebalance.rebalancer import beside
from ray_ep.driver.requests import Answer, Request, RequestKind, Requests, Where, Why
from ray_ep.errors import BadInput, PlacementError
from ray_ep.placement import Placement
from ray_ep.placement.planner.verdict import Question
from ray_ep.placement.whatif.propose import Proposal, misfit, propose

SERVICE = pb.DESCRIPTOR.services_by_name["ControlService"]
"""Its calls, as control.proto has them."""

CODES = {
    Why.NEVER: grpc.StatusCode.INVALID_ARGUMENT,
    Why.UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Why.NOT_NOW: grpc.StatusCode.FAILED_PRECONDITION,
    Why.CHANGED: grpc.StatusCode.ABORTED,
    Why.FAILED: grpc.StatusCode.INTERNAL,
    Why.ENDED: grpc.StatusCode.UNAVAILABLE,
}
"""What a driver's refusal is called on the wire."""


WATCHERS = 768
"""At once, of the server's CALLS: who looks leaves room for who steers."""
TRACES = 2
"""Tokens that are looked up at once: each reads files."""
NO_TOKEN = "expected `authorization: Bearer TOKEN` with a token of this run: there was none, or a wrong one"
"""What a caller without a right hears."""

log = logging.getLogger("ray_ep.control")


class Service:
    """The service of one run.

    Args:
        keys: that open it. requests: the driver's queue. board: the run's status. placements: reads one by version.
        traces: reads a token's path; raises BadInput.
        audit: is told of every change that is asked for.
    """

    def __init__(
        self,
        keys: Iterable[Key],
        requests: Requests,
        board: Board,
        placements: Callable[[int], Placement | None],
        traces: Callable[[pb.TraceRequest], pb.TraceResponse],
        audit: Audit,
    ):
        self.keys, self.requests, self.board, self.audit = keys, requests, board, audit
        self._placements, self._traces, self._once = placements, traces, Once()
        self._tracing = asyncio.Semaphore(TRACES)
        self._predicting = asyncio.Lock()
        self._planning: Future[Proposal] | None = None  # one at a time: it takes a processor, also when nobody waits

    def knows(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether a caller shows a token of this run."""
        return opened_by(self.keys, metadata) is not None

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server: every call of the service.

        Messages come as streams of bytes, each of one: who has no right is refused before any has come.
        """
        made: dict[str, grpc.RpcMethodHandler] = {}
        for method in SERVICE.methods:
            if method.server_streaming:
                made[method.name] = grpc.stream_stream_rpc_method_handler(partial(self._stream, method))
            else:
                made[method.name] = grpc.stream_unary_rpc_method_handler(partial(self.called, method))
        return grpc.method_handlers_generic_handler(SERVICE.full_name, made)

    def _work(self, method: Any) -> Any:
        return getattr(self, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method.name).lower())

    async def called(self, method: Any, raw: bytes | AsyncIterator[bytes], context: Any) -> bytes:
        """The answer to one call of SERVICE that is no stream, whichever way it came.

        Args:
            raw: its message, or what brings that.
            context: a `grpc.aio.ServicerContext`, or what has its invocation_metadata, auth_context, peer and abort.
        """
        began, caller, asked = time.monotonic(), self._caller(context), ""
        changes = "mutation" in method.input_type.fields_by_name
        entry = partial(self._entry, method.name, caller, began)
        try:
            self._admit(caller, Role.OPERATOR if changes else Role.VIEWER)
            asked = request = parsed(method, raw if isinstance(raw, bytes) else await only(raw))
            if changes and (why := self.audit.write(entry(request, ASKED, ""))):
                raise Denied(grpc.StatusCode.FAILED_PRECONDITION, f"no change is made without its record: {why}")
            answer: Message = await self._work(method)(request, caller)
        except Denied as e:
            if changes:
                self.audit.write(entry(asked, e.code.name, e.words))
            await context.abort(e.code, text(e.words))
        except asyncio.CancelledError:
            if changes:
                self.audit.write(entry(asked, "CANCELLED", "the caller gave it up; if it was begun, it is carried out"))
            raise
        except Exception as e:  # a mistake of ours: the run goes on
            log.exception("control what=%s", method.name)
            if changes:
                self.audit.write(entry(asked, "INTERNAL", f"{type(e).__name__}: {e}"))
            await context.abort(grpc.StatusCode.INTERNAL, f"{method.name} failed: the driver's log says why")
        if changes:
            self.audit.write(entry(asked, "OK", answer.outcome.words))  # type: ignore[attr-defined]
        return answer.SerializeToString()

    async def _stream(self, method: Any, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            self._admit(self._caller(context), Role.VIEWER)
            async for answer in self._work(method)(parsed(method, await only(messages))):
                yield answer
        except Denied as e:
            await context.abort(e.code, text(e.words))

    def _caller(self, context: Any) -> Caller:
        names = context.auth_context().get("x509_common_name") or [b""]
        shown = "".join(c if c.isprintable() else "?" for c in names[0].decode("utf-8", "replace")[:200])
        return Caller(opened_by(self.keys, context.invocation_metadata() or ()), shown, context.peer())

    @staticmethod
    def _admit(caller: Caller, least: Role) -> None:
        if caller.key is None:
            raise Denied(grpc.StatusCode.UNAUTHENTICATED, NO_TOKEN)
        if least is Role.OPERATOR and caller.key.role is not Role.OPERATOR:
            words = f"{caller.key.name} opens for viewers: they look, and change nothing"
            raise Denied(grpc.StatusCode.PERMISSION_DENIED, words)

    @staticmethod
    def _entry(what: str, caller: Caller, began: float, asked: Any, result: str, words: str) -> Entry:
        number = asked.mutation.request_id if asked else ""
        fields = asked.ListFields() if asked else ()
        shown = ", ".join(f"{f.name}={value!r}" for f, value in fields if f.message_type is None)[:300]
        role = caller.key.role.value if caller.key else ""
        took = round(time.monotonic() - began, 6)
        return Entry(caller.name, role, caller.where, what, number, shown, result, words[:1000], took)

    async def status(self, request: pb.StatusRequest, caller: Caller) -> pb.StatusResponse:
        """What the run is at now."""
        return pb.StatusResponse.FromString(await self.board.now())

    async def watch_status(self, request: pb.WatchStatusRequest) -> AsyncIterator[bytes]:
        """The same, now and after each change."""
        every = request.every_seconds or 1.0
        if not 0.2 <= every <= 3600:
            raise Denied(grpc.StatusCode.INVALID_ARGUMENT, f"every_seconds={every:g}: allowed are 0.2 to 3600, or 0")
        if self.board.watchers >= WATCHERS:
            raise Denied(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS} watch already: ask for the status instead")
        async for answer in self.board.watch(every):
            yield answer

    async def get_placement(self, request: pb.GetPlacementRequest, caller: Caller) -> pb.GetPlacementResponse:
        """Which expert sits where."""
        version = request.version if request.HasField("version") else self.requests.where().version
        placement = await asyncio.to_thread(self._placements, version)
        if placement is None:
            raise Denied(grpc.StatusCode.NOT_FOUND, f"version={version}: the run has no placement of that version")
        return pb.GetPlacementResponse(placement=placement_message(placement))

    async def propose_placement(
        self, request: pb.ProposePlacementRequest, caller: Caller
    ) -> pb.ProposePlacementResponse:
        """What a placement, or the planner's, is predicted to bring."""
        found, where = await self._predicted(self._placement(request), caller)
        return proposal_message(found, where.epoch, where.version)

    async def trace(self, request: pb.TraceRequest, caller: Caller) -> pb.TraceResponse:
        """Which expert on which rank computed for a token."""
        if request.WhichOneof("of") is None:
            raise Denied(grpc.StatusCode.INVALID_ARGUMENT, "expected a step or a request_id")
        async with self._tracing:
            try:
                return await asyncio.to_thread(self._traces, request)
            except BadInput as e:
                raise Denied(grpc.StatusCode.NOT_FOUND, str(e)) from None

    async def rebalance(self, request: pb.RebalanceRequest, caller: Caller) -> pb.RebalanceResponse:
        """Plan now; answered with the decision."""
        outcome, _ = await self._change(RequestKind.REBALANCE, request, caller, with_fields())
        return pb.RebalanceResponse(outcome=outcome)

    async def apply_placement(self, request: pb.ApplyPlacementRequest, caller: Caller) -> pb.ApplyPlacementResponse:
        """Move experts; what that is predicted to bring is found out first, beside the steps."""
        placement = self._placement(request)
        if placement is None:
            raise Denied(grpc.StatusCode.INVALID_ARGUMENT, "placement: none was given")

        async def fields() -> dict[str, Any]:
            try:
                found, _ = await self._predicted(placement, caller)
            except Denied as e:
                if e.code is grpc.StatusCode.FAILED_PRECONDITION:  # no step was made to predict by
                    return {"placement": placement, "verdict": None}
                raise
            return {"placement": placement, "verdict": found.verdict}

        outcome, _ = await self._change(RequestKind.APPLY, request, caller, fields)
        return pb.ApplyPlacementResponse(outcome=outcome)

    async def drain(self, request: pb.DrainRequest, caller: Caller) -> pb.DrainResponse:
        """All ranks leave a node."""
        if not 0 < len(request.node) <= 256:
            raise Denied(grpc.StatusCode.INVALID_ARGUMENT, "node: expected an id, a host's name or an address")
        fields = with_fields(node=request.node, undo=request.undo)
        outcome, _ = await self._change(RequestKind.DRAIN, request, caller, fields)
        return pb.DrainResponse(outcome=outcome)

    async def scale(self, request: pb.ScaleRequest, caller: Caller) -> pb.ScaleResponse:
        """Go on with so many ranks."""
        outcome, _ = await self._change(RequestKind.SCALE, request, caller, with_fields(ranks=request.ranks))
        return pb.ScaleResponse(outcome=outcome)

    async def checkpoint(self, request: pb.CheckpointRequest, caller: Caller) -> pb.CheckpointResponse:
        """Write a checkpoint."""
        outcome, url = await self._change(RequestKind.CHECKPOINT, request, caller, with_fields())
        return pb.CheckpointResponse(outcome=outcome, url=text(url or ""))

    async def pause(self, request: pb.PauseRequest, caller: Caller) -> pb.PauseResponse:
        """Make no further step."""
        outcome, _ = await self._change(RequestKind.PAUSE, request, caller, with_fields())
        return pb.PauseResponse(outcome=outcome)

    async def resume(self, request: pb.ResumeRequest, caller: Caller) -> pb.ResumeResponse:
        """Go on."""
        outcome, _ = await self._change(RequestKind.RESUME, request, caller, with_fields())
        return pb.ResumeResponse(outcome=outcome)

    async def stop(self, request: pb.StopRequest, caller: Caller) -> pb.StopResponse:
        """Save and end."""
        outcome, _ = await self._change(RequestKind.STOP, request, caller, with_fields())
        return pb.StopResponse(outcome=outcome)

    @staticmethod
    def _placement(request: Any) -> Placement | None:
        """The one that a message holds; None: it holds none."""
        if not request.HasField("placement"):
            return None
        try:
            return placement_of(request.placement)
        except PlacementError as e:
            raise Denied(grpc.StatusCode.INVALID_ARGUMENT, str(e)) from None

    async def _change(
        self, kind: RequestKind, request: Any, caller: Caller, prepare: Callable[[], Awaitable[dict[str, Any]]]
    ) -> tuple[pb.Outcome, Any]:
        """Ask the driver, once for each request id; what came of it, and the answer's value.

        Args:
            prepare: the fields of the driver's request; awaited for a new id alone.
        """
        said = request.mutation
        number, content = said.request_id, kind.value.encode() + request.SerializeToString(deterministic=True)
        if not proper_id(number):
            words = f"mutation.request_id={number[:200]!r}: expected 1 to 128 characters of A-Z a-z 0-9 . _ : -"
            raise Denied(grpc.StatusCode.INVALID_ARGUMENT, words)
        try:
            known = self._once.known(number, content)
            if known is None:
                fields = await prepare()
                known = self._once.known(number, content)  # a repeat may have come meanwhile
            if known is None:
                epoch = said.if_epoch if said.HasField("if_epoch") else None
                version = said.if_placement_version if said.HasField("if_placement_version") else None
                asked = Request(kind, str(caller), fields, epoch, version)
                known = self._once.begin(number, content, asked)
                self._send(asked, known)
        except Other:
            words = f"mutation.request_id={number!r} was given to another request: each has its own"
            raise Denied(grpc.StatusCode.INVALID_ARGUMENT, words) from None
        except TooMany:
            raise Denied(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests wait for the run: ask later") from None
        answer = await self._once.answer(number, known)
        self.board.outdated()
        check(answer)
        where = known.where or self.requests.where()
        words = text(answer.words)
        outcome = pb.Outcome(words=words, step=where.done, epoch=where.epoch, placement_version=where.version)
        return outcome, answer.value

    def _send(self, request: Request, known: Known) -> None:
        """Put a request into the queue, and note where the run is at the moment of its answer."""

        def answered(_: object) -> None:
            known.where = self.requests.where()

        request.answer.add_done_callback(answered)
        self.requests.put(request)

    async def _predicted(self, placement: Placement | None, caller: Caller) -> tuple[Proposal, Where]:
        """What a placement, or the planner's, would bring, and to where."""
        if self._predicting.locked() or (self._planning is not None and not self._planning.done()):
            words = "another placement is being predicted: ask again soon"
            raise Denied(grpc.StatusCode.RESOURCE_EXHAUSTED, words)
        async with self._predicting:  # free, so nobody comes between
            asked = Request(RequestKind.QUESTION, str(caller))
            known = Known(asked.answer, b"")
            self._send(asked, known)
            answer = await asyncio.wrap_future(known.answer)
            check(answer)
            question: Question = answer.value
            if placement is not None and (why := misfit(placement, question.current, question.slots)):
                raise Denied(grpc.StatusCode.INVALID_ARGUMENT, why)
            self._planning = beside(partial(propose, question, placement))
            try:
                found = await asyncio.shield(asyncio.wrap_future(self._planning))
            except BadInput as e:
                raise Denied(grpc.StatusCode.INVALID_ARGUMENT, str(e)) from None
            return found, known.where or self.requests.where()


def with_fields(**fields: Any) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Fields that are known."""

    async def known() -> dict[str, Any]:
        return fields

    return known


def check(answer: Answer) -> None:
    """Raise Denied for what was refused."""
    if answer.refused is not None:
        raise Denied(CODES[answer.refused], answer.words)
