"""The files of one rank in a checkpoint, given its tensors under their keys; what they are copies of is not known here.

Nothing is stacked: memory stays at one file (a layer of a rank, or FILE_BYTES dense bytes).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ray_ep.rank.saved.directory import Directory

FILE_BYTES = 1 << 28
"""Bytes of dense tensors in one file, unless a single tensor is larger."""

Tensors = Iterable[tuple[str, torch.Tensor]]
"""Tensors by the keys that a checkpoint has for them (`ray_ep.rank.saved.checkpoint`)."""


def write_rank(
    directory: Directory, step: int, rank: int, dense: Tensors, layers: Sequence[Tensors]
) -> dict[str, list[Any]]:
    """Write what a rank has to write (not collective); returns its part of the manifest's tensors.

    Args:
        dense: what every rank has: rank 0 writes it. layers: of each MoE layer what this rank owns.

    Raises:
        SaveError: a file could not be written.
    """
    tensors: dict[str, list[Any]] = {}
    if rank == 0:
        for i, part in enumerate(_chunks(dense)):
            tensors |= directory.write_tensors(step, f"dense-{i:04d}.safetensors", part)
    for layer, owned in enumerate(layers):
        if part := dict(owned):
            tensors |= directory.write_tensors(step, f"experts-L{layer:03d}-r{rank:03d}.safetensors", part)
    return tensors


def _chunks(items: Tensors) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for key, t in items:
        if part and size + t.nbytes > FILE_BYTES:
            yield part
            part, size = {}, 0
        part[key] = t
        size += t.nbytes
    if part:
        yield part
