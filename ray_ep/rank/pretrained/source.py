"""The tensors of a transformers checkpoint directory: which files count, what their headers say, and reading them.

Opening it reads headers only (a few MB of a 600 GB checkpoint) and finds what is damaged. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from ray_ep.errors import CheckpointError, ModelError
from ray_ep.rank.pretrained.quantised import DEQUANTISED, FLOATS, Packed4, Scaled, declared, scales_of
from ray_ep.rank.pretrained.reading import Reading

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of the file of all weights, and of the file that says which of several holds each."""
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
         "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64}  # fmt: skip
_LFS = b"version https://git-lfs"
Header = dict[str, tuple[str, tuple[int, ...]]]
"""Key -> dtype and shape of a tensor."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file, not read yet; `[...]` reads it, `[a:b]` some of its rows."""

    source: WeightSource
    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> Any:
        part = self.source.open(self.file).get_slice(self.key)[index]
        self.source.reading.add(part.nbytes)
        return part

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8


class WeightSource:
    """A checkpoint directory.

    Args:
        reading: counts what is read of it.

    Attributes:
        tensors: key -> lazy tensor, dequantised ones under the key of the weight.
        quantised: keys of those.
        declared: the quantisation that config.json declares, as it is there.

    Raises:
        CheckpointError: no weights, damaged ones, a key twice, or a quantisation that is not read.
    """

    def __init__(self, path: Path, reading: Reading | None = None):
        self.path, self._open = path, dict[Path, Any]()
        self.reading = reading or Reading()
        self.declared = declared(read_config(path))
        method = self.declared.get("quant_method", "")
        if method and method not in DEQUANTISED:
            raise self.refused(f"quantization_config of its config.json, quant_method={method!r}")
        self.tensors: dict[str, Any] = {}
        for file, header in _files(path).items():
            for key, (dtype, shape) in header.items():
                if key in self.tensors:
                    first = self.tensors[key].file.name
                    raise CheckpointError(
                        f"model.path={path}: {key} is in two files that count, {first} and {file.name}: keep one of "
                        "the two, and the files of one checkpoint only"
                    )
                self.tensors[key] = Stored(self, key, file, dtype, shape)
        if not self.tensors:
            raise CheckpointError(f"model.path={path}: its safetensors files hold no tensors")
        self.quantised: list[str] = []
        if method == "fp8":
            self._scale()
        elif method == "mxfp4":
            self._unpack()

    def open(self, file: Path) -> Any:
        """The safetensors file, opened at its first use."""
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, "pt")
            except (OSError, SafetensorError) as e:
                raise CheckpointError(f"model.path={self.path}: {file.name} is unreadable: {e}") from None
        return self._open[file]

    def refused(self, what: str, instead: str = "") -> CheckpointError:
        """The error for a quantisation that is not read."""
        instead = instead or "give the checkpoint in bfloat16 or float32 that it was made from"
        return CheckpointError(
            f"model.path={self.path}: its weights are quantised ({what}). ray_ep reads fp8 with block scales and "
            f"gpt-oss's mxfp4 where config.json declares them, no other: {instead}"
        )

    def _scale(self) -> None:
        block = self.declared.get("weight_block_size")
        if block and not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) for n in block)):
            raise CheckpointError(
                f"model.path={self.path}: quantization_config of its config.json has weight_block_size={block!r}: "
                "expected rows and columns, such as [128, 128]"
            )
        for key, weight in list(self.tensors.items()):
            scales = next((s for s in scales_of(key) if s in self.tensors), None)
            if scales is None or weight.dtype in FLOATS:
                continue
            self._take(key, lambda w=weight, s=scales: Scaled(w, self.tensors[s], block))
            del self.tensors[scales]

    def _unpack(self) -> None:
        for key in [k for k in self.tensors if k.endswith("_blocks")]:
            name = key.removesuffix("_blocks")
            scales = f"{name}_scales"
            if scales in self.tensors:
                self._take(name, lambda k=key, s=scales: Packed4(self.tensors[k], self.tensors[s]))
                del self.tensors[key], self.tensors[scales]

    def _take(self, key: str, make: Any) -> None:
        try:
            self.tensors[key] = make()
        except ValueError as e:
            raise CheckpointError(f"model.path={self.path}: {key} cannot be dequantised: {e}") from None
        self.quantised.append(key)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory, as written; raises ModelError."""
    file = path / "config.json"
    if not path.is_dir():
        raise ModelError(f"model.path={str(path)!r}: no such directory")
    if not file.is_file():
        raise ModelError(f"model.path={str(path)!r}: no transformers checkpoint there (config.json is missing)")
    try:
        text = file.read_bytes()
        raw = json.loads(text.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        lfs = text.startswith(_LFS) if isinstance(e, ValueError) else False
        why = "a git-lfs pointer, not the file itself: run git lfs pull there" if lfs else f"not JSON: {e}"
        raise ModelError(f"model.path={str(path)!r}: its config.json is {why}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"model.path={str(path)!r}: its config.json holds a {type(raw).__name__}, not keys and values")
    decoded: dict[str, Any] = PreTrainedConfig._decode_special_floats(raw)  # {"__float__": "Infinity"}
    return decoded


def _files(path: Path) -> dict[Path, Header]:
    """The files that count, by transformers' rule: one named in config.json, model.safetensors, or the index's."""
    named = read_config(path).get("transformers_weights")
    if named is not None:
        whole = isinstance(named, str) and str(named).endswith((".safetensors", ".safetensors.index.json"))
        if not whole or not (path / named).resolve().is_relative_to(path.resolve()) or not (path / named).is_file():
            raise CheckpointError(f"model.path={path}: config.json names transformers_weights={named!r}: not there")
        file = path / named
        return _indexed(path, file) if named.endswith(".json") else {file: _header(path, file)}
    if (path / WHOLE).is_file():
        return {path / WHOLE: _header(path, path / WHOLE)}
    if (path / INDEX).is_file():
        return _indexed(path, path / INDEX)
    try:
        names = sorted(os.listdir(path))
    except OSError as e:
        raise CheckpointError(f"model.path={path}: {e.strerror}") from None
    broken = next((n for n in (WHOLE, INDEX) if (path / n).is_symlink()), None)
    if broken:
        raise CheckpointError(f"model.path={path}: {broken} is a link to a file that is not there")
    other = [n for n in names if n.endswith(".safetensors")]
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"))]
    say = f"model.path={path}: neither {WHOLE} nor {INDEX} is there"
    if other:
        found = f"{', '.join(other[:3])}{' …' if len(other) > 3 else ''}"
        do = "name it model.safetensors" if len(other) == 1 else "add the index, or write one file"
        raise CheckpointError(f"{say}, and no other file counts as weights ({found}): {do}")
    if pickled:
        raise CheckpointError(
            f"{say}, only {pickled[0]}, which ray_ep does not read: load it once with transformers where you trust it "
            "and write it anew (AutoModelForCausalLM.from_pretrained(old).save_pretrained(new))"
        )
    raise CheckpointError(f"{say}: no .safetensors files there")


def _indexed(path: Path, index: Path) -> dict[Path, Header]:
    """The shards of an index, each there and with the keys that it says."""
    try:
        text = index.read_bytes()
        where = json.loads(text)["weight_map"]
        files = {name: path / name for name in sorted(set(where.values()))}
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("a file elsewhere")
    except OSError as e:
        raise CheckpointError(f"model.path={path}: {index.name} is unreadable: {e.strerror or e}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        lfs = text.startswith(_LFS)
        why = (
            "a git-lfs pointer, not the file itself: run git lfs pull there"
            if lfs
            else ('damaged, or no index: expected {"weight_map": {"name of a tensor": "name of its file", …}}')
        )
        raise CheckpointError(f"model.path={path}: {index.name} is {why}") from None
    absent = [name for name, file in files.items() if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"model.path={path}: {len(absent)} of the {len(files)} files that {index.name} names are not there, first "
            f"{absent[0]}: copy or download the rest"
        )
    if not files:
        raise CheckpointError(f"model.path={path}: {index.name} names no files")
    held = {name: _header(path, file) for name, file in files.items()}
    lost = next((key for key, name in where.items() if key not in held[name]), None)
    if lost is not None:
        raise CheckpointError(
            f"model.path={path}: {index.name} says that {lost} is in {where[lost]}, which does not hold it: the index "
            "and the files are not of one checkpoint"
        )
    return {file: held[name] for name, file in files.items()}


def _header(path: Path, file: Path) -> Header:
    """(dtype, shape) of each tensor of a safetensors file, its length checked against them."""
    say = f"model.path={path}: {file.name}"
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            head = f.read(8)
            if (head + f.read(len(_LFS) - 8)).startswith(_LFS):
                raise CheckpointError(f"{say} is a git-lfs pointer, not the weights: run git lfs pull there")
            f.seek(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise CheckpointError(f"{say} is unreadable: {size:,} bytes, cut off or no safetensors file")
            header = json.loads(f.read(length))
        tensors = {k: (v["dtype"], tuple(v["shape"])) for k, v in header.items() if k != "__metadata__"}
        spans = [v["data_offsets"] for k, v in header.items() if k != "__metadata__"]
        end = 8 + length + max((int(b) for _, b in spans), default=0)
        wrong = next(
            (
                key
                for (key, (dtype, shape)), (a, b) in zip(tensors.items(), spans, strict=True)
                if dtype in _BITS and math.prod(shape) * _BITS[dtype] != (b - a) * 8
            ),
            None,
        )
        ordered = sorted((int(a), int(b), key) for key, (a, b) in zip(tensors, spans, strict=True))
        ends = [0, *(b for _, b, _ in ordered)]
        wrong = wrong or next((key for (a, _, key), b in zip(ordered, ends, strict=False) if a != b), None)
    except OSError as e:
        raise CheckpointError(f"{say} is unreadable: {e.strerror or e}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{say} is unreadable: its header is damaged, or it is no safetensors file") from None
    if wrong is not None:
        raise CheckpointError(f"{say} is unreadable: its header is damaged (the size or place of {wrong})")
    if size != end:
        what = "it is cut off: copy or download it again" if size < end else "its end is not its own"
        raise CheckpointError(f"{say} is damaged: it has {size:,} bytes, its header says {end:,}; {what}")
    return tensors
