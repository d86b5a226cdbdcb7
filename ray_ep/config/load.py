"""YAML files and dotted overrides -> one checked, read-only OmegaConf tree of the schema.

Nothing is started here; every error names the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ray_ep.config.schema import Config
from ray_ep.errors import ConfigError


def fields() -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every leaf of the schema as (dotted key, field, default)."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{prefix}{f.name}.")
            else:
                yield f"{prefix}{f.name}", f, value

    yield from walk(Config(), "")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: YAML file with any subset of the schema's keys; None for the defaults.
        overrides: ``key=value`` strings with dotted keys, applied last; values are YAML.

    Returns:
        A read-only OmegaConf tree, typed as `Config`.

    Raises:
        ConfigError: unknown key (the nearest is suggested), wrong type, value out of range, unreadable file.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        _merge(tree, _read(Path(path)), "", str(path))
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {item!r}: expected key=value, such as optim.steps=50")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as e:
            raise ConfigError(f"override {item!r}: the value is not YAML: {e}") from None
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(tree, nested, "", f"override {item!r}")
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """A nested dict of any subset of the schema -> checked configuration; raises ConfigError."""
    base = OmegaConf.structured(Config)
    allowed = {key: f.metadata["allowed"] for key, f, _ in fields()}
    model = tree.get("model")
    if isinstance(model, dict) and model.get("type", base.model.type) != base.model.type:
        base.model.overrides = {}  # the default sizes are those of the default type
    for key, value in _leaves(tree):
        _set(base, key, value, allowed[key])
    OmegaConf.resolve(base)
    check(base)
    OmegaConf.set_readonly(base, True)
    return cast(Config, base)


def check(cfg: DictConfig) -> None:
    """Value ranges and closed choices; raises ConfigError."""
    for key, f, _ in fields():
        allowed = f.metadata["allowed"]
        value = OmegaConf.select(cfg, key)
        if allowed and value not in allowed:
            raise ConfigError(f"{key}={value!r}: allowed are {', '.join(allowed)}{_nearest(str(value), allowed)}")
    for key, low in _AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if not value >= low:
            raise ConfigError(f"{key}={value!r}: must be at least {low}")
    if not 0 <= cfg.data.held_out <= 0.5:
        raise ConfigError(f"data.held_out={cfg.data.held_out!r}: must be between 0 and 0.5")
    if cfg.batch.sequences % cfg.batch.accumulation:
        raise ConfigError(
            f"batch.sequences={cfg.batch.sequences} is not a multiple of batch.accumulation={cfg.batch.accumulation}"
        )
    if cfg.data.files and cfg.data.dataset:
        raise ConfigError("data.files and data.dataset are both set: give one of them")
    if 0 < cfg.placement.imbalance <= 1:
        raise ConfigError(
            f"placement.imbalance={cfg.placement.imbalance!r}: busiest over mean is at least 1: give more than 1, or 0"
        )
    _check_exchange(cfg)


def _check_exchange(cfg: DictConfig) -> None:
    exchange, cluster = cfg.exchange, cfg.cluster
    if exchange.transport in ("nccl", "torch_nccl") and cluster.device == "cpu":
        raise ConfigError(
            f"exchange.transport={exchange.transport!r} moves tensors between GPUs; with cluster.device='cpu' allowed "
            "are auto, gloo"
        )
    passes = [cfg.batch.sequences // cfg.batch.accumulation, cfg.eval.sequences if cfg.eval.every else 0]
    tokens = -(-max(passes) // cluster.ranks) * cfg.batch.length
    most = -(-tokens // exchange.chunks)
    if exchange.tokens and exchange.tokens < most:
        raise ConfigError(
            f"exchange.tokens={exchange.tokens}: a rank has up to {most} tokens in one pass (batch.sequences, "
            f"batch.length, eval.sequences, exchange.chunks): give at least {most}, or 0"
        )


_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "cluster.ranks": 1,
    "cluster.cpus_per_rank": 0.01,
    "cluster.wait_s": 0,
    "cluster.collective_timeout_s": 1,
    "data.max_bytes": 0,
    "batch.sequences": 1,
    "batch.length": 2,
    "batch.accumulation": 1,
    "optim.steps": 1,
    "optim.learning_rate": 0,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "optim.beta1": 0,
    "optim.beta2": 0,
    "optim.eps": 0,
    "optim.clip_norm": 0,
    "router.aux_coefficient": 0,
    "router.z_coefficient": 0,
    "router.bias_rate": 0,
    "router.alarm_balancedness": 0,
    "router.alarm_starved": 0,
    "placement.slots_per_rank": 0,
    "placement.every": 0,
    "placement.imbalance": 0,
    "placement.horizon_steps": 1,
    "placement.decay": 1,
    "placement.migration_buffer_mb": 1,
    "placement.survive_nodes": 0,
    "placement.alert_s": 0,
    "balance.guest_mb": 0,
    "balance.most": 1,
    "exchange.chunks": 1,
    "exchange.tokens": 0,
    "topology.budget_s": 0.01,
    "checkpoint.every": 0,
    "checkpoint.every_minutes": 0,
    "checkpoint.keep": 0,
    "eval.every": 0,
    "eval.sequences": 1,
    "statistics.sample": 0,
}


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"configuration file {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"configuration file {path} is not YAML: {e}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file {path}: expected keys and values, found {type(tree).__name__}")
    return tree


def _merge(into: dict[str, Any], tree: dict[str, Any], prefix: str, where: str) -> None:
    """Deep merge with every key checked against the schema; open dicts (model.overrides) take any key."""
    known = {k for k, _, _ in fields()}
    sections = {k.rpartition(".")[0] for k in known} | {""}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in sections:
            if not isinstance(value, dict):
                inner = sorted(k for k in known if k.startswith(key + "."))
                raise ConfigError(f"{where}: {key} is a section, not a value; its keys: {', '.join(inner)}")
            _merge(into.setdefault(name, {}), value, f"{key}.", where)
        elif key in known:
            if isinstance(into.get(name), dict) and isinstance(value, dict):
                into[name] = {**into[name], **value}
            else:
                into[name] = value
        else:
            raise ConfigError(f"{where}: unknown key {key!r}{_nearest(key, [*known, *sections])}")


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, [w for w in words if w], n=1, cutoff=0.5)
    tail = {w.rpartition(".")[2]: w for w in words}
    near = near or [tail[w] for w in difflib.get_close_matches(word.rpartition(".")[2], list(tail), n=1, cutoff=0.7)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    known = {k for k, _, _ in fields()}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in known:
            yield key, value
        elif isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            raise ConfigError(f"unknown key {key!r}{_nearest(key, list(known))}")


def _set(base: DictConfig, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    default = OmegaConf.select(base, key)
    kind = (
        "a mapping"
        if OmegaConf.is_dict(default)
        else "a list"
        if OmegaConf.is_list(default)
        else type(default).__name__
    )
    if isinstance(default, str) and isinstance(value, bool):  # YAML reads a bare no or off as false
        words = ("yes", "on", "true") if value else ("no", "off", "false")
        value = next((w for w in words if w == default or w in allowed), value)
    bad_kind = (OmegaConf.is_dict(default) != isinstance(value, dict)) or (
        isinstance(default, str) and not isinstance(value, str)
    )
    if isinstance(default, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        value, bad_kind = str(value), False
    if bad_kind or value is None:
        raise ConfigError(f"{key}={value!r}: expected {kind}, such as {default!r}")
    try:
        if OmegaConf.is_dict(default):
            value = OmegaConf.merge(default, value)
        elif OmegaConf.is_list(default) and isinstance(value, str):
            value = [value]
        OmegaConf.update(base, key, value, merge=False)
    except OmegaConfBaseException:
        raise ConfigError(f"{key}={value!r}: expected {kind}, such as {default!r}") from None
