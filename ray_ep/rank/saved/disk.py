"""Files of tensors on a disk, whole and readable, and words for what a disk refuses. No checkpoints, no ranks."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def checksum(t: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def save_tensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file as readable as its directory; raises OSError, also for what safetensors meets on the disk."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as e:
        found = re.search(r"os error (\d+)", str(e))
        if not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
    with suppress(OSError):  # it makes files that nobody else can read
        os.chmod(path, os.stat(Path(path).parent).st_mode & 0o666)


def temporary() -> str:
    """The temporary directory, in words."""
    try:
        return f"the temporary directory {tempfile.gettempdir()} (TMPDIR)"
    except OSError:
        return "any temporary directory (TMPDIR)"


def sync(path: str) -> None:
    """To the disk: what a manifest names must be there after a power cut, and a full network disk says so only now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # file systems that cannot, for directories say
            raise
    finally:
        os.close(handle)


def in_one_line(e: Exception) -> str:
    """What went wrong, on one line."""
    text = (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__
    return " ".join(text.split())[:300]


def remedy(e: Exception, in_temporary: bool) -> str:
    """What can be done about an error of writing a checkpoint."""
    other = "another directory with TMPDIR" if in_temporary else "another place with checkpoint.dir"
    number = e.errno if isinstance(e, OSError) else None
    if number in _FULL:
        return f"make room there, or name {other}"
    return f"make it writable, or name {other}" if number in _CLOSED else f"see to that, or name {other}"
