"""One owner for each weight: float32 masters, gradients summed over ranks and replicas, one global norm, one update.

Dense weights are replicated: every rank updates its own copy with the same summed gradient. An expert is updated by its
primary alone, which sends the new weights to the replicas. No model search here (ray_ep.moe), no schedule of steps.
S experts held by this rank, the first `owned` of them primaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from transformers import get_scheduler

from ray_ep.collective import Group
from ray_ep.config.schema import OptimConfig
from ray_ep.moe import ExpertParallel

BUCKET = 1 << 23
"""Elements of dense gradients that are summed over ranks in one all-reduce."""


@dataclass(slots=True)
class Weight:
    """A parameter of the model and its master: the same storage in float32, a float32 copy in bfloat16."""

    name: str  # as in model.named_parameters()
    param: torch.nn.Parameter  # dense [...], or [S, ...] rows of experts
    master: torch.nn.Parameter  # dense [...], or [owned, ...] rows of primaries
    layer: int | None  # MoE layer of an expert stack, None for dense
    gradient: torch.Tensor | None = None  # float32, like param; summed over the passes of a step

    @property
    def key(self) -> str:
        """Name in the module that holds it."""
        return self.name.rpartition(".")[2]


class MasterOptimizer:
    """AdamW or SGD over the master weights of one rank.

    Use: after each backward `accumulate()`, then once `step(number)`; both collective in the sense that all ranks call.
    """

    def __init__(self, model: Any, cfg: OptimConfig, group: Group):
        ep: ExpertParallel = model.ray_ep
        self.ep, self.cfg, self.group = ep, cfg, group
        layer_of = {f"{n}.{p}": i for i, n in enumerate(ep.names) for p in ep.parameters(i)}
        self.weights = [
            _weight(name, p, layer_of.get(name), ep) for name, p in model.named_parameters() if p.requires_grad
        ]
        self.updates = 0  # so far, those of a restored run included
        decays = (cfg.weight_decay, 0.0)
        groups = [{"params": p, "weight_decay": d} for p, d in zip(self._groups(), decays, strict=True)]
        self.torch = _torch_optimizer(cfg, groups)
        schedule = get_scheduler(cfg.schedule, self.torch, cfg.warmup_steps, cfg.steps)
        self._factor = schedule.lr_lambdas[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the moments that the optimizer keeps of a weight."""
        return ("exp_avg", "exp_avg_sq") if self.cfg.kind == "adamw" else ("momentum_buffer",)

    def learning_rate(self, step: int) -> float:
        """Rate of optimizer step `step` (from 0); the first warm-up step is not zero."""
        return float(self.cfg.learning_rate * self._factor(step + 1 if step < self.cfg.warmup_steps else step))

    def accumulate(self) -> None:
        """Add the gradients of the last backward to the step's sum, in float32."""
        for w in self.weights:
            g = w.param.grad
            if w.gradient is None:  # no gradient at all (no tokens came) is a zero: decay still applies
                w.gradient = torch.zeros_like(w.param, dtype=torch.float32) if g is None else g.float()
            elif g is not None:
                w.gradient += g
            w.param.grad = None

    def discard(self) -> None:
        """Forget the gradients that were accumulated for a step that will not be made."""
        for w in self.weights:
            w.gradient = w.param.grad = None

    @torch.no_grad()
    def step(self, number: int, figures: torch.Tensor | float = 0.0) -> float:
        """Sum gradients over ranks and replicas, clip, update, send to replicas; returns the norm before clipping.

        It is the same on every rank. Not finite: then nothing was updated, and the gradients are gone.

        Args:
            figures: losses of this rank; one that is not finite makes the norm so.
        """
        self._sum_dense()
        for w in self._stacks():
            self.ep.replicas[w.layer].sum_to_owner(w.gradient.flatten(1))
        for w in self.weights:
            w.master.grad = w.gradient if w.layer is None else w.gradient[: len(w.master)]
        norm = self._global_norm(torch.as_tensor(figures))
        if isfinite(norm):
            self._update(number, norm)
        for w in self.weights:
            w.gradient = w.master.grad = None
        return norm

    def _update(self, number: int, norm: float) -> None:
        if self.cfg.clip_norm and norm > self.cfg.clip_norm:
            for w in self.weights:
                w.master.grad.mul_(self.cfg.clip_norm / (norm + 1e-6))
        for g in self.torch.param_groups:
            g["lr"] = self.learning_rate(number)
        self.torch.step()
        self.updates += 1
        self.publish()

    def damaged(self) -> str:
        """Name of a weight that is not finite here, or whose moments are not; empty if there is none."""
        kept = ((w.name, t) for w in self.weights for t in (w.master.data, *self.moments(w).values()))
        return next((name for name, t in kept if not t.isfinite().all()), "")

    @torch.no_grad()
    def publish(self) -> None:
        """Copy masters to compute weights (bfloat16) and primaries' weights to their replicas."""
        for w in self.weights:
            target = w.param.data if w.layer is None else w.param.data[: len(w.master)]
            if target.data_ptr() != w.master.data_ptr():
                target.copy_(w.master)
        for w in self._stacks():
            self.ep.replicas[w.layer].send_to_replicas(w.param.data.flatten(1))

    def moments(self, w: Weight) -> dict[str, torch.Tensor]:
        """Optimizer state of a weight in the master's shape: exp_avg and exp_avg_sq, or momentum_buffer."""
        state = self.torch.state[w.master]
        return {n: state[n] for n in self.kinds if state.get(n) is not None}

    def restore(self, w: Weight, moments: dict[str, torch.Tensor], step: int) -> None:
        """Put back what `moments` gave, after `step` updates."""
        self.updates = step
        state = self.torch.state[w.master]
        state.update(moments)
        if self.cfg.kind == "adamw":
            state["step"] = torch.tensor(float(step), device=w.master.device)  # where the fused optimizer keeps it

    def pending(self) -> str:
        """Name of a parameter with a gradient that was accumulated and not applied yet; empty if there is none."""
        return next((w.name for w in self.weights if w.gradient is not None), "")

    def kinds_of(self, layer: int) -> dict[str, int]:
        """Master and moments that an owner keeps of an expert, counted, by the parameter's name in its module."""
        return {w.key: 1 + len(self._kept()) for w in self._stacks() if w.layer == layer}

    def rows(self, layer: int, expert: int) -> dict[str, list[torch.Tensor]]:
        """Master and moments of an expert that this rank owns, each [...] float32."""
        row = self._owned(layer).index(expert)
        return {
            w.key: [w.master.data[row], *(m[row] for m in self.moments(w).values())]
            for w in self._stacks()
            if w.layer == layer
        }

    @torch.no_grad()
    def take(self, layer: int, experts: list[int], arrived: dict[int, dict[str, torch.Tensor]]) -> None:
        """Own `experts` of a layer from now on, in that order.

        The parameters hold their rows already, the layer's list of experts is still the old one.

        Args:
            arrived: masters and moments [kinds, ...] of those that this rank did not own, by parameter.
        """
        row_of = {e: row for row, e in enumerate(self._owned(layer))}
        for w in [w for w in self._stacks() if w.layer == layer]:
            old = {"master": w.master.data, **self.moments(w)}
            new = {}
            for i, kind in enumerate(("master", *self._kept())):
                if kind == "master" and w.param.dtype == torch.float32:
                    new[kind] = w.param.data[: len(experts)]  # the same storage
                    continue
                new[kind] = w.param.data.new_empty(len(experts), *w.param.shape[1:], dtype=torch.float32)
                for row, e in enumerate(experts):
                    new[kind][row] = old[kind][row_of[e]] if e in row_of else arrived[e][w.key][i]
            w.master.data = new.pop("master")
            self.torch.state.pop(w.master, None)
            if experts and new:
                self.restore(w, new, self.updates)
        for group, masters in zip(self.torch.param_groups, self._groups(), strict=True):
            group["params"] = masters

    def _groups(self) -> list[list[torch.nn.Parameter]]:
        """Masters that decay, and those that do not; an expert stack without primaries is in neither."""
        return [[w.master for w in self.weights if w.master.numel() and _decays(w) is d] for d in (True, False)]

    def _kept(self) -> tuple[str, ...]:
        """Moments that owners have by now, the same on every rank: before the first update there are none."""
        return self.kinds if self.updates and (self.cfg.kind == "adamw" or self.cfg.beta1) else ()

    def _owned(self, layer: int) -> list[int]:
        return self.ep.layers[layer].experts[: self.ep.layers[layer].owned]

    def _stacks(self) -> Iterator[Any]:
        return (w for w in self.weights if w.layer is not None)

    def _sum_dense(self) -> None:
        bucket: list[torch.Tensor] = []
        dense = [w.gradient for w in self.weights if w.layer is None and w.gradient is not None]
        for i, g in enumerate(dense):
            bucket.append(g)
            if sum(b.numel() for b in bucket) >= BUCKET or i + 1 == len(dense):
                flat = torch.cat([b.flatten() for b in bucket])
                self.group.all_reduce(flat)
                for b, part in zip(bucket, flat.split([b.numel() for b in bucket]), strict=True):
                    b.copy_(part.view_as(b))
                bucket = []

    def _global_norm(self, figures: torch.Tensor) -> float:
        """L2 norm of the whole gradient, each expert counted once (at its primary); NaN if a figure is not finite."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.weights[0].master.device)
        for w in self.weights:
            squares[int(w.layer is not None)] += w.master.grad.double().square().sum()
        experts = squares[1:] + 0 * figures.sum()
        self.group.all_reduce(experts)
        return float((squares[0] + experts[0]).sqrt())


def _weight(name: str, p: torch.nn.Parameter, layer: int | None, ep: ExpertParallel) -> Weight:
    owned = p.data if layer is None else p.data[: ep.layers[layer].owned]
    master = p if layer is None and p.dtype == torch.float32 else torch.nn.Parameter(owned.float())
    return Weight(name, p, master, layer)


def _decays(w: Weight) -> bool:
    """Matrices decay; biases, norms and other vectors (per expert, too) do not."""
    dims = w.param.dim() - (w.layer is not None)
    return dims >= 2 and not w.name.endswith("bias")


def _torch_optimizer(cfg: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if cfg.kind == "sgd":
        return torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=cfg.beta1)
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.eps, fused=True)
