"""Passes of the model over rows of a batch: this rank's share of it, and its share of the losses. No update here.

All are collective: the layers exchange. B sequences of the whole batch, L MoE layers.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from ray_ep.moe import Draws, router_losses
from ray_ep.rank.balancing import balancing
from ray_ep.rank.data.batch import Batch
from ray_ep.rank.data.corpus import Corpus
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.step.loss import summed_cross_entropy
from ray_ep.rank.step.masks import document_masks
from ray_ep.rank.step.recording import Recording


def shared(rows: int, ranks: int) -> list[tuple[int, int]]:
    """First and last (exclusive) row of each rank; a rank may have none."""
    return [(rows * r // ranks, rows * (r + 1) // ranks) for r in range(ranks)]


class Forward:
    """Forward passes of one rank; the caller makes the backward.

    Attributes:
        draws: random draws of training passes.
        recording: who answers for sampled tokens of training passes.
        stop: set by another thread: leave at the next pass, once all ranks have agreed.
    """

    def __init__(self, rank: ModelRank, corpus: Corpus):
        self.rank, self.ep = rank, rank.ep
        self.accumulation = rank.cfg.batch.accumulation
        self.balancing = balancing(rank.cfg, rank.config)
        self.ep.routing.draws = self.draws = Draws(rank.cfg.seed, rank.device)
        self.recording = Recording(rank, corpus)
        self.stop = threading.Event()

    def loss(self, part: Batch, step: int, number: int, predictions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the loss of pass `number` over `part`; its figures main, aux, z.

        Args:
            predictions: of all passes of the step: the main loss is the mean over them.
        """
        passes, balancing, routing = self.accumulation, self.balancing, self.ep.routing
        mine, length = self.share(part), part.length
        first = number * len(part) + routing.first_token // length
        with self.draws.forward(step, first, len(mine), length), self.recording.of_pass(step, number, first, mine):
            main = self.cross_entropy(mine) / predictions
        if not any(layer.calls for layer in self.ep.layers):
            raise self.rank.never_called()
        how = balancing.form, self.rank.top_k, (bool(balancing.coefficient), bool(balancing.z))
        load, tokens = self.ep.pass_load(), part.tokens
        losses = router_losses(routing.logits_of_tokens(), load, routing.routers, self.rank.group, tokens, *how)
        loss = main + (balancing.coefficient * losses.aux + balancing.z * losses.z) / passes
        figures = torch.stack([main.double(), losses.aux.double() / passes, losses.z.double() / passes])
        return loss, figures.detach()

    def share(self, batch: Batch) -> Batch:
        """Rows of the batch that are this rank's; there may be none."""
        low, high = shared(len(batch), self.rank.group.size)[self.rank.group.rank]
        self.ep.routing.first_token = low * batch.length
        return batch.rows(low, high)

    def cross_entropy(self, rows: Batch) -> torch.Tensor:
        """Summed loss of the rows' predictions; zero, with all exchanges made, if there are none."""
        model, device = self.rank.model, self.rank.device
        if not len(rows):
            with self.ep.idle():
                padding = torch.zeros(1, 2, dtype=torch.int64, device=device)
                nothing: torch.Tensor = 0 * model(input_ids=padding, use_cache=False).logits.sum()
                return nothing
        there, more = np.flatnonzero(rows.offsets >= 0), {}
        if rows.positions is not None:
            positions = torch.from_numpy(rows.positions).to(device)
            more = {"position_ids": positions, "attention_mask": document_masks(model, positions)}
        tokens = None if len(there) == rows.ids.size else torch.from_numpy(there).to(device)
        with self.ep.padded(tokens):
            logits = model(input_ids=torch.from_numpy(rows.ids).to(device), use_cache=False, **more).logits
        return summed_cross_entropy(logits, torch.from_numpy(rows.targets).to(device))

    def leaving(self) -> bool:
        """Whether any rank was asked to stop: the same answer on every rank (collective; on a GPU a host sync)."""
        asked = torch.tensor([float(self.stop.is_set())], device=self.rank.device)
        self.rank.group.all_reduce(asked, "max")
        return bool(asked.item())
