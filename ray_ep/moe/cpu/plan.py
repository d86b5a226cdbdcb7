"""What the ranks agree on before one layer's tokens move, for the fused CPU body: who sends which rows and pairs.

Two ways to the same plan: sizes and metadata by all-to-all (`agree`), or tokens and metadata at once to everybody
(`gather`), which for few tokens costs one exchange instead of three. Tests hold them equal, bit for bit.
T tokens, K top_k (an expert of -1 is no choice), E experts, S experts held, R ranks, P pairs received, N rows received.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ray_ep.moe.balance.guests import Guests, ResidentGuests
from ray_ep.moe.balance.step import StepBalance
from ray_ep.moe.cpu import kernels
from ray_ep.moe.cpu.gemm import Gemm
from ray_ep.moe.cpu.pool import Pool
from ray_ep.moe.exchange.dispatch import Sizes
from ray_ep.moe.exchange.float8 import pack
from ray_ep.moe.exchange.meter import MeteredGroup
from ray_ep.moe.site import Site

_PAIR = np.dtype([("expert", np.uint16), ("weight", np.float32)], align=False)  # 6 bytes on the wire


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOrder:
    """In which order this rank's rows and pairs are sent: by destination, the rank itself last, tokens ascending."""

    token: torch.Tensor  # [others + own] token of each row
    pair: np.ndarray  # [pairs of this rank's tokens] flat number in [T, K]
    others: int  # rows that go to other ranks
    back: tuple[np.ndarray, np.ndarray]  # CSR: rows sent to others, by token


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOrder:
    """Received pairs grouped by expert, padded with pairs of weight 0. X has others' rows by source, own rows last."""

    offsets: np.ndarray  # [S + 1] rows of each expert in G and Y
    row: torch.Tensor  # [offsets[-1]] row of X
    weight: np.ndarray  # [offsets[-1]]
    segment: np.ndarray  # [N + 1] pairs of each row of X
    place: np.ndarray  # [P] row of G and Y of each pair
    own_start: np.ndarray  # [T + 1] own pairs of each token, into place


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraExperts:
    """Experts of other ranks that are computed here, after the rank's own, in the order of the fields."""

    resident: ResidentGuests | None = None
    guests: Guests | None = None
    arrived: list[list[torch.Tensor]] = field(default_factory=list)  # the guests' weights, once they are here


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedPlan:
    """One layer's exchange in one pass, seen from one rank. "others" are rows from or to other ranks."""

    sizes: Sizes  # 0 to and from oneself
    order: RowOrder
    by_expert: ExpertOrder
    extra: ExtraExperts
    gathered: torch.Tensor | None  # [others in, ...] others' rows as they travel, if they came with the metadata
    float8: bool  # rows are dispatched in 8 bits
    traffic: MeteredGroup
    pool: Pool
    gemm: Gemm

    @property
    def others_in(self) -> int:
        """Rows of X that came from other ranks."""
        return sum(self.sizes.rows_in)


