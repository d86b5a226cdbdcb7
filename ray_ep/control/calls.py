"""One call over the network: who makes it, its message, and how it is refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from ray_ep.control.keys import Key

MESSAGE_S = 10.0
"""Seconds within which the message of a call must have come."""

M = TypeVar("M")


class Denied(Exception):
    """A call is answered with this code and sentence."""

    def __init__(self, code: grpc.StatusCode, words: str):
        super().__init__(words)
        self.code, self.words = code, words


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls; `key` None: nobody who may."""

    key: Key | None
    certificate: str
    where: str

    @property
    def name(self) -> str:
        """For people: which token, and whose certificate."""
        shown = f", certificate of {self.certificate}" if self.certificate else ""
        return f"{self.key.name}{shown}" if self.key else ""

    def __str__(self) -> str:
        return f"{self.name} from {host_of(self.where)}"


async def only(messages: AsyncIterator[M]) -> M:
    """The message of a call, which takes its place among others until it has come. Raises Denied."""

    async def first() -> M:
        async for message in messages:
            return message
        raise Denied(grpc.StatusCode.INVALID_ARGUMENT, "expected a message")

    try:
        return await asyncio.wait_for(first(), MESSAGE_S)
    except asyncio.TimeoutError:
        raise Denied(grpc.StatusCode.DEADLINE_EXCEEDED, f"no message came within {MESSAGE_S:g} s") from None


def parsed(method: Any, raw: bytes) -> Any:
    """The message of a call, from its bytes."""
    try:
        return GetMessageClass(method.input_type).FromString(raw)
    except DecodeError:
        raise Denied(grpc.StatusCode.INVALID_ARGUMENT, f"expected a {method.input_type.full_name}") from None


def host_of(peer: str) -> str:
    """The address of a peer without its port, which tells people nothing: of ipv4:10.0.3.17:40100, 10.0.3.17."""
    found = re.fullmatch(r"ipv[46]:(.+):\d+", unquote(peer))
    return found[1] if found else peer
