"""Build a rank's model: checked config, dense part whole, experts only where the placement puts them.

Weights come from a seed or from a transformers checkpoint (pretrained.py), layer by layer: a rank never holds experts
that are not its own beyond one layer. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ray_ep.collective import Group
from ray_ep.config.schema import ModelConfig
from ray_ep.errors import ModelError, brief
from ray_ep.moe import find_experts, parallelize
from ray_ep.moe.families.llama4 import adapt
from ray_ep.moe.parallelize import keep_rows, same_count
from ray_ep.placement import Placement
from ray_ep.rank.overrides import typed
from ray_ep.rank.pretrained.hub import directory
from ray_ep.rank.pretrained.load import load_pretrained
from ray_ep.rank.pretrained.reading import Reading
from ray_ep.rank.pretrained.source import read_config

_ALIASES = {"kimi_k2": "deepseek_v3"}
"""Types that are another one underneath: the same code and names of weights, other sizes."""
_NOT_TAKEN = {"auto_map", "quantization_config", "compression_config", "transformers_weights", "attn_implementation",
              "_attn_implementation", "experts_implementation", "_experts_implementation"}  # fmt: skip
"""What a config says of files beside it and of code to run: not of the model, and untrue of what is exported."""


def model_config(cfg: ModelConfig, vocab_size: int) -> PreTrainedConfig:
    """The transformers config of a run; raises ModelError for an unknown type or field, or a vocabulary too small."""
    overrides: Any = (
        OmegaConf.to_container(cfg.overrides) if OmegaConf.is_config(cfg.overrides) else dict(cfg.overrides)
    )
    if cfg.path:
        config = _config_of_path(cfg.path, cfg.type, overrides)
    else:
        config = _config_of_type(cfg.type, overrides, vocab_size)
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ModelError(
            f"{type(config).__name__} with vocab_size={size!r} is no language model: it predicts no tokens"
        )
    if size < vocab_size:
        raise ModelError(
            f"the model's vocab_size={size} is smaller than the tokenizer's {vocab_size} (one more than the "
            "highest token id): give the tokenizer that belongs to the model as data.tokenizer"
        )
    return config


def meta_model(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """The model without storage; raises ModelError if transformers cannot build it or it has no experts."""
    kind = type(config).__name__
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"transformers has no causal language model of {kind}: give a model that predicts tokens")
    try:
        with torch.device("meta"):
            kwargs = {"dtype": getattr(torch, dtype), "trust_remote_code": False}
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)  # type: ignore[no-untyped-call]
    except Exception as e:
        raise ModelError(f"transformers cannot build a causal language model of {kind}: {brief(e)}") from None
    adapt(model)
    same_count(find_experts(model))
    _check_sizes(model)
    _keep_float32(model)
    model.train()  # from_config leaves dropout on; a rank decides by step kind
    return model


def build(
    cfg: ModelConfig,
    config: PreTrainedConfig,
    seed: int,
    group: Group,
    placement: Placement,
    device: torch.device | str = "cpu",
    reading: Reading | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The parallelized model of one rank (collective).

    Weights come from cfg.path, else are drawn from `seed`, the same on any number of ranks and any device: they are
    made on the CPU. `reading` counts what is read. `options` go to `ray_ep.moe.parallelize`.
    """
    model = meta_model(config, cfg.dtype)
    rows = {n: placement.experts_of(i, group.rank) for i, n in enumerate(find_experts(model))}
    if cfg.path:
        load_pretrained(model, directory(cfg.path, weights=True), rows, reading)
    else:
        draw_weights(model, seed, rows)
    torch.nn.Module.to(model, torch.device(device))
    parallelize(model, group, placement, seed=seed, **options)
    if cfg.gradient_checkpointing:
        how = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # type: ignore[no-untyped-call]
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


