"""Pages that compare: a table, sentences and charts in the look of a run's page, as one self-contained file.

Used for plans, simulated clusters and disturbed runs, which say what is on them. sheet.js draws. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_ep.observe.page.html import whole_page

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Heat:
    """A heat map.

    Args:
        name: of a file that holds it alone. values: [rows, columns].
        unit: of a value. ratio: values are multiples of a mean (colours around 1), else amounts from 0 up.
        top: the value of the strongest colour, the same in maps that are to be compared; None: of this one.
        rows, columns: what they are. parted: columns (and rows, of a square) before which a line is drawn.
    """

    name: str
    title: str
    values: np.ndarray
    unit: str
    ratio: bool
    rows: str
    columns: str
    top: float | None = None
    parted: Sequence[int] = ()

    @property
    def reach(self) -> float:
        """The value of the strongest colour: of a ratio, 2 at least and 8 at most."""
        if self.top is not None:
            return self.top
        finite = self.values[np.isfinite(self.values) & (self.values > 0)]
        if not self.ratio:
            return float(finite.max(initial=1e-9))
        return float(2.0 ** np.clip(np.abs(np.log2(finite)).max(initial=1.0), 1.0, 3.0))

    def tree(self) -> dict[str, Any]:
        """For sheet.js."""
        values = np.where(np.isfinite(self.values), self.values, 0.0)
        return {
            "kind": "heat", "title": self.title, "values": values.tolist(), "unit": self.unit, "ratio": self.ratio,
            "rows": self.rows, "columns": self.columns, "top": self.reach, "parted": list(self.parted),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lines:
    """Curves over one axis.

    Args:
        curves: points of each by its name. x, y: what the axes are. log: x by doublings.
        low: least of y; None: as drawn.
        stairs: curves that keep their value until the next point.
        marks: (x, name, until) of what happened; names of a kind have one colour; `until` None: at a moment.
    """

    title: str
    curves: Mapping[str, Points]
    x: str
    y: str
    log: bool = False
    low: float | None = None
    stairs: Sequence[str] = ()
    marks: Sequence[tuple[float, str, float | None]] = field(default_factory=tuple)

    def tree(self) -> dict[str, Any]:
        """For sheet.js."""
        finite = {name: [p for p in points if np.isfinite(p).all()] for name, points in self.curves.items()}
        curves = [
            {"name": name, "x": [x for x, _ in points], "y": [y for _, y in points], "stairs": name in self.stairs}
            for name, points in finite.items()
        ]
        marks = [{"x": x, "name": name, "until": until} for x, name, until in self.marks]
        return {
            "kind": "lines", "title": self.title, "curves": curves, "x": self.x, "y": self.y, "log": self.log,
            "low": self.low, "marks": marks,
        }  # fmt: skip


def sheet_page(
    title: str,
    notes: Sequence[str],
    table: Sequence[Sequence[str]],
    legend: str,
    words: tuple[str, Sequence[str]],
    charts: Sequence[Heat | Lines],
) -> str:
    """One self-contained HTML page.

    Args:
        table: its first row is its head. legend: what its columns mean. words: a heading and sentences.
    """
    head, *rows = table
    data = {
        "notes": list(notes), "head": list(head), "rows": [list(row) for row in rows], "legend": legend,
        "words_title": words[0], "words": list(words[1]), "charts": [chart.tree() for chart in charts],
    }  # fmt: skip
    return whole_page(title, data, "sheet")
