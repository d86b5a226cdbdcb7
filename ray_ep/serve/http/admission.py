"""Which requests are taken, how many at once, and why one is not: pure functions and a count. No HTTP, no torch.

What is admitted can be computed: ids that the model knows, room for prompt and answer. Nothing else reaches a rank.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from ray_ep.errors import BadInput
from ray_ep.rank.generate.requests import Limits


class Refused(BadInput):
    """One request is not taken; others are as they were.

    ``status`` is of HTTP; ``param`` the field at fault, "": none; ``retry_after_s`` seconds after which to ask again,
    0: it would not help.
    """

    def __init__(self, message: str, param: str = "", status: int = 400, retry_after_s: int = 0):
        super().__init__(message)
        self.param, self.status, self.retry_after_s = param, status, retry_after_s


def new_tokens(
    prompt: Sequence[int], wanted: int | None, limits: Limits, where: str, wanted_by: str = "max_tokens"
) -> int:
    """How many tokens may be generated after a prompt; `wanted` or, where it is None, all that there is room for.

    Args:
        where: field that the prompt came in. wanted_by: field of `wanted`.

    Raises:
        Refused: no token, an id that the model does not know, or no limits.
    """
    if not prompt:
        raise Refused(f"{where} has no token: give some text", where)
    wrong = next((i for i in prompt if not 0 <= i < limits.vocabulary), None)
    if wrong is not None:
        raise Refused(f"{where}: token {wrong} is not of this model: allowed are 0 to {limits.vocabulary - 1}", where)
    left = limits.context - len(prompt)
    if left < 1:
        raise Refused(
            f"{where} has {len(prompt)} tokens: this server takes {limits.context} of prompt and answer together, so "
            f"at most {limits.context - 1}",
            where,
        )
    if wanted is None:
        return left
    if wanted > left:
        raise Refused(
            f"{wanted_by}={wanted}: {where} has {len(prompt)} tokens, and this server takes {limits.context} of prompt "
            f"and answer together: allowed are 1 to {left}",
            wanted_by,
        )
    return wanted


class Places:
    """How many answers may be under way at once, computed or waiting.

    Args:
        most: so many. clock: seconds.
    """

    LONGEST_S = 60
    """Nobody is told to wait longer before asking again."""

    def __init__(self, most: int, clock: Callable[[], float]):
        self.most, self._clock = most, clock
        self.taken = 0
        self._freed: deque[float] = deque(maxlen=32)  # when the last places were given back

    def take(self, count: int) -> None:
        """Take places for the `count` answers of a request, each to be given back once.

        Raises:
            Refused: with 400 where so many are never free, else with 429 and the seconds until some probably are.
        """
        if count > self.most:
            raise Refused(f"{count} answers to one request: this server has places for {self.most}", "n")
        if self.taken + count > self.most:
            wait = self.wait_s(self.taken + count - self.most)
            raise Refused(
                f"{self.taken} answers are under way, at most {self.most} may be: ask again in {wait} s", "", 429, wait
            )
        self.taken += count

    def give_back(self) -> None:
        """One place is free again."""
        assert self.taken > 0
        self.taken -= 1
        self._freed.append(self._clock())

    def wait_s(self, count: int) -> int:
        """Whole seconds, at least one, in which `count` places will be free if it goes on as of late."""
        if len(self._freed) < 2:
            return 1
        pace = (self._clock() - self._freed[0]) / (len(self._freed) - 1)  # seconds a place, this silence included
        return min(max(math.ceil(pace * count), 1), self.LONGEST_S)
