"""A Hugging Face tokenizer by name or directory, without running code that comes with it; and the ids that it may give.

Our own words for what its loader refuses: the library's name options that are not ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray_ep.errors import DataError, brief


def load_tokenizer(name: str) -> tuple[Any, int]:
    """The tokenizer, and the vocabulary that a model needs for it: one more than its highest id, added tokens included.

    Raises:
        DataError: none there, damaged, or one that needs code of its own.
    """
    from transformers import AutoTokenizer

    say = f"data.tokenizer={name!r}: give bytes, or the name or directory of a tokenizer: "
    if os.path.isdir(name):
        _check_directory(Path(name), say)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
    except Exception as e:  # its loaders raise nearly anything: OSError, KeyError, ImportError, bare Exception
        raise DataError(f"{say}{_why(name, e)}") from e
    if not vocabulary.keys() - set(tokenizer.all_special_tokens):  # of some models it makes one without any file
        raise DataError(f"{say}{_none_there(name) or 'this one has special tokens only, so no text has any'}")
    return tokenizer, max(len(tokenizer), max(vocabulary.values()) + 1)


def load_decoder(name: str) -> Callable[[Sequence[int]], str]:
    """What turns ids of tokens that follow each other into their text; what is no whole character there becomes \ufffd.

    Args:
        name: as data.tokenizer has it.

    Raises:
        DataError: as `load_tokenizer`.
    """
    if name == "bytes":
        return lambda ids: bytes(ids).decode("utf-8", "replace")
    tokenizer, _ = load_tokenizer(name)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _check_directory(path: Path, say: str) -> None:
    """DataError for a file that is no JSON, above all a git-lfs pointer."""
    for file in (path / "tokenizer.json", path / "tokenizer_config.json"):
        if not file.is_file():
            continue
        try:
            text = file.read_bytes()
            json.loads(text)
        except (OSError, ValueError) as e:
            lfs = isinstance(e, ValueError) and text.startswith(b"version https://git-lfs")
            why = "is a git-lfs pointer, not the file itself: run git lfs pull there" if lfs else f"is unreadable: {e}"
            raise DataError(f"{say}{file.name} {why}") from None


def _why(name: str, e: Exception) -> str:
    """What is wrong, as far as the loader's error tells it."""
    text = str(e)
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "this one needs code that comes with it, which is never run; convert it to a tokenizer.json elsewhere and "
            "give that directory"
        )
    if isinstance(e, OSError) and not os.path.isdir(name):
        return "no such directory here, and no such tokenizer could be had from the Hugging Face hub"
    return _none_there(name) or brief(e)


def _none_there(name: str) -> str:
    """Words for a directory without any file of a vocabulary; "": it has one, or is none."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not os.path.isdir(name) or any((Path(name) / n).exists() for n in names):
        return ""
    return f"no tokenizer is in that directory (none of {', '.join(names)})"
