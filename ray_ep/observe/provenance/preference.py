"""Which text an expert prefers, counted over documents: one document's quirk is not a preference.

Each text of a token (and each class of texts) is compared with the other tokens of the same document: did the expert
answer more often? The 2x2 tables of all documents are put together by Mantel and Haenszel's method (Cochran,
Biometrics 1954; Mantel and Haenszel, J. Natl. Cancer Inst. 1959), which no difference between documents can feign.
What counts is the statistic without the document that speaks for it most, and only what three documents say at least.
Of all texts that were tried, at most one in twenty that are told is told by chance (Benjamini and Hochberg, J. R.
Statist. Soc. B 1995). Pure; NumPy only. n tokens, D documents.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import erfc, sqrt
from typing import Any

import numpy as np

DOCUMENTS = 3
"""Documents at least in which the expert must have answered for a text, beside others that it was not asked for."""
CHANCE = 0.05
"""Share of the texts told that may be told by chance."""

_CLASSES = (
    ("line end", lambda text: "\n" in text or "\r" in text),
    ("white space", str.isspace),
    ("digits", lambda text: text.strip().isdigit()),
    ("capital letters", lambda text: text.strip().isalpha() and text.strip()[0].isupper()),
    ("small letters", lambda text: text.strip().isalpha() and text.strip().islower()),
    ("other letters", lambda text: text.strip().isalpha()),
    ("marks", lambda text: all(unicodedata.category(c)[0] in "PS" for c in text.strip()) and bool(text.strip())),
)


@dataclass(frozen=True, slots=True)
class Preference:
    """What an expert answers for more often than for other tokens of the same documents.

    Args:
        text: of the token, or the name of a class of texts. whole_class: which of the two.
        documents: in which the expert answered for it, and could be compared.
        tokens, answered: of this text that were recorded, and that the expert answered for.
        share, elsewhere: of these tokens, and of the other tokens of these documents, that it answered for.
        odds: Mantel and Haenszel's odds ratio; None: beyond bounds.
        z: the statistic, in standard deviations, without the document that speaks for it most.
    """

    text: str
    whole_class: bool
    documents: int
    tokens: int
    answered: int
    share: float
    elsewhere: float
    odds: float | None
    z: float


def class_of(text: str) -> str:
    """The class of a token's text."""
    return next((name for name, fits in _CLASSES if fits(text)), "others")


def preferences(texts: Sequence[str], documents: np.ndarray, answered: np.ndarray) -> list[Preference]:
    """What one expert prefers, the surest first.

    Args:
        texts: [n] of the tokens. documents: int64 [n] of each. answered: bool [n] the expert was among its choices.
    """
    found = []
    for whole_class, names in ((True, [class_of(t) for t in texts]), (False, list(texts))):
        found += [(whole_class, *tried) for tried in _tried(names, documents, answered)]
    told = _by_chance_at_most(np.array([0.5 * erfc(z / sqrt(2)) for *_, z in found]))
    chosen = [Preference(p[1], p[0], *p[2:]) for p, sure in zip(found, told, strict=True) if sure]
    return sorted(chosen, key=lambda p: -p.z)


def _tried(names: list[str], documents: np.ndarray, answered: np.ndarray) -> list[tuple[Any, ...]]:
    """Fields of a preference from `text` on, for each name that enough documents speak of."""
    if not names:
        return []
    texts, text = np.unique(np.array(names, object), return_inverse=True)
    _, document = np.unique(documents, return_inverse=True)
    size, hits = np.bincount(document).astype(float), np.bincount(document, answered)  # [D]
    cells, cell = np.unique(text * len(size) + document, return_inverse=True)  # a text in a document
    of_text, of_document = np.divmod(cells, len(size))
    tokens, both = np.bincount(cell).astype(float), np.bincount(cell, answered)
    n, m = size[of_document], hits[of_document]
    expected = tokens * m / n
    variance = tokens * (n - tokens) * m * (n - m) / (n * n * np.maximum(n - 1, 1))
    out = []
    starts = np.searchsorted(of_text, np.arange(len(texts) + 1))
    for number, (first, end) in enumerate(pairwise(starts.tolist())):
        part = slice(first, end)
        known = variance[part] > 0  # the document can say something
        speaking = int((known & (both[part] > 0)).sum())
        if speaking < DOCUMENTS:
            continue
        more, spread = (both - expected)[part][known], variance[part][known]
        left = spread.sum() - spread
        z = float(np.min(np.divide(more.sum() - more, np.sqrt(left), out=np.zeros_like(left), where=left > 0)))
        here, others = tokens[part][known], (n - tokens)[part][known]
        by_it, by_it_elsewhere = both[part][known], (m - both)[part][known]
        against = float(((here - by_it) * by_it_elsewhere / n[part][known]).sum())
        odds = float((by_it * (others - by_it_elsewhere) / n[part][known]).sum()) / against if against else None
        shares = float(by_it.sum() / here.sum()), float(by_it_elsewhere.sum() / others.sum())
        out.append((str(texts[number]), speaking, int(here.sum()), int(by_it.sum()), *shares, odds, z))
    return out


def _by_chance_at_most(p: np.ndarray) -> np.ndarray:
    """bool [n]: which of the p-values are told, so that of these at most a share of CHANCE is so by chance."""
    order = np.argsort(p)
    below = np.flatnonzero(p[order] <= CHANCE * np.arange(1, len(p) + 1) / max(len(p), 1))
    told = np.zeros(len(p), np.bool_)
    told[order[: int(below[-1]) + 1 if len(below) else 0]] = True
    return told
