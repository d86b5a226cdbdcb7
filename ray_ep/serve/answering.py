"""What a front needs of whatever answers its requests; `ray_ep.serve.engine.Engine` is that."""

from __future__ import annotations

from typing import Protocol

from ray_ep.placement import Placement
from ray_ep.rank.generate.requests import Limits, RankStatus, Request


class Answering(Protocol):
    """Ranks that answer. All calls may come from any thread; none but `move` blocks.

    What comes back goes to the `on_deltas` that `ray_ep.serve.engine.engine`, a context manager, was given: a function
    of a list of `Delta`, called from a thread of the engine's own; it must not block. Every request that was taken
    gets one last delta, whatever happens.
    """

    @property
    def limits(self) -> Limits:
        """What a request may have."""

    @property
    def failed(self) -> str:
        """Why nothing is answered any more, in one sentence; "": requests are taken."""

    def submit(self, request: Request) -> None:
        """Take a request in; it goes to the rank with the fewest outstanding tokens.

        Raises:
            RequestError: it cannot be computed (see admission.refusal), its id is open, or the engine has failed.
        """

    def cancel(self, id: str) -> None:
        """Have a request end with done="cancelled"; one that is over, or unknown, is passed over."""

    def status(self) -> list[RankStatus]:
        """Each rank as it told last, within a second or so."""

    def move(self, placement: Placement) -> int:
        """Move experts between two passes; open requests go on. Blocks until done; returns how many experts moved.

        Raises:
            PlacementError: it does not fit; nothing has changed.
            RankError: a rank was lost: the engine has failed.
        """
