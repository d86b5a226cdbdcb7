"""The phases of whole steps on a device, which the host does not wait for; on a CUDA that is not there."""

import copy
import time

import pytest

from ray_ep.placement import random
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.step.clock import STEP_PHASES
from ray_ep.rank.trainer import Trainer
from tests.fake_cuda import fake_cuda, nccl_ranks
from tests.rank.test_training import CORPUS, EXPERTS, LAYERS, MAKING, configure


def trainer(cfg, config, group):
    with MAKING:
        placement = random(LAYERS, EXPERTS, group.size, seed=1)
        return Trainer(ModelRank(cfg, copy.deepcopy(config), group, placement, device="cuda"), CORPUS)


def test_the_phases_of_a_step_are_its_time_and_a_half_step_leaves_nothing_to_count():
    cfg, config = configure()

    def work(group):
        rank = trainer(cfg, config, group)
        rank.clock._clock = pytest.fail  # the host's
        rank.train_step(0)
        began = time.perf_counter()
        usage = rank.train_step(1).usage
        took = time.perf_counter() - began
        assert rank.ep.meter._laps == []  # all of it is in the step's own usage
        counted = [dict(rank.ep.meter.seconds), dict(rank.clock.seconds)]
        rank._begin()
        rank.clock.enter("forward")
        rank._passes(2)[0]()
        rank.discard()
        return took, usage, counted, [dict(rank.ep.meter.seconds), dict(rank.clock.seconds)]

    with fake_cuda():
        results = nccl_ranks(2, work)
    for took, usage, counted, after in results:
        phases = dict(zip(STEP_PHASES, usage.phases.tolist(), strict=True))
        assert sum(phases.values()) == pytest.approx(took, rel=0.2)
        assert usage.exchange_seconds == pytest.approx(phases["exchange_forward"] + phases["exchange_backward"])
        assert usage.expert_seconds == pytest.approx(phases["experts_forward"] + phases["experts_backward"])
        assert usage.exchange_seconds > 0 < usage.expert_seconds
        assert min(phases.values()) > -0.05 * took
        assert after == counted
