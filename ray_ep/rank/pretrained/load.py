"""A transformers checkpoint -> the weights of a model: checked as a whole from its headers, read for one rank.

Renames and converts as transformers does, by its own loader (its underscore methods: pyproject pins the version range).
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ray_ep.errors import CheckpointError, brief
from ray_ep.moe import find_experts
from ray_ep.moe.parallelize import keep_rows
from ray_ep.rank.pretrained.quantised import ACTIVATION_SCALE, FLOATS, looks_like
from ray_ep.rank.pretrained.reading import Reading
from ray_ep.rank.pretrained.source import Stored, WeightSource

# What families are known to carry beside a causal language model's weights, the first that fits counts.
_BESIDE = {
    r"(^|\.)(visual|vision|vision_tower|vision_model|vpm|vit|image_\w+|mm_projector|multi_modal_projector|patch_\w+)\.":
        "a vision tower",
    r"(^|\.)(audio|audio_tower|audio_model|speech|thinker_audio|talker|code2wav|token2wav)[._]": "an audio tower",
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$": "rotary buffers",
    r"\.(masked_bias|attn\.bias|position_ids)$": "old buffers",
    r"\b(lora_|adapter)": "an adapter",
    r"\b(score|v_head|value_head|reward_head|classifier)\.": "another head",
}  # fmt: skip
_MTP = re.compile(r"(^|\.)(mtp|nextn)[._]|\.(eh_proj|enorm|hnorm|shared_head)\.")
_SINGLE = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: a name in the model's state dict, and the experts module that owns it, if any."""

    name: str
    owner: str | None  # dotted name of an experts module
    expert: int | None  # of a tensor of one expert


def inspect(path: Path, model: PreTrainedModel) -> list[tuple[str, str]]:
    """Check that a checkpoint fills a meta model (whose parameters it replaces); reads headers only.

    Returns:
        What to tell of it, as (kind of event, message).

    Raises:
        CheckpointError: damaged, quantised in a way that is not read, or of another model.
    """
    source = WeightSource(path)
    say = f"model.path={path}"
    experts = {n: int(m.num_experts) for n, m in find_experts(model).items()}  # type: ignore[arg-type]
    expected = model.state_dict()
    targets = _targets(source, model, expected, experts)
    _check_quantised(source, targets, expected)
    _check_experts(say, source, targets, experts)
    for module in find_experts(model).values():  # one expert stands for all: they were found alike
        keep_rows(module, [0])
    part = _part(source, targets, {name: [0] for name in experts})
    info = _load(model, {k: _Shape(t) for k, t in part.items()}, "meta")
    model.mark_tied_weights_as_initialized(info)  # type: ignore[no-untyped-call]
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    _raise_for(say, model, info)
    notes = []
    if source.quantised:
        method = source.declared["quant_method"]
        notes.append(
            ("dequantised", f"{say}: {len(source.quantised):,} weights in {method} are dequantised as they are read")
        )
    leftovers = _leftovers([k for k, t in targets.items() if t is None], model, bool(source.quantised))
    if leftovers:
        notes.append(("checkpoint-leftovers", f"{say} holds tensors that the model has no place for: {leftovers}"))
    return notes


