"""Build a rank's model: checked config, dense part whole, experts only where the placement puts them.

Weights come from a seed or from a transformers checkpoint, layer by layer: a rank never holds experts that are not its
own beyond one layer. Uses underscore methods of transformers' loader: pyproject pins the version range.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig

from ray_ep.collective import Group
from ray_ep.config.schema import ModelConfig
from ray_ep.errors import CheckpointError, ModelError
from ray_ep.moe import find_experts, parallelize
from ray_ep.moe.parallelize import keep_rows
from ray_ep.placement import Placement
from ray_ep.rank.overrides import typed


def model_config(cfg: ModelConfig, vocab_size: int) -> PreTrainedConfig:
    """The transformers config of a run; raises ModelError for an unknown type or field, or a vocabulary too small."""
    if cfg.path:
        config = _config_of_path(cfg.path)
    else:
        config = _config_of_type(cfg.type, cfg.overrides, vocab_size)
    text = config.get_text_config()
    if text.vocab_size < vocab_size:
        raise ModelError(f"the model's vocab_size={text.vocab_size} is smaller than the tokenizer's {vocab_size}")
    return config


def meta_model(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """The model without storage; raises ModelError if transformers cannot build it or it has no experts."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except Exception as e:
        raise ModelError(f"transformers cannot build a causal language model of {type(config).__name__}: {e}") from None
    find_experts(model)
    model.train()  # from_config leaves dropout on; a rank decides by step kind
    return model


def build(
    cfg: ModelConfig,
    config: PreTrainedConfig,
    seed: int,
    group: Group,
    placement: Placement,
    device: torch.device | str = "cpu",
    **options: Any,
) -> PreTrainedModel:
    """The parallelized model of one rank (collective).

    Weights come from cfg.path, else are drawn from `seed`, the same on any number of ranks and any device: they are
    made on the CPU. `options` go to `ray_ep.moe.parallelize`.
    """
    model = meta_model(config, cfg.dtype)
    rows = {n: placement.experts_of(i, group.rank) for i, n in enumerate(find_experts(model))}
    if cfg.path:
        load_pretrained(model, Path(cfg.path), rows)
    else:
        draw_weights(model, seed, rows)
    model.to(torch.device(device))
    parallelize(model, group, placement, seed=seed, **options)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def draw_weights(model: PreTrainedModel, seed: int, rows: dict[str, list[int]]) -> None:
    """Give a meta model storage and transformers' own initial weights, keeping only `rows` of each experts module.

    Every rank draws the same numbers in the same order, so weights do not depend on the placement.
    """
    names = {id(m): n for n, m in model.named_modules()}
    torch.manual_seed(seed)

    def visit(module: torch.nn.Module, init: Callable[[torch.nn.Module], None]) -> None:
        for child in module.children():
            visit(child, child._init_weights if isinstance(child, PreTrainedModel) else init)
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(_unwritten(p), requires_grad=p.requires_grad))
        for name, b in module.named_buffers(recurse=False):
            module._buffers[name] = _unwritten(b)
        init(module)
        if names[id(module)] in rows:
            keep_rows(module, rows[names[id(module)]])

    with torch.no_grad():
        visit(model, model._init_weights)
    model.tie_weights()
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and t.isnan().any():
            raise ModelError(f"{type(model).__name__} does not initialise {name}: start from a checkpoint (model.path)")


def load_pretrained(model: PreTrainedModel, path: Path, rows: dict[str, list[int]]) -> None:
    """Fill a meta model from a transformers checkpoint, reading only `rows` of each experts module.

    Raises:
        CheckpointError: no safetensors there, unreadable, or keys missing: a checkpoint of another model.
    """
    totals = {n: m.num_experts for n, m in find_experts(model).items()}
    for name, module in find_experts(model).items():
        keep_rows(module, sorted(rows[name]))
    files = _Files(path)
    mapping = get_model_conversion_mapping(model)
    state = {k: v for k in files.keys if (v := _local(files, k, model, mapping, rows, totals)) is not None}
    load = LoadStateDictConfig(device_map={"": torch.device("cpu")}, dtype=model.dtype, weight_mapping=mapping)
    try:
        info, _ = PreTrainedModel._load_pretrained_model(model, state, None, load)
        info = PreTrainedModel._finalize_model_loading(model, load, info)
    except Exception as e:
        raise CheckpointError(f"checkpoint {path} does not fit {type(model).__name__}: {e}") from None
    if info.missing_keys or info.mismatched_keys or info.conversion_errors:
        wrong = sorted(map(str, [*info.missing_keys, *info.mismatched_keys, *info.conversion_errors]))
        raise CheckpointError(
            f"checkpoint {path} is of another model than {type(model).__name__}: {len(wrong)} weights are missing or "
            f"of another shape, first {wrong[0]}"
        )
    for name, module in find_experts(model).items():  # read in ascending order: bring into the placement's
        ascending = sorted(rows[name])
        for pname, p in list(module.named_parameters(recurse=False)):
            setattr(module, pname, torch.nn.Parameter(p.data[[ascending.index(e) for e in rows[name]]]))
        module.ray_ep_rows = list(rows[name])


