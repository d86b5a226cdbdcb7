"""Where values that are not finite come from: a weight, the first module that gives them, or the first gradient.

Called when a step has turned out not to be finite; it repeats the step's passes and may take its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ray_ep.collective import Group
from ray_ep.moe import ExpertParallel
from ray_ep.moe.passes import recomputing

LOSSES = ("the loss", "the auxiliary loss", "the router z-loss")
"""Names of the losses of a step, in the order in which they are reduced."""


def bad_weight(model: Any, group: Group) -> str:
    """The first weight that is not finite, and the ranks that hold it; empty if all are (collective)."""
    named = list(model.named_parameters())
    found = next((i for i, (_, p) in enumerate(named) if not _all_finite(p.data)), -1)
    first, ranks = _first(model, group, found, found)
    return "" if first < 0 else f"{_told(model, named[first][0])} {ranks}"


def locate(model: Any, group: Group, passes: list[Callable[[], tuple[torch.Tensor, torch.Tensor]]]) -> str:
    """What is first not finite in the passes of a step (collective).

    Args:
        passes: forwards of the step in order, each giving this rank's loss with its graph, and its figures main,
            aux, z.
    """
    modules = [name for name, _ in model.named_modules()]
    weights = list(model.named_parameters())
    for forward in passes:
        with _watched(model) as seen:
            loss, figures = forward()
        first, ranks = _first(model, group, *(seen[0] if seen else (-1, -1)))
        if first >= 0:
            return f"the first are in the output of {_told(model, modules[first])} {ranks}"
        found = next((i for i, x in enumerate(figures) if not _all_finite(x)), -1)
        first, ranks = _first(model, group, found, found)
        if first >= 0:
            return f"every layer's output is finite, {LOSSES[first]} is not {ranks}"
        with _watched_gradients(weights) as seen:
            loss.backward()  # type: ignore[no-untyped-call]
        first, ranks = _first(model, group, *(seen[0] if seen else (-1, -1)))
        if first >= 0:
            name = _told(model, weights[first][0])
            return f"the forward is finite; the first in the backward are in the gradient of {name} {ranks}"
    return "what each rank has is finite, the sum over them is not"


@contextmanager
def _watched(model: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Inside: fills the list with the first module that gives values that are not finite for ones that are.

    As (how many modules had run, number of the module): both are the same on every rank.
    """
    seen: list[tuple[int, int]] = []
    ran = [0]

    def hook(number: int) -> Callable[..., None]:
        def after(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if recomputing():
                return
            ran[0] += 1
            given = [args, {k: v for k, v in kwargs.items() if "mask" not in k}]  # masks hold infinities
            if not seen and not _all_finite(output) and _all_finite(given):
                seen.append((ran[0], number))

        return after

    handles = [m.register_forward_hook(hook(i), with_kwargs=True) for i, m in enumerate(model.modules())]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched_gradients(weights: list[tuple[str, torch.nn.Parameter]]) -> Iterator[list[tuple[int, int]]]:
    """Inside: the same of the first gradient that is not finite, in the order of backward. Gradients are dropped."""
    seen: list[tuple[int, int]] = []
    ran = [0]

    def hook(number: int) -> Callable[[torch.Tensor], None]:
        def after(p: torch.Tensor) -> None:
            ran[0] += 1
            if not seen and not _all_finite(p.grad):
                seen.append((ran[0], number))
            p.grad = None

        return after

    handles = [
        p.register_post_accumulate_grad_hook(hook(i))  # type: ignore[no-untyped-call]
        for i, (_, p) in enumerate(weights)
        if p.requires_grad
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(model: Any, group: Group, order: int, found: int) -> tuple[int, str]:
    """Of what each rank found (-1: nothing) the one that is first in order, and on which ranks (collective)."""
    device = next(model.parameters()).device
    said = group.all_gather(torch.tensor([order, found], device=device)).tolist()
    first = min((o for o, _ in said if o >= 0), default=-1)
    ranks = [r for r, (o, _) in enumerate(said) if o == first]
    if first < 0:
        return -1, ""
    if len(ranks) == group.size > 1:
        return said[ranks[0]][1], "on every rank"
    return said[ranks[0]][1], f"on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _told(model: Any, name: str) -> str:
    """A module or parameter by its dotted name, with the number of its MoE layer if it is of one."""
    ep: ExpertParallel = model.ray_ep
    for number, experts in enumerate(ep.names):
        block = experts.rpartition(".")[0]
        if block and (name == block or name.startswith(f"{block}.")):
            return f"{name} (MoE layer {number})"
    return name or type(model).__name__


def _all_finite(values: Any) -> bool:
    if isinstance(values, torch.Tensor):
        return not values.is_floating_point() or bool(values.detach().isfinite().all())
    if isinstance(values, dict):
        return all(map(_all_finite, values.values()))
    return not isinstance(values, (list, tuple)) or all(map(_all_finite, values))
