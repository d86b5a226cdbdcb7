"""Who answers for chosen tokens of a step's passes: kept on the model's device in the forward, fetched once a step.

A source knows the rank that answers for each choice, but on two levels: there it knows the gateway alone. So chosen
tokens travel marked (their experts' numbers are raised by E), a gateway keeps who answers for what came marked, and
says so at the end of the step in one small exchange. Which tokens are chosen is the caller's affair.

n chosen tokens, m of them in one part of a pass, T tokens of a pass, N rows at a gateway, K top_k, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.moe.upload import upload


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one rank's chosen tokens in the order of passes and tokens. L MoE layers; -1 where there is no choice.

    Args:
        experts, ranks: int32 [L, n, K], what was chosen and which rank computed it. weights: float32 [L, n, K].
    """

    experts: np.ndarray
    weights: np.ndarray
    ranks: np.ndarray


@dataclass(slots=True)
class _Passed:
    """What one gateway has got of one part of a layer's tokens of all ranks."""

    marked: torch.Tensor  # bool [N]
    experts: torch.Tensor  # [N, K], -1 for none
    rows_in: list[int]  # [R] rows of each source
    to: torch.Tensor | None = None  # [N, K] who answers


@dataclass(slots=True)
class _Pass:
    """One pass. Keys are (layer, part): a layer's tokens may travel in parts, the same on every rank."""

    tokens: int
    chosen: np.ndarray  # int64 [n] ascending
    rows: torch.Tensor  # the same on the device
    choices: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # experts, weights [n, K]
    to: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # [m, K] ranks, or gateways
    passed: dict[tuple[int, int], _Passed] = field(default_factory=dict)
    open: dict[int, _Part] = field(default_factory=dict)  # of the present layer, by identity of their choices


@dataclass(frozen=True, slots=True)
class _Part:
    """Choices [t, K] that a body was called with, and what of them is to be kept."""

    index: torch.Tensor  # held, so that its identity stays its own
    key: tuple[int, int]
    rows: torch.Tensor  # int64 [m] chosen tokens, counted from the part's first
    at_gateway: bool = False


