"""A file of answers, one JSON object a line, each written when it is whole: a second start goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ray_ep.errors import DataError, SaveError
from ray_ep.rank.generate.requests import TokenLogprob
from ray_ep.serve.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a prompt; `done` as in `Delta`."""

    prompt: Prompt
    tokens: tuple[int, ...]
    done: str
    logprobs: tuple[TokenLogprob, ...]

    def to_dict(self, decode: Callable[[Sequence[int]], str], eos: tuple[int, ...]) -> dict[str, Any]:
        """As a line has it: text is without the token that ended it."""
        ended = self.tokens[-1:] and self.tokens[-1] in eos
        text = decode(self.tokens[:-1] if ended else self.tokens)
        line = {"id": self.prompt.request.id, "prompt": self.prompt.given, "text": text, "tokens": list(self.tokens)}
        line |= {"done": self.done}
        return line | ({"logprobs": [asdict(p) for p in self.logprobs]} if self.logprobs else {})


class AnswerFile:
    """Answers to `prompts`, in the order in which they came.

    Attributes:
        left: prompts that have no answer there yet.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt]):
        """Read what is there, and drop a last line that was cut off.

        Raises:
            DataError: it cannot be read, or holds something else than answers to these prompts.
        """
        self.path = path
        self._file: TextIO | None = None
        self._whole = 0  # bytes of whole lines
        there = self._read({p.request.id: p for p in prompts})
        self.left = [p for p in prompts if p.request.id not in there]

    def _read(self, prompts: dict[str, Prompt]) -> set[str]:
        if not self.path.exists():
            if not self.path.absolute().parent.is_dir():
                raise DataError(f"--out {self.path}: no such directory")
            return set()
        try:
            data = self.path.read_bytes()
        except OSError as e:
            raise DataError(f"--out {self.path}: {e.strerror or e}") from None
        there: set[str] = set()
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
            there.add(self._answered(line, number, prompts))
        self._whole = data.rfind(b"\n") + 1
        return there

    def _answered(self, line: bytes, number: int, prompts: dict[str, Prompt]) -> str:
        where = f"--out {self.path}, line {number}"
        try:
            tree = json.loads(line)
            id, given = str(tree["id"]), tree["prompt"]
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{where} is no answer: give another file; this one is left as it is") from None
        if id not in prompts or prompts[id].given != given:
            raise DataError(f"{where} answers another prompt than the one with id {id!r}: give another file")
        return id

    def __enter__(self) -> AnswerFile:
        """Begin to write, behind what is there. Raises SaveError."""
        try:
            self._file = open(self.path, "a", encoding="utf-8")  # closed at the end
            if self.path.stat().st_size:
                self._file.truncate(self._whole)
            return self
        except OSError as e:
            raise SaveError(f"--out {self.path}: {e.strerror or e}") from None

    def write(self, line: dict[str, Any]) -> None:
        """Write one answer; it is in the file when this returns. Raises SaveError."""
        assert self._file is not None, "inside `with` only"
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as e:
            raise SaveError(f"--out {self.path}: {e.strerror or e}: start again to go on") from None

    def __exit__(self, *error: object) -> None:
        """Write no more."""
        if self._file is not None:
            with suppress(OSError):  # each answer was flushed, or its failure told
                self._file.close()
