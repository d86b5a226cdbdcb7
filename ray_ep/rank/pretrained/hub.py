"""Checkpoints by name, as the Hugging Face hub has them: through its own client and cache, never with code of theirs.

HF_HOME, HF_TOKEN and HF_HUB_OFFLINE count as everywhere. Each node fetches into its own cache, once for all its ranks.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ray_ep.config.paths import is_hub_name
from ray_ep.errors import ModelError, brief

_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*tiktoken*", "tokenizer.model.v*"]
_INDEX = "model.safetensors.index.json"


def directory(path: str, weights: bool = False) -> Path:
    """The directory of a checkpoint: `path` itself, or where the cache has `owner/name` or `owner/name@revision`.

    Args:
        weights: with the weights; else with config, index and tokenizer alone, which are small.

    Raises:
        ModelError: neither in the cache nor to be had from the hub.
    """
    if not is_hub_name(path):
        return Path(path)
    found = _snapshot(path, _SMALL)
    if weights:
        _snapshot(path, [*_SMALL, *_shards(found)])
    return found


def _shards(found: Path) -> list[str]:
    """Names of the files that hold the weights: a repository may hold them a second time, in other formats."""
    try:
        where = json.loads((found / _INDEX).read_bytes())["weight_map"]
        return sorted({str(name) for name in where.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["model.safetensors"]


def _snapshot(path: str, patterns: list[str]) -> Path:
    name, _, revision = path.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as e:  # beside its own, those of the network, of the disk and of names that cannot be
        raise ModelError(f"model.path={path!r}: no such directory here, and {_why(e, revision)}") from None


def _why(e: Exception, revision: str) -> str:
    if isinstance(e, GatedRepoError):
        return "on the Hugging Face hub its owner has to let you in: ask there, then give your token as HF_TOKEN"
    if isinstance(e, RevisionNotFoundError):
        return f"on the Hugging Face hub it has no revision {revision!r}"
    if isinstance(e, RepositoryNotFoundError):
        return "the Hugging Face hub has none of that name that you may read (HF_TOKEN says who you are)"
    if isinstance(e, LocalEntryNotFoundError):
        return "it is not in this machine's cache (HF_HOME), and the Hugging Face hub cannot be reached, or may not be"
    if isinstance(e, HfHubHTTPError):
        return f"the Hugging Face hub does not give it: {brief(e)}"
    return f"it could not be had from the Hugging Face hub: {brief(e)}"
