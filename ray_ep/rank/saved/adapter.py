"""A checkpoint of adapters -> a directory that PEFT loads beside the model that they adapt. No ranks, no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ray_ep.config.sections.lora import LoraConfig
from ray_ep.moe.adapters import A, B
from ray_ep.rank.model import meta_model
from ray_ep.rank.saved.checkpoint import Checkpoint
from ray_ep.rank.saved.disk import save_tensors
from ray_ep.rank.trained.lora import peft_config

WEIGHTS = "adapter_model.safetensors"
"""What PEFT calls the file of an adapter."""


def write_adapter(checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
    """Write `out` so that `PeftModel.from_pretrained(base, out)` is the trained model, in float32.

    Returns:
        What was written: tensors, bytes, files, and the base.
    """
    from peft import get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

    manifest = checkpoint.manifest
    settings = dict(manifest["model"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    lora, base = LoraConfig(**manifest["config"]["lora"]), str(manifest["config"]["model"]["path"])
    model = get_peft_model(meta_model(config), peft_config(lora), low_cpu_mem_usage=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            tensors |= _of_experts(checkpoint, name, module)
    for key in checkpoint.tensors:
        kind, _, name = key.partition("/")
        if kind == "weight" and name.count("/") == 0:
            tensors[f"base_model.model.{name.replace('.default.', '.')}"] = checkpoint.read(key)
    save_tensors({k: t.contiguous() for k, t in tensors.items()}, out / WEIGHTS, {"format": "pt"})
    how = peft_config(lora, base)
    how.inference_mode = True
    how.save_pretrained(out)
    size = sum(t.nbytes for t in tensors.values())
    files = sorted(p.name for p in out.iterdir())
    return {"tensors": len(tensors), "bytes": size, "shards": 1, "files": files, "base": base}


def _of_experts(checkpoint: Checkpoint, name: str, module: Any) -> dict[str, torch.Tensor]:
    """Both factors of all experts of a weight in PEFT's layout: A [E * r, in], B [out, r * E], experts innermost."""
    inside = name.removeprefix("base_model.model.").replace(".base_layer", "")
    a, b = (
        torch.stack(
            [checkpoint.read(f"weight/{inside}.{k}{module.parameter_name}/{e}") for e in range(module.num_experts)]
        )
        for k in (A, B)
    )
    return {f"{name}.lora_A.weight": a.flatten(0, 1), f"{name}.lora_B.weight": b.permute(1, 2, 0).flatten(1)}
