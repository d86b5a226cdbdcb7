"""Quantised weights of a checkpoint: which are dequantised while they are read, and how the others are called.

Tensors here are lazy, like safetensors' slices: `[...]` reads all, `[a:b]` rows of the first dimension. Reads no files.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

DEQUANTISED = ("fp8", "mxfp4")
"""Values of quant_method that are read: the others are refused by name."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that need no dequantisation."""

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])

# What no model has a place for, by the name it goes under; the first that fits counts.
_LOOKS = {
    r"\.(qweight|qzeros)$": "GPTQ or AWQ",
    r"\.g_idx$": "GPTQ",
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.": "bitsandbytes, 4 bits",
    r"\.(SCB|weight_format)$": "bitsandbytes, 8 bits",
    r"\.(weight_packed|weight_zero_point|weight_shape)$": "compressed-tensors",
    r"_blocks$|_scales$": "mxfp4",
    r"\.(W_q|W_nbits)$": "HQQ",
    r"(_weight_qdata|:qdata|_weight_scale|:scale)$": "torchao",
    r"\.weight_scale_2$": "NVIDIA ModelOpt",
    r"(_scale_inv|\.qscale_weight)$": "fp8",
    r"\.(pre_quant_scale|smooth_scale)$": "smoothed for quantisation",
    r"\.(weight_scale|weight_scales|weight_global_scale|input_global_scale)$": "scaled weights",
}
_MAYBE = re.compile(
    r"\.(scale|scales)$"
)  # of a weight, if there is one beside it; else of a norm, or of a tower's layer
ACTIVATION_SCALE = re.compile(r"\.(activation_scale|input_scale|qscale_act)$|_activation_scale$")
"""Scales of activations: a dequantised model has no use for them."""


def declared(raw: dict[str, Any]) -> dict[str, Any]:
    """The quantisation that a config.json declares, `quant_method` filled in; empty: none."""
    texts = [raw, *(raw[k] for k in ("text_config", "llm_config", "language_config") if isinstance(raw.get(k), dict))]
    found = next((t[k] for t in texts for k in ("quantization_config", "compression_config") if t.get(k)), None)
    if not isinstance(found, dict):
        return {}
    bits = found.get("load_in_8bit") or found.get("load_in_4bit")
    return {**found, "quant_method": str(found.get("quant_method") or ("bitsandbytes" if bits else "unnamed"))}


def looks_like(key: str, keys: Container[str]) -> str:
    """Which quantisation the name of a tensor among `keys` speaks of; empty: none."""
    if _MAYBE.search(key) and f"{key.rpartition('.')[0]}.weight" in keys:
        return "scaled weights"
    return next((name for pattern, name in _LOOKS.items() if re.search(pattern, key)), "")


def scales_of(key: str) -> list[str]:
    """Names that the scales of a weight may have: DeepSeek-V3's, DeepSeek-V4's, Mistral's."""
    names = [f"{key}_scale_inv"]
    if key.endswith(".weight"):
        names += [f"{key.removesuffix('weight')}scale", f"{key.removesuffix('weight')}qscale_weight"]
    return names


class Scaled:
    """A weight [..., M, N] in float8 (or two 4-bit floats a byte) times scales [..., m, n], one for each block.

    The blocks are those of the config where their number is that of the scales (the last may be cut off: DeepSeek-V3
    has 576 rows in blocks of 128), else even ones.
    """

    def __init__(self, weight: Any, scales: Any, block: list[int] | None):
        self.weight, self.scales = weight, scales
        self.shape = list(weight.get_shape())
        self.packed = weight.get_dtype() == "I8"
        if self.packed:
            self.shape[-1] *= 2
        grid = list(scales.get_shape())
        self.single = all(n == 1 for n in grid)
        if self.single:
            return
        fits = len(grid) == len(self.shape) >= 2 and grid[:-2] in (self.shape[:-2], [1] * (len(grid) - 2))
        pairs = zip(self.shape[-2:], grid[-2:], block or [0, 0], strict=True)
        self.block = [_block(*sizes) for sizes in pairs] if fits else [0, 0]
        if 0 in self.block:
            raise ValueError(f"its scales of shape {grid} do not fit its shape {self.shape}")

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return "F32"

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.weight.nbytes + self.scales.nbytes)

    def __getitem__(self, index: Any) -> torch.Tensor:
        shape = self.scales.get_shape()
        alike = isinstance(index, slice) and len(shape) == 3 and shape[0] > 1  # scales of these rows alone
        weight, scales = self.weight[index], self.scales[index if alike else ...]
        weight = _unpack(weight) if self.packed else weight.float()
        scales = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
        if self.single:
            return weight * scales.reshape(())
        for dim, size in zip((-2, -1), self.block, strict=True):
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
        return weight.mul_(scales)


class Packed4:
    """gpt-oss's experts in mxfp4: blocks [E, M, G, 16] of two values a byte and scales [E, M, G] -> [E, 32 G, M].

    bfloat16 holds every such value exactly.
    """

    def __init__(self, blocks: Any, scales: Any):
        self.blocks, self.scales = blocks, scales
        shape = list(blocks.get_shape())
        if len(shape) != 4 or list(scales.get_shape()) != shape[:3]:
            raise ValueError(f"its scales of shape {list(scales.get_shape())} do not fit its blocks of shape {shape}")

    def get_shape(self) -> list[int]:
        experts, rows, groups, size = self.blocks.get_shape()
        return [experts, groups * size * 2, rows]

    def get_dtype(self) -> str:
        return "BF16"

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.blocks.nbytes + self.scales.nbytes)

    def __getitem__(self, index: Any) -> torch.Tensor:
        blocks = self.blocks[index]
        if not len(blocks):
            return torch.empty(0, *self.get_shape()[1:], dtype=torch.bfloat16)
        dense: torch.Tensor = convert_moe_packed_tensors(blocks, self.scales[index], dtype=torch.bfloat16)
        return dense


def _block(size: int, count: int, configured: int) -> int:
    if configured and -(-size // configured) == count:
        return configured
    return size // count if count and size % count == 0 else 0


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    bits = packed.contiguous().view(torch.uint8)
    pairs = torch.stack([_FP4[(bits & 15).long()], _FP4[(bits >> 4).long()]], -1)
    return pairs.flatten(-2)
