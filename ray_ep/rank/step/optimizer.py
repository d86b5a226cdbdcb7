"""One owner for each weight: float32 masters, gradients summed over ranks and replicas, one global norm, one update.

Dense weights are replicated: every rank updates its own copy with the same summed gradient. An expert is updated by its
primary alone, which sends the new weights to the replicas. No model search here (ray_ep.moe), no schedule of steps.
S experts held by this rank, the first `owned` of them primaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import get_scheduler

from ray_ep.collective import Group
from ray_ep.config.schema import OptimConfig
from ray_ep.moe import ExpertParallel
from ray_ep.rank.step.update import Rule, WeightPart, sum_of_squares, update

BUCKET = 1 << 23
"""Elements of dense gradients that are summed over ranks in one all-reduce."""


@dataclass(slots=True)
class Weight:
    """A parameter of the model and its master: the same storage in float32, a float32 copy in bfloat16."""

    name: str  # as in model.named_parameters()
    param: torch.nn.Parameter  # dense [...], or [S, ...] rows of experts
    master: torch.nn.Parameter  # dense [...], or [owned, ...] rows of primaries
    layer: int | None  # MoE layer of an expert stack, None for dense
    gradient: torch.Tensor | None = None  # like param, of one pass; float32 once passes, ranks or replicas are summed
    moments: dict[str, torch.Tensor] = field(default_factory=dict)  # like master; empty before the first update

    @property
    def key(self) -> str:
        """Name in the module that holds it."""
        return self.name.rpartition(".")[2]

    @property
    def decays(self) -> bool:
        """Matrices decay; biases, norms and other vectors (per expert, too) do not."""
        return self.param.dim() - (self.layer is not None) >= 2 and not self.name.endswith("bias")

    @property
    def owned(self) -> torch.Tensor:
        """The gradient of what the master holds."""
        assert self.gradient is not None
        return self.gradient if self.layer is None else self.gradient[: len(self.master)]

    @property
    def compute(self) -> torch.Tensor | None:
        """Where the model has its copy of the master; None: it computes with the master itself."""
        data = self.param.data if self.layer is None else self.param.data[: len(self.master)]
        return None if data.data_ptr() == self.master.data_ptr() else data


@dataclass(frozen=True, slots=True)
class FrozenWeight:
    """A parameter that is not trained: it has no master, and moves and is saved as it is."""

    name: str  # as in model.named_parameters()
    param: torch.nn.Parameter  # dense [...], or [S, ...] rows of experts
    layer: int | None  # MoE layer of an expert stack, None for dense

    @property
    def key(self) -> str:
        """Name in the module that holds it."""
        return self.name.rpartition(".")[2]


class MasterOptimizer:
    """AdamW or SGD over the master weights of one rank.

    Use: after each backward `accumulate()`; then once, in this order, `reduce()` and `norm(...)`, which are collective,
    `update(...)`, which is not, and `publish()`, which is and may be repeated. Up to `update`, `discard()` forgets all.

    Args:
        enter: told what a step is at: reduce, norm, update, publish.

    Attributes:
        weights: what is trained. frozen: what is not, but for the base of adapters, which nobody saves.
    """

    def __init__(self, model: Any, cfg: OptimConfig, enter: Callable[[str], None] = lambda phase: None):
        ep: ExpertParallel = model.ray_ep
        self.ep, self.cfg, self.enter = ep, cfg, enter
        layer_of = {f"{n}.{p}": i for i, n in enumerate(ep.names) for p in ep.parameters(i)}
        named = list(model.named_parameters())
        self.weights = [_weight(n, p, layer_of.get(n), ep) for n, p in named if p.requires_grad]
        base = set(getattr(model, "ray_ep_base", ()))  # of adapters: it is where it came from
        self.frozen = [FrozenWeight(n, p, layer_of.get(n)) for n, p in named if not (p.requires_grad or n in base)]
        self.updates = 0  # so far, those of a restored run included
        schedule = get_scheduler(cfg.schedule, torch.optim.SGD([torch.zeros(1)]), cfg.warmup_steps, cfg.steps)
        self._factor = schedule.lr_lambdas[0]

    @property
    def group(self) -> Group:
        """The group that the layers exchange over."""
        return self.ep.group

    @property
    def parameters(self) -> list[Weight | FrozenWeight]:
        """All of the model's, trained or not."""
        return [*self.weights, *self.frozen]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the moments that the optimizer keeps of a weight."""
        return ("exp_avg", "exp_avg_sq") if self.cfg.kind == "adamw" else ("momentum_buffer",)

    def learning_rate(self, step: int) -> float:
        """Rate of optimizer step `step` (from 0); the first warm-up step is not zero."""
        return float(self.cfg.learning_rate * self._factor(step + 1 if step < self.cfg.warmup_steps else step))

    def accumulate(self) -> None:
        """Add the gradients of the last backward to the step's sum: that of several passes is float32."""
        for w in self.weights:
            g, w.param.grad = w.param.grad, None
            if w.gradient is None:  # no gradient at all (no tokens came) is a zero: decay still applies
                w.gradient = torch.zeros_like(w.param.data) if g is None else g
            elif g is not None:
                w.gradient = w.gradient.float()
                w.gradient += g

    def discard(self) -> None:
        """Forget the gradients of a step, whatever state they are in."""
        for w in self.weights:
            w.gradient = w.param.grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum gradients over ranks and replicas (collective)."""
        self.enter("reduce")
        self._sum_dense()
        for w in self._stacks():
            if self.ep.replicas[w.layer].any:
                w.gradient = w.gradient.float()
                self.ep.replicas[w.layer].sum_to_owner(w.gradient.flatten(1))

    @torch.no_grad()
    def norm(self, figures: torch.Tensor) -> float:
        """L2 norm of the whole gradient, each expert counted once (at its primary): equal on every rank (collective).

        Args:
            figures: float64 [n], summed over ranks along the way, in place.
        """
        self.enter("norm")
        squares = torch.zeros(2, dtype=torch.float64, device=figures.device)  # of dense weights, of experts
        for w in self.weights:
            if w.layer is not None or self.group.rank == 0:  # dense: other processors may sum otherwise in the last bit
                squares[int(w.layer is not None)] += sum_of_squares(w.owned)
        message = torch.cat([squares, figures])
        self.group.all_reduce(message)
        figures.copy_(message[2:])
        self.group.wait()
        return float((message[0] + message[1]).sqrt())

    @torch.no_grad()
    def update(self, number: int, norm: float) -> None:
        """Update masters, moments and compute weights by gradients of this norm, which are gone then. Not collective.

        Args:
            number: of the step, from 0, for the learning rate.
        """
        self.enter("update")
        self.updates += 1
        cfg, limit, kinds = self.cfg, self.cfg.clip_norm, self._kept()
        clip = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        for decays, decay in ((True, cfg.weight_decay), (False, 0.0)):
            numbers = self.learning_rate(number), cfg.beta1, cfg.beta2, cfg.eps, decay, clip, self.updates
            weights = [w for w in self.weights if w.decays is decays and w.master.numel()]
            update(Rule(cfg.kind, *numbers), (_part(w, kinds) for w in weights))
        self.discard()

    def damaged(self) -> str:
        """Name of a weight that is not finite here, or whose moments are not; empty if there is none."""
        kept = ((w.name, t) for w in self.weights for t in (w.master.data, *w.moments.values()))
        return next((name for name, t in kept if not t.isfinite().all()), "")

    @torch.no_grad()
    def publish(self) -> None:
        """Send primaries' weights to their replicas (collective); again does no harm."""
        self.enter("publish")
        for w in self._stacks():
            self.ep.replicas[w.layer].send_to_replicas(w.param.data.flatten(1))

    @torch.no_grad()
    def restore(self, moments: dict[str, dict[str, torch.Tensor]], step: int) -> None:
        """Go on from masters that were overwritten, and these moments by parameter, after `step` updates (collective).

        A moment that is not among them, since the run that wrote them had none, is zero.
        """
        self.begin_after(step, moments)
        self.round()
        self.publish()

    def begin_after(self, updates: int, moments: Mapping[str, dict[str, torch.Tensor]]) -> None:
        """Have made so many updates, with these moments by parameter; one that is not among them is zero."""
        self.updates = updates
        for w in self.weights:
            old = moments.get(w.name, {})
            w.moments = {kind: old[kind] if kind in old else torch.zeros_like(w.master.data) for kind in self._kept()}

    @torch.no_grad()
    def round(self) -> None:
        """The model computes with what masters are now."""
        for w in self.weights:
            if w.compute is not None:
                w.compute.copy_(w.master)

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
            w.key: [w.master.data[row], *(m[row] for m in w.moments.values())]
            for w in self._stacks()
            if w.layer == layer
        }

    @torch.no_grad()
    def take(self, layer: int, experts: list[int], arrived: dict[int, dict[str, torch.Tensor]]) -> None:
        """Own `experts` of a layer from now on, in that order.

        The parameters hold their rows already, the layer's list of experts is still the old one.

        Args:
            arrived: masters and moments [kinds, ...] of those that this rank did not own, by parameter; of others they
                are in place of its own.
        """
        row_of = {e: row for row, e in enumerate(self._owned(layer))}
        for w in [w for w in self._stacks() if w.layer == layer]:
            old = {"master": w.master.data, **w.moments}
            new = {}
            for i, kind in enumerate(("master", *self._kept())):
                if kind == "master" and w.param.dtype == torch.float32:
                    new[kind] = w.param.data[: len(experts)]  # the same storage
                    continue
                new[kind] = w.param.data.new_empty(len(experts), *w.param.shape[1:], dtype=torch.float32)
                for row, e in enumerate(experts):
                    new[kind][row] = arrived[e][w.key][i] if e in arrived else old[kind][row_of[e]]
            w.master.data = new.pop("master")
            w.moments = new

    def _kept(self) -> tuple[str, ...]:
        """Moments that owners have by now, the same on every rank: before the first update there are none."""
        return self.kinds if self.updates and (self.cfg.kind == "adamw" or self.cfg.beta1) else ()

    def _owned(self, layer: int) -> list[int]:
        return self.ep.layers[layer].experts[: self.ep.layers[layer].owned]

    def _stacks(self) -> Iterator[Any]:
        return (w for w in self.weights if w.layer is not None)

    def _sum_dense(self) -> None:
        """Sum dense gradients over ranks, in float32."""
        if self.group.size == 1:
            return
        bucket: list[Weight] = []
        dense = [w for w in self.weights if w.layer is None]
        for i, w in enumerate(dense):
            bucket.append(w)
            sizes = [b.param.numel() for b in bucket]
            if sum(sizes) >= BUCKET or i + 1 == len(dense):
                flat = torch.cat([b.gradient.flatten().float() for b in bucket if b.gradient is not None])
                self.group.all_reduce(flat)
                for b, part in zip(bucket, torch.split(flat, sizes), strict=True):
                    b.gradient = part.view_as(b.param)
                bucket = []


def _weight(name: str, p: torch.nn.Parameter, layer: int | None, ep: ExpertParallel) -> Weight:
    p.data = p.data.contiguous()  # updated in blocks of neighbours
    owned = p.data if layer is None else p.data[: ep.layers[layer].owned]
    master = p if layer is None and p.dtype == torch.float32 else torch.nn.Parameter(owned.float())
    return Weight(name, p, master, layer)


def _part(w: Weight, kinds: tuple[str, ...]) -> WeightPart:
    """All elements of a weight, for `update`; moments of `kinds` that it lacks are made."""
    for kind in kinds:
        if kind not in w.moments:
            w.moments[kind] = torch.zeros_like(w.master.data)
    moments = tuple(w.moments[kind].view(-1) for kind in kinds)
    return WeightPart(
        w.master.data.view(-1), w.owned.reshape(-1), moments, None if w.compute is None else w.compute.view(-1)
    )
