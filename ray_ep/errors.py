"""Every error that ray_ep raises on purpose. Imports nothing.

RayEPError
├── BadInput             what the user gave is wrong: found before anything starts; exit status 2
│   ├── ConfigError      a configuration key or value
│   ├── DataError        missing, empty or unreadable training data
│   ├── ModelError       a model that cannot run with expert parallelism
│   ├── PlacementError   a placement, topology or statistics that do not fit
│   ├── CheckpointError  a damaged checkpoint, or one of another model
│   └── ClusterError     the cluster cannot give what was asked for
├── SaveError            a checkpoint could not be written; older ones are whole
├── GroupError           a collective failed: a peer died, timed out, or the group was aborted
└── RankError            a rank raised or died; carries that rank's own traceback
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


class SaveError(RayEPError):
    """A checkpoint could not be written: the message says where and why. Those written before it are whole."""


class GroupError(RayEPError):
    """A collective failed: a peer died, timed out, or the group was aborted."""


class RankError(RayEPError):
    """A rank raised or died.

    ``rank`` is its number; the message holds its own traceback.
    """

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank
