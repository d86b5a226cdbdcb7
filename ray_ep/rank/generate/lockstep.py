"""What ranks agree on before each pass: whether any has work, whether to stop, whether to pause.

One all-reduce of three numbers; nothing else is exchanged beside the layers' own messages. After it every rank makes
one pass: over its own tokens, or an idle one. Uses `BackgroundThreadStatus`, which transformers' continuous batching
keeps of its thread, for both kinds of batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus
from transformers.generation.continuous_batching.distributed import DistributedHelper

from ray_ep.collective import Group
from ray_ep.errors import GroupError

NOT_STOPPING, FLUSH, HARD = (
    BackgroundThreadStatus.DONT_STOP, BackgroundThreadStatus.FLUSH_AND_STOP, BackgroundThreadStatus.HARD_STOP,
)  # fmt: skip
"""Go on; stop when nobody has work left; stop now."""

NAP_S = 0.1
"""Seconds between two rounds while nobody has work; a request that comes wakes its rank, and its engine all others."""


class Lockstep(DistributedHelper):
    """transformers' helper of its batch processor, without tensor parallelism: its exchange goes over all ranks.

    Attributes:
        any_work: whether some rank makes a pass in this round.
    """

    def __init__(self, group: Group):
        super().__init__(device_mesh=None, cpu_group_timeout=None)
        self.group, self.any_work = group, False
        self.has_work: Callable[[], bool] = bool  # asked when the queue of new requests is empty
        self.global_rank = self.dp_rank = group.rank
        self.world_size = self.dp_size = group.size

    def tp_all_reduce_state(
        self, payload_size: int, stop_status: int, pause_requested: int = 0
    ) -> tuple[int, int, int]:
        """Agree (collective). Called by transformers at each batch boundary, and once more after an error."""
        work = payload_size > 0 or self.has_work()
        state = torch.tensor([work, stop_status, pause_requested], dtype=torch.int64)
        try:
            self.group.all_reduce(state, "max")
        except GroupError:
            if stop_status != HARD:
                raise
            # The loop has ended and would tell the others, who are gone.
        any_work, stop, pause = state.tolist()
        self.any_work = bool(any_work)
        return payload_size, stop, pause

    def set_tp_seed(self, seed: int | None, model_device: torch.device) -> None:
        """Draws have seeds of their own (sampling.py); torch's random state is left alone."""
