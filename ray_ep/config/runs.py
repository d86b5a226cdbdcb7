"""Where runs are, and the configuration that one had: files only, read without torch or Ray.

Writing a run directory is the driver's work.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]

from ray_ep.config.paths import is_url
from ray_ep.config.values import WrongValue, parse
from ray_ep.errors import ConfigError

RUNS = "runs"
"""Parent of run directories that the user did not name."""
NEWEST = ".newest"
"""File in it: where the run is that was started last from this directory."""


def remember(path: Path) -> None:
    """Note that the run in `path` is the newest one started from the current directory, if that can be written.

    Nothing is noted where its name says so already.
    """
    note = Path(RUNS) / NEWEST
    with suppress(OSError):
        if _newest_dated() == path.absolute():
            note.unlink(missing_ok=True)
            return
        Path(RUNS).mkdir(exist_ok=True)
        part = note.with_name(f"{NEWEST}.{os.getpid()}")
        part.write_text(str(path.absolute()), encoding="utf-8")
        part.replace(note)


def newest() -> Path | None:
    """The run that was started last from the current directory, else the newest dated one under runs/."""
    with suppress(OSError, ValueError):
        path = Path((Path(RUNS) / NEWEST).read_text(encoding="utf-8"))
        if (path / "config.yaml").is_file():
            return path
    return _newest_dated()


def _newest_dated() -> Path | None:
    old = [p.parent for p in Path(RUNS).glob("*/config.yaml") if re.match(r"\d{8}-\d{6}", p.parent.name)]
    return max(old, key=lambda p: (p.name[:15], len(p.name), p.name)).absolute() if old else None


def settings_of(path: Path) -> dict[str, Any]:
    """config.yaml of a run directory as a tree of text; {} if there is none.

    Where the directory was moved, a checkpoint.dir inside it moved along.

    Raises:
        ConfigError: it cannot be read.
    """
    file = path / "config.yaml"
    try:
        tree = parse(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, WrongValue) as e:
        raise ConfigError(f"{str(path)!r}: its config.yaml is damaged: {str(e).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{str(path)!r}: its config.yaml is damaged: expected keys and values")
    old, checkpoint = tree.get("run_dir"), tree.get("checkpoint")
    if old and isinstance(checkpoint, dict) and str(checkpoint.get("dir")).startswith(f"{old}/"):
        checkpoint["dir"] = f"{path.absolute()}{str(checkpoint['dir'])[len(old) :]}"
    return tree


def checkpoints_of(where: str) -> str:
    """Where a run directory keeps its checkpoints; anything else is such a directory itself. Raises ConfigError."""
    if is_url(where) or not (Path(where) / "config.yaml").is_file():
        return where
    checkpoint = settings_of(Path(where)).get("checkpoint")
    named = checkpoint.get("dir") if isinstance(checkpoint, dict) else None
    return str(named or Path(where) / "checkpoints")


def settings_of_checkpoint(where: str) -> dict[str, Any]:
    """The configuration in the manifest of the newest checkpoint at `where` (as `resume` takes it).

    {} where there is none that can be read: opening the checkpoint says what is wrong with it.
    """
    for manifest in _manifests(where):
        config = manifest.get("config")
        return config if isinstance(config, dict) else {}
    return {}


def _manifests(where: str) -> Iterator[dict[str, Any]]:
    """Manifests at `where`, the newest first; those that cannot be read are left out."""
    tail = where.rstrip("/").rpartition("/")[2]
    with suppress(Exception):  # whatever a file system raises: opening the checkpoint meets it again, and says it
        fs, root = fsspec.core.url_to_fs(where if re.fullmatch(r"step-\d+", tail) else checkpoints_of(where))
        names = [root] if re.fullmatch(r"step-\d+", tail) else fs.ls(root, detail=False)
        steps = {int(m.group(1)): n for n in names if (m := re.search(r"/step-(\d+)/?$", n))}
        for step in sorted(steps, reverse=True):
            with suppress(OSError, ValueError), fs.open(f"{steps[step]}/manifest.json") as f:
                tree = json.load(f)
                if isinstance(tree, dict):
                    yield tree