def load_pretrained(
    model: PreTrainedModel, path: Path, rows: dict[str, list[int]], reading: Reading | None = None
) -> None:
    """Fill a meta model from a transformers checkpoint, reading only `rows` of each experts module.

    Args:
        reading: counts what is read.

    Raises:
        CheckpointError: no safetensors there, unreadable, or keys missing: a checkpoint of another model.
    """
    reading = reading or Reading()
    source = WeightSource(path, reading)
    totals = {n: int(m.num_experts) for n, m in find_experts(model).items()}  # type: ignore[arg-type]
    for name, module in find_experts(model).items():
        keep_rows(module, sorted(rows[name]))
    targets = _targets(source, model, model.state_dict(), totals)
    _check_experts(f"model.path={path}", source, targets, totals)
    state = _part(source, targets, {n: sorted(r) for n, r in rows.items()})
    reading.begin(sum(t.nbytes for t in state.values()))
    load = LoadStateDictConfig(device_map={"": torch.device("cpu")}, dtype=model.dtype)
    info = _load(model, state, "cpu")
    try:
        info = PreTrainedModel._finalize_model_loading(model, load, info)
    except Exception as e:
        raise CheckpointError(f"model.path={path} does not fit {type(model).__name__}: {brief(e)}") from None
    _raise_for(f"model.path={path}", model, info)
    for name, module in find_experts(model).items():  # read in ascending order: bring into the placement's
        module.ray_ep_rows = list(rows[name])  # type: ignore[assignment]
        ascending = sorted(rows[name])
        if ascending != rows[name]:
            order = [ascending.index(e) for e in rows[name]]
            # In place: what glibc frees of one size it does not give for that size again.
            for _, p in module.named_parameters(recurse=False):
                p.data.copy_(p.data[order])
    reading.end()


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

    @property
    def nbytes(self) -> int:
        return int(self.source.nbytes * len(self.rows) // max(1, self.source.get_shape()[0]))


class _Shape:
    """A checkpoint tensor as its header tells it: materialised without storage."""

    def __init__(self, tensor: Any):
        self.tensor = tensor

    def __getitem__(self, _: Any) -> torch.Tensor:
        dtype = torch.float32 if self.tensor.get_dtype() in FLOATS else torch.int64
        return torch.empty(self.tensor.get_shape(), dtype=dtype, device="meta")

    def get_shape(self) -> list[int]:
        return list(self.tensor.get_shape())

    def get_dtype(self) -> str:
        return str(self.tensor.get_dtype())


def _targets(
    source: WeightSource, model: PreTrainedModel, expected: dict[str, Any], experts: dict[str, int]
) -> dict[str, Target | None]:
    """Where each tensor goes, by transformers' own renaming; None: nowhere."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    found: dict[str, Target | None] = {}
    for key in sorted(source.tensors, key=dot_natural_key):  # the loader's order: some renamings depend on it
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, expected)
        if name not in expected:
            found[key] = None
            continue
        parent = name.rpartition(".")[0]
        owner = parent if parent in experts else None  # a submodule that all experts share is dense
        single = _SINGLE.search(key) if owner is not None else None
        found[key] = Target(name, owner, int(single.group(1)) if single else None)
    return found


def _part(source: WeightSource, targets: dict[str, Target | None], rows: dict[str, list[int]]) -> dict[str, Any]:
    """The tensors of a model with these experts: dense ones, those of one expert each, and rows of stacks."""
    part = {}
    for key, target in targets.items():
        tensor = source.tensors[key]
        if target is None or (target.owner and target.expert is not None and target.expert not in rows[target.owner]):
            continue
        stacked = target.owner is not None and target.expert is None
        part[key] = _Rows(tensor, rows[str(target.owner)]) if stacked else tensor
    return part


def _load(model: PreTrainedModel, state: dict[str, Any], device: str) -> Any:
    """transformers' loader over lazy tensors; returns what it found."""
    mapping: Any = get_model_conversion_mapping(model)
    load = LoadStateDictConfig(device_map={"": torch.device(device)}, dtype=model.dtype, weight_mapping=mapping)
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        info, _ = PreTrainedModel._load_pretrained_model(model, state, None, load)
    except Exception as e:
        raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}: {brief(e)}") from None
    finally:
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return info


def _check_quantised(source: WeightSource, targets: dict[str, Target | None], expected: dict[str, Any]) -> None:
    """Whatever quantisation is left is refused: by what the tensors are called, and by their dtypes."""
    undeclared = "" if source.declared else "; config.json declares no quantization_config"
    for key in [k for k, target in targets.items() if target is None]:
        if ACTIVATION_SCALE.search(key) or not (name := looks_like(key, source.tensors)):
            continue
        hint = ""
        if name == "fp8" and not source.declared:
            hint = (
                'if it was made in blocks, add quantization_config={"quant_method": "fp8", "weight_block_size": '
                "[128, 128]} to its config.json"
            )
        raise source.refused(f"{name}: {key}{undeclared}", hint)
    for key, target in targets.items():
        tensor = source.tensors[key]
        wide = not isinstance(tensor, Stored) or tensor.dtype in FLOATS
        if target is not None and not wide and expected[target.name].is_floating_point():
            name = "float8" if tensor.dtype.startswith("F8") else tensor.dtype
            raise source.refused(f"{key} is {name} without scales that are known{undeclared}")


