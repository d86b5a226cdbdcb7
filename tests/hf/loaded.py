"""Work on the ranks of a job: models that transformers loads with ray_ep's layer, and what one process gets."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from ray_ep.errors import ModelError
from tests.models import build, reference

try:
    from ray_ep import hf
except ModelError as e:  # Python 3.10 has an older transformers
    pytest.skip(str(e), allow_module_level=True)

IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(1))


def load(path, name="ray_ep", **sizes):
    """The saved model with its experts over all ranks; without sizes for DistributedConfig each has its own batch."""
    world = torch.distributed.get_world_size()
    sizes = sizes or {"fsdp_size": world}
    config = DistributedConfig(**{"ep_size": world, **sizes}, ep_implementation=name)
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config, attn_implementation="eager")


def saved(folder, name, dtype=torch.float32):
    """A plain model, and the folder in which it lies."""
    model, path = build(name, dtype=dtype), folder / f"{name}-{dtype}".replace("torch.", "")
    if not path.exists():
        model.save_pretrained(path)
    return model, str(path)


def whole(tensor):
    """A tensor of every rank's shards (collective)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_loss(model, ids):
    """Mean next-token loss of ids [B, L], and the logits."""
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return loss, logits


def gradients(model):
    """Every gradient in full by name, as transformers' optimizers see them (collective)."""
    return {n: whole(p.grad) for n, p in model.named_parameters()}


def assert_equals_one_process(plain, model, rows, tolerance=1e-5):
    """Forward and backward on this rank's `rows` of IDS give plain transformers' logits and every gradient."""
    _, logits, grads = reference(plain, IDS)
    model.zero_grad()
    loss, got = mean_loss(model, IDS[rows])
    loss.backward()
    assert (got - logits[rows]).abs().max() <= tolerance
    found = gradients(model)
    assert found.keys() == grads.keys()
    for name, gradient in grads.items():
        assert (found[name] - gradient).abs().max() <= tolerance, name
    return hf.experts_of(model)


def rows_of(rank, ranks=2):
    """This rank's rows of IDS, the same number on each."""
    return slice(len(IDS) * rank // ranks, len(IDS) * (rank + 1) // ranks)
