"""Opens files that other programs wrote, by format; every failure names the file. torch is imported only for .pt."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ray_ep.errors import PlacementError

ALLOWED = (
    "ray_ep's own statistics (.npz); SGLang's expert-distribution records (.pt, or the directory with one a rank) or "
    "logical_count (.json); routed experts of vLLM or SGLang (responses as .json, .jsonl, or a directory of them; of "
    "vLLM also .npy, .npz of [tokens, layers, top_k]); TensorRT-LLM's EXPERT_STATISTIC_PATH (a directory with "
    "meta_info.json)"
)
"""Records of routing that are read."""


def holds(tree: Any) -> str:
    """What a document is, for a message."""
    if isinstance(tree, Mapping):
        return f"keys {sorted(map(str, tree))[:8]}"
    names = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return "nothing" if tree is None else names.get(type(tree), "something else")


def head_of(file: Path) -> bytes:
    """The first bytes, blanks before them left out."""
    try:
        with open(file, "rb") as f:
            return f.read(64).lstrip()
    except OSError as e:
        raise PlacementError(f"{file}: {e.strerror or 'cannot be read'}") from None


def numpy_file(file: Path, load: Callable[..., Any]) -> Any:
    """What `load` makes of the file, pickles refused."""
    try:
        return load(file, allow_pickle=False)
    except Exception as e:  # on damaged bytes NumPy raises SyntaxError, TokenError, zlib.error, MemoryError and more
        raise PlacementError(f"{file}: a damaged NumPy file: {_first_line(e)}") from None


def torch_file(file: Path) -> Any:
    """What torch.save wrote, tensors as arrays; only tensors and plain containers are loaded."""
    import torch

    try:
        # Records hold tensors of the GPUs that wrote them.
        tree = torch.load(file, map_location="cpu", weights_only=True)
        return _plain(tree)
    except Exception as e:  # a damaged pickle can raise what any of its instructions raises
        raise PlacementError(f"{file}: torch cannot load it as plain tensors: {_first_line(e)}") from None


def _plain(value: Any) -> Any:
    """Tensors as arrays, containers kept."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.numpy() if value.dtype is not torch.bfloat16 else value.float().numpy()
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], (torch.Tensor, Mapping)):
        return [_plain(v) for v in value]
    return value


def _first_line(error: Exception) -> str:
    """What a library says, without the names of Python's exceptions."""
    line = next(iter(str(error).splitlines()), "")
    return "its content is damaged" if not line or re.search(r"\b\w+(Error|Exception)\b", line) else line


def torch_bytes(tree: Mapping[str, Any]) -> bytes:
    """The values as tensors, as torch.save writes them."""
    import torch

    out = io.BytesIO()
    torch.save({k: torch.tensor(v) for k, v in tree.items()}, out)
    return out.getvalue()


def file_text(file: Path) -> str:
    """The whole file as UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as e:
        raise PlacementError(f"{file}: {e.strerror or 'cannot be read'}") from None
    except UnicodeDecodeError as e:
        raise PlacementError(f"{file}: {e}") from None


def json_file(file: Path) -> Any:
    """One JSON document."""
    try:
        return json.loads(file_text(file))
    except (ValueError, RecursionError) as e:
        raise PlacementError(f"{file}: not JSON: {_first_line(e)}") from None


def json_values(file: Path) -> Any:
    """One JSON document, or one a line."""
    text = file_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as whole:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2 or not lines[0].rstrip().endswith(("}", "]")):
            raise PlacementError(f"{file}: not JSON: {_first_line(whole)}") from None
    values = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise PlacementError(f"{file}, line {number}: not JSON: {_first_line(e)}") from None
        values += value if isinstance(value, list) else [value]
    return values


def yaml_file(file: Path) -> Any:
    """A YAML document, or JSON, which is read faster."""
    text = file_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as e:
        at = "" if e.problem_mark is None else f", line {e.problem_mark.line + 1}"
        raise PlacementError(f"{file}: neither JSON nor YAML: {e.problem or 'damaged'}{at}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError, AttributeError, IndexError) as e:
        # PyYAML makes dates, numbers and keys of what looks like one, and raises what those raise.
        raise PlacementError(f"{file}: neither JSON nor YAML: {_first_line(e)}") from None
