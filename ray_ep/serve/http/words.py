"""Tokens of one answer -> its text, as far as it is certain, up to the first stop string. No HTTP.

However tokens are cut into pieces, the text is that of all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class UpToStop:
    """Text in pieces, cut before the first of some strings; `stopped` once one was met.

    Args:
        stop: strings that end the text, none of them empty; of two that end at one character, the earlier begun wins.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held, self.stopped = tuple(stop), "", False

    def feed(self, text: str) -> str:
        """What of the text so far is certain and was not given yet: the end that a stop string may begin with waits."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [(held.find(s) + len(s), held.find(s)) for s in self._stop if s in held]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, s) for s in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """What waited, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, which is not in it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Spelled:
    """Tokens -> text, piece by piece: a character that tokens share comes with the last of them.

    Args:
        tokenizer: transformers' fast one. special: whether special tokens are part of the text.
    """

    def __init__(self, tokenizer: Any, special: bool):
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._special = tokenizer, special
        self._stream = DecodeStream([], skip_special_tokens=not special)
        self._ids: list[int] = []
        self._said = ""

    def feed(self, tokens: Sequence[int]) -> str:
        """Text that these tokens complete."""
        self._ids += tokens
        text = "".join(self._stream.step(self._tokenizer._tokenizer, i) or "" for i in tokens)
        self._said += text
        return text

    def rest(self) -> str:
        """What the last tokens leave unfinished, as transformers decodes it."""
        whole = self._tokenizer.decode(
            self._ids, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
        )
        return whole[len(self._said) :] if whole.startswith(self._said) else ""
