"""Whole documents laid into rows: several to a row, or one. Pure NumPy: no files, no tokenizer.

D documents, N tokens, R rows, T tokens of a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ray_ep.rank.data.batch import IGNORED, Batch


@dataclass(frozen=True, slots=True)
class Rows:
    """The documents of one split, and which of them make up each row.

    Args:
        tokens: [N], document after document. counted: bool [N] whether predicting a token counts.
        starts: int64 [D + 1] where each document begins.
        order: int64 [D] documents, row after row; first: int64 [R + 1] where each row begins there.
    """

    tokens: np.ndarray
    counted: np.ndarray
    starts: np.ndarray
    order: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        """R."""
        return len(self.first) - 1

    def batch(self, rows: np.ndarray, length: int) -> Batch:
        """The rows of these numbers, T = length."""
        shape = (len(rows), length)
        ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED)
        offsets, positions = np.full(shape, -1), np.zeros(shape, np.int64)
        for i, row in enumerate(rows.tolist()):
            at = 0
            for document in self.order[self.first[row] : self.first[row + 1]].tolist():
                start, end = self.starts[document : document + 2].tolist()
                here = slice(at, at := at + end - start - 1)  # the last token predicts nothing
                ids[i, here], offsets[i, here] = self.tokens[start : end - 1], np.arange(start, end - 1)
                then, counted = self.tokens[start + 1 : end], self.counted[start + 1 : end]
                targets[i, here] = np.where(counted, then.astype(np.int64), IGNORED)
                positions[i, here] = np.arange(end - start - 1)
            positions[i, at:] = np.arange(length - at)  # padding is a document that nobody sees
        return Batch(ids, targets, offsets, positions)


def laid(tokens: list[np.ndarray], counted: list[np.ndarray], length: int, several: bool) -> Rows:
    """Documents of at most length + 1 tokens each -> rows: as many as fit together, or one to each.

    Long ones come first, each into the row that it fills best (best fit decreasing): no row is opened while a document
    fits into another. Documents in which nothing counts are left out.
    """
    use = [i for i, c in enumerate(counted) if c[1:].any()]
    sizes = np.array([len(tokens[i]) for i in use], np.int64)
    held = _fitted(sizes - 1, length) if several else [[d] for d in range(len(use))]
    empty = np.zeros(0, np.int64)
    return Rows(
        tokens=np.concatenate([tokens[i] for i in use]) if use else empty,
        counted=np.concatenate([counted[i] for i in use]) if use else empty.astype(np.bool_),
        starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        order=np.array([d for row in held for d in row], np.int64),
        first=np.cumsum([0, *map(len, held)]),
    )


def _fitted(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Documents of each row."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows, by what is left of them
    rooms: list[int] = []  # those of which there are rows, ascending
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[document])
        place = bisect_left(rooms, size)
        if place < len(rooms):
            left = rooms[place]
            row = with_room[left].pop()
            if not with_room[left]:
                rooms.pop(place)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(document)
        if not with_room[left - size]:
            insort(rooms, left - size)
        with_room[left - size].append(row)
    return rows


def rows_of_step(count: int, seed: int, step: int, sequences: int) -> np.ndarray:
    """int64 [sequences]: the rows of a step among `count`: every row once, in an order of its own, then all again."""
    numbers = step * sequences + np.arange(sequences)
    return np.array([_shuffled(count, seed, n // count)[n % count] for n in numbers.tolist()], np.int64)


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, time: int) -> np.ndarray:
    return np.random.default_rng((seed, time)).permutation(count)
