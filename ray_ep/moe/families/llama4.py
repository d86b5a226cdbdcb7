"""Llama 4's MoE block, whose experts take every token, zero where it was not routed: here only what was routed travels.

Scores scale what goes into an expert, not what comes out, so tokens are scaled before they are sent, and the weights
that travel beside them are 1. T tokens, E experts, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from ray_ep.errors import ModelError

LOGITS = 1
"""Which output of its router are the logits; the first are scores."""


class Experts(Llama4TextExperts):
    """Its experts as the others of transformers are: called with (hidden, index, weights), flags for the layout."""

    config: Any
    has_gate, is_concatenated, is_transposed = True, True, True
    has_bias = has_post_expert_norm = _is_expert_parallel = False
    _apply_gate = _default_apply_gate

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], index [T, 1], weights [T, 1] -> [T, H]."""
        name = self.config._experts_implementation
        out: torch.Tensor = ALL_EXPERTS_FUNCTIONS[name](self, *args)
        return out


class Moe(Llama4TextMoe):
    """The block around them."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, L, H] or [T, H] -> [T, H] and router logits [T, E]."""
        hidden = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)  # [T, E] each; scores are 0 but where routed
        weight, index = scores.max(-1, keepdim=True)  # [T, 1]
        routed = self.experts(hidden * weight, index, torch.ones_like(weight))
        return self.shared_expert(hidden) + routed, logits


def adapt(model: torch.nn.Module) -> None:
    """Make every such block of a model one of these, in place; a model of another family stays as it is.

    Raises:
        ModelError: a block sends a token to more than one expert, which no published Llama 4 does.
    """
    for block in [m for m in model.modules() if type(m) is Llama4TextMoe]:
        if block.top_k != 1:
            raise ModelError(
                f"Llama 4 with num_experts_per_tok={block.top_k}: ray_ep runs it with 1, as it is published"
            )
        block.__class__, block.experts.__class__ = Moe, Experts
        block.experts.config = block.shared_expert.config
