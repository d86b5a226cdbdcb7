"""A file of prompts, one JSON object a line, as requests. What is wrong in it is found before anything is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_ep.config.schema import Config
from ray_ep.errors import DataError
from ray_ep.rank.generate.admission import refusal
from ray_ep.rank.generate.requests import Limits, Request, Sampling
from ray_ep.serve.checked import Checked

_KEYS = ("id", "prompt", "messages", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "logprobs")
_NUMBERS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int, "logprobs": int}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it was given (text, token ids or messages), and the request that it makes."""

    given: Any
    request: Request


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a line that does not say otherwise has; prompt number n (from 0) then has the seed `sampling.seed` + n."""

    max_new_tokens: int
    sampling: Sampling


class Reader:
    """Makes requests of prompts for one checkpoint."""

    def __init__(self, cfg: Config, checked: Checked, defaults: Defaults):
        self.checked, self.defaults = checked, defaults
        cache = cfg.generate.cache_tokens
        self.limits = Limits(
            vocabulary=int(checked.config.get_text_config().vocab_size), context=min(checked.context or cache, cache),
            cache_tokens=cache, requests=cfg.generate.requests,
        )  # fmt: skip

    def file(self, path: Path) -> list[Prompt]:
        """Prompts of a file. Raises DataError: unreadable, or a line that is none; it is named."""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"--prompts {path}: {getattr(e, 'strerror', None) or e}") from None
        found = [self.one(tree, number, where) for number, (tree, where) in enumerate(_objects(text, path))]
        if not found:
            raise DataError(f"--prompts {path}: no line has a prompt")
        first: dict[str, int] = {}
        for number, prompt in enumerate(found):
            if (other := first.setdefault(prompt.request.id, number)) != number:
                raise DataError(
                    f"--prompts {path}: prompts {other + 1} and {number + 1} both have id {prompt.request.id!r}: give "
                    "each its own, or none"
                )
        return found

    def one(self, tree: dict[str, Any], number: int, where: str) -> Prompt:
        """The prompt `number` (from 0), as an object of the file has it. Raises DataError, beginning with `where`."""
        unknown = next((k for k in tree if k not in _KEYS), None)
        if unknown is not None:
            raise DataError(f"{where}: unknown key {unknown!r}: allowed are {', '.join(_KEYS)}")
        values = {k: _number(tree[k], kind, f"{where}: {k}") for k, kind in _NUMBERS.items() if k in tree}
        most = values.pop("max_new_tokens", self.defaults.max_new_tokens)
        logprobs = values.pop("logprobs", None)
        seed = self.defaults.sampling.seed
        sampling = replace(self.defaults.sampling, **{"seed": None if seed is None else seed + number, **values})
        request = Request(
            id=str(tree.get("id", number)), prompt=tuple(self._tokens(tree, where)), max_new_tokens=most,
            sampling=sampling, eos=self.checked.eos, logprobs=logprobs,
        )  # fmt: skip
        if why := refusal(request, self.limits):
            raise DataError(f"{where}: {why}")
        return Prompt(tree.get("prompt", tree.get("messages")), request)

    def _tokens(self, tree: dict[str, Any], where: str) -> list[int]:
        if ("prompt" in tree) == ("messages" in tree):
            raise DataError(f"{where}: give prompt (text, or a list of token ids) or messages (a list), one of the two")
        given = tree.get("prompt", tree.get("messages"))
        if "messages" in tree:
            if not (isinstance(given, list) and given and all(isinstance(m, dict) for m in given)):
                raise DataError(f"{where}: messages: expected a list of objects with role and content")
            try:
                return self.checked.text.chat(given)
            except DataError as e:
                raise DataError(f"{where}: {e}") from None
        if isinstance(given, str):
            return self.checked.text.encode(given)
        if isinstance(given, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in given):
            return given
        raise DataError(f"{where}: prompt: expected text or a list of token ids")


def _objects(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each object, and where it is, in words."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028, which JSON leaves as it is
        if not line.strip():
            continue
        where = f"--prompts {path}, line {number}"
        try:
            tree = json.loads(line)
        except ValueError as e:
            raise DataError(f"{where} is no JSON: {e}") from None
        if not isinstance(tree, dict):
            raise DataError(f'{where}: expected an object such as {{"prompt": "text"}}')
        yield tree, where


def _number(value: Any, kind: type, where: str) -> Any:
    good = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not good:
        raise DataError(f"{where}={value!r}: expected {'a whole number' if kind is int else 'a number'}")
    return kind(value)