class _Files:
    """The safetensors files of a checkpoint directory, opened lazily."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise CheckpointError(f"model.path={path}: no such directory")
        index = path / "model.safetensors.index.json"
        files = sorted(path.glob("*.safetensors"))
        try:
            if index.exists():
                files = sorted({path / f for f in json.loads(index.read_text())["weight_map"].values()})
            self.keys = {k: f for f in files for k in safe_open(f, "pt").keys()}  # noqa: SIM118 (not a dict)
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            raise CheckpointError(f"model.path={path}: unreadable checkpoint: {e}") from None
        if not self.keys:
            raise CheckpointError(f"model.path={path}: no .safetensors files there")
        self._open: dict[Path, Any] = {}

    def slice(self, key: str) -> Any:
        file = self.keys[key]
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        return self._open[file].get_slice(key)


class _Rows:
    """A checkpoint tensor [E, ...] of which only some rows are read; transformers materialises it by `[...]`."""

    def __init__(self, source: Any, rows: list[int]):
        self.source, self.rows = source, rows

    def __getitem__(self, _: Any) -> torch.Tensor:
        parts = [self.source[r : r + 1] for r in self.rows]
        return torch.cat(parts) if parts else self.source[0:0]

    def get_shape(self) -> list[int]:
        return [len(self.rows), *self.source.get_shape()[1:]]

    def get_dtype(self) -> str:
        return str(self.source.get_dtype())


def _local(
    files: _Files,
    key: str,
    model: PreTrainedModel,
    mapping: list[Any],
    rows: dict[str, list[int]],
    totals: dict[str, int],
) -> Any:
    """What of a checkpoint tensor this rank reads: all of a dense one, its experts' rows of a stacked one, or None."""
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, model.state_dict())
    owner = next((n for n in rows if target.startswith(f"{n}.")), None)
    source = files.slice(key)
    if owner is None or "." in target[len(owner) + 1 :]:
        return source  # dense, or a submodule that all experts share
    single = re.search(r"experts\.(\d+)\.", key)
    if single:
        return source if int(single.group(1)) in rows[owner] else None
    if source.get_shape()[0] != totals[owner]:
        raise CheckpointError(
            f"checkpoint tensor {key} has shape {source.get_shape()}: expected {totals[owner]} experts"
        )
    return _Rows(source, sorted(rows[owner]))


def _unwritten(t: torch.Tensor) -> torch.Tensor:
    """Storage for a meta tensor; floats are NaN so that what nobody writes is found."""
    if t.is_floating_point():
        return torch.full(t.shape, float("nan"), dtype=t.dtype)
    return torch.zeros(t.shape, dtype=t.dtype)


def _config_of_path(path: str) -> PreTrainedConfig:
    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"model.path={path!r}: no transformers checkpoint there (config.json is missing)")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    except Exception as e:
        raise ModelError(f"model.path={path!r}: {e}") from None
    return config


def _config_of_type(kind: str, overrides: Mapping[str, Any], vocab_size: int) -> PreTrainedConfig:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named = getattr(transformers, kind, None)
    if isinstance(named, type) and issubclass(named, PreTrainedConfig):
        cls = named
    elif kind in CONFIG_MAPPING:
        cls = CONFIG_MAPPING[kind]
    else:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"model.type={kind!r} is neither a transformers model type nor a config class{hint}")
    known = _fields_of(cls)
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"model.overrides.{key}: {cls.__name__} has no such field{hint}")
    try:
        config: PreTrainedConfig = cls(**{"vocab_size": vocab_size, **typed(cls, overrides)})
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"model.overrides: {cls.__name__} refuses them: {e}") from None
    return config


def _fields_of(cls: type[PreTrainedConfig]) -> set[str]:
    """Fields that a config class has or its modeling code reads (some, such as head_dim, appear only there)."""
    known = set(cls().to_dict()) | set(getattr(cls, "attribute_map", {}))
    source = Path(inspect.getfile(cls))
    modeling = source.with_name(source.name.replace("configuration_", "modeling_"))
    if modeling.is_file():
        used = re.findall(r"config\.(\w+)|config, \"(\w+)\"", modeling.read_text(encoding="utf-8"))
        known |= {a or b for a, b in used}
    return known
