"""Records of made-up steps."""

from dataclasses import fields

import numpy as np

from ray_ep.driver.records import StepRecord


def record(step=1, **figures):
    """Of one step: what is not given is 0, or was not measured."""
    nothing = {f.name: 0 for f in fields(StepRecord)} | {
        "loss": 2.0, "step_seconds": 0.1, "phase_seconds": {}, "max_expert_load": [], "load": np.ones((1, 4)),
        "rank_load": np.ones((1, 2)), "sent": np.zeros((2, 2)), "migration_seconds": None, "rebalance_seconds": None,
        "eval_loss": None, "sample": None,
    }  # fmt: skip
    return StepRecord(**nothing | {"step": step} | figures)
