"""The ways that tokens can travel, and how a layer's pairs are laid out for the second level of a two-level exchange.

flat: once to each rank. two_level: once to each node, to the rank that stands there for the source, and on from it.
all_gather: every token to every rank, for few tokens. Which is taken is measured (choose.py); tests hold them equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ray_ep.moe.exchange.dispatch import ReceivedPairs

KINDS = ("flat", "two_level", "all_gather")
"""Ways of the exchange; of equally fast ones the first is taken."""

DEEPEP = "deepep"
"""One more way, never timed with the others: by DeepEP's kernels (deepep.py), over torch's NCCL."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """How the layers of one model exchange, and so which bodies they have; the same on every rank.

    Args:
        kind: one of KINDS, or DEEPEP.
        chunks: tokens travel in this many parts; on GPUs one part travels while another computes.
        float8: dispatch in 8 bits (float8.py).
        tokens: bound on the tokens of a rank in one pass, for DEEPEP, and for all_gather on GPUs, where 0 has it agreed
            on in each pass.
        fused: layers have the fused body where it fits; off for comparison.
    """

    kind: str = "flat"
    chunks: int = 1
    float8: bool = False
    tokens: int = 0
    fused: bool = True


def gateways(routes: np.ndarray, node_of: np.ndarray, rank: int) -> np.ndarray:
    """routes [E, C] of a rank, each serving rank replaced by the one that stands for `rank` on its node.

    That is the rank itself on its own node; elsewhere the one with the same number within its node (modulo its size),
    so that the ranks of a node share the work of passing on.
    """
    members = {int(n): np.nonzero(node_of == n)[0] for n in np.unique(node_of)}
    place = int(np.nonzero(members[int(node_of[rank])] == rank)[0][0])
    stands = np.array([members[int(n)][place % len(members[int(n)])] for n in node_of])
    stands[node_of == node_of[rank]] = rank
    out: np.ndarray = stands[routes]
    return out


def by_row(pairs: ReceivedPairs, weights: torch.Tensor, rows: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Received pairs laid out like a router's choice: index [N, K] with -1 for none, and weights [N, K], with graph.

    Args:
        weights: [P] of the pairs; rows: N.
    """
    row = pairs.row  # ascending
    first = torch.searchsorted(row, torch.arange(rows, device=row.device))
    column = torch.arange(len(row), device=row.device) - first[row]
    index = torch.full((rows, top_k), -1, dtype=torch.int64, device=row.device)
    index[row, column] = pairs.expert
    return index, weights.new_zeros(rows, top_k).index_put((row, column), weights)
