"""The processes of a disturbed run: `ray-ep train`, and the agent beside its cluster. They end before this one does.

Each is in a session of its own: a terminal's Ctrl-C reaches this process alone, which ends them in order.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray_ep.errors import ClusterError

_ROOT = Path(__file__).parents[2]  # of the package, which another directory's Python may not find by itself
_COMMAND = "import sys; sys.path.append(sys.argv.pop(1)); from ray_ep.cli import main; sys.exit(main())"
_AGENT = "import sys; sys.path.append(sys.argv.pop(1)); from ray_ep.chaos.agent import main; main()"
_POLITE_S = 20.0
"""How long a run that is asked to end, or an agent, may take."""
_ANSWER_S = 120.0
"""How long an answer of the agent may take: it starts raylets."""


def ray_ep(*arguments: str) -> list[str]:
    """The command line of `ray-ep` with this Python and this package."""
    return [sys.executable, "-c", _COMMAND, str(_ROOT), *arguments]


def agent() -> list[str]:
    """The command line of the agent, without what it is to be."""
    return [sys.executable, "-c", _AGENT, str(_ROOT)]


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with some variables of one's own."""
    return {**os.environ, **own}


@contextmanager
def unhurried() -> Iterator[None]:
    """Inside: signals wait, so that an impatient second Ctrl-C leaves nothing behind either."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Agent:
    """The other side of `ray_ep.chaos.agent`: a context manager.

    Args:
        command: that starts it, without the last word. told: what it is to be.
        log: where its stderr goes.

    Attributes:
        address: of the cluster.
    """

    def __init__(self, command: Sequence[str], told: Mapping[str, Any], env: Mapping[str, str], log: Path):
        self._command, self._env, self._log = [*command, json.dumps(told)], env, log
        self.address = ""
        self._asked = 0  # number of the last question
        self._read = b""  # of answers, not looked at yet

    def __enter__(self) -> Agent:
        """It is up, and knows its cluster.

        Raises:
            ClusterError: it could not start or join Ray.
        """
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=dict(self._env),
                start_new_session=True,
            )  # fmt: skip
        try:
            self.address = self._answer("starting")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """It is gone, and the cluster that it started."""
        with unhurried():
            assert self._process.stdin is not None
            with suppress(OSError):
                self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLITE_S)
            _kill_session(self._process)

    def ask(self, do: str, **arguments: Any) -> Any:
        """What it answers.

        Raises:
            ClusterError: it could not do that, or is gone.
        """
        assert self._process.stdin is not None
        self._asked += 1
        try:
            self._process.stdin.write((json.dumps({"id": self._asked, "do": do, **arguments}) + "\n").encode())
            self._process.stdin.flush()
        except OSError as e:
            raise ClusterError(f"{do}: the process beside the cluster is gone ({e}); its words: {self._log}") from None
        return self._answer(do)

    def _answer(self, do: str) -> Any:
        limit = time.monotonic() + _ANSWER_S
        said: dict[str, Any] = {"id": -1}
        while said["id"] != self._asked:  # one that came too late for its question is passed over
            said = json.loads(self._line(do, limit))
        if "error" in said:
            raise ClusterError(f"{do}: {said['error']}")
        return said["ok"]

    def _line(self, do: str, limit: float) -> bytes:
        out = self._process.stdout
        assert out is not None
        while b"\n" not in self._read:
            ready, _, _ = select.select([out], [], [], max(0.0, limit - time.monotonic()))
            part = os.read(out.fileno(), 1 << 16) if ready else b""
            if not part:
                raise ClusterError(f"{do}: no answer from the process beside the cluster; its words: {self._log}")
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line


class Training:
    """One `ray-ep train`: a context manager at whose end it is gone.

    Attributes:
        session: of its processes, but for Ray's.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path):
        self._command, self._env, self._cwd, self._log = list(command), env, cwd, log

    def __enter__(self) -> Training:
        """It has been started."""
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(self._env), cwd=self._cwd,
                start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        """Asked to end if it still runs; a moment later killed."""
        with unhurried():
            self.end(_POLITE_S)
            _kill_session(self._process)

    @property
    def session(self) -> int:
        """It leads a session of its own."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status; None: it runs."""
        return self._process.poll()

    def end(self, limit_s: float) -> None:
        """Have it stop after its step and save; returns when it has, or when so much time has passed."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(limit_s)

    def words(self) -> str:
        """Why it ended, if it said so, else the last thing that it said."""
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [x for x in said if x.startswith("ray-ep: ") and not x.endswith(" ...")]  # those are phases
        return next(iter(errors), said[-1] if said else "nothing").removeprefix("ray-ep: ").partition(". ")[0]


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
