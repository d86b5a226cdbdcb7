"""What all verbs share that talk to a run: its address, its token, what a change carries, and its answer in print."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from ray_ep.control.client import Client
    from ray_ep.control.v1 import control_pb2 as pb

Command = Callable[..., Any]


class Seconds(click.FloatRange):
    """A time that a clock can wait."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As a float. Fails for what is out of range, and for nan."""
        found = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is no time", param, ctx) if math.isnan(found) else found


def number(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """What a message can count of what was typed."""
    if value is not None and not 0 <= value < 1 << 64:
        raise click.BadParameter(f"{value} is not in the range of 0 to {(1 << 64) - 1}", ctx, param)
    return value


def text(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """What a message can carry of what was typed: Unicode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise click.BadParameter(f"{value!r} is not UTF-8", ctx, param) from None
    return value


_ACCESS = (
    click.argument("where", metavar="RUN_OR_ADDRESS"),
    click.option(
        "--token-file", default="", envvar="RAY_AUTH_TOKEN_PATH", metavar="FILE",
        help="Token to show, in a file (0600); RUN's own if not given. For HOST:PORT also from RAY_AUTH_TOKEN_PATH.",
    ),
    click.option("--ca", default="", metavar="FILE", help="PEM file of who signed its certificate; else the system's."),
    click.option("--cert", default="", metavar="FILE", help="PEM certificate to show, where clients must (mTLS)."),
    click.option("--key", default="", metavar="FILE", help="Its private key, of mode 0600."),
    click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON line."),
)  # fmt: skip
_CHANGE = (
    click.option(
        "--request-id", default="", callback=text, metavar="ID",
        help="The same id again changes nothing; a new one if not given.",
    ),
    click.option("--if-epoch", type=int, callback=number, metavar="N", help="Only if the ranks are of this epoch."),
    click.option(
        "--if-placement-version", type=int, callback=number, metavar="N",
        help="Only if the placement has this version.",
    ),
    click.option(
        "--wait", "limit_s", type=Seconds(0, 1e6, min_open=True), default=600.0, show_default=True, metavar="S",
        help="Seconds for the answer; then the request is taken back, unless it was begun.",
    ),
)  # fmt: skip


def access(command: Command) -> Command:
    """RUN_OR_ADDRESS, and the options that say how to reach it."""
    for option in reversed(_ACCESS):
        command = option(command)
    return command


def change(command: Command) -> Command:
    """As `access`, and the options of every change of a run."""
    for option in reversed(_CHANGE):
        command = option(command)
    return access(command)


def client(where: str, given: dict[str, Any]) -> Client:
    """A client of the run that the options of `access` name. Raises BadInput."""
    from ray_ep.control.address import is_run, target_of
    from ray_ep.control.client import Client

    named = click.get_current_context().get_parameter_source("token_file") is not ParameterSource.ENVIRONMENT
    token_file = given["token_file"] if named or not is_run(where) else ""  # a run has a token of its own
    return Client(target_of(where, token_file, given["ca"], given["cert"], given["key"]))


def mutation(given: dict[str, Any]) -> pb.Mutation:
    """What the options of `change` say."""
    from ray_ep.control.client import mutation as new

    made = new(given["if_epoch"], given["if_placement_version"])
    if given["request_id"]:
        made.request_id = given["request_id"]
    return made


def carry_out(where: str, given: dict[str, Any], request: Message) -> None:
    """Ask for a change, and print what came of it. Raises BadInput, ControlError."""
    try:
        with client(where, given) as it:
            answer = it.call(request, given["limit_s"])
    except KeyboardInterrupt:
        click.echo("ray-ep: the request is taken back, unless it was begun", err=True)
        raise
    click.echo(as_json(answer) if given["as_json"] else answer.outcome.words)


def as_json(message: Message) -> str:
    """One line, with the names of control.proto and every field."""
    from google.protobuf.json_format import MessageToDict

    tree = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(tree)
