"""A checkpoint of ours -> a plain transformers checkpoint, one MoE layer in memory at a time. No ranks, no Ray."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ray_ep.errors import BadInput, CheckpointError, SaveError
from ray_ep.moe import find_experts
from ray_ep.rank.model import meta_model
from ray_ep.rank.saved.adapter import write_adapter
from ray_ep.rank.saved.checkpoint import QUICK, Checkpoint
from ray_ep.rank.saved.companions import companions
from ray_ep.rank.saved.disk import save_tensors

_SHARD = "model-{:05d}.safetensors"
_PART = ".export.part"
"""Where the files of an export lie in its directory until all are written."""


def export_checkpoint(checkpoint: Checkpoint, out: Path, dtype: str | None = None) -> dict[str, Any]:
    """Write `out` so that `AutoModelForCausalLM.from_pretrained(out)` is the trained model.

    Args:
        dtype: of the written weights; None: the run's compute dtype. float32 loses nothing.

    Returns:
        What was written: tensors, bytes, shards, files; where tokenizer and generation settings are from.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds too few or too many experts.
        BadInput: `out` holds files, or cannot be made. SaveError: it could not be written. Then nothing is left there.
    """
    try:
        full = out.exists() and (not out.is_dir() or any(p.name != _PART for p in out.iterdir()))
    except OSError as e:
        raise BadInput(f"{out} cannot be read: {e.strerror}: give another directory") from None
    if full:
        raise BadInput(f"{out} already exists and is not an empty directory: give a new one")
    manifest = checkpoint.manifest
    if adapters := (manifest.get("config") or {}).get("lora", {}).get("rank"):
        checkpoint.verify(QUICK)
        with _staged(out) as part:
            return {**write_adapter(checkpoint, part), "rank": adapters}
    try:
        settings = dict(manifest["model"])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        dtype = dtype or manifest["config"]["model"]["dtype"]
    except (KeyError, ValueError, TypeError) as e:
        raise CheckpointError(f"checkpoint {checkpoint.name}: its model is not known: {e!r}") from None
    model = meta_model(config, dtype)
    _count_experts(checkpoint, model)
    checkpoint.verify(QUICK)
    with _staged(out) as part:
        _check_room(part, model, getattr(torch, dtype))
        done = _write_weights(checkpoint, _Writer(part, model), dtype)
        files, words = companions(manifest["config"])
        for name, data in files.items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_bytes(data)
        written = sorted(p.relative_to(part).as_posix() for p in part.rglob("*") if p.is_file())
    return {**done, **words, "files": written}


def _write_weights(checkpoint: Checkpoint, writer: _Writer, dtype: str) -> dict[str, Any]:
    model = writer.model
    stacks = {f"{n}.{p}": m for n, m in find_experts(model).items() for p, _ in m.named_parameters(recurse=False)}
    dense, buffers = {}, {}
    for key in checkpoint.tensors:
        kind, _, name = key.partition("/")
        if kind == "weight" and name.rpartition("/")[0] not in stacks:
            dense[name] = checkpoint.read(key)
        elif kind == "buffer":
            buffers[name] = checkpoint.read(key)
    writer.write(dense, buffers)
    for name, module in find_experts(model).items():
        count: int = module.num_experts  # type: ignore[assignment]
        layer = {}
        for p, _ in module.named_parameters(recurse=False):
            layer[f"{name}.{p}"] = torch.stack([checkpoint.read(f"weight/{name}.{p}/{e}") for e in range(count)])
        writer.write(layer)
    return writer.finish(dtype)


class _Writer:
    """Shards of a transformers checkpoint and their index."""

    def __init__(self, out: Path, model: PreTrainedModel):
        self.out, self.model = out, model
        self.dtypes = {n: t.dtype for n, t in model.state_dict().items()}  # float32 where transformers keeps that
        self.files: dict[str, str] = {}
        self.bytes = 0

    def write(self, weights: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor] | None = None) -> None:
        """One shard, under the names that transformers and other engines read."""
        cast = {k: t.to(self.dtypes.get(k, t.dtype)) for k, t in {**weights, **(buffers or {})}.items()}
        plain = revert_weight_conversion(self.model, cast)
        name = _SHARD.format(len(set(self.files.values())) + 1)
        save_tensors({k: t.contiguous() for k, t in plain.items()}, self.out / name, {"format": "pt"})
        self.files |= dict.fromkeys(plain, name)
        self.bytes += sum(t.numel() * t.element_size() for t in plain.values())

    def finish(self, dtype: str) -> dict[str, Any]:
        """The index and the config, last: an export cut short is not loadable.

        The config is the model's own: of the language model alone, where a checkpoint's spoke of towers beside it.
        """
        config: Any = self.model.config
        index = {"metadata": {"total_size": self.bytes}, "weight_map": self.files}
        (self.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config.architectures = [type(self.model).__name__]
        config.dtype = dtype
        _promise_no_more(config, self.model)
        config.save_pretrained(self.out)
        return {"tensors": len(self.files), "bytes": self.bytes, "shards": len(set(self.files.values()))}


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A directory inside `out` whose files move there at the end, config.json last; an error leaves nothing."""
    new = [p for p in (out, *out.parents) if not p.exists()]
    part, moved = out / _PART, []
    try:
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        try:
            part.mkdir(parents=True)
        except OSError as e:
            raise BadInput(f"{out} cannot be written to: {e.strerror or e}: give another directory") from None
        yield part
        for path in sorted(part.iterdir(), key=lambda p: p.name == "config.json"):
            moved.append(out / path.name)
            os.replace(path, moved[-1])
        part.rmdir()
    except BaseException as e:
        for path in (part, *moved):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in new:
            with suppress(OSError):
                path.rmdir()
        if isinstance(e, OSError):
            raise SaveError(
                f"{out} could not be written: {e.strerror or e}; nothing of it is left there: make room, or give "
                "another directory"
            ) from None
        raise


def _check_room(part: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    need, free = sum(p.numel() for p in model.parameters()) * dtype.itemsize, shutil.disk_usage(part).free
    if need > free:
        raise SaveError(
            f"{part.parent} has {free / 1e6:,.1f} MB free and the weights need {need / 1e6:,.1f} MB: nothing was "
            "written; make room, or give another directory"
        )


def _promise_no_more(config: Any, model: PreTrainedModel) -> None:
    """Multi-token prediction layers are neither trained nor exported: an engine must not look for them."""
    kept = any(re.search(r"\bmtp|nextn", name) for name in model.state_dict())
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key in ("quantization_config", "auto_map"):  # as checkpoints of earlier versions remember them
            if hasattr(part, key):
                delattr(part, key)
        for key in ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules"):
            if getattr(part, key, 0) and not kept:
                setattr(part, key, 0)


def _count_experts(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Every (layer, parameter, expert) once, none left over: an export that lost experts must not look whole."""
    want = {
        f"weight/{n}.{p}/{e}"
        for n, m in find_experts(model).items()
        for p, _ in m.named_parameters(recurse=False)
        for e in range(m.num_experts)  # type: ignore[arg-type]
    }
    have = {k for k in checkpoint.tensors if k.startswith("weight/") and k.count("/") == 2}
    if want != have:
        example = sorted(want ^ have)[0]
        raise checkpoint.damaged(
            f"it holds {len(have)} expert weights, the model has {len(want)}: first that differs is {example}"
        )
