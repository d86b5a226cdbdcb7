"""What a process is at, for people: the stacks of its threads, and what torch's flight recorder holds.

Of this process, and of another one of this machine, which may be stopped. Imports torch where a process has it already.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import FrameType
from typing import Any

MOST = 1 << 16
"""Characters that are kept of one process: so few come with Ray's answer itself, from no store of another node."""
NEWEST = 50
"""Entries of the flight recorder that are told, the newest."""
SPY_S = 0.8
"""Seconds that py-spy may take: it took 0.03 to 0.1."""

_RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""Of torch._C._distributed_c10d: of gloo's groups; of NCCL's, in builds for CUDA."""


def own(asking: bool = False) -> str:
    """The stacks of this process's threads, the newest call last; first those that are in this package.

    Threads that are at the same are told together.

    Args:
        asking: that of the thread which asks, too.
    """
    names = {t.ident: t.name for t in threading.enumerate()}
    me, frames = threading.get_ident(), sys._current_frames()
    told = sorted((i for i in frames if asking or i != me), key=lambda i: (not _ours(frames[i]), i))
    at: dict[str, list[str]] = {}
    for i in told:
        at.setdefault(_calls(frames[i]), []).append(f"thread {names.get(i, 'without a name')} ({i})")
    return cut("\n".join(f"{', '.join(threads)}\n{calls}" for calls, threads in at.items()))


def _calls(frame: FrameType) -> str:
    return "".join(traceback.format_stack(frame))


def _ours(frame: FrameType | None) -> bool:
    """Whether any call in it, from the newest on, is one of the package's."""
    package = str(Path(__file__).parents[1])
    while frame is not None:
        if frame.f_code.co_filename.startswith(package):
            return True
        frame = frame.f_back
    return False


def flight_recorder() -> str:
    """What torch's flight recorder holds of this process's collectives, the newest last; or why it holds nothing."""
    c10d: Any = sys.modules.get("torch._C._distributed_c10d")
    entries: list[dict[str, Any]] = []
    for name in _RECORDERS:
        if (dump := getattr(c10d, name, None)) is not None:
            with suppress(Exception):  # of a library that looks at a group which is broken
                entries += json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", [])
    if not entries:
        return "nothing is recorded: no call went through torch's groups, or TORCH_FR_BUFFER_SIZE=0\n"
    now = time.time_ns()
    entries.sort(key=lambda e: e.get("time_created_ns", 0))
    lines = [_entry(e, now) for e in entries[-NEWEST:]]
    return f"the newest {len(lines)} of {len(entries)} calls\n" + "\n".join(lines) + "\n"


def _entry(e: dict[str, Any], now: int) -> str:
    """One line: when it was begun, which call of which group, of which sizes, how far it is."""
    ago = (now - e.get("time_created_ns", now)) / 1e9
    group = " ".join(filter(None, map(str, e.get("process_group", ())))) or e.get("pg_id", "?")
    number = e.get("p2p_seq_id") if e.get("is_p2p") else e.get("collective_seq_id")
    state = "ended" if e.get("retired") else str(e.get("state", "?"))
    name, sizes = e.get("profiling_name", "?"), e.get("input_sizes")
    return f"{ago:10.3f} s ago  group {group}  call {number}  {name} {sizes}  {state}"


def seen(pids: Sequence[int]) -> list[str]:
    """Other processes of this machine from outside, all at once: they need not answer."""
    started = [_spy(pid) for pid in pids]
    limit = time.monotonic() + SPY_S
    return [cut(f"{_state(pid)}\n{_said(spy, limit)}") for pid, spy in zip(pids, started, strict=True)]


def _spy(pid: int) -> subprocess.Popen[str] | str:
    """py-spy on a process, which it neither stops nor slows; words: there is none."""
    command = _py_spy()
    if command is None:
        return "py-spy, which comes with ray[default], is not installed: its stacks cannot be read from outside"
    arguments = [command, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as e:
        return f"py-spy cannot be started: {e.strerror or e}"


def _py_spy() -> str | None:
    """Where the program is: that of this environment, whatever PATH is, else any."""
    with suppress(PackageNotFoundError):
        for file in distribution("py-spy").files or ():
            if file.name == "py-spy" and Path(str(file.locate())).exists():
                return str(file.locate())
    return shutil.which("py-spy")


def _said(spy: subprocess.Popen[str] | str, limit: float) -> str:
    if isinstance(spy, str):
        return spy
    try:
        out, err = spy.communicate(timeout=max(limit - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        spy.kill()
        spy.communicate()
        return f"py-spy was not done within {SPY_S:g} s"
    if spy.returncode == 0:
        return out
    why = next((line.strip() for line in err.splitlines() if line.strip()), "no reason given")
    return f"py-spy cannot read it (it needs the right to trace the process): {why}"


def _state(pid: int) -> str:
    """What the kernel says of a process: whether it is stopped, and where in the kernel its main thread waits."""
    place = Path(f"/proc/{pid}")
    try:
        lines = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
    except OSError as e:
        return f"process {pid} cannot be looked at: {e.strerror or e}"
    waits = "?"
    with suppress(OSError):
        waits = (place / "wchan").read_text().strip() or "?"
    state, threads = lines.get("State", "?").strip(), lines.get("Threads", "?").strip()
    return f"process {pid}: state {state}; its main thread waits in the kernel in {waits}; {threads} threads"


def cut(text: str) -> str:
    """At most MOST characters: the beginning, and how many are left out."""
    return text if len(text) <= MOST else f"{text[:MOST]}\n... {len(text) - MOST} characters are left out\n"