class Recorder:
    """Records the passes of one step on one rank; all ranks have one for the same passes.

    `begin` and `end` go around the forward of each pass; `collect` comes after the last one.
    """

    def __init__(self, layers: int, experts: int):
        self.layers, self.experts = layers, experts
        self._passes: list[_Pass] = []
        self._homeward: list[tuple[np.ndarray, torch.Tensor]] = []  # sources [q], experts and ranks int32 [q, 2K]
        self._two_level = False

    def begin(self, chosen: np.ndarray, tokens: int, device: torch.device) -> None:
        """The next pass has T = `tokens` of this rank, of which those with the numbers `chosen` [n] are recorded."""
        self._passes.append(_Pass(tokens, chosen, upload(chosen.astype(np.int64), device)))

    def choices(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> None:
        """A layer begins: its router's choices index [T, K] and their weights [T, K]."""
        now = self._passes[-1]
        known = len(index) == now.tokens  # else its rows are not the batch's tokens in order: nobody knows whose
        rows = now.rows if known else now.rows[:0]
        if known:
            now.choices[layer] = (index.detach()[rows], weights.detach()[rows])
        now.open = {id(index): _Part(index, (layer, 0), rows)}

    def parts(self, index: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """The choices index [T, K] of the present layer go on in parts [t, K]."""
        now = self._passes[-1]
        whole = now.open.pop(id(index))
        chosen = now.chosen if len(whole.rows) else now.chosen[:0]  # on the host: the device is not waited for
        ends = np.cumsum([len(part) for part in parts])
        cuts = [0, *np.searchsorted(chosen, ends).tolist()]
        for number, part in enumerate(parts):
            first = int(ends[number]) - len(part)
            rows = whole.rows[cuts[number] : cuts[number + 1]] - first
            now.open[id(part)] = _Part(part, (whole.key[0], number), rows)

    def passes_on(self, index: torch.Tensor, gateways: torch.Tensor) -> torch.Tensor:
        """Choices index [t, K] travel to gateways [t, K] first: returns them with chosen tokens marked."""
        self._two_level = True
        now = self._passes[-1]
        part = now.open[id(index)]
        now.to[part.key] = gateways[part.rows]
        raised = index.new_zeros(len(index), 1).index_fill_(0, part.rows, self.experts)
        return torch.where(index >= 0, index + raised, index)

    def arrived(self, sent: torch.Tensor, index: torch.Tensor, rows_in: list[int]) -> torch.Tensor:
        """What came to this gateway, index [N, K] with marks, while it sent `sent` [t, K]: returns it without them.

        Args:
            rows_in: [R] rows of each source.
        """
        now = self._passes[-1]
        key = now.open[id(sent)].key
        mark = index >= self.experts
        plain = torch.where(mark, index - self.experts, index)
        now.passed[key] = _Passed(mark.any(1), plain, rows_in)
        now.open[id(plain)] = _Part(plain, key, now.rows[:0], at_gateway=True)
        return plain

    def answered(self, index: torch.Tensor, to: torch.Tensor) -> None:
        """Ranks to [t, K] answer for choices index [t, K], the very tensor that the body was called with."""
        now = self._passes[-1]
        part = now.open[id(index)]
        if part.at_gateway:
            now.passed[part.key].to = to
        else:
            now.to[part.key] = to[part.rows]

    def end(self, group: Group) -> None:
        """The forward of a pass is over; at a gateway only marked rows are kept, for which it waits for the device."""
        now = self._passes[-1]
        now.open, passed = {}, [now.passed[key] for key in sorted(now.passed)]
        now.passed = {}
        if not passed:
            return
        group.wait()
        marked = np.flatnonzero(torch.cat([p.marked for p in passed]).cpu().numpy())
        firsts = np.cumsum([0, *(len(p.marked) for p in passed)])
        for p, first, end in zip(passed, firsts, firsts[1:], strict=False):
            assert p.to is not None, "a gateway's body did not say who answers"
            rows = marked[np.searchsorted(marked, first) : np.searchsorted(marked, end)] - first
            there = upload(rows, p.to.device)
            message = torch.cat([p.experts[there].to(torch.int32), p.to[there].to(torch.int32)], 1)
            self._homeward.append((np.searchsorted(np.cumsum(p.rows_in), rows, side="right"), message))

    def collect(self, group: Group) -> Answers:
        """What was recorded, on the host; collective where tokens travelled on two levels.

        Raises:
            GroupError: a peer is gone.
        """
        width = max((index.shape[1] for p in self._passes for index, _ in p.choices.values()), default=1)
        found = torch.cat([self._of_pass(p, width) for p in self._passes], 2)
        group.wait()
        experts, ranks, bits = found.cpu().numpy()
        if self._two_level:
            ranks = self._asked_at_gateways(group, experts, ranks)
        return Answers(experts, bits.view(np.float32), np.where(experts >= 0, ranks, -1))

    def _of_pass(self, p: _Pass, width: int) -> torch.Tensor:
        """int32 [3, L, n, K] on the device: experts, ranks or gateways, the bits of the weights."""
        blank = torch.full((len(p.rows), width), -1, dtype=torch.int32, device=p.rows.device)
        layers = []
        for layer in range(self.layers):
            experts, weights = p.choices.get(layer, (blank, blank))
            to = [p.to[key] for key in sorted(p.to) if key[0] == layer and layer in p.choices] or [blank]
            bits = weights.float().contiguous().view(torch.int32)
            layers.append(torch.stack([experts.to(torch.int32), torch.cat(to).to(torch.int32), bits]))
        return torch.stack(layers, 1)

    def _asked_at_gateways(self, group: Group, experts: np.ndarray, gateways: np.ndarray) -> np.ndarray:
        """[L, n, K] the ranks that answer, -1 where nobody said so, for what went to these gateways (collective)."""
        layers, tokens, width = experts.shape
        numbers = np.arange(layers * tokens).reshape(layers, tokens)
        ends = np.cumsum([len(p.chosen) for p in self._passes])
        order = np.concatenate([part.ravel() for part in np.split(numbers, ends[:-1], 1)])  # as gateways got them
        mine, via = experts.reshape(-1, width), np.where(experts >= 0, gateways, -1).reshape(-1, width)
        gateways_of = via[order]
        used = set(np.unique(via).tolist())  # a few: of the others nothing is worked out
        expected = [
            order[(gateways_of == gateway).any(1)] if gateway in used else order[:0] for gateway in range(group.size)
        ]
        take = list(map(len, expected))

        sources = np.concatenate([source for source, _ in self._homeward])
        message = torch.cat([m for _, m in self._homeward])
        message = message[upload(np.argsort(sources, kind="stable"), message.device)]
        came = message.new_empty(sum(take), message.shape[1])
        group.all_to_all(came, message, take, np.bincount(sources, minlength=group.size).tolist())
        group.wait()
        found = np.full_like(mine, -1)
        for gateway, block in enumerate(np.split(came.cpu().numpy(), np.cumsum(take)[:-1])):
            rows = expected[gateway]
            if not len(rows):
                continue
            same = mine[rows][:, :, None] == block[:, None, :width]  # [q, K, K]
            who = np.take_along_axis(block[:, width:], same.argmax(2), 1)
            found[rows] = np.where((via[rows] == gateway) & same.any(2), who, found[rows])
        return found.reshape(experts.shape)