@dataclass(frozen=True, slots=True)
class SendList:
    """Who gets which of one rank's tokens: rows and pairs by destination in ascending order, the rank itself last."""

    rows: np.ndarray  # [R]
    pairs: np.ndarray  # [R]
    row_token: np.ndarray  # [sum(rows)]
    pair: np.ndarray  # [sum(pairs)] flat number in [T, K]
    wire: np.ndarray  # [sum(pairs)] of _PAIR

    @staticmethod
    def of(index: np.ndarray, weights: np.ndarray, to: np.ndarray, ranks: int, rank: int) -> SendList:
        """index [T, K] int64, weights [T * K] float32, to [T, K] int32: the rank that serves each pair."""
        rows, pairs, row_token, pair, bits = kernels.plan_send(index, to, ranks, rank)
        wire = np.empty(len(pair), _PAIR)
        wire["expert"], wire["weight"] = bits, weights[pair]
        return SendList(rows, pairs, row_token, pair, wire)

    def block(self, counts: np.ndarray, rank: int, to: int) -> slice:
        """Where the rows (or pairs) for rank `to` lie, counts being `rows` (or `pairs`)."""
        before = counts[:to].sum() - (counts[rank] if rank < to else 0)
        start = counts.sum() - counts[rank] if to == rank else before
        return slice(start, start + counts[to])


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What other ranks sent, by source."""

    pairs: np.ndarray  # of _PAIR
    sizes: list[int]  # [R] how many of each rank, 0 of oneself
    rows: torch.Tensor | None = None  # their rows, if those came along


def agree(
    site: Site, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, balance: StepBalance | None
) -> FusedPlan:
    """Plan one layer's exchange with all ranks (collective): sizes, then 6 bytes a pair.

    Args:
        hidden: [T, H], for its dtype. index, weights: [T, K].
        balance: of this step; it says who computes how many pairs, and so all sizes.
    """
    traffic, me = site.traffic, site.traffic.rank
    traffic.meter.enter("route")
    chosen, weight = _arrays(index, weights)
    if balance is None:
        to = kernels.serving_ranks(chosen, site.slots.routes32)
        sent = SendList.of(chosen, weight, to, traffic.size, me)
        pairs_in = traffic.swap_sizes(torch.from_numpy(sent.pairs)).numpy()
    else:
        to = kernels.assign(chosen, np.ascontiguousarray(balance.plan.sends(me)), me)
        sent = SendList.of(chosen, weight, to, traffic.size, me)
        pairs_in = balance.plan.pairs_between()[:, me]
    site.note(index, torch.from_numpy(to))
    give, take = _others(sent.pairs, me), _others(pairs_in, me)
    meta = torch.from_numpy(sent.wire.view(np.uint8).reshape(-1, _PAIR.itemsize)[: sum(give)])
    received = traffic.all_to_all(meta, give, take, torch.empty(sum(take), _PAIR.itemsize, dtype=torch.uint8))
    arrivals = Arrivals(received.numpy().reshape(-1).view(_PAIR), take)
    extra = ExtraExperts() if balance is None else ExtraExperts(resident=balance.resident, guests=balance.guests)
    return _finish(site, sent, arrivals, hidden, extra)


class Gatherer:
    """Plans by all-gather, for one layer (collective): every rank gets every token and its pairs.

    Attributes:
        room: tokens of a rank that a message has room for: as many as any rank had before in this epoch, equal on all
            ranks. When one has more, all see it and ask again; where a call failed, some may have seen it and some not.
    """

    def __init__(self, site: Site):
        self.site, self.room, self.epoch = site, 0, 0

    def gather(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> FusedPlan:
        """`agree`, and others' rows of X at once, for hidden [T, H], index [T, K], weights [T, K]."""
        site, traffic, me = self.site, self.site.traffic, self.site.traffic.rank
        traffic.meter.enter("route")
        chosen, weight = _arrays(index, weights)
        tokens = pack(hidden) if site.exchange.float8 else hidden.detach()
        row, top_k = tokens.shape[1] * tokens.element_size(), chosen.shape[1]
        everything, counts = self._ask(tokens, chosen, weight)
        to = kernels.serving_ranks(chosen, site.slots.routes32)
        site.note(index, torch.from_numpy(to))
        sent = SendList.of(chosen, weight, to, traffic.size, me)
        rows_of, pairs_of, take = [tokens[:0]], [np.empty(0, _PAIR)], [0] * traffic.size
        for source in range(traffic.size):
            if source == me:
                continue
            n, data = counts[source], everything[source, 8:]
            pairs = data[self.room * row :][: n * top_k * _PAIR.itemsize].numpy().view(_PAIR).reshape(n, top_k)
            theirs = np.ascontiguousarray(pairs["expert"]).view(np.int16).astype(np.int64)
            via = kernels.serving_ranks(theirs, site.slots.routes_of(source))
            other = SendList.of(theirs, pairs["weight"].reshape(-1), via, traffic.size, source)
            for_me = other.row_token[other.block(other.rows, source, me)]
            rows_of.append(data[: n * row].view(tokens.dtype).view(n, tokens.shape[1])[torch.from_numpy(for_me)])
            pairs_of.append(other.wire[other.block(other.pairs, source, me)])
            take[source] = len(pairs_of[-1])
        arrivals = Arrivals(np.concatenate(pairs_of), take, torch.cat(rows_of))
        return _finish(site, sent, arrivals, hidden, ExtraExperts())

    def _ask(self, tokens: torch.Tensor, chosen: np.ndarray, weight: np.ndarray) -> tuple[torch.Tensor, list[int]]:
        """Every rank's message uint8 [R, bytes], and how many tokens each has."""
        count, top_k = chosen.shape
        row = tokens.shape[1] * tokens.element_size()
        if self.epoch != (epoch := self.site.traffic.group.epoch):
            self.epoch, self.room = epoch, 0
        while True:
            room = self.room
            size = 8 + room * (row + top_k * _PAIR.itemsize)
            message = torch.empty(-(-size // 8) * 8, dtype=torch.uint8)  # so that every rank's part can be viewed
            message[:8] = torch.tensor([count]).view(torch.uint8)
            if count <= room:
                pairs = np.empty((count, top_k), _PAIR)
                pairs["expert"], pairs["weight"] = chosen.astype(np.int16).view(np.uint16), weight.reshape(count, top_k)
                body = message[8 : 8 + room * row]
                body[: count * row] = tokens.contiguous().view(-1).view(torch.uint8)
                message[8 + room * row :][: pairs.nbytes] = torch.from_numpy(pairs.view(np.uint8).reshape(-1))
            everything = self.site.traffic.all_gather(message)
            counts: list[int] = everything[:, :8].numpy().view(np.int64).ravel().tolist()
            if max(counts) <= room:
                return everything, counts
            self.room = max(counts)


def _finish(site: Site, sent: SendList, arrivals: Arrivals, hidden: torch.Tensor, extra: ExtraExperts) -> FusedPlan:
    """The plan, once others' pairs are here."""
    me, shared = site.traffic.rank, site.shared
    own_pairs, own_rows = int(sent.pairs[me]), int(sent.rows[me])
    others, tokens = len(sent.row_token) - own_rows, len(hidden)
    pairs = np.concatenate([arrivals.pairs, sent.wire[len(sent.wire) - own_pairs :]])
    bits, weight = np.ascontiguousarray(pairs["expert"]), np.ascontiguousarray(pairs["weight"])
    row_of, held = _rows_of(site, extra)
    align = shared.gemm.align(hidden.dtype)
    offsets, sorted_row, sorted_weight, segment, place = kernels.plan_receive(bits, weight, row_of, held, align)
    firsts = np.zeros(len(bits) + 1, np.int64)
    np.cumsum(bits >> 15, out=firsts[1:])
    rows_in: list[int] = np.diff(firsts[np.cumsum(arrivals.sizes)], prepend=0).tolist()
    own_start = np.zeros(tokens + 1, np.int64)
    n = len(segment) - 1 - own_rows
    own_start[sent.row_token[others:] + 1] = np.diff(segment[n:])
    np.cumsum(own_start, out=own_start)
    plan = FusedPlan(
        sizes=Sizes(
            rows_out=_others(sent.rows, me),
            rows_in=rows_in,
            pairs_out=_others(sent.pairs, me),
            pairs_in=arrivals.sizes,
        ),
        order=RowOrder(
            token=torch.from_numpy(sent.row_token),
            pair=sent.pair,
            others=others,
            back=kernels.rows_of_tokens(sent.row_token[:others], tokens),
        ),
        by_expert=ExpertOrder(
            offsets=offsets,
            row=torch.from_numpy(sorted_row),
            weight=sorted_weight,
            segment=segment,
            place=place,
            own_start=own_start + segment[n],
        ),
        extra=extra,
        gathered=arrivals.rows,
        float8=site.exchange.float8,
        traffic=site.traffic,
        pool=shared.pool,
        gemm=shared.gemm,
    )
    site.traffic.meter.enter("")
    return plan


def _rows_of(site: Site, extra: ExtraExperts) -> tuple[np.ndarray, int]:
    """[E] row of each expert that is computed here, and how many those are."""
    resident, guests = extra.resident, extra.guests
    row_of, held = (site.slots.row_of32, site.slots.held) if resident is None else (resident.row_of, resident.held)
    if guests is not None:
        row_of = row_of.copy()
        row_of[guests.experts] = held + np.arange(len(guests.experts))
        held += len(guests.experts)
    return row_of, held


def _arrays(index: torch.Tensor, weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """index [T, K] int64 and weights [T * K] float32, in the layout that the kernels were compiled for."""
    return index.long().contiguous().numpy(), weights.detach().reshape(-1).float().numpy()


def _others(counts: np.ndarray, me: int) -> list[int]:
    out: list[int] = counts.tolist()
    out[me] = 0
    return out
