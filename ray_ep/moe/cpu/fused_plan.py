"""What the ranks agree on before one layer's tokens move, for the fused CPU body: who sends which rows and pairs.

Two ways to the same plan: sizes and metadata by all-to-all (`agree`), or tokens and metadata at once to everybody
(`gather`), which for few tokens costs one exchange instead of three. Tests hold them equal, bit for bit.
T tokens, K top_k (an expert of -1 is no choice), E experts, S experts held, R ranks, P pairs received, N rows received.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.moe.balance.guests import Guests, Kept
from ray_ep.moe.cpu import gemm, kernels
from ray_ep.moe.cpu.pool import Pool
from ray_ep.moe.exchange.dispatch import Meter
from ray_ep.moe.exchange.float8 import pack
from ray_ep.placement.in_step.rules import StepPlan

_PAIR = np.dtype([("expert", np.uint16), ("weight", np.float32)], align=False)  # 6 bytes on the wire


@dataclass(frozen=True, slots=True)
class Agreed:
    """One layer's exchange, as this rank sees it. "others" are rows from or to other ranks; own rows follow them."""

    group: Group
    meter: Meter
    pool: Pool
    rows_out: list[int]  # [R] rows to each rank, 0 to oneself
    rows_in: list[int]  # [R]
    pairs_out: list[int]  # [R] pairs to each rank, 0 to oneself
    pairs_in: list[int]  # [R]
    row_token: torch.Tensor  # [others + own] token of each row of this rank's tokens
    pair: np.ndarray  # [pairs of this rank's tokens] flat number of each, in row order
    offsets: np.ndarray  # [S + 1] rows of each expert in G and Y
    sorted_row: torch.Tensor  # [offsets[-1]] row of X
    sorted_weight: np.ndarray  # [offsets[-1]], 0 for padding
    segment: np.ndarray  # [N + 1] pairs of each row of X
    place: np.ndarray  # [P] row of G and Y of each pair
    own_start: np.ndarray  # [T + 1] own pairs of each token, into place
    back: tuple[np.ndarray, np.ndarray]  # CSR: rows sent to others, by token
    gathered: torch.Tensor | None  # [others in, ...] others' rows as they travel, if they came with the metadata
    float8: bool  # rows are dispatched in 8 bits
    guests: Guests | None  # the last experts of the offsets
    kept: Kept | None  # experts S, S + 1, ... of the offsets
    arrived: list[list[torch.Tensor]] = field(default_factory=list)  # the guests' weights, once they are here

    @property
    def others_out(self) -> int:
        """Rows of this rank's tokens that go to other ranks."""
        return sum(self.rows_out)

    @property
    def others_in(self) -> int:
        """Rows of X that came from other ranks."""
        return sum(self.rows_in)

    def move(self, out: torch.Tensor, rows: torch.Tensor, give: list[int], take: list[int]) -> torch.Tensor:
        """All-to-all of rows, counted."""
        return _move(self.group, self.meter, out, rows, give, take)


@dataclass(frozen=True, slots=True)
class Sent:
    """Who gets which of one rank's tokens: rows and pairs by destination in ascending order, the rank itself last."""

    rows: np.ndarray  # [R]
    pairs: np.ndarray  # [R]
    row_token: np.ndarray  # [sum(rows)]
    pair: np.ndarray  # [sum(pairs)] flat number in [T, K]
    wire: np.ndarray  # [sum(pairs)] of _PAIR

    @staticmethod
    def of(index: np.ndarray, weights: np.ndarray, to: np.ndarray, ranks: int, rank: int) -> Sent:
        """index [T, K] int64, weights [T * K] float32, to [T, K] int32: the rank that serves each pair."""
        rows, pairs, row_token, pair, bits = kernels.plan_send(index, to, ranks, rank)
        wire = np.empty(len(pair), _PAIR)
        wire["expert"], wire["weight"] = bits, weights[pair]
        return Sent(rows, pairs, row_token, pair, wire)

    def block(self, counts: np.ndarray, rank: int, to: int) -> slice:
        """Where the rows (or pairs) for rank `to` lie, counts being `rows` (or `pairs`)."""
        before = counts[:to].sum() - (counts[rank] if rank < to else 0)
        start = counts.sum() - counts[rank] if to == rank else before
        return slice(start, start + counts[to])


