"""Groups that are left are closed beside what goes on: a silent peer makes that last as long as their time limit.

gloo's destructor waits for its threads, and they for the peer: over 40 s were seen, while aborting takes a moment.
Imports group.py.
"""

from __future__ import annotations

import threading

from ray_ep.collective.group import Group

CLOSE_S = 1.0
"""Seconds that a polite end waits for a group to be closed; 0.02 is usual. What takes longer goes on beside."""


def park(group: Group, wait_s: float = 0.0) -> None:
    """Abort a group now, so that whoever waits in it is released, and close it in a thread of its own.

    Args:
        wait_s: return once it is closed, or when this time is over.
    """
    group.abort()
    closing = threading.Thread(target=group.close, name=f"close-epoch-{group.epoch}", daemon=True)
    closing.start()
    closing.join(wait_s)
