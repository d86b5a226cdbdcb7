"""Logarithmic probabilities of given tokens: what perplexity and multiple choice are made of. One rank's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ray_ep.rank.model_rank import ModelRank


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens, of which those from number `first` on (at least 1) are scored, given all before each."""

    tokens: tuple[int, ...]
    first: int = 1


@dataclass(frozen=True, slots=True)
class Scored:
    """Sum of natural logarithms of the scored tokens' probabilities; whether each was the most likely one."""

    logprob: float
    greedy: bool


@torch.no_grad()
def score(rank: ModelRank, rows: Sequence[Row], pass_tokens: int) -> list[Scored]:
    """Scores in the order of `rows` (collective; ranks may have different numbers of rows, or none).

    Args:
        pass_tokens: of one pass, padding included; a longer row has a pass of its own.
    """
    parts = list(_parts(rows, pass_tokens))
    passes = torch.tensor([len(parts)], device=rank.device)
    rank.group.all_reduce(passes, "max")
    found: dict[int, Scored] = {}
    for number in range(int(passes)):
        if number < len(parts):
            found |= _pass(rank, rows, parts[number])
        else:
            rank.ep.idle_pass()
    return [found[i] for i in range(len(rows))]


def _parts(rows: Sequence[Row], pass_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows that go through the model together: those of like length, the longest first."""
    part: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)):
        if part and (len(part) + 1) * len(rows[part[0]].tokens) > pass_tokens:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _pass(rank: ModelRank, rows: Sequence[Row], part: list[int]) -> dict[int, Scored]:
    """Rows are padded behind, which no token before looks at."""
    longest = len(rows[part[0]].tokens)
    ids = torch.tensor([[*rows[i].tokens[:-1], *[0] * (longest - len(rows[i].tokens))] for i in part])  # [B, N - 1]
    logits = rank.model(input_ids=ids.to(rank.device), use_cache=False).logits  # [B, N - 1, V]
    found = {}
    for place, i in enumerate(part):
        tokens, first = rows[i].tokens, rows[i].first
        mine = logits[place, first - 1 : len(tokens) - 1].float()  # [n, V]
        targets = torch.tensor(tokens[first:], device=mine.device)
        loss = torch.nn.functional.cross_entropy(mine, targets, reduction="none").double().sum()
        found[i] = Scored(-float(loss), bool((mine.argmax(-1) == targets).all()))
    return found
