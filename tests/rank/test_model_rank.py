"""A rank with a model and nothing to train it."""

import copy

import numpy as np
import torch

from ray_ep.placement import contiguous, random
from ray_ep.rank.model_rank import ModelRank
from tests.conftest import run_ranks
from tests.rank.test_training import EXPERTS, LAYERS, MAKING, VOCAB, configure

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (2, 12)))


def test_a_rank_without_a_trainer_computes_counts_chooses_and_migrates():
    cfg, config = configure("statistics.sample=8")

    def work(group):
        with MAKING:
            rank = ModelRank(cfg, copy.deepcopy(config), group, contiguous(LAYERS, EXPERTS, 2))
        forward = lambda: rank.model.eval()(input_ids=IDS, use_cache=False).logits  # noqa: E731
        with torch.no_grad():
            choice = rank.choose_exchange({"gloo": group}, forward, IDS.numel(), backward=False)
            assert rank.statistics().load.sum() == 0, "a trial is not counted"
            before = forward()
            moved = rank.migrate(random(LAYERS, EXPERTS, 2, 6, seed=3))
            after = forward()
        assert choice.transport == "gloo"
        assert moved.moves > 0
        torch.testing.assert_close(after, before)
        return int(rank.statistics().load.sum()), rank.sample().shape

    tokens = 2 * IDS.numel() * LAYERS * 2  # passes, tokens, layers, top_k
    assert run_ranks(2, work) == [(tokens, (LAYERS, 4, 2))] * 2
