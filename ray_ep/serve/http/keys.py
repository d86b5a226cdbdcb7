"""The API keys of a server: a file that only its owner can read, one key a line; compared in constant time."""

from __future__ import annotations

import hmac
import logging
import re

from ray_ep.control.keys import LEAST, private, stamp
from ray_ep.errors import ConfigError

log = logging.getLogger("ray_ep.serve")

_KEY = re.compile(rb"[\x21-\x7e]{%d,4096}" % LEAST)
_SCHEME = b"bearer "


class ApiKeys:
    """The keys that open a server, as their file has them now: one that is taken out opens no more.

    Raises:
        ConfigError: the file cannot be read, can be read by others, or holds something else than keys.
    """

    NAME = "serve.api_key_file"

    def __init__(self, path: str):
        self._path, self._seen = path, stamp(path)
        self._keys = _read(path)

    def open(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether a request shows one of them (`Authorization: Bearer KEY`), and nothing beside it."""
        shown = [value for name, value in headers if name == b"authorization"]
        if len(shown) != 1 or not shown[0].lower().startswith(_SCHEME):
            return False
        key, found = shown[0][len(_SCHEME) :].strip(), False
        for one in self._current():  # all of them, whichever opens
            found |= hmac.compare_digest(one, key)
        return found

    def _current(self) -> tuple[bytes, ...]:
        now = stamp(self._path)
        if now != self._seen:
            self._seen = now
            try:
                self._keys = _read(self._path)
            except ConfigError as e:
                self._keys = ()
                log.error("keys: %s; until that is mended, no key opens", e)
        return self._keys


def _read(path: str) -> tuple[bytes, ...]:
    lines = [line.strip() for line in private(path, ApiKeys.NAME).splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith(b"#"))
    if not keys or not all(_KEY.fullmatch(key) for key in keys):
        raise ConfigError(
            f"{ApiKeys.NAME}={path!r}: expected a key a line there, each of {LEAST} to 4096 visible ASCII characters, "
            "such as `openssl rand -hex 32` makes"
        )
    return keys
