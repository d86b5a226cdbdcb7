"""YAML files and dotted overrides -> one checked, read-only OmegaConf tree of the schema.

Nothing is started here; every error names the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from ray_ep.config.control import check_control
from ray_ep.config.elastic import check_elastic
from ray_ep.config.exchange import check_exchange, settle_exchange
from ray_ep.config.paths import absolute, is_url
from ray_ep.config.provenance import check_provenance
from ray_ep.config.runs import newest, settings_of, settings_of_checkpoint
from ray_ep.config.schema import Config, ModelConfig
from ray_ep.config.sections.lora import check_lora
from ray_ep.config.sections.serving import check_serve
from ray_ep.config.values import WrongValue, convert, flow_list, parse, scalar_or_tree
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

    Where `resume` names a run or a checkpoint, what neither the file nor an override gives is as it was there.

    Args:
        path: YAML file with any subset of the schema's keys; None for the defaults.
        overrides: ``key=value`` strings with dotted keys, applied last; a key's own type says how its value is read.

    Returns:
        A read-only OmegaConf tree, typed as `Config`; its paths are absolute, seen from the current directory.

    Raises:
        ConfigError: unknown key (the nearest is suggested), wrong type, value out of range, unreadable file.
    """
    given: dict[str, Any] = {}
    if path is not None:
        _take(given, _flat(_read(Path(path)), str(path)), f"{path}: ")
    for item in overrides:
        _take(given, _typed(item))
    given = absolute(given)
    values = _earlier(given)
    if "model.type" in given and given["model.type"] != values.get("model.type"):
        values.pop("model.overrides", None)  # sizes of another type
    for key, value in given.items():
        values[key] = _joined(values.get(key), value)
    return _built(values)


def from_dict(tree: dict[str, Any]) -> Config:
    """A nested dict of any subset of the schema -> checked configuration; raises ConfigError."""
    values: dict[str, Any] = {}
    _take(values, _flat(tree, "configuration"))
    return _built(values)


def _built(values: dict[str, Any]) -> Config:
    base = OmegaConf.structured(Config)
    if values.get("model.type", base.model.type) != base.model.type or values.get("model.path"):
        base.model.overrides = {}  # the default sizes are those of the default type
    if values.get("model.path"):
        base.model.type = ""  # the checkpoint says it
    for key, value in beside_path(values).items():
        before = OmegaConf.to_container(base.model.overrides) if key == "model.overrides" else None
        OmegaConf.update(base, key, _joined(before, value), merge=False)
    check(base)
    settle_exchange(base)
    OmegaConf.set_readonly(base, True)
    return cast(Config, base)


def _earlier(given: dict[str, Any]) -> dict[str, Any]:
    """Values of the run or checkpoint that `given` goes on with, its directory included; {} if it goes on with none."""
    resume, run_dir = given.get("resume", "no"), given.get("run_dir", "")
    if resume == "no":
        return {}
    if resume == "auto":
        path = Path(run_dir) if run_dir else newest()
        if path is None:
            return {}
        values = old_values(settings_of(path) or settings_of_checkpoint(f"{path}/checkpoints"), set(given))[0] | {
            "run_dir": str(path)
        }
    else:
        values = old_values(settings_of_checkpoint(resume), set(given))[0]
        if not run_dir or Path(run_dir).resolve() not in (Path(resume).resolve(), *Path(resume).resolve().parents):
            values.pop("checkpoint.dir", None)  # of another run, which keeps what is in it
        values.pop("run_dir", None)
    values.pop("resume", None)
    return values