def _check_sizes(model: PreTrainedModel) -> None:
    """ModelError for sizes that transformers builds a model with and that no token can pass."""
    text, kind = model.config.get_text_config(), type(model).__name__
    for name, module in find_experts(model).items():
        empty = next((n for n, p in module.named_parameters() if not p.numel()), None)
        if empty is not None:
            shape = list(module.get_parameter(empty).shape)
            raise ModelError(f"{kind} has experts of no size: {name}.{empty} is {shape} with the sizes of its config")
        experts, top_k = int(module.num_experts), getattr(text, "num_experts_per_tok", None)  # type: ignore[arg-type]
        if isinstance(top_k, int) and not 1 <= top_k <= experts:
            raise ModelError(f"{kind} with num_experts_per_tok={top_k} of {experts} experts: expected 1 to {experts}")
    heads, shared = (getattr(text, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise ModelError(f"{kind} with num_attention_heads={heads}: num_key_value_heads={shared} does not divide it")


def _keep_float32(model: PreTrainedModel) -> None:
    """Give a meta model's tensors the dtypes that transformers' loader gives them (its keep-in-float32 lists).

    Correction biases are float32 in any class: their updates are smaller than what bfloat16 can add.
    """
    plan = {**model._get_dtype_plan(model.dtype), "e_score_correction_bias": torch.float32}
    kept, _, _ = build_glob_alternation(list(plan))
    loaded = set(model.state_dict())
    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, t in tensors.items():
                full = f"{name}.{key}".lstrip(".")
                if t is None or full not in loaded or not t.is_floating_point() or not kept.search(full):
                    continue
                wide = t.data.float()
                tensors[key] = torch.nn.Parameter(wide, t.requires_grad) if tensors is module._parameters else wide


def _unwritten(t: torch.Tensor) -> torch.Tensor:
    """Storage for a meta tensor; floats are NaN so that what nobody writes is found."""
    if t.is_floating_point():
        return torch.full(t.shape, float("nan"), dtype=t.dtype)
    return torch.zeros(t.shape, dtype=t.dtype)


def _config_of_path(path: str, kind: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    """A checkpoint's own config, as transformers' class of its type (or of `kind`) reads it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = read_config(directory(path))
    raw = {k: v for k, v in whole.items() if k not in _NOT_TAKEN}
    says = raw.get("model_type")
    named = _ALIASES.get(says, says) if isinstance(says, str) else ""
    if not kind and named not in CONFIG_MAPPING:
        raise ModelError(_unknown_type(path, whole))
    cls = _config_class(kind or named)
    _check_fields(cls, overrides, raw)
    for alias, value in typed(cls, overrides).items():
        key = cls.attribute_map.get(alias, alias)
        own: Any = raw.get(key)
        raw = {k: v for k, v in raw.items() if cls.attribute_map.get(k, k) != key}
        nested = isinstance(value, dict) and isinstance(own, dict)
        raw[key] = {**own, **value} if nested else value  # nested fields that are not named stay
    try:
        config: PreTrainedConfig = cls.from_dict({**raw, "model_type": cls.model_type})
    except Exception as e:
        what = f"model.overrides={overrides} and its config.json" if overrides else "its config.json"
        raise ModelError(f"model.path={path!r}: {cls.__name__} refuses {what}: {brief(e)}") from None
    _check_taken(path, config, overrides)
    return config


def _check_taken(path: str, config: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    """ModelError for an override that the config's class passes over: it has the value elsewhere, or nested."""
    text = config.get_text_config()
    for key, value in overrides.items():
        if isinstance(value, dict) or key in ("dtype", "torch_dtype"):
            continue
        got = [getattr(c, key) for c in (config, text) if hasattr(c, key)]
        if not got or any((list(g) if isinstance(g, tuple) else g) != value for g in got):
            hint = _inside(key, config.to_dict())
            raise ModelError(f"model.path={path!r}: model.overrides.{key}={value!r} has no effect on its config{hint}")


def _inside(key: str, config: dict[str, Any]) -> str:
    """Where in a config a field is that was looked for at its top; empty: nowhere."""
    inside = next((k for k, v in config.items() if isinstance(v, dict) and key in v), None)
    return f"; give it inside {inside}, as {inside}={{{key}: …}}" if inside else ""


def _unknown_type(path: str, raw: dict[str, Any]) -> str:
    """Why a config.json is of no model that can be built, and what can be done."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = raw.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    known, name = next(((t, c) for t, c in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if c in named), ("", ""))
    says = f"says model_type={raw['model_type']!r}, which" if raw.get("model_type") else "has no model_type, so it"
    is_not = "is none of transformers' models" if raw.get("model_type") else "names no model"
    code = "; the code that comes with it is never run" if "auto_map" in raw else ""
    if known:
        do = f"its architectures={name} is transformers' {known}: give model.type={known}"
    else:
        do = "where it is another model underneath (as kimi_k2 is deepseek_v3), give that one as model.type"
    return f"model.path={path!r}: its config.json {says} {is_not}{code}; {do}"


def _config_of_type(kind: str, overrides: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    cls = _config_class(kind)
    _check_fields(cls, overrides, {})
    try:
        config: PreTrainedConfig = cls(**{"vocab_size": vocab_size, **typed(cls, overrides)})
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"model.overrides: {cls.__name__} refuses them: {brief(e)}") from None
    return config


def _config_class(kind: str) -> type[PreTrainedConfig]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = _ALIASES.get(kind, kind)
    named = getattr(transformers, kind, None) if kind else None
    if isinstance(named, type) and issubclass(named, PreTrainedConfig):
        return named
    if kind in CONFIG_MAPPING:
        cls: type[PreTrainedConfig] = CONFIG_MAPPING[kind]
        return cls
    near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ModelError(f"model.type={kind!r} is neither a transformers model type nor a config class{hint}")


def _check_fields(cls: type[PreTrainedConfig], overrides: dict[str, Any], own: dict[str, Any]) -> None:
    """ModelError for an override that neither the class nor the checkpoint's own config knows."""
    known = _fields_of(cls) | set(own)
    for key in overrides:
        if key not in known or key in _NOT_TAKEN:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near and key not in _NOT_TAKEN else ""
            hint = _inside(key, own) or hint
            raise ModelError(f"model.overrides.{key}: {cls.__name__} has no such field{hint}")


def _fields_of(cls: type[PreTrainedConfig]) -> set[str]:
    """Fields that a config class has or its modeling code reads (some, such as head_dim, appear only there)."""
    known = set(cls().to_dict()) | set(getattr(cls, "attribute_map", {}))
    source = Path(inspect.getfile(cls))
    modeling = source.with_name(source.name.replace("configuration_", "modeling_"))
    if modeling.is_file():
        used = re.findall(r"config\.(\w+)|config, \"(\w+)\"", modeling.read_text(encoding="utf-8"))
        known |= {a or b for a, b in used}
    return known
