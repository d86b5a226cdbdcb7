"""Training on the CUDA that is not there, over its NCCL, follows the CPU's over gloo step by step."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from ray_ep.placement import random
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.trainer import Trainer
from tests.conftest import slow
from tests.fake_cuda import fake_cuda, host_syncs, nccl_ranks
from tests.rank.test_training import CORPUS, EXPERTS, FIGURES, LAYERS, MAKING, configure, train

STEPS = 5


def train_there(size, *overrides, placement):
    """[rank][step] results, load counted, and all parameters after STEPS steps, on the host."""
    cfg, config = configure(*overrides)

    def work(group):
        device = torch.device("cuda", 0)
        with MAKING:
            rank = Trainer(ModelRank(cfg, copy.deepcopy(config), group, placement, None, device), CORPUS)
        results = [rank.train_step(step) for step in range(STEPS)]
        assert all(p.device == device for p in rank.model.parameters())
        with host_syncs() as syncs:
            counted = rank.rank.statistics()
        assert syncs, "what is counted lies on the device"
        return results, counted.load, {name: p.detach().cpu() for name, p in rank.model.named_parameters()}

    with fake_cuda():
        return nccl_ranks(size, work)


@pytest.mark.parametrize(
    "case",
    [
        (2, ("model.gradient_checkpointing=true", "batch.accumulation=2")),
        *slow((1, ()), (3, ("balance.in_step=off", "optim.kind=sgd"))),
    ],
)
def test_five_steps_and_what_comes_of_them_are_those_of_the_cpu(case):
    size, overrides = case
    placement = random(LAYERS, EXPERTS, size, EXPERTS if size == 1 else 6, seed=1)
    with set_checkpoint_early_stop(False):  # a global of torch, which ranks in threads would switch for one another
        want, made = train(size, STEPS, *overrides, placement=placement)
        got = train_there(size, *overrides, placement=placement)
    for rank, (results, load, parameters) in enumerate(got):
        for ours, cpu in zip(results, want[rank], strict=True):
            for figure in FIGURES:
                assert getattr(ours, figure) == pytest.approx(getattr(cpu, figure), rel=1e-4, abs=1e-6)
        assert np.array_equal(results[0].load, want[rank][0].load)
        assert load.sum() == made[rank].rank.statistics().load.sum()
        for name, p in made[rank].model.named_parameters():
            torch.testing.assert_close(parameters[name], p.detach(), rtol=1e-3, atol=1e-4, msg=name)