def old_values(tree: dict[str, Any], leave: Set[str] = frozenset()) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values, what this version does not know) of an earlier run's configuration, by dotted key, but for `leave`.

    Raises:
        ConfigError: a value that this version does not take.
    """
    values: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    pairs = [(k, v) for k, v in _flat(tree, "configuration", unknown) if k not in leave or k == "model.overrides"]
    _take(values, pairs, "configuration of the run to go on with: ")
    return absolute(values), unknown


def _typed(item: str) -> Iterable[tuple[str, Any]]:
    """An override as (dotted key, value not yet converted)."""
    key, sep, text = item.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {item!r}: expected key=value, such as optim.steps=50")
    kinds = {k: str(f.type) for k, f, _ in fields()}
    try:
        value: Any = text
        if key not in kinds:
            value = scalar_or_tree(text)
        elif kinds[key].startswith("dict"):
            value = parse(text)
        elif kinds[key].startswith("list"):
            value = flow_list(text)
    except WrongValue as e:
        raise ConfigError(f"override {item!r}: the value {e}") from None
    return _flat({key: value}, f"override {item!r}")


def _take(into: dict[str, Any], pairs: Iterable[tuple[str, Any]], where: str = "") -> None:
    """Convert each value by its key's type; a mapping joins the one that is there, anything else replaces it."""
    known = {k: (str(f.type), default) for k, f, default in fields()}
    for key, value in pairs:
        kind, default = known[key]
        try:
            into[key] = _joined(into.get(key), convert(value, kind))
        except WrongValue as e:
            such = f", such as {default!r}" if isinstance(default, (int, float)) else ""
            raise ConfigError(f"{where}{key}={_shown(value)}: {e}{such}") from None


def _joined(before: Any, value: Any) -> Any:
    """`value` over `before`: mappings key by key."""
    if not (isinstance(before, dict) and isinstance(value, dict)):
        return value
    return {**before, **{k: _joined(before.get(k), v) for k, v in value.items()}}


def _shown(value: Any) -> str:
    return repr(str(value) if isinstance(value, str) else value)


