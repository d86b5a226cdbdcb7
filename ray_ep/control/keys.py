"""Who may do what: tokens, their roles, and the files that they are read from. Compares in constant time. No gRPC."""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from ray_ep.config.sections.observing import ControlConfig
from ray_ep.errors import ConfigError

LEAST = 16
"""Characters of a token at least: those of `ray get-auth-token` and of `openssl rand -hex 32` have 64."""

_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_SCHEME = "bearer "


class Role(Enum):
    """What the holder of a token may do."""

    VIEWER = "viewer"  # look
    OPERATOR = "operator"  # change the run, too


@dataclass(frozen=True, slots=True)
class Key:
    """A token that opens; `name` tells people which one it was."""

    name: str
    role: Role
    token: str = field(repr=False)


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_hex(32)


def cluster_token() -> str:
    """The token of the Ray cluster that this process has joined; "": it asks for none."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

    if not is_token_auth_enabled():
        return ""
    shown = str(AuthenticationTokenLoader.instance().get_token_for_http_header().get("authorization", ""))
    return shown[len(_SCHEME) :] if shown.lower().startswith(_SCHEME) else ""


class Keys:
    """The tokens that open a run, as their files have them now: one that is taken back opens no more.

    Args:
        own, ray: as of `keys_of`.
        failed: is told why a file that has changed cannot be used; the run's own token and the cluster's open then.

    Raises:
        ConfigError: as `keys_of`.
    """

    def __init__(self, cfg: ControlConfig, own: str, ray: str, failed: Callable[[str], None]):
        self._cfg, self._own, self._ray, self._failed = cfg, own, ray, failed
        self._seen = self._stamps()
        self._keys = keys_of(cfg, own, ray)

    def __iter__(self) -> Iterator[Key]:
        """Looks at the files first."""
        now = self._stamps()
        if now != self._seen:
            self._seen = now
            try:
                self._keys = keys_of(self._cfg, self._own, self._ray)
            except ConfigError as e:
                self._keys = keys_of(ControlConfig(), self._own, self._ray)
                self._failed(f"{e}; until that is mended, no token of control.*_token_file opens")
        return iter(self._keys)

    def _stamps(self) -> list[tuple[int, ...]]:
        return [stamp(path) for path in (self._cfg.operator_token_file, self._cfg.viewer_token_file) if path]


def stamp(path: str) -> tuple[int, ...]:
    """Another one whenever what a file holds, or who may read it, has changed; () where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def keys_of(cfg: ControlConfig, own: str, ray: str) -> list[Key]:
    """The tokens that open a run.

    Args:
        own: the one that the run made itself. ray: that of the Ray cluster; "": it has none.

    Raises:
        ConfigError: a token's file cannot be read, can be read by others, or holds no token.
    """
    keys = [Key("control.json", Role.OPERATOR, own)]
    if ray:
        keys.append(Key("the Ray cluster's token", Role.OPERATOR, ray))
    files = (("operator", Role.OPERATOR, cfg.operator_token_file), ("viewer", Role.VIEWER, cfg.viewer_token_file))
    for name, role, path in files:
        if path:
            named = f"control.{name}_token_file"
            keys.append(Key(named, role, secret(path, named)))
    roles: dict[str, Role] = {}
    for key in keys:
        if roles.setdefault(key.token, key.role) is not key.role:
            raise ConfigError(f"{key.name}: its token opens as {roles[key.token].value}, too: give each role its own")
    return keys


def secret(path: str, key: str) -> str:
    """The token in a file that only its owner can read.

    Args:
        key: how to name the file in a message: what gave it.

    Raises:
        ConfigError: as above.
    """
    text = private(path, key).decode("ascii", "replace").strip()
    if not _TOKEN.fullmatch(text) or len(text) < LEAST:
        raise ConfigError(
            f"{key}={path!r}: expected one token there, of {LEAST} to 4096 visible ASCII characters, such as "
            "`openssl rand -hex 32` makes"
        )
    return text


def private(path: str, key: str) -> bytes:
    """What is in a file that only its owner can read. Raises ConfigError, as above."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{key}={path!r}: expected a file")
            if found.st_mode & 0o077:
                mode = stat.S_IMODE(found.st_mode)
                raise ConfigError(f"{key}={path!r} can be read by others (mode {mode:04o}): chmod 600 it")
            return os.read(file, 1 << 16)
        finally:
            os.close(file)
    except OSError as e:
        raise ConfigError(f"{key}={path!r}: {e.strerror or e}") from None


def opened_by(keys: Iterable[Key], metadata: Iterable[tuple[str, str | bytes]]) -> Key | None:
    """The key that a call shows (`authorization: Bearer TOKEN`); None: none, or a wrong one, or several."""
    shown = [value for name, value in metadata if name == "authorization"]
    if len(shown) != 1 or not isinstance(shown[0], str) or not shown[0].lower().startswith(_SCHEME):
        return None
    token, found = shown[0][len(_SCHEME) :].strip().encode(), None
    for key in keys:  # all of them, whichever opens
        if hmac.compare_digest(key.token.encode(), token):
            found = found or key
    return found
