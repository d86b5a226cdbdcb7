"""Multi-head latent attention over transformers' paged cache, which keeps keys and values of one width.

transformers 5.23 takes `config.head_dim` for it, which such models set to the rotary part of a key alone. Inside
`room_for_keys` a cache is as wide as a whole key; inside `padded_values` values are padded to that, and cut again
before the output projection. Keys and values are kept whole, not as the latent: more memory than the model needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def room_for_keys(config: Any) -> Iterator[None]:
    """Inside: a cache that is made has room for whole keys. Other models are left as they are."""
    kept, wide = getattr(config, "head_dim", None), getattr(config, "qk_head_dim", None)
    if wide is None:
        yield
        return
    config.head_dim = wide
    try:
        yield
    finally:
        config.head_dim = kept


@contextmanager
def padded_values(model: Any) -> Iterator[None]:
    """Inside: values are as wide as keys where the model's are narrower."""
    text = model.config.get_text_config()
    keys, values = int(getattr(text, "qk_head_dim", None) or 0), int(getattr(text, "v_head_dim", None) or 0)
    layers = [m for m in model.modules() if hasattr(m, "expand_kv")] if 0 < values < keys else []
    hooks = []
    for layer in layers:
        layer.expand_kv = partial(_padded, layer.expand_kv, keys - values)
        hooks.append(layer.o_proj.register_forward_pre_hook(partial(_cut, keys, values)))
    try:
        yield
    finally:
        for layer in layers:
            del layer.expand_kv  # the class has its own
        for hook in hooks:
            hook.remove()


def _padded(
    expand: Callable[..., tuple[torch.Tensor, torch.Tensor]], more: int, *args: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = expand(*args)
    return key, torch.nn.functional.pad(value, (0, more))


def _cut(keys: int, values: int, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    return (args[0].view(*args[0].shape[:-1], -1, keys)[..., :values].flatten(-2),)
