"""Routings that `ray-ep bench layer --routing` imposes: each a function of (name, seed, step) alone.

Skewed kinds as users meet them; hot-rank, spread, ragged, zero, rotating and burst after the workloads W2 to W7 that
Megatron-LM's pull request 7488 defines. E experts, R ranks, T tokens of a rank, K top_k.
"""

from __future__ import annotations

import re

import torch

from ray_ep.bench.contenders import Work
from ray_ep.errors import BadInput

ROUTINGS = (
    "balanced",
    "zipf",
    "30:4",
    "50:4",
    "80:4",
    "95:4",
    "hot-rank",
    "spread",
    "ragged",
    "zero",
    "rotating",
    "burst",
)
"""Names of the routings that --routing=all measures."""

_HEAT = 4.0
"""How much likelier a hot expert is chosen in hot-rank, spread and rotating."""


def check_routing(name: str) -> None:
    """Raises BadInput for a name that is none of the kinds and not RATIO:HOT."""
    if name not in ROUTINGS and not re.fullmatch(r"\d{1,2}:\d+", name):
        raise BadInput(f"--routing={name}: allowed are {', '.join(ROUTINGS)} and other RATIO:HOT, such as 70:2")


def tokens_of(name: str, work: Work, rank: int, ranks: int, seed: int, step: int) -> int:
    """T of a rank: ragged: from half to one and a half of the work's by rank; else the work's."""
    if name != "ragged" or ranks == 1:
        return work.tokens
    return round(work.tokens * (0.5 + rank / (ranks - 1)))


def route(name: str, work: Work, rank: int, ranks: int, seed: int, step: int) -> torch.Tensor:
    """[T, K] distinct experts for each of a rank's tokens.

    balanced: all alike. zipf: popularity 1 / rank of the expert. RATIO:HOT: that share of the tokens picks among the
    first HOT experts, never fewer than K, the others among the rest. hot-rank: the experts of the last rank are hot;
    spread: as many, one here, one there; rotating: the hot rank moves with the step; burst: every fourth step is 95:4,
    the others balanced; zero: nobody picks the last rank's experts; ragged: balanced, tokens uneven by source.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + 1009 * step + rank)
    count, experts = tokens_of(name, work, rank, ranks, seed, step), work.experts
    if name == "burst":
        name = "95:4" if step % 4 == 3 else "balanced"
    chance = torch.ones(count, experts)
    of_rank = experts // ranks
    if name == "zipf":
        chance *= torch.arange(1, experts + 1, dtype=torch.float) ** -1.0
    elif name in ("hot-rank", "rotating"):
        hot = (ranks - 1 if name == "hot-rank" else step % ranks) * of_rank
        chance[:, hot : hot + of_rank] *= _HEAT
    elif name == "spread":
        chance[:, ::ranks] *= _HEAT
    elif name == "zero" and ranks > 1 and experts - of_rank >= work.top_k:
        chance[:, experts - of_rank :] = 0
    elif ":" in name:
        ratio, first = name.split(":")
        hot, cut = max(int(first), work.top_k), int(count * float(ratio) / 100)
        if hot < experts - work.top_k:
            chance[:cut, hot:], chance[cut:, :hot] = 0, 0
        chance = chance[torch.randperm(count, generator=generator)]
    return torch.multinomial(chance, work.top_k, generator=generator)
