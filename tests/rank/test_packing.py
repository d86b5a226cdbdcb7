"""Whole documents in rows, packed or padded: the figures are those of each document alone in plain transformers."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from ray_ep.config import load_config
from ray_ep.errors import DataError, ModelError
from ray_ep.placement import random
from ray_ep.rank.data.batch import IGNORED
from ray_ep.rank.data.corpus import Corpus, load_corpus
from ray_ep.rank.data.packing import laid, rows_of_step
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.step.masks import check_documents, document_masks
from ray_ep.rank.trainer import Trainer
from tests.conftest import run_ranks, slow
from tests.models import build
from tests.rank.test_training import EXPERTS, GPT_OSS, LAYERS, MAKING, QWEN, TOP_K, VOCAB, Reference, configure

LENGTH, STEPS = 32, 3


def documents(sizes, seed=0):
    """Tokens of each document, and which of them count: some do not."""
    draw = np.random.default_rng(seed)
    tokens = [draw.integers(0, VOCAB, size).astype(np.uint8) for size in sizes]
    return tokens, [draw.random(size) < 0.7 for size in sizes]


def corpus_of(sizes, several):
    rows = laid(*documents(sizes), LENGTH, several)
    held = laid(*documents(sizes[:5], 1), LENGTH, several)
    return Corpus(rows.tokens, held.tokens, VOCAB, len(sizes), "drawn", rows.starts[:-1], rows, held)


SIZES = [5, 33, 12, 1, 7, 20, 31, 9, 16, 3, 2, 28, 11, 14, 8, 6, 17, 4, 25, 10]


class OneByOne(Reference):
    """Each document is a batch of its own; nothing is packed or padded."""

    def __init__(self, cfg, config, corpus):
        super().__init__(cfg, config)
        self.corpus = corpus

    def backward(self, number):
        cfg, rows = self.cfg, self.corpus.rows
        total, load = np.zeros(3), np.zeros((LAYERS, EXPERTS), int)
        numbers = rows_of_step(len(rows), cfg.seed, number, cfg.batch.sequences)
        found = [d for r in numbers for d in rows.order[rows.first[r] : rows.first[r + 1]].tolist()]
        parts = [(rows.tokens[a:b], rows.counted[a:b]) for a, b in (rows.starts[d : d + 2] for d in found)]
        predictions = sum(c[1:].sum() for _, c in parts)
        main, logits = 0, []
        for tokens, counted in parts:
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            out = self.model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
            labels = ids[0, 1:].masked_fill(~torch.from_numpy(counted[1:]), -100)
            main = main + cross_entropy(out.logits[0], labels, reduction="sum") / predictions
            logits.append(out.router_logits)
        logits = [torch.cat(x) for x in zip(*logits, strict=True)]
        z = torch.stack([x.logsumexp(-1).square().mean() for x in logits]).mean()
        figures = torch.stack([main, self.auxiliary(logits), z])
        (torch.tensor([1, cfg.router.aux_coefficient, cfg.router.z_coefficient]) * figures).sum().backward()
        total += figures.detach().double().numpy()
        load += [np.bincount(x.topk(TOP_K).indices.flatten(), minlength=EXPERTS) for x in logits]
        return total.tolist(), load


def train(size, corpus, *overrides, model=QWEN, kind="flat"):
    cfg, config = configure(*overrides, model=model)

    def work(group):
        with MAKING:
            trainer = Trainer(
                ModelRank(cfg, copy.deepcopy(config), group, random(LAYERS, EXPERTS, size, 8 - 3 * (size > 1), 1)),
                corpus,
            )
        trainer.ep.exchange_by(kind=kind)
        trainer.ep.balancer.assume(1e-3, 1e12)
        results = [trainer.train_step(step) for step in range(STEPS)]
        return SimpleNamespace(results=results, trainer=trainer, evaluation=trainer.evaluate(True))

    return run_ranks(size, work)


WAYS = {
    "fused": (),
    "recomputed": ("model.gradient_checkpointing=true",),
    "guests": ("balance.in_step=always",),
    "all_gather": ("exchange.kind=all_gather", "balance.in_step=off"),
    "two passes": ("batch.accumulation=2", "router.aux_loss=off", "router.z_coefficient=0"),
}


@pytest.mark.parametrize("model", [QWEN, GPT_OSS], ids=["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("several", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("way", ["fused", *slow("recomputed", "guests", "all_gather", "two passes")])
def test_losses_gradients_and_loads_are_those_of_each_document_alone(several, model, way):
    overrides = ("router.z_coefficient=0.01", "statistics.sample=4096", *WAYS[way])
    corpus = corpus_of(SIZES, several)
    plain = OneByOne(*configure(*overrides, model=model), corpus)
    wanted = [plain.step(step) for step in range(STEPS)]
    kind = "all_gather" if way == "all_gather" else "flat"
    for rank in train(2, corpus, *overrides, model=model, kind=kind):
        for got, want in zip(rank.results, wanted, strict=True):
            assert (got.loss, got.aux_loss, got.grad_norm) == pytest.approx(
                (want.loss, want.aux_loss, want.grad_norm), rel=2e-4
            )
            if way != "two passes":
                assert got.z_loss == pytest.approx(want.z_loss, rel=1e-4)
            assert (got.load == want.load).all(), "padding is routed nowhere"
            assert got.load.sum() == got.tokens * LAYERS * TOP_K
        loss, traces = rank.evaluation
        assert np.isfinite(loss)
        assert all((trace["experts"] >= 0).all() for trace in traces)
        assert rank.trainer.draws.count == 0, "masked attention without dropout draws nothing"
    rank = train(1, corpus, *overrides, model=model, kind="flat")[0]
    assert rank.results[-1].loss == pytest.approx(wanted[-1].loss, rel=2e-4)
    assert rank.evaluation[0] == pytest.approx(loss, rel=2e-4)
    counted = rank.trainer.rank.statistics()
    assert counted.load.sum() == sum(r.load.sum() for r in rank.results)
    assert counted.sample.shape[1] <= sum(r.tokens for r in rank.results)


@pytest.mark.parametrize("name", ["mixtral", *slow("qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe")])
def test_no_document_sees_another_in_any_architecture(name):
    model = build(name)
    ids = torch.randint(0, VOCAB, (1, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(12), torch.arange(20)])[None]
    mask = document_masks(model, positions)
    packed = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    alone = [model(input_ids=part, use_cache=False).logits for part in (ids[:, :12], ids[:, 12:])]
    assert (packed - torch.cat(alone, 1)).abs().max() < 1e-4


def test_a_model_whose_layers_carry_a_state_is_refused():
    check_documents(build("gpt_oss"))
    with pytest.raises(ModelError, match=r"data.pack=documents: NemotronHForCausalLM has .*: give data.pack=off"):
        check_documents(build("nemotron_h"))


@given(sizes=st.lists(st.integers(1, 17), min_size=1, max_size=60), several=st.booleans())
@settings(deadline=None)
def test_every_document_that_counts_is_in_one_row_and_no_row_is_too_long(sizes, several):
    tokens = [np.arange(n) + 100 * i for i, n in enumerate(sizes)]
    rows = laid(tokens, [np.ones(n, np.bool_) for n in sizes], 16, several)
    assert sorted(rows.order.tolist()) == list(range(sum(n > 1 for n in sizes)))
    batch = rows.batch(np.arange(len(rows)), 16)
    seen = list(zip(*np.nonzero(batch.targets != IGNORED), strict=True))
    assert len(seen) == sum(n - 1 for n in sizes), "each token but a document's first is predicted once"
    for i, j in seen:
        assert batch.targets[i, j] == batch.ids[i, j] + 1, "by the one before it in its document"
        assert batch.positions[i, j] == batch.ids[i, j] % 100
    if several and len(rows) > 1:
        filled = np.sort([(rows.starts[rows.order[a:b] + 1] - rows.starts[rows.order[a:b]] - 1).sum()
                          for a, b in zip(rows.first, rows.first[1:], strict=False)])  # fmt: skip
        assert filled[0] + filled[1] > 16, "the two emptiest rows do not fit into one"


def test_steps_take_every_row_once_before_any_comes_again():
    taken = np.concatenate([rows_of_step(10, 3, step, 4) for step in range(5)])
    assert sorted(taken[:10].tolist()) == sorted(taken[10:].tolist()) == list(range(10))
    assert taken[:10].tolist() != taken[10:].tolist()
    assert rows_of_step(10, 3, 2, 4).tolist() == taken[8:12].tolist(), "a function of seed and step alone"


@pytest.mark.parametrize("pack", ["documents", "off"])
def test_long_texts_go_on_in_other_rows_and_each_token_is_predicted_once(tmp_path, pack):
    for i, size in enumerate((5, 40, 100)):
        (tmp_path / f"{i}.txt").write_bytes(bytes(range(1, size + 1)))
    cfg = load_config(None, [f"data.files={tmp_path}/*.txt", f"data.pack={pack}", "data.held_out=0"])
    corpus = load_corpus(cfg.data, 16)
    batch = corpus.rows.batch(np.arange(len(corpus.rows)), 16)
    assert batch.predictions == 5 + 40 + 100, "with the byte that ends each, but for its first"
    follows = (batch.targets == batch.ids + 1) | (batch.targets == 0)
    assert follows[batch.targets != IGNORED].all()
    assert corpus.held_out_rows is None
    assert len(corpus.held_out) == 0
    held = load_corpus(load_config(None, [f"data.files={tmp_path}/*.txt", f"data.pack={pack}"]).data, 16)
    assert len(held.held_out_rows) >= 1
    assert len(held.held_out_batch(64, 16)) == len(held.held_out_rows)


def test_documents_without_two_tokens_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no text there"):
        load_corpus(load_config(None, [f"data.files={tmp_path}/a.jsonl", "data.pack=documents"]).data, 16)
