"""Reads the records of sampled tokens of a run; a file that is damaged, or goes meanwhile, is left out and named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from pyarrow import parquet

from ray_ep.errors import BadInput
from ray_ep.observe.provenance.files import FOLDER, parts_of
from ray_ep.observe.provenance.table import SCHEMA

_SHOWN = 8
"""Tokens that a refusal names."""
_OF_TOKEN = ("step", "request", "position", "batch_row", "batch_column", "text")


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token: of a training step at a position of the global batch, or of a request."""

    step: int | None
    request: str | None
    position: int
    row: int
    column: int
    text: str

    def words(self) -> str:
        """For people."""
        return f"{self.position} ({self.row}:{self.column}) {self.text!r}"


class Records:
    """The records of one run.

    Attributes:
        damaged: names of files that could not be read so far.

    Raises:
        BadInput: there are none.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.damaged = run_dir, []  # type: tuple[Path, list[str]]
        if not (run_dir / "config.yaml").is_file():
            raise BadInput(f"{str(run_dir)!r} is not a run directory: it has no config.yaml")
        self.parts = parts_of(run_dir)
        if not self.parts:
            raise BadInput(
                f"{str(run_dir / FOLDER)!r} has no records of tokens: train with provenance.sample=0.01, or another "
                "share; a run that goes on has the first after a minute"
            )

    def read(self, columns: Sequence[str], where: pc.Expression, step: int | None = None) -> pa.Table:
        """Rows for which `where` holds; `step` spares the files of other steps."""
        found = []
        for part in self.parts:
            if step is None or part.first <= step <= part.last:
                try:
                    found.append(parquet.read_table(part.path, columns=list(columns), filters=where))
                except (OSError, pa.ArrowException):
                    self.damaged = sorted({*self.damaged, part.path.name})
        if not found:
            return pa.table({name: [] for name in columns})
        return pa.concat_tables(found, promote_options="default")

    def steps(self) -> dict[int, int]:
        """How many tokens were recorded of each step."""
        table = self.read(("step", "position"), pc.field("step").is_valid() & (pc.field("choice") == 0))
        tokens = table.group_by(["step", "position"]).aggregate([])  # each is there once a layer
        steps, counts = np.unique(tokens.column("step").to_numpy(), return_counts=True)
        return dict(zip(steps.tolist(), counts.tolist(), strict=True))

    def tokens(self, step: int | None, request: str | None) -> list[Token]:
        """Those of a step, or of a request, by position. Raises BadInput: none were recorded."""
        table = self.read(_OF_TOKEN, _which(step, request), step)
        if not len(table) and request is not None:
            raise BadInput(f"request {request!r}: no token of it was recorded in {self.run_dir / FOLDER}")
        if not len(table):
            raise BadInput(f"step {step}: no token of it was recorded; {self._there()}")
        _, first = np.unique(table.column("position").to_numpy(), return_index=True)
        return [Token(*(row[name] for name in _OF_TOKEN)) for row in table.take(pa.array(first)).to_pylist()]

    def of_token(self, step: int | None, request: str | None, position: int) -> list[dict[str, Any]]:
        """All rows of one recorded token, by layer and choice."""
        here = _which(step, request) & (pc.field("position") == position)
        rows: list[dict[str, Any]] = self.read(SCHEMA.names, here, step).to_pylist()
        return sorted(rows, key=lambda row: (row["layer"], row["choice"]))

    def of_layer(self, layer: int, columns: Sequence[str]) -> pa.Table:
        """The rows of one MoE layer in all steps. Raises BadInput: there is no such layer."""
        table = self.read(columns, pc.field("layer") == layer)
        if not len(table):
            layers = pc.max(self.read(("layer",), pc.field("choice") == 0).column("layer")).as_py()
            if layers is None:
                raise BadInput(f"layer {layer}: {self._there()} in {self.run_dir / FOLDER}")
            raise BadInput(f"layer {layer}: there are records of MoE layers 0 to {layers}")
        return table

    def _there(self) -> str:
        steps = list(self.steps())
        if not steps:
            return "no file of records can be read"
        some = ", ".join(map(str, steps[:_SHOWN])) + (", ..." if len(steps) > _SHOWN else "")
        return f"there are records of {len(steps)} steps from {min(steps)} to {max(steps)}: {some}"


def chosen(tokens: Sequence[Token], word: str) -> Token:
    """The token that `word` means, a position or ROW:COLUMN.

    Raises:
        BadInput: none is; the message names those that were recorded, next to it.
    """
    found = re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", word.strip())
    if found is None:
        raise BadInput(f"--token {word!r}: expected a position such as 17, or ROW:COLUMN such as 0:17")
    asked = tuple(int(n) for n in found.groups() if n is not None)

    def away(token: Token) -> tuple[int, ...]:
        place = (token.position,) if len(asked) == 1 else (token.row, token.column)
        return tuple(abs(a - b) for a, b in zip(place, asked, strict=True))

    near = sorted(tokens, key=away)
    if not any(away(near[0])):
        return near[0]
    first = near[0]
    which = f"step {first.step}" if first.request is None else f"request {first.request!r}"
    some = ", ".join(t.words() for t in near[:_SHOWN])
    raise BadInput(f"{which}: token {word} was not sampled; {len(near)} of its tokens were, next to it: {some}")


def _which(step: int | None, request: str | None) -> pc.Expression:
    return pc.field("request") == request if request is not None else pc.field("step") == step
