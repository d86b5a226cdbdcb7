"""One update of weights, in blocks: what several operations read of them then stays in the processor's cache.

A block's gradient is widened and clipped, its master and moments are updated, its compute weight is written, then comes
the next: one pass over memory, and no float32 copy of all gradients. Knows tensors alone; optimizer.py knows the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

CPU_BLOCK, GPU_BLOCK = 1 << 18, 1 << 26
"""Elements that are updated at once; on a GPU a block only bounds memory."""

_SUMMED = 1 << 7
"""Elements whose squares are added in float32 before float64 goes on: a relative error of 2e-8 at most (measured)."""
_LEAST, _MOST = 1e-24, 1e38
"""Sums of a block's squares that float32 gets right: below, single squares vanish; above, their sum may be infinite."""


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Neighbouring elements [n] of one weight. Master and moments are float32, the others of any dtype."""

    master: torch.Tensor
    gradient: torch.Tensor  # not needed any more: may be overwritten
    moments: tuple[torch.Tensor, ...]  # exp_avg, exp_avg_sq; or momentum_buffer; or none
    compute: torch.Tensor | None  # what the model computes with; None: the master itself

    def cut(self, to: slice) -> WeightPart:
        """Some of its elements."""
        compute = None if self.compute is None else self.compute[to]
        return WeightPart(self.master[to], self.gradient[to], tuple(m[to] for m in self.moments), compute)


@dataclass(frozen=True, slots=True)
class Rule:
    """What one update does: AdamW, or SGD with momentum beta1."""

    kind: str  # adamw or sgd
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float  # factor of every gradient
    number: int  # of the update, from 1


def sum_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """float64 scalar on the gradient's device."""
    if gradient.device.type != "cpu":
        norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        return norm.square()
    flat, total = gradient.detach().reshape(-1), torch.zeros((), dtype=torch.float64)
    wide = torch.empty(min(CPU_BLOCK, len(flat)), dtype=torch.float32)
    for part in flat.split(CPU_BLOCK):  # type: ignore[no-untyped-call]
        part = part if part.dtype == torch.float32 else wide[: len(part)].copy_(part)
        rows, rest = part[: len(part) // _SUMMED * _SUMMED].view(-1, _SUMMED), part[len(part) // _SUMMED * _SUMMED :]
        squares = torch.linalg.vector_norm(rows, dim=1).double().square().sum() + rest.double().square().sum()
        if _LEAST < float(squares) < _MOST:
            total += squares
        elif part.any():
            total += part.double().square().sum()
    return total


def update(rule: Rule, weights: Iterable[WeightPart]) -> None:
    """Update whole weights (each a `WeightPart` of all its elements), bit for bit as torch.optim does."""
    apply = _adamw if rule.kind == "adamw" else _sgd
    wide = torch.empty(0, dtype=torch.float32)
    for parts in _blocks(weights):
        narrow = sum(len(p.gradient) for p in parts if p.gradient.dtype != torch.float32)
        if len(wide) < narrow:
            wide = parts[0].master.new_empty(narrow)
        gradients, start = [], 0
        for p in parts:
            g = p.gradient
            if g.dtype != torch.float32:
                g, start = wide[start : start + len(g)].copy_(g), start + len(g)
            gradients.append(g if rule.clip == 1 else g.mul_(rule.clip))
        apply(rule, parts, gradients)
        for p in parts:
            if p.compute is not None:
                p.compute.copy_(p.master)


def _blocks(weights: Iterable[WeightPart]) -> Iterator[list[WeightPart]]:
    """Parts that have a block together, or less than two: large weights are cut, small ones gathered."""
    gathered: list[WeightPart] = []
    elements = 0
    for w in weights:
        block = CPU_BLOCK if w.master.device.type == "cpu" else GPU_BLOCK
        for start in range(0, len(w.master), block):
            gathered.append(w.cut(slice(start, start + block)))
            elements += len(gathered[-1].master)
            if elements >= block:
                yield gathered
                gathered, elements = [], 0
    if gathered:
        yield gathered


def _adamw(rule: Rule, parts: list[WeightPart], gradients: list[torch.Tensor]) -> None:
    """torch.optim.AdamW(fused=True)."""
    masters, first, second = [p.master for p in parts], [p.moments[0] for p in parts], [p.moments[1] for p in parts]
    count = torch.tensor(float(rule.number), dtype=torch.float32, device=masters[0].device)
    torch._fused_adamw_(
        masters, gradients, first, second, [], [count] * len(parts), lr=rule.learning_rate, beta1=rule.beta1,
        beta2=rule.beta2, weight_decay=rule.weight_decay, eps=rule.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def _sgd(rule: Rule, parts: list[WeightPart], gradients: list[torch.Tensor]) -> None:
    """torch.optim.SGD."""
    for p, g in zip(parts, gradients, strict=True):
        if rule.weight_decay:
            g.add_(p.master, alpha=rule.weight_decay)
        for momentum in p.moments:  # one, or none
            g = momentum.mul_(rule.beta1).add_(g)
        p.master.add_(g, alpha=-rule.learning_rate)
