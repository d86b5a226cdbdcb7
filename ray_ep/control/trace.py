"""The path of a token as a message of v1/control.proto, from the records that ranks keep (observe.provenance)."""

from __future__ import annotations

from pathlib import Path

from ray_ep.control.messages import text
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.errors import BadInput
from ray_ep.observe.provenance.path import Hop, path_of
from ray_ep.observe.provenance.reader import Records, Token
from ray_ep.observe.state import RunState

TOKENS = 10_000
"""That are told at most of a step or a request."""

_LAST = 2**62  # no run makes so many steps, and Parquet's numbers end not far from there


def trace(run: Path, request: pb.TraceRequest) -> pb.TraceResponse:
    """What was recorded of a step or a request, or of one token of it. Raises BadInput: nothing was."""
    of_step = request.WhichOneof("of") == "step"
    step, name = (min(request.step, _LAST), None) if of_step else (None, request.request_id)
    records = Records(run)
    tokens = records.tokens(step, name)
    if not request.HasField("position"):
        return pb.TraceResponse(tokens=[_token(t) for t in tokens[:TOKENS]])
    chosen = [t for t in tokens if t.position == request.position]
    if not chosen:
        raise BadInput(f"position={request.position}: that token was not recorded; {len(tokens)} others were")
    state = RunState(run)
    newest = state.placements.newest
    now = None if newest is None else newest.version
    path = path_of(records.of_token(step, name, request.position), state.why, now)
    return pb.TraceResponse(
        tokens=[_token(chosen[0])],
        hops=[_hop(layer, hop) for layer, hops in path.layers.items() for hop in hops],
        placement_version=path.version,
        epoch=path.epoch,
    )


def _token(token: Token) -> pb.Token:
    return pb.Token(position=token.position, row=token.row, column=token.column, text=text(token.text or ""))


def _hop(layer: int, hop: Hop) -> pb.Hop:
    place = hop.place
    return pb.Hop(
        layer=layer, choice=hop.choice, expert=hop.expert, weight=hop.weight, kind=hop.kind, rank=place.rank,
        node=place.node, host=place.host, device=place.device, why=hop.why,
    )  # fmt: skip
