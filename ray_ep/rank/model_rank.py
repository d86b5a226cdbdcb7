"""One rank's part of a model: experts on their slots, the group, how they exchange, and what was routed.

A plain class; the Ray actor is a shell around it, a `Trainer` works with it. No data, no losses, no optimizer here.
L MoE layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil

import numpy as np
import torch
from transformers import PreTrainedConfig

from ray_ep.collective import Group
from ray_ep.config.exchange import most_tokens
from ray_ep.config.schema import Config
from ray_ep.errors import ModelError
from ray_ep.moe import (
    KINDS,
    Choice,
    ExpertParallel,
    Limits,
    Moved,
    OwnedState,
    Rows,
    apply_placement,
    choose,
    regroup,
    settle,
)
from ray_ep.moe.exchange.elastic import library
from ray_ep.moe.exchange.ways import DEEPEP
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.rank.model import build
from ray_ep.rank.pretrained.reading import Reading
from ray_ep.rank.step.before import unseen
from ray_ep.rank.trained.frozen import freeze
from ray_ep.rank.trained.lora import adapt

CHOICE_S = 1.2
"""Time that the choice of the exchange may take, beside one forward pass and a first round of every way."""


class ModelRank:
    """One rank of a group with its part of the model.

    Args:
        config: the transformers config of the model.
        node_of: [R] node of each rank, or group of fast links.
        device: where this rank computes; the group must take its tensors. Only cpu has been run yet.
        topology: links, for the balance inside the step; None, or not measured: it measures a few itself.
        reading: counts what is read of a checkpoint.
    """

    def __init__(
        self,
        cfg: Config,
        config: PreTrainedConfig,
        group: Group,
        placement: Placement,
        node_of: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        topology: Topology | None = None,
        reading: Reading | None = None,
    ):
        self.cfg, self.config, self.device = cfg, config, torch.device(device)
        way, by_deepep = cfg.exchange, cfg.exchange.transport == DEEPEP
        if by_deepep and group.size > 1:
            library()  # raises before the model is built
        self.model = build(
            cfg.model, config, cfg.seed, group, placement, self.device, reading,
            node_of=node_of, sample=cfg.statistics.sample // group.size, balance=cfg.balance.in_step,
            limits=Limits(cfg.balance.guest_mb, cfg.balance.most, None if topology is None else topology.by_groups()),
        )  # fmt: skip
        self.ep: ExpertParallel = self.model.ray_ep  # type: ignore[assignment]
        freeze(self.model, cfg.optim.freeze)
        if cfg.lora.rank:
            held = [layer.experts for layer in self.ep.layers]
            adapt(self.model, cfg.lora, cfg.seed, dict(zip(self.ep.names, held, strict=True)))
        self.ep.routing.force = cfg.router.force
        self.top_k = int(getattr(config.get_text_config(), "num_experts_per_tok", None) or 1)
        # DeepEP's buffer needs a bound.
        self._bounded = bool(way.tokens) or by_deepep
        self.ep.exchange_by(chunks=way.chunks, float8=way.float8, tokens=self._most_tokens())

    @property
    def group(self) -> Group:
        """The group that the layers exchange over."""
        return self.ep.group

    @torch.no_grad()
    def choose_exchange(
        self, groups: dict[str, Group], forward: Callable[[], object], tokens: int, backward: bool
    ) -> Choice:
        """Take the fastest way to exchange, timed on the routing of one pass (collective, between steps).

        Nothing that a step depends on or reports is changed, but the groups: those not taken are the caller's to close.

        Args:
            groups: transports to choose from, by name.
            forward: the pass: of what the model is going to compute on.
            tokens: of all ranks in such a pass.
            backward: time backward, too.
        """
        exchange = self.cfg.exchange
        kinds = KINDS if exchange.kind == "auto" else (exchange.kind,)
        if exchange.transport == DEEPEP:
            kinds = (DEEPEP,)
        if len(groups) == 1 and (self.group.size == 1 or len(kinds) == 1):
            return settle(self.ep, kinds[0], groups, ceil(tokens * self.top_k / self.ep.num_experts), backward)
        layer = self.ep.layers[len(self.ep.layers) // 2]
        with unseen(self.model):
            with self.ep.capturing(layer.index) as capture:
                forward()
            if capture.work is None:
                raise self.never_called()
            return choose(self.ep, capture.work, layer.index, groups, kinds=kinds, backward=backward, budget_s=CHOICE_S)

    def migrate(self, placement: Placement, buffer_mb: float = 256, state: OwnedState | None = None) -> Moved:
        """Take on another placement: experts move, and with their primaries what `state` keeps of them (between steps).

        Raises:
            PlacementError, ModelError, GroupError: see ray_ep.moe.apply_placement; then nothing has changed.
        """
        return apply_placement(self.model, placement, buffer_mb=buffer_mb, state=state)

    def regroup(
        self,
        placement: Placement,
        topology: Topology,
        kept: Mapping[tuple[int, int], Rows] | None = None,
        state: OwnedState | None = None,
        equal: Mapping[str, object] | None = None,
    ) -> None:
        """Go on over the group, which was re-formed in place (collective over it, between steps).

        Raises:
            PlacementError, ModelError, GroupError: see ray_ep.moe.regroup; then nothing has changed, but the group.
        """
        self.ep.exchange_by(tokens=self._most_tokens())  # first: ranks compare how they exchange
        regroup(self.model, self.ep.group, placement, topology, kept=kept, state=state, equal=equal)

    def statistics(self) -> RoutingStatistics:
        """Routing statistics of this rank since its making. Not collective."""
        return self.ep.counters.statistics()

    def sample(self) -> np.ndarray:
        """[L, N, K] expert sets of a reservoir of this rank's recent tokens (see placement.decay). Not collective."""
        return self.ep.counters.sets()

    def _most_tokens(self) -> int:
        """Bound on a rank's tokens in one pass, which fewer ranks need greater; 0: none was asked for."""
        return max(self.cfg.exchange.tokens, most_tokens(self.cfg, self.group.size)) if self._bounded else 0

    def never_called(self) -> ModelError:
        """What to say of a model that keeps its experts to itself."""
        return ModelError(f"{type(self.model).__name__} never called its experts through transformers' interface")
