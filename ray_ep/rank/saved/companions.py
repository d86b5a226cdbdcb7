"""What an exported model needs beside its weights: tokenizer, chat template, generation settings, as they were given.

Files are copied as they are, so that every engine reads what it read before; nothing that is copied is ever run.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*tiktoken*",
    "vocab.json",
    "vocab.txt",
)
_TOKENIZER = (
    *_VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
_GENERATION = ("generation_config.json",)
BYTES = "bytes: token = byte, 0 ends a document; there are no tokenizer files"
"""What a checkpoint says in place of tokenizer files where bytes are the tokens."""


class LeftOut(Exception):
    """Something is known to belong to the model and cannot be had any more."""


def companions(config: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Files to write, and words of where each kind is from, given a run's configuration as its manifest has it."""
    path = str(_get(config, "model", "path") or "")
    tokenizer = str(_get(config, "data", "tokenizer") or "bytes")
    files: dict[str, bytes] = {}
    words = {"tokenizer": BYTES}
    try:
        if tokenizer != "bytes":
            found = _tokenizer(tokenizer)
            words["tokenizer"] = f"{tokenizer} (data.tokenizer)"
        else:
            found = _read(Path(path), _TOKENIZER) if path and _has(Path(path), _VOCABULARIES) else {}
            if found:
                words["tokenizer"] = f"{path} (model.path); the run itself was trained on bytes"
        files |= found
        if "auto_map" in _json(found.get("tokenizer_config.json", b"{}")):
            words["tokenizer"] += "; it needs code of its own, which is not copied"
    except LeftOut as e:
        words["tokenizer"] = f"left out: {e}"
    try:
        generation = _read(Path(path), _GENERATION) if path else {}
        words["generation_config"] = f"{path} (model.path)" if generation else "none was given"
        files |= generation
    except LeftOut as e:
        words["generation_config"] = f"left out: {e}"
    return files, words


def _tokenizer(name: str) -> dict[str, bytes]:
    """Files of a tokenizer: those of its directory, or what transformers writes of one that it knows by name."""
    if Path(name).is_dir():
        if _has(Path(name), _VOCABULARIES):
            return _read(Path(name), _TOKENIZER)
    elif Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise LeftOut(f"data.tokenizer={name} is gone")
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory() as tmp:
            AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(tmp)
            return _read(Path(tmp), _TOKENIZER)
    except Exception as e:  # its loaders raise nearly anything
        raise LeftOut(f"data.tokenizer={name} cannot be loaded any more: {_first_line(e)}") from None


def _read(path: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Small files of a directory, by their path in it."""
    if not path.is_dir():
        raise LeftOut(f"{path} is gone")
    try:
        names = sorted({p.relative_to(path).as_posix() for pattern in patterns for p in path.glob(pattern)})
        files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    except OSError as e:
        raise LeftOut(f"{path} cannot be read any more: {_first_line(e)}") from None
    for name, data in files.items():
        if data.startswith(b"version https://git-lfs"):
            raise LeftOut(f"{path / name} is a pointer of git-lfs, not the file")
    return files


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds the vocabulary of a tokenizer."""
    return _has(path, _VOCABULARIES)


def _has(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in path.glob(pattern)) if path.is_dir() else False


def _get(config: dict[str, Any], section: str, key: str) -> Any:
    part = config.get(section)
    return part.get(key) if isinstance(part, dict) else None


def _json(data: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]
