"""`audit.jsonl` of a run: who asked for which change, when, from where, and what came of it; granted or refused."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_ep.driver.records import now

AUDIT = "audit.jsonl"
"""Name of the file in a run directory."""
REFUSED = 100
"""Lines a minute at most about callers without a right: who has none shall not fill a disk either."""

log = logging.getLogger("ray_ep.control")


@dataclass(frozen=True, slots=True)
class Entry:
    """One change that was asked for.

    Args:
        who: name of the token, and of the client's certificate, if there was one; "": no right.
        role: viewer, operator; "": none. where: address that the call came from.
        what: name of the call. id: of the request. asked: its content, but for a placement.
        result: name of the status code. words: the answer.
        seconds: from the call to its answer.
    """

    who: str
    role: str
    where: str
    what: str
    id: str
    asked: str
    result: str
    words: str
    seconds: float


class Audit:
    """The file of one run.

    Args:
        failed: told once if it cannot be written. clock: seconds.
    """

    def __init__(self, run: Path, failed: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.path, self._failed, self._clock = run / AUDIT, failed, clock
        self._said = False
        self._minute, self._count, self._left_out = 0.0, 0, 0

    def write(self, entry: Entry) -> None:
        """One line, on disk in full or not at all."""
        log.info("control what=%s who=%r result=%s", entry.what, entry.who, entry.result)
        if not entry.role and not self._admitted():
            return
        tree = {"time": now().isoformat(timespec="milliseconds"), **asdict(entry)}
        if self._left_out:
            tree["left_out_before"], self._left_out = self._left_out, 0
        line = (json.dumps(tree) + "\n").encode()
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                whole = os.fstat(file).st_size
                if os.write(file, line) < len(line):
                    os.ftruncate(file, whole)
                    raise OSError("No space left on device")
            finally:
                os.close(file)
        except OSError as e:
            if not self._said:
                self._said = True
                self._failed(f"{self.path} cannot be written: {e.strerror or e}: changes go on without their records")

    def _admitted(self) -> bool:
        """Whether there is room for one more line about somebody without a right."""
        if self._clock() - self._minute >= 60:
            self._minute, self._count = self._clock(), 0
        self._count += 1
        self._left_out += self._count > REFUSED
        return self._count <= REFUSED
