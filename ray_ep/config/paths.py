"""Which keys name places on this machine: made absolute once, since ranks run in other directories."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

from ray_ep.errors import ConfigError

_WORDS = {
    "run_dir": ("",),
    "resume": ("", "no", "auto"),
    "checkpoint.dir": ("",),
    "model.path": ("",),
    "data.files": ("",),
    "placement.initial": ("contiguous", "random"),
    "control.operator_token_file": ("",),
    "control.viewer_token_file": ("",),
    "control.tls_cert": ("",),
    "control.tls_key": ("",),
    "control.tls_client_ca": ("",),
    "serve.api_key_file": ("",),
    "serve.tls_cert": ("",),
    "serve.tls_key": ("",),
}
"""Keys that hold a path or URL (data.files: several), but for these words."""
_NAMES = {"data.tokenizer": ("", "bytes"), "data.dataset": ("",)}
"""Keys that hold a name, or a directory where there is one."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def absolute(values: dict[str, Any]) -> dict[str, Any]:
    """`values` (dotted key -> value) with every local path absolute, seen from the current directory; URLs stay.

    Raises:
        ConfigError: a path that no file can have, or a URL where only a directory of this machine will do.
    """
    out = dict(values)
    for key, words in _WORDS.items():
        if key == "data.files" and key in values:
            out[key] = [_absolute(key, v, pattern=True) for v in values[key]]
        elif key in values and values[key] not in words:
            named = key == "model.path" and is_hub_name(values[key]) and not _is_directory(values[key])
            out[key] = values[key] if named else _absolute(key, values[key])
    for key, words in _NAMES.items():
        if key in values and values[key] not in words and _is_directory(values[key]):
            out[key] = _absolute(key, values[key])
    if is_url(out.get("run_dir", "")):
        raise ConfigError(
            f"run_dir={out['run_dir']!r}: expected a directory of this machine; checkpoint.dir takes a URL"
        )
    return out


def is_url(text: str) -> bool:
    """Whether it is fsspec's to open: s3://bucket/x, or several joined by ::."""
    return "://" in text or "::" in text


def is_hub_name(text: str) -> bool:
    """Whether it is `owner/name`, or that with `@revision`, of the Hugging Face hub; absolute paths never are."""
    return _HUB_NAME.fullmatch(text) is not None


def _is_directory(text: str) -> bool:
    return text.startswith(("~", "./", "../")) or ("\0" not in text and os.path.isdir(text))


def _absolute(key: str, text: str, pattern: bool = False) -> str:
    if is_url(text) or not text:
        return text
    if "\0" in text:
        raise ConfigError(f"{key}={text!r}: no path holds a zero byte")
    try:
        path = os.path.expanduser(text)
        here = os.getcwd()
        if pattern and glob.has_magic(here) and not os.path.isfile(path):
            here = glob.escape(here)  # what the directory is called is no pattern
        return os.path.normpath(os.path.join(here, path))
    except OSError as e:
        raise ConfigError(f"{key}={text!r}: the current directory is gone ({e.strerror}): give an absolute path") from e
