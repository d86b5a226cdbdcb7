"""What a run that goes on changes of its earlier configuration: told key by key, or refused where it cannot be."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import OmegaConf

from ray_ep.config.load import beside_path, fields, old_values
from ray_ep.config.schema import Config
from ray_ep.errors import ConfigError

_ABOUT_THE_START = {"run_dir", "resume"}
_FIXED = {
    "optim.kind": "the checkpoint holds the state of the other optimizer",
    "data.tokenizer": "the model knows the other tokenizer's tokens",
    "model.type": "the checkpoint holds weights of the other type",
    "model.path": "weights come from the checkpoint, and their model from where the run had it",
}


def changes(tree: dict[str, Any], cfg: Config, trained: bool) -> list[str]:
    """One sentence for each key whose value differs between an earlier configuration and `cfg`, old and new.

    Args:
        tree: config.yaml of the run, or the configuration in its checkpoint's manifest.
        trained: there is a checkpoint to go on from; without one everything may change.

    Raises:
        ConfigError: a change that the checkpoint does not allow.
    """
    old, unknown = old_values(tree)
    present = OmegaConf.structured(cfg)  # once: it takes 20 ms
    new = {key: _plain(OmegaConf.select(present, key)) for key, _, _ in fields()}
    old = beside_path(old)
    said = [f"{key}: it was {value!r}; this version has no such key" for key, value in unknown.items()]
    for key, before in old.items():
        after = new[key]
        if key in _ABOUT_THE_START or before == after:
            continue
        if trained and key in _FIXED and not _moved(key, before, after):
            raise ConfigError(
                f"{key}={after!r}: the run to go on with has {before!r}, and that cannot change: {_FIXED[key]}. Leave "
                f"{key} out, or start a new run from its weights: ray-ep export, then model.path"
            )
        said += _words(key, before, after)
    return said


def _words(key: str, before: Any, after: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
        return [f"{key}.{n}: {_show(before.get(n))} -> {_show(after.get(n))}" for n in names]
    return [f"{key}: {_show(before)} -> {_show(after)}"]


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else "none" if value is None else str(value)


def _moved(key: str, before: str, after: str) -> bool:
    """Whether a directory only has another place now: both are paths, and nothing is left at the old one.

    The shapes of a model at model.path are compared with the checkpoint's anyway.
    """
    paths = os.path.isabs(before) and os.path.isabs(after)
    return paths and (key == "model.path" or not os.path.exists(before))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
