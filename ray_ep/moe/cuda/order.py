"""The order of pairs by expert, and the way back: all on the device, the host knows lengths only.

P pairs received, S experts (own and guests).

    pairs as they came   row 0 0 1 2 2   expert b a b a c
    sorted pairs         expert a a b b c   pair 1 3 0 2 4   row 0 2 0 1 2   ends 2 4 5
    and back             place 2 0 3 1 4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOrder:
    """Where each pair lies once pairs are grouped by expert."""

    pair: torch.Tensor  # int64 [P] pair in each sorted place
    row: torch.Tensor  # int64 [P] row in each sorted place
    place: torch.Tensor  # int64 [P] sorted place of each pair
    ends: torch.Tensor  # int32 [S] one past the last sorted place of each expert


def expert_order(row: torch.Tensor, expert_row: torch.Tensor, experts: int) -> ExpertOrder:
    """Group pairs by expert, those of one expert in the order in which they came.

    Args:
        row: int64 [P] of each pair. expert_row: int64 [P] from 0 to S - 1. experts: S.
    """
    device, pairs = row.device, len(row)
    # One byte where that is enough: a radix sort on a GPU passes over int64 keys eight times.
    key = expert_row.to(torch.uint8 if experts <= 256 else torch.int16)
    sorted_key, pair = torch.sort(key, stable=True)
    place = torch.empty_like(pair)
    place[pair] = torch.arange(pairs, device=device)
    every = torch.arange(experts, device=device, dtype=key.dtype)
    return ExpertOrder(
        pair=pair,
        row=row[pair],
        place=place,
        ends=torch.searchsorted(sorted_key, every, right=True, out_int32=True),
    )
