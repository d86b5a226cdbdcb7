"""`audit.jsonl` of a run: who asked for which change, when, from where, and what came of it; granted or refused.

A change has a line before it is carried out (ASKED) and one with its result; whoever has no right to one, the latter.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_ep.control.keys import Role
from ray_ep.driver.records import now

AUDIT = "audit.jsonl"
"""Name of the file in a run directory."""
REFUSED = 100
"""Lines a minute at most about callers without a right to changes: who has none shall not fill a disk either."""
ASKED = "ASKED"
"""Result of a change that is going to be carried out, or refused by the run."""

log = logging.getLogger("ray_ep.control")


@dataclass(frozen=True, slots=True)
class Entry:
    """One change that was asked for.

    Args:
        who: name of the token, and of the client's certificate, if there was one; "": no token.
        role: viewer, operator; "": none. where: address that the call came from.
        what: name of the call. id: of the request. asked: its content, but for a placement.
        result: ASKED, or the name of the status code. words: the answer.
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
        failed: told when it cannot be written any more. clock: seconds.
    """

    def __init__(self, run: Path, failed: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.path, self._failed, self._clock = run / AUDIT, failed, clock
        self._said = False
        self._minute, self._count, self._left_out = 0.0, 0, 0

    def write(self, entry: Entry) -> str:
        """One line, in the file in full or not at all; why it is not, "" if it is or there are too many like it."""
        log.info("control what=%s who=%r result=%s", entry.what, entry.who, entry.result)
        if entry.role != Role.OPERATOR.value and not self._admitted():
            return ""
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
            why = f"{self.path} cannot be written: {e.strerror or e}"
            if not self._said:
                self._said = True
                self._failed(f"{why}: until it can, nobody is granted a change")
            return why
        self._said = False
        return ""

    def _admitted(self) -> bool:
        """Whether there is room for one more line about somebody without a right to changes."""
        if self._clock() - self._minute >= 60:
            self._minute, self._count = self._clock(), 0
        self._count += 1
        self._left_out += self._count > REFUSED
        return self._count <= REFUSED
