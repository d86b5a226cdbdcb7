"""When a run is evaluated on its held-out split, and what becomes of a loss that is no number."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, Protocol

import numpy as np

from ray_ep.config.schema import EvalConfig
from ray_ep.driver.records import Event

RankTrace = list[dict[str, np.ndarray[Any, Any]]]


class EvaluatingRanks(Protocol):
    """What an evaluation needs of the ranks."""

    def evaluate(self) -> tuple[float, list[RankTrace]] | None:
        """Loss on the held-out split, and who answered; None: it was broken off."""


class Evaluator:
    """Evaluations of one run.

    Args:
        steps: of the whole run; the last one is evaluated, too.
        sequences: held out; 0: there is nothing to evaluate on.
        keep: is given the step and each rank's trace of who answered.
        publish: tells an operator.
    """

    def __init__(
        self,
        cfg: EvalConfig,
        steps: int,
        sequences: int,
        ranks: EvaluatingRanks,
        keep: Callable[[int, list[RankTrace]], None],
        publish: Callable[[Event], None],
    ):
        self.cfg, self.steps, self.sequences, self.ranks = cfg, steps, sequences, ranks
        self.keep, self.publish = keep, publish

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps."""
        every = self.cfg.every
        return bool(every and self.sequences) and (done % every == 0 or done == self.steps)

    def evaluate(self, done: int) -> float | None:
        """The loss after `done` steps; None if it is not a number, which is told, or if it was broken off.

        Raises:
            RankError: a rank was lost meanwhile.
        """
        answer = self.ranks.evaluate()
        if answer is None:
            return None
        loss, traces = answer
        self.keep(done, traces)
        if isfinite(loss):
            return loss
        words = f"step {done}: the loss on the held-out split is {loss}: it is not drawn"
        self.publish(Event("evaluation", words, {"eval_loss": loss}))
        return None
