"""Tiny transformers checkpoints as hubs hold them: quantised, with stray files, with layers that no model has."""

import json
import math

import torch
from safetensors.torch import load_file, save_file

from tests.models import build


def tiny(path, name="deepseek_v3", **overrides):
    """A checkpoint of one model.safetensors; returns its tensors."""
    build(name, **overrides).save_pretrained(path)
    return load_file(path / "model.safetensors")


def write(path, tensors, **config):
    """Replace the weights of a checkpoint, and keys of its config (None: removed)."""
    save_file({k: t.clone() for k, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def fp8(tensors, block=(16, 16), suffix="_scale_inv", stacked=False):
    """(what the family ships, what it stands for): matrices of projections in float8 with a scale a block."""
    out, plain = {}, {}
    for key, t in tensors.items():
        if not (t.dim() == 2 and "_proj" in key and key.endswith(".weight")) and not (stacked and t.dim() == 3):
            out[key] = plain[key] = t
            continue
        grid = [math.ceil(n / b) for n, b in zip(t.shape[-2:], block, strict=True)]
        whole = torch.zeros(*t.shape[:-2], grid[0] * block[0], grid[1] * block[1])
        whole[..., : t.shape[-2], : t.shape[-1]] = t
        blocks = whole.unflatten(-1, (grid[1], block[1])).unflatten(-3, (grid[0], block[0]))
        scales = blocks.abs().amax((-3, -1)) / 448
        q = (blocks / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
        back = (q.float() * scales[..., :, None, :, None]).flatten(-4, -3).flatten(-2)
        out[key] = q.view(torch.uint8).flatten(-4, -3).flatten(-2).view(torch.float8_e4m3fn)
        out[key] = out[key][..., : t.shape[-2], : t.shape[-1]].contiguous()
        out[f"{key.removesuffix('weight')}scale" if suffix == ".scale" else key + suffix] = scales
        plain[key] = back[..., : t.shape[-2], : t.shape[-1]].contiguous()
    return out, plain


def mxfp4(tensors):
    """gpt-oss's experts as random blocks and scales; what they stand for is transformers' affair."""
    generator, out = torch.Generator().manual_seed(0), {}
    for key, t in tensors.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[key] = t
            continue
        experts, inner, rows = t.shape
        shape = (experts, rows, inner // 32)
        out[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        out[f"{key}_scales"] = torch.randint(120, 126, shape, generator=generator).to(torch.uint8)
    return out


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
