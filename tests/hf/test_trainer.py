"""transformers' Trainer over a model loaded with ray_ep's layer: losses, norms and checkpoints of one process."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ray_ep.placement import random
from tests.conftest import slow
from tests.hf.loaded import hf, load, mean_loss, saved

STEPS, ROWS = 3, 4
DATA = torch.randint(3, 64, (STEPS * ROWS, 10), generator=torch.Generator().manual_seed(2))


def adapted(model):
    """The model with adapters on its attention: peft's, the same on every rank."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def trained(rank, path, out, moved=False, adapters=False, accumulate=1, **arguments):
    """Losses and gradient norms of a few steps, as the Trainer logs them; ROWS rows a step over both ranks."""
    model = load(path)
    if moved:
        hf.apply_placement(model, random(2, 8, 2, seed=1))
    if adapters:
        model = adapted(model)
    settings = TrainingArguments(
        out, use_cpu=True, max_steps=STEPS, per_device_train_batch_size=ROWS // 2 // accumulate, learning_rate=0.1,
        gradient_accumulation_steps=accumulate, lr_scheduler_type="constant", logging_steps=1, report_to=[],
        disable_tqdm=True, optim="sgd", train_sampling_strategy="sequential", save_only_model=True,
        save_strategy="steps", save_steps=2, **arguments,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in DATA])
    trainer.train()
    trainer.save_model(f"{out}/last")
    logged = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    return logged, [layer.calls for layer in hf.experts_of(model).layers]


def one_process(model):
    """The same steps in plain torch."""
    optimizer, figures = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(STEPS):
        loss, _ = mean_loss(model, DATA[step * ROWS : (step + 1) * ROWS])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        figures.append((float(loss.detach()), float(norm)))
    return figures


def check(two, tmp_path, passes=STEPS, tolerance=1e-4, **options):
    """A Trainer on two ranks gives the figures of one process; its checkpoint is whole."""
    plain, path = saved(tmp_path, "qwen3_moe")
    results = two(partial(trained, **options), path, str(tmp_path / "out"))
    want = torch.tensor(one_process(plain))
    for logged, calls in results:
        assert torch.allclose(torch.tensor(logged), want, rtol=tolerance, atol=0), (logged, want)
        assert calls == [passes, passes]
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "last")
    for (name, p), q in zip(plain.named_parameters(), last.parameters(), strict=True):
        assert (p - q).abs().max() < 10 * tolerance, name
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").exists()


def test_a_trainer_gives_the_losses_norms_and_weights_of_one_process(two, tmp_path):
    check(two, tmp_path)


@pytest.mark.slow
def test_a_trainer_saves_experts_that_were_moved_in_their_order(two, tmp_path):
    check(two, tmp_path, moved=True)


@pytest.mark.parametrize("reentrant", slow(False, True))
def test_gradient_checkpointing_in_a_trainer_changes_nothing(two, tmp_path, reentrant):
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    check(two, tmp_path, passes=2 * STEPS, **again)


@pytest.mark.slow
def test_gradients_accumulate_as_in_one_process(two, tmp_path):
    check(two, tmp_path, passes=2 * STEPS, accumulate=2)


@pytest.mark.slow
def test_a_trainer_in_mixed_precision_stays_near_one_process(two, tmp_path):
    check(two, tmp_path, tolerance=0.05, bf16=True)


@pytest.mark.slow
def test_adapters_on_the_attention_train_as_in_one_process(two, tmp_path):
    plain, path = saved(tmp_path, "qwen3_moe")
    want = torch.tensor(one_process(adapted(plain)))
    for logged, _ in two(partial(trained, adapters=True), path, str(tmp_path / "out")):
        assert torch.allclose(torch.tensor(logged), want, rtol=1e-4, atol=0), (logged, want)
    assert (tmp_path / "out" / "last" / "adapter_model.safetensors").exists()


def with_optimizer_state(rank, path, out):
    settings = TrainingArguments(out, use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="Pass `save_only_model=True` or `save_strategy='no'`"):
        Trainer(load(path), settings)


def test_checkpoints_with_optimizer_state_are_refused_by_transformers_before_anything_runs(two, tmp_path):
    two(with_optimizer_state, saved(tmp_path, "qwen3_moe")[1], str(tmp_path / "out"))