def beside_path(values: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key, but for the default model's type and sizes where a checkpoint says its own."""
    default = ModelConfig()
    type_and_sizes = values.get("model.type"), values.get("model.overrides")
    if values.get("model.path") and type_and_sizes == (default.type, default.overrides):  # as runs once wrote them down
        return {k: v for k, v in values.items() if k not in ("model.type", "model.overrides")}
    return values


def check(cfg: DictConfig) -> None:
    """Value ranges and closed choices; raises ConfigError."""
    for key, f, _ in fields():
        allowed = f.metadata["allowed"]
        value = OmegaConf.select(cfg, key)
        if allowed and value not in allowed:
            raise ConfigError(f"{key}={value!r}: allowed are {', '.join(allowed)}{_nearest(str(value), allowed)}")
    for key, low in _AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not value >= low:
            raise ConfigError(f"{key}={value!r}: must be at least {low}")
    if not cfg.resume:
        raise ConfigError("resume='': allowed are no, auto, or the directory of a run or a checkpoint")
    if not re.fullmatch(_LABEL_KEY, cfg.cluster.block_label):
        raise ConfigError(
            f"cluster.block_label={cfg.cluster.block_label!r}: expected the key of a node label alone, such as "
            "ray.io/gpu-domain or ep.block, or nothing"
        )
    if not 0 <= cfg.data.held_out <= 0.5:
        raise ConfigError(f"data.held_out={cfg.data.held_out!r}: must be between 0 and 0.5")
    if cfg.batch.sequences % cfg.batch.accumulation:
        raise ConfigError(
            f"batch.sequences={cfg.batch.sequences} is not a multiple of batch.accumulation={cfg.batch.accumulation}"
        )
    if cfg.observe.port > 65535:
        raise ConfigError(f"observe.port={cfg.observe.port}: allowed are 0 (a free one) to 65535")
    _check_data(cfg.data)
    if 0 < cfg.placement.imbalance <= 1:
        raise ConfigError(
            f"placement.imbalance={cfg.placement.imbalance!r}: busiest over mean is at least 1: give more than 1, or 0"
        )
    check_lora(cfg)
    check_elastic(cfg)
    _check_snapshots(cfg)
    check_control(cfg)
    check_serve(cfg)
    check_exchange(cfg)
    check_provenance(cfg)


def _check_data(data: Any) -> None:
    if data.files and data.dataset:
        raise ConfigError("data.files and data.dataset are both set: give one of them")
    if data.format != "chat":
        return
    if not (data.files or data.dataset):
        raise ConfigError("data.format=chat: give the conversations as data.files or data.dataset")
    if data.tokenizer == "bytes":
        raise ConfigError("data.format=chat: data.tokenizer=bytes has no chat template: give a tokenizer that has one")
    if data.pack == "stream":
        raise ConfigError("data.pack=stream cuts conversations anywhere: with data.format=chat give documents or off")


def _check_snapshots(cfg: Any) -> None:
    if not cfg.snapshot.to_disk:
        return
    if not cfg.snapshot.every:
        raise ConfigError(
            "snapshot.to_disk=true: snapshot.every=0 takes none that could be written: give snapshot.every at least 1, "
            "or snapshot.to_disk=false"
        )
    if is_url(cfg.checkpoint.dir):
        raise ConfigError(
            f"snapshot.to_disk=true writes beside the checkpoints, and checkpoint.dir={cfg.checkpoint.dir!r} is a URL: "
            "allowed is a directory that all nodes share, or snapshot.to_disk=false"
        )


_LABEL_KEY = r"(([A-Za-z0-9][A-Za-z0-9.-]{0,252}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"
"""As Ray has it, which has it from Kubernetes."""


_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "cluster.ranks": 1,
    "cluster.cpus_per_rank": 0.01,
    "cluster.wait_s": 0,
    "cluster.silence_s": 2,
    "cluster.collective_timeout_s": 1,
    "data.max_bytes": 0,
    "batch.sequences": 1,
    "batch.length": 2,
    "batch.accumulation": 1,
    "optim.steps": 1,
    "optim.learning_rate": 0,
    "lora.rank": 0,
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
    "snapshot.every": 0,
    "elastic.min_ranks": 1,
    "elastic.max_ranks": 0,
    "elastic.wait_s": 0,
    "control.port": 0,
    "eval.every": 0,
    "eval.sequences": 1,
    "serve.port": 0,
    "serve.answers": 1,
    "serve.body_mb": 0.01,
    "serve.grace_s": 0,
    "generate.cache_tokens": 32,
    "generate.pass_tokens": 1,
    "generate.requests": 1,
    "statistics.sample": 0,
    "observe.port": 0,
    "provenance.disk_mb": 1,
}


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ConfigError(f"configuration file {path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"configuration file {path} is not YAML: {e}") from None
    except WrongValue as e:
        raise ConfigError(f"configuration file {path} {e}") from None
    if tree is None or tree == "":
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file {path}: expected keys and values, found {_form(tree)}")
    pairs = [k for k, _ in _flat(tree, str(path)) if k != "model.overrides"]
    twice = [k for k in dict.fromkeys(pairs) if pairs.count(k) > 1]
    if twice:
        raise ConfigError(f"configuration file {path} has {twice[0]} twice: give it once")
    return tree


def _form(tree: Any) -> str:
    return "a list" if isinstance(tree, list) else "text without a colon"


def _flat(
    tree: dict[str, Any], where: str, unknown: dict[str, Any] | None = None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; open mappings (model.overrides) take any key, also a dotted one.

    What the schema does not know is put into `unknown`; without that it raises ConfigError.
    """
    known = {k: str(f.type) for k, f, _ in fields()}
    sections = {k.rpartition(".")[0] for k in known} - {""}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        opened = next((k for k, kind in known.items() if kind.startswith("dict") and key.startswith(f"{k}.")), None)
        if key in known:
            yield key, value
        elif key in sections and isinstance(value, dict):
            yield from _flat(value, where, unknown, f"{key}.")
        elif key in sections and value != "":
            inner = sorted(k for k in known if k.startswith(key + "."))
            raise ConfigError(f"{where}: {key} is a section, not a value; its keys: {', '.join(inner)}")
        elif opened is not None:
            for part in reversed(key[len(opened) + 1 :].split(".")):
                value = {part: value}
            yield opened, value
        elif key not in sections and unknown is None:
            raise ConfigError(f"{where}: unknown key {key!r}{_nearest(key, [*known, *sections])}")
        elif unknown is not None:
            unknown[key] = value


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, [w for w in words if w], n=1, cutoff=0.5)
    tail = {w.rpartition(".")[2]: w for w in words}
    near = near or [tail[w] for w in difflib.get_close_matches(word.rpartition(".")[2], list(tail), n=1, cutoff=0.7)]
    return f"; did you mean {near[0]!r}?" if near else ""
