"""Attention masks of rows that hold several documents: transformers' own, made here.

Its models find documents by positions that begin anew, but some of them (gpt_oss) do not hand the positions on to where
masks are made. B rows, T tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_masks_for_generate

from ray_ep.errors import ModelError


def document_masks(model: Any, positions: torch.Tensor) -> Any:
    """What a model takes as attention_mask so that tokens see their own document alone, each layer in its own way.

    Args:
        positions: [B, T] of tokens in their documents.
    """
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    like = torch.empty(*positions.shape, 0, dtype=model.dtype, device=positions.device)  # for its shape
    return make(
        config=model.config, inputs_embeds=like, attention_mask=None, past_key_values=None, position_ids=positions
    )


def check_documents(model: Any) -> None:
    """ModelError for a model that cannot keep documents of one row apart: its layers carry a state along the row."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    other = sorted(kinds - set(LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING))
    if model._is_stateful or other:
        what = f"layers of type {', '.join(other)}" if other else "a state"
        raise ModelError(
            f"data.pack=documents: {type(model).__name__} has {what}, which nothing resets between documents: give "
            "data.pack=off, or data.pack=stream"
        )
