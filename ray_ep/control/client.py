"""A client of a run's control, for the command line and other programs. Loads neither torch nor Ray."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from ray_ep.control.address import Target, ended
from ray_ep.control.tls import channel_credentials
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.run.claim import holder
from ray_ep.errors import BadInput, ControlError

WAIT_S = 600.0
"""Seconds that a change is waited for: steps and saves of large models take minutes."""
LOOK_S = 30.0
"""Seconds that an answer is waited for that needs no step."""
GONE_S = 1.0
"""Seconds within which a process that was killed is gone."""
MESSAGE_BYTES = 64 << 20
"""Of an answer that is taken."""

M = TypeVar("M", bound=Message)

_METHODS = {m.input_type.name: m for m in pb.DESCRIPTOR.services_by_name["ControlService"].methods}
_BAD = (
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED,
)  # fmt: skip
_FOREIGN = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)


def mutation(epoch: int | None = None, version: int | None = None) -> pb.Mutation:
    """A change under an id of its own.

    Args:
        epoch, version: of the membership and of the placement that it is meant for; None: whatever they are.
    """
    return pb.Mutation(request_id=uuid.uuid4().hex, if_epoch=epoch, if_placement_version=version)


class Client:
    """Calls of one control; a context manager. A call's message names it: `client.call(pb.PauseRequest(…))`.

    Args:
        target: where, see `address.target_of`.
    """

    def __init__(self, target: Target):
        """Nothing is sent yet. Raises BadInput: a certificate cannot be read."""
        self.target = target
        options = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
        if target.tls:
            credentials = channel_credentials(target.ca, target.cert, target.key)
            self._channel = grpc.secure_channel(target.address, credentials, options)
        else:
            self._channel = grpc.insecure_channel(target.address, options)
        self._metadata = (("authorization", f"Bearer {target.token}"),)

    def __enter__(self) -> Client:
        """Ready."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Connections are closed."""
        self._channel.close()

    def call(self, request: Message, limit_s: float = LOOK_S) -> Any:
        """The answer, of the message's own kind.

        Raises:
            BadInput: it can never be, or not in the run's present state; or the caller has no right.
            ControlError: it was tried and failed, the run has changed meanwhile, or it does not answer within
                `limit_s`; its words say which.
        """
        method = _METHODS[request.DESCRIPTOR.name]
        try:
            raw = self._path(method)(request.SerializeToString(), limit_s, metadata=self._metadata)
        except grpc.RpcError as e:
            begun = "; if it was begun, it is carried out" if "mutation" in request.DESCRIPTOR.fields_by_name else ""
            self._raise(e, f"no answer within {limit_s:g} s{begun}")
        return GetMessageClass(method.output_type).FromString(raw)

    def watch(self, every_s: float = 1.0) -> Iterator[pb.RunStatus]:
        """The run's status, now and after each change, until it has ended; errors as of `call`."""
        request = pb.WatchStatusRequest(every_seconds=every_s)
        method = _METHODS[request.DESCRIPTOR.name]
        answers, heard = self._path(method)(request.SerializeToString(), metadata=self._metadata), False
        try:
            for raw in answers:
                heard = True
                yield pb.WatchStatusResponse.FromString(raw).status
        except grpc.RpcError as e:
            self._raise(e, heard=heard)
        finally:
            answers.cancel()

    def _path(self, method: Any) -> Any:
        kind = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        return kind(f"/{method.containing_service.full_name}/{method.name}")

    def _raise(self, e: Any, late: str = "", heard: bool = False) -> NoReturn:
        """As an error of ours.

        Args:
            late: what to say of a deadline. heard: whether it was the run that has answered before.
        """
        code, words = e.code(), " ".join(str(e.details()).split())
        run = Path(self.target.run) if self.target.run else None
        if code in _FOREIGN and run is not None and gone(run):
            raise ControlError(ended(run)) from None
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ControlError(f"{self.target.said()}: {late or words}") from None
        if code is grpc.StatusCode.UNAVAILABLE and words.startswith("the run has ended"):
            raise ControlError(f"{self.target.said()}: {words}") from None
        if code in _FOREIGN and heard:
            raise ControlError(f"{self.target.said()}: the connection is lost ({words}): has the run ended?") from None
        if code in _FOREIGN:
            raise ControlError(f"{self.target.address}: {self._who(words)}") from None
        error = BadInput if code in _BAD else ControlError
        raise error(f"{self.target.said()}: {words}") from None

    def _who(self, words: str) -> str:
        """What is at an address where no control of a run has answered."""
        host, _, port = self.target.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except (OSError, OverflowError) as e:
            return f"nobody listens there ({getattr(e, 'strerror', None) or e}): has the run ended?"
        secured = "with TLS" if self.target.tls else "without TLS"
        return (
            f"what listens there is no control of a run that can be talked to {secured} ({words}): another program, a "
            "control with TLS where none was asked for (--ca), or a certificate that is out of date, of another host, "
            "or unknown here"
        )


def gone(run: Path) -> bool:
    """Whether nobody runs there any more: a process that is killed gives its connections up first, then its lock."""
    limit = time.monotonic() + GONE_S
    while holder(run, unknown={}) is not None:
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True
