"""Every error that ray_ep raises on purpose. Imports nothing.

RayEPError
├── BadInput             what the user gave is wrong: found before anything starts; exit status 2
│   ├── ConfigError      a configuration key or value
│   ├── DataError        missing, empty or unreadable training data
│   ├── ModelError       a model that cannot run with expert parallelism
│   ├── PlacementError   a placement, topology or statistics that do not fit
│   ├── CheckpointError  a damaged checkpoint, or one of another model
│   └── ClusterError     the cluster cannot give what was asked for
├── ControlError         a run does not do what it is asked: it refuses, has ended, or does not answer; exit status 1
├── RequestError         a request for tokens cannot be computed, or nobody computes any more; exit status 1
├── SaveError            a checkpoint or an export cannot be written: disk full, no permission; exit status 1
├── DivergedError        training gave values that are not finite: stopped before they were applied or saved
├── GroupError           a collective failed: a peer died, timed out, or the group was aborted
│   └── LateError        peers did not come within the limit, and nobody says that they are dead
└── RankError            a rank raised or died; carries that rank's own traceback
    └── LostError        ranks are gone, or a collective failed and nobody says why; the others were released
"""

from __future__ import annotations


class RayEPError(Exception):
    """Base of all errors of this package."""


class BadInput(RayEPError):
    """The user's input is wrong. The message says what, where, and what is allowed."""


class ConfigError(BadInput):
    """A configuration key or value is wrong."""


class DataError(BadInput):
    """Training data is missing, empty or unreadable."""


class ModelError(BadInput):
    """The model cannot run with expert parallelism."""


class PlacementError(BadInput):
    """A placement, topology or statistics do not fit the model or the ranks."""


class CheckpointError(BadInput):
    """A checkpoint is damaged, missing, or belongs to another model."""


class ClusterError(BadInput):
    """The cluster cannot give what was asked for."""


class ControlError(RayEPError):
    """A run does not do what it is asked over its control service. The run is as it was."""


class RequestError(RayEPError):
    """A request for tokens cannot be computed: the message says what is allowed, or why nobody computes any more."""


class SaveError(RayEPError):
    """A checkpoint or an export cannot be written. What was there before it is as it was."""


class DivergedError(RayEPError):
    """A loss, a gradient or a weight is not finite. Raised on every rank before the update; nothing was saved."""


class GroupError(RayEPError):
    """A collective failed: a peer died, timed out, or the group was aborted."""


class LateError(GroupError):
    """A collective took longer than its limit: a peer hangs, or is very slow. That one died is not known."""


class RankError(RayEPError):
    """A rank raised or died.

    ``rank`` is its number; the message holds its own traceback.
    """

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


class LostError(RankError):
    """Ranks died, went silent or did not come back; those that are left were released and can go on without them.

    ``lost`` are their numbers, ascending; none where a collective failed and every rank is still there. ``silent_s``:
    seconds from their last sign of life, at most one more than from their end, until the others were released.
    ``stacks``: directory that tells what everybody was at; "": nobody hung.
    """

    def __init__(self, rank: int, message: str, lost: tuple[int, ...], silent_s: float = 0.0, stacks: str = ""):
        super().__init__(rank, message)
        self.lost, self.silent_s, self.stacks = lost, silent_s, stacks


_FOREIGN = ("trust_remote_code", "ignore_mismatched_sizes", "use_safetensors", "pip install", "http", "upgrade")


def brief(e: BaseException) -> str:
    """A library's words in one short line; only its type where they advise what cannot be done here."""
    text = " ".join(str(e).split())
    kind = type(e).__name__
    if not text or any(word in text for word in _FOREIGN):
        return kind
    return text if len(text) <= 200 else f"{text[:200]}…"