def agree(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    layer: Any,
    step: StepPlan | None = None,
    guests: Guests | None = None,
    kept: Kept | None = None,
) -> Agreed:
    """Plan one layer's exchange with all ranks (collective): sizes, then 6 bytes a pair.

    Args:
        hidden: [T, H], for its dtype. index, weights: [T, K].
        layer: has group, meter, pool, routes32 [E, C], row_of32 [E] and held (S).
        step: the balance of this step, which says who computes how many pairs (and so all sizes); guests: its guests;
            kept: earlier ones that stayed.
    """
    group, meter, me = layer.group, layer.meter, layer.group.rank
    meter.enter("route")
    chosen, weight = _arrays(index, weights)
    if step is None:
        to = kernels.choose(chosen, layer.routes32)
        sent = Sent.of(chosen, weight, to, group.size, me)
        sizes_out = torch.from_numpy(sent.pairs)
        sizes_in = torch.empty_like(sizes_out)
        ones = [1] * group.size
        meter.enter("exchange")
        group.all_to_all(sizes_in, sizes_out, ones, ones)
        meter.enter("route")
        pairs_in = sizes_in.numpy()
    else:
        to = kernels.assign(chosen, np.ascontiguousarray(step.sends(me)), me)
        sent = Sent.of(chosen, weight, to, group.size, me)
        pairs_in = step.pairs_between()[:, me]
    layer.note(index, torch.from_numpy(to))
    give, take = _others(sent.pairs, me), _others(pairs_in, me)
    own = int(sent.pairs[me])
    meta = torch.from_numpy(sent.wire.view(np.uint8).reshape(-1, _PAIR.itemsize)[: len(sent.wire) - own])
    received = torch.empty(sum(take), _PAIR.itemsize, dtype=torch.uint8)
    _move(group, meter, received, meta, give, take)
    theirs = received.numpy().reshape(-1).view(_PAIR)
    return _finish(layer, sent, theirs, take, hidden, None, guests, kept)


