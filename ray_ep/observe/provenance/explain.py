"""What one expert did, over all records of a run: which tokens it answered for, and which text it prefers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from ray_ep.errors import BadInput
from ray_ep.observe.provenance.path import shown
from ray_ep.observe.provenance.preference import DOCUMENTS, Preference, preferences
from ray_ep.observe.provenance.reader import Records

EXAMPLES = 10
"""Tokens that are shown, each of another document as far as there are so many."""

_COLUMNS = (
    "step", "request", "position", "document", "offset", "text", "before", "after", "choice", "expert", "weight",
    "rank", "host",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """A token that the expert answered for."""

    step: int | None
    request: str | None
    position: int
    document: int | None
    text: str
    before: str
    after: str
    weight: float
    rank: int
    host: str

    def words(self) -> str:
        """In one line."""
        which = f"step {self.step}" if self.request is None else f"request {self.request}"
        text = f"{shown(self.before)}[{shown(self.text)}]{shown(self.after)}"
        return f"{which}, token {self.position}, weight {self.weight:.2f}, rank {self.rank}: {text}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an expert did. A token of the training text counts once, as it was recorded last.

    Args:
        tokens: recorded of the layer. answered: of them, by this expert. documents: that the tokens are of.
        answered_in: documents in which it answered.
        even: share of the tokens that it would have if all experts had the same.
    """

    layer: int
    expert: int
    tokens: int
    answered: int
    documents: int
    answered_in: int
    even: float
    preferences: list[Preference]
    examples: list[Example]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def words(self) -> str:
        """The figures in one sentence, and what they cannot say."""
        share = self.answered / max(self.tokens, 1)
        said = (
            f"layer {self.layer}, expert {self.expert}: answered for {self.answered:,} of {self.tokens:,} recorded "
            f"tokens ({share:.1%}; an even share is {self.even:.1%}), "
            f"in {self.answered_in} of {self.documents} documents."
        )
        if self.documents < DOCUMENTS:
            return f"{said} What it prefers is not told: that takes records of {DOCUMENTS} documents at least."
        if not self.preferences:
            return f"{said} No text is surely preferred: more records may tell (provenance.sample, more steps)."
        return said


def explain(records: Records, layer: int, expert: int, experts: int) -> Explanation:
    """Count over all records of a run.

    Args:
        experts: of a layer.

    Raises:
        BadInput: there is no such layer or expert.
    """
    if not 0 <= expert < experts:
        raise BadInput(f"expert {expert}: a layer has experts 0 to {experts - 1}")
    table = records.of_layer(layer, _COLUMNS)
    width = int(pc.max(table.column("choice")).as_py()) + 1
    key, step = _keys(table), table.column("step").fill_null(0).to_numpy()
    tokens, number = np.unique(key, return_inverse=True)
    last = np.zeros(len(tokens), step.dtype)
    np.maximum.at(last, number, step)
    kept = step == last[number]
    table, key = table.filter(pa.array(kept)), key[kept]
    its = np.equal(table.column("expert").to_numpy(), expert)
    tokens, first = np.unique(key, return_index=True)
    answered = np.isin(tokens, key[its])
    documents = _documents(table)[first]
    texts = table.column("text").take(pa.array(first)).to_pylist()
    return Explanation(
        layer=layer,
        expert=expert,
        tokens=len(tokens),
        answered=int(answered.sum()),
        documents=len(np.unique(documents)),
        answered_in=len(np.unique(documents[answered])),
        even=width / experts,
        preferences=preferences([t or "" for t in texts], documents, answered),
        examples=_examples(table.filter(pa.array(its))),
    )


def _keys(table: pa.Table) -> np.ndarray:
    """int64 [rows] what a token is known by: its place in the training text, or request and position."""
    offset = table.column("offset").fill_null(-1).to_numpy()
    return np.where(offset >= 0, offset, -1 - (_requests(table) << 40) - table.column("position").to_numpy())


def _documents(table: pa.Table) -> np.ndarray:
    """A number for each row's document; each request is one."""
    document = table.column("document").fill_null(-1).to_numpy()
    numbers: np.ndarray = np.where(document >= 0, document, -1 - _requests(table))
    return numbers


def _requests(table: pa.Table) -> np.ndarray:
    """int64 [rows] a number for each request; that of training steps, which have none, is one, too."""
    coded = table.column("request").combine_chunks().dictionary_encode()
    return np.asarray(coded.indices.fill_null(-1).to_numpy() + 1, np.int64)


def _examples(table: pa.Table) -> list[Example]:
    """The tokens with the greatest weights, of as many documents as there are."""
    order = np.argsort(-table.column("weight").to_numpy(), kind="stable")
    document = _documents(table)[order]
    _, first = np.unique(document, return_index=True)
    ahead = np.concatenate([np.sort(first), np.setdiff1d(np.arange(len(order)), first)])[:EXAMPLES]
    rows = table.take(pa.array(order[ahead])).select(list(Example.__slots__)).to_pylist()
    return [Example(**row) for row in rows]
