"""`model.overrides` by the fields of a transformers config class: each field's own type says how its text is read."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedConfig

from ray_ep.config.values import WrongValue, as_bool, as_float, as_int
from ray_ep.errors import ModelError

_READ = {bool: as_bool, int: as_int, float: as_float}
_NONE = ("none", "null", "~", "")


def typed(cls: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Plain Python values of `overrides` as `cls` declares them; a field without a declaration is like its default.

    Raises:
        ModelError: a value that its field cannot take.
    """
    tree: Any = OmegaConf.to_container(overrides) if OmegaConf.is_config(overrides) else dict(overrides)
    plain: dict[str, Any] = tree
    hints = {k: v for base in reversed(cls.__mro__) for k, v in vars(base).get("__annotations__", {}).items()}
    names = dict(getattr(cls, "attribute_map", {}))
    names |= {own: other for other, own in names.items()}
    defaults = cls()
    for key, value in plain.items():
        hint = hints.get(key, hints.get(names.get(key, "")))
        if hint is None or isinstance(hint, str):
            hint = type(getattr(defaults, key, None))
        try:
            plain[key] = _as(value, hint)
        except WrongValue as e:
            raise ModelError(f"model.overrides.{key}={value!r}: {e} ({cls.__name__})") from None
    return plain


def _as(value: Any, hint: Any) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = list(typing.get_args(hint)) if union else [hint]
    kinds = [typing.get_origin(o) or o for o in options]
    if isinstance(value, dict):
        shape = next((o for o in options if typing.is_typeddict(o)), None)
        inner = {} if shape is None else shape.__annotations__
        return {k: _as(v, inner.get(k, Any)) for k, v in value.items()}
    if isinstance(value, list):
        hints = [typing.get_args(o) for o, kind in zip(options, kinds, strict=True) if kind in (list, tuple)]
        items = [_as(v, next((h[0] for h in hints if h), Any)) for v in value]
        return tuple(items) if tuple in kinds and list not in kinds else items
    if type(value) in kinds or Any in kinds:
        return None if isinstance(value, str) and type(None) in kinds and value.lower() in _NONE else value
    if isinstance(value, str) and type(None) in kinds and value.lower() in _NONE:
        return None
    if value is None:
        return value
    if isinstance(value, (int, float)) and str in kinds and not {bool, int, float} & set(kinds):
        return str(value)
    return _number(value, [k for k in (bool, int, float) if k in kinds])


def _number(value: Any, kinds: list[type]) -> Any:
    """`value` as the first of `kinds` that takes it; as it is where a class says nothing of numbers."""
    problem = None
    for kind in kinds:
        try:
            return _READ[kind](value)
        except WrongValue as e:
            problem = e
    if problem is not None:
        raise problem
    return value
