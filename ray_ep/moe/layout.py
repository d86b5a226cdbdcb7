"""Which layout of experts modules the fused bodies know: transformers' flags, asked in one place."""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate


def is_gated_silu(module: Any) -> bool:
    """Gated SiLU, gate_up_proj [S, 2F, H] with the gate first, down_proj [S, H, F]; no bias, no norm."""
    return (
        module.has_gate
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
        and module.is_concatenated
        and type(module)._apply_gate is _default_apply_gate
        and isinstance(module.act_fn, torch.nn.SiLU | SiLUActivation)
    )
