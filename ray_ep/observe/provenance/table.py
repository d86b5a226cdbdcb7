"""What ranks recorded of steps -> one Arrow table, a row for each choice of each sampled token in each MoE layer. Pure.

n tokens, L MoE layers, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ray_ep.rank.recorded import BEFORE, KINDS, Recorded, StepProvenance

Decode = Callable[[Sequence[int]], str]
"""Ids of tokens that follow each other -> their text."""

_WORD = pa.dictionary(pa.int32(), pa.string())

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),  # of training, from 1; null: a request's
        ("request", pa.string()),  # id; null: a training step's
        ("position", pa.int64()),  # batch_row x batch.length + batch_column
        ("batch_row", pa.int32()),
        ("batch_column", pa.int32()),
        ("token", pa.int32()),  # id
        ("text", _WORD),
        ("before", _WORD),  # text of the tokens before it in its sequence
        ("after", _WORD),
        ("document", pa.int64()),  # number in reading order, of those that are trained on
        ("offset", pa.int64()),  # of the token among all that are trained on
        ("home_rank", pa.int32()),  # that had the token
        ("home_node", _WORD),
        ("home_host", _WORD),
        ("home_device", _WORD),
        ("layer", pa.int32()),  # among the MoE layers
        ("choice", pa.int32()),  # 0: the router's first
        ("expert", pa.int32()),
        ("weight", pa.float32()),
        ("rank", pa.int32()),  # that computed
        ("kind", _WORD),  # primary, replica or guest
        ("node", _WORD),  # Ray's id of it
        ("host", _WORD),
        ("device", _WORD),
        ("placement_version", pa.int32()),
        ("epoch", pa.int32()),  # of the membership that ranks are numbered in
    ],
    metadata={"ray_ep": "provenance 1"},
)
"""Columns of the records; rows are in the order of step, position, layer, choice."""


ROWS = 1 << 17
"""Rows of a table, about: of a step that is recorded whole there may be a hundred millions, too many for memory."""


def tables_of(steps: Sequence[tuple[int, StepProvenance]], decode: Decode) -> Iterator[pa.Table]:
    """The records of some steps, each by its number from 1, as tables of about ROWS rows that follow each other."""
    waiting: list[pa.Table] = []
    for step, provenance in steps:
        for table in _of_step(step, provenance, decode):
            waiting.append(table)
            if sum(map(len, waiting)) >= ROWS:
                yield _one(waiting)
                waiting = []
    if waiting:
        yield _one(waiting)


def _one(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).unify_dictionaries()


def _of_step(step: int, provenance: StepProvenance, decode: Decode) -> Iterator[pa.Table]:
    """The records of one step, some tokens after others."""
    parts = [p for p in provenance.parts if len(p.position)]
    if not parts:
        return
    positions = np.sort(np.concatenate([p.position for p in parts]))
    layers, _, choices = parts[0].experts.shape
    some = max(1, ROWS // max(layers * choices, 1))
    for at in range(0, len(positions), some):
        first, last = positions[at], positions[min(at + some, len(positions)) - 1]
        yield _of_tokens(step, [_between(p, first, last) for p in parts], provenance, decode)


def _between(part: Recorded, first: int, last: int) -> Recorded:
    """The tokens at positions `first` to `last`."""
    mine = (part.position >= first) & (part.position <= last)
    if mine.all():
        return part
    by_token = {name: getattr(part, name)[mine] for name in ("position", "context", "document", "offset")}
    by_layer = {name: getattr(part, name)[:, mine] for name in ("experts", "weights", "ranks", "kinds")}
    return replace(part, **by_token, **by_layer)


def _of_tokens(step: int, parts: Sequence[Recorded], provenance: StepProvenance, decode: Decode) -> pa.Table:
    first, length = parts[0], provenance.length
    positions = np.concatenate([p.position for p in parts])
    order = np.argsort(positions)
    position = positions[order]

    def of_choice(name: str) -> np.ndarray:  # [n, L, K]
        return np.concatenate([getattr(p, name) for p in parts], 1)[:, order].transpose(1, 0, 2)

    experts = of_choice("experts")
    token, layer, choice = np.nonzero(experts >= 0)
    there = token, layer, choice
    seats = provenance.seats
    ranks = of_choice("ranks")[there]
    home = np.repeat([p.rank for p in parts], [len(p.position) for p in parts])[order][token]
    context = _joined(parts, "context")[order]
    before, text, after = (_texts(context[:, cut], decode) for cut in _CUTS)
    whole = np.ones(len(token), np.int64)
    columns = [
        step * whole, pa.nulls(len(token), pa.string()), position[token], position[token] // length,
        position[token] % length, context[token, BEFORE], _words(text, token), _words(before, token),
        _words(after, token), _joined(parts, "document")[order][token], _joined(parts, "offset")[order][token], home,
        *(_words([getattr(s, name) for s in seats], home) for name in ("node", "host", "device")), layer, choice,
        experts[there], of_choice("weights")[there], ranks, _words(list(KINDS), of_choice("kinds")[there]),
        *(_words([getattr(s, name) for s in seats], ranks) for name in ("node", "host", "device")),
        first.version * whole, first.epoch * whole,
    ]  # fmt: skip
    arrays = [c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    return pa.table(arrays, schema=SCHEMA)


_CUTS = slice(0, BEFORE), slice(BEFORE, BEFORE + 1), slice(BEFORE + 1, None)


def _joined(parts: Sequence[Recorded], name: str) -> np.ndarray:
    return np.concatenate([getattr(p, name) for p in parts])


def _texts(ids: np.ndarray, decode: Decode) -> list[str]:
    """Text of each row of ids [n, W], -1 for none."""
    return [decode([i for i in row if i >= 0]) for row in ids.tolist()]


def _words(values: Sequence[str], codes: np.ndarray) -> pa.Array:
    """values[codes], stored once each; null for a negative code."""
    known = pa.array(values, pa.string()).dictionary_encode()
    codes = codes.astype(np.int64)
    return known.take(pa.array(codes.clip(0), mask=codes < 0)).cast(_WORD)