def gather(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: Any) -> Agreed:
    """`agree`, and others' rows of X at once (collective): every rank gets every token and its pairs.

    The message has room for as many tokens as any rank had before; when one has more, all see it and ask again.
    """
    group, meter, me = layer.group, layer.meter, layer.group.rank
    meter.enter("route")
    chosen, weight = _arrays(index, weights)
    count, top_k = chosen.shape
    tokens = pack(hidden) if layer.exchange.float8 else hidden.detach()
    row = tokens.shape[1] * tokens.element_size()
    while True:
        room = layer.room
        size = 8 + room * (row + top_k * _PAIR.itemsize)
        message = torch.empty(-(-size // 8) * 8, dtype=torch.uint8)  # so that every rank's part can be viewed
        message[:8] = torch.tensor([count]).view(torch.uint8)
        if count <= room:
            pairs = np.empty((count, top_k), _PAIR)
            pairs["expert"], pairs["weight"] = chosen.astype(np.int16).view(np.uint16), weight.reshape(count, top_k)
            body = message[8 : 8 + room * row]
            body[: count * row] = tokens.contiguous().view(-1).view(torch.uint8)
            message[8 + room * row :][: pairs.nbytes] = torch.from_numpy(pairs.view(np.uint8).reshape(-1))
        meter.enter("exchange")
        everything = group.all_gather(message)
        meter.enter("route")
        meter.add([1] * group.size, message[None], me)
        counts = everything[:, :8].numpy().view(np.int64).ravel().tolist()
        if max(counts) <= room:
            break
        layer.room = max(counts)
    to = kernels.choose(chosen, layer.routes32)
    layer.note(index, torch.from_numpy(to))
    sent = Sent.of(chosen, weight, to, group.size, me)
    rows_of, pairs_of, take = [tokens[:0]], [np.empty(0, _PAIR)], [0] * group.size
    for source in range(group.size):
        if source == me:
            continue
        n, data = counts[source], everything[source, 8:]
        pairs = data[room * row :][: n * top_k * _PAIR.itemsize].numpy().view(_PAIR).reshape(n, top_k)
        theirs = np.ascontiguousarray(pairs["expert"]).view(np.int16).astype(np.int64)
        via = kernels.choose(theirs, layer.routes_of(source))
        other = Sent.of(theirs, pairs["weight"].reshape(-1), via, group.size, source)
        for_me = other.row_token[other.block(other.rows, source, me)]
        rows_of.append(data[: n * row].view(tokens.dtype).view(n, tokens.shape[1])[torch.from_numpy(for_me)])
        pairs_of.append(other.wire[other.block(other.pairs, source, me)])
        take[source] = len(pairs_of[-1])
    return _finish(layer, sent, np.concatenate(pairs_of), take, hidden, torch.cat(rows_of))


def _finish(
    layer: Any,
    sent: Sent,
    theirs: np.ndarray,
    pairs_in: list[int],
    hidden: torch.Tensor,
    gathered: torch.Tensor | None,
    guests: Guests | None = None,
    kept: Kept | None = None,
) -> Agreed:
    """The plan, once others' pairs are here, by source."""
    me = layer.group.rank
    own_pairs, own_rows = int(sent.pairs[me]), int(sent.rows[me])
    others = len(sent.row_token) - own_rows
    pairs = np.concatenate([theirs, sent.wire[len(sent.wire) - own_pairs :]])
    bits, weight = np.ascontiguousarray(pairs["expert"]), np.ascontiguousarray(pairs["weight"])
    align, tokens = gemm.align(hidden.dtype), len(hidden)
    row_of, held = (layer.row_of32, layer.held) if kept is None else (kept.row_of, kept.held)
    if guests is not None:
        row_of = row_of.copy()
        row_of[guests.experts] = held + np.arange(len(guests.experts))
        held += len(guests.experts)
    offsets, sorted_row, sorted_weight, segment, place = kernels.plan_receive(bits, weight, row_of, held, align)
    firsts = np.zeros(len(bits) + 1, np.int64)
    np.cumsum(bits >> 15, out=firsts[1:])
    ends = firsts[np.cumsum(pairs_in)]
    rows_in = np.diff(ends, prepend=0)
    own_start = np.zeros(tokens + 1, np.int64)
    n = len(segment) - 1 - own_rows
    own_start[sent.row_token[others:] + 1] = np.diff(segment[n:])
    np.cumsum(own_start, out=own_start)
    layer.meter.enter("")
    return Agreed(
        layer.group, layer.meter, layer.pool, _others(sent.rows, me), rows_in.tolist(), _others(sent.pairs, me),
        pairs_in, torch.from_numpy(sent.row_token), sent.pair, offsets, torch.from_numpy(sorted_row), sorted_weight,
        segment, place, own_start + segment[n], kernels.rows_of_tokens(sent.row_token[:others], tokens), gathered,
        layer.exchange.float8, guests, kept,
    )  # fmt: skip


def _arrays(index: torch.Tensor, weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """index [T, K] int64 and weights [T * K] float32, in the layout that the kernels were compiled for."""
    return index.long().contiguous().numpy(), weights.detach().reshape(-1).float().numpy()


def _others(counts: np.ndarray, me: int) -> list[int]:
    out: list[int] = counts.tolist()
    out[me] = 0
    return out


def _move(
    group: Group, meter: Meter, out: torch.Tensor, rows: torch.Tensor, give: list[int], take: list[int]
) -> torch.Tensor:
    phase = meter.enter("exchange")
    group.all_to_all(out, rows, take, give)
    meter.enter(phase)
    meter.add(give, rows, group.rank)
    return out