def _check_experts(say: str, source: WeightSource, targets: dict[str, Target | None], experts: dict[str, int]) -> None:
    """Every experts module must have all of its experts, and no others, alike."""
    held: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(dict)  # (module, name for all) -> expert -> shape
    for key, target in targets.items():
        if target is None or target.owner is None:
            continue
        shape = source.tensors[key].get_shape()
        if target.expert is not None:
            held[target.owner, _SINGLE.sub("experts.*.", key)][target.expert] = shape
        elif not shape or shape[0] != experts[target.owner]:
            raise CheckpointError(_other_count(say, target.owner, shape[0] if shape else 0, experts[target.owner]))
    for (owner, name), shapes in held.items():
        want = experts[owner]
        if shapes.keys() != set(range(want)):
            if shapes.keys() == set(range(len(shapes))):
                raise CheckpointError(_other_count(say, owner, len(shapes), want))
            lost = next((e for e in range(want) if e not in shapes), want)
            raise CheckpointError(f"{say}: {name.replace('*', str(lost))} is missing (of {want} experts)")
        if other := next((e for e, shape in shapes.items() if shape != shapes[0]), None):
            raise CheckpointError(
                f"{say}: {name.replace('*', str(other))} has shape {shapes[other]}, that of expert 0 {shapes[0]}"
            )


def _other_count(say: str, owner: str, count: int, want: int) -> str:
    return (
        f"{say}: {owner} holds {count} experts, its config says {want}; every MoE layer must hold as many as the "
        "config says"
    )


def _raise_for(say: str, model: PreTrainedModel, info: Any) -> None:
    """CheckpointError for weights that are missing or have another shape."""
    kind = type(model).__name__
    mismatched = sorted(info.mismatched_keys, key=lambda m: dot_natural_key(m[0]))
    if mismatched:
        name, got, want = mismatched[0]
        raise CheckpointError(
            f"{say} is of another model than {kind} with the sizes of its config: {len(mismatched)} weights are of "
            f"another shape, first {name}: {list(got)} there, {list(want)} in the model"
        )
    missing = sorted(info.missing_keys | set(info.conversion_errors), key=dot_natural_key)
    if missing:
        raise CheckpointError(
            f"{say} is of another model than {kind}, or not whole: {len(missing)} weights are missing or do not fit, "
            f"first {missing[0]}"
        )


def _leftovers(keys: list[str], model: PreTrainedModel, dequantised: bool) -> str:
    """Tensors without a place, grouped by what they are known to be; empty: none."""
    text = model.config.get_text_config()
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    promised = any(getattr(text, key, 0) for key in ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules"))
    beyond = "multi-token prediction (MTP), " if promised or any(map(_MTP.search, keys)) else ""
    groups: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        number = re.match(r"(?:\w+\.)*?layers\.(\d+)\.", key)
        what = next((w for pattern, w in _BESIDE.items() if re.search(pattern, key)), "")
        if ACTIVATION_SCALE.search(key) and dequantised:
            what = "scales of activations (not needed)"
        elif not what and number and layers and int(number.group(1)) >= layers:
            what = f"{beyond}layers from {layers} on"
        elif not what:
            what = "multi-token prediction (MTP)" if _MTP.search(key) else "unknown"
        groups[what].append(key)
    parts = []
    for what, names in groups.items():
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        parts.append(f"{what}: {len(names):,} ({shown})")
    return f"{len(keys):,}; {'; '.join(parts)}. They are neither trained nor exported" if parts else ""
