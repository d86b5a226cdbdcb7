"""Parameters that are not trained: `optim.freeze` names them. What is frozen is the same on every rank."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from ray_ep.errors import ModelError


def freeze(model: torch.nn.Module, patterns: Iterable[str]) -> list[str]:
    """Train no parameter that a pattern names; returns their names, sorted.

    A weight that has two names (tied embeddings) is frozen by either.

    Raises:
        ModelError: a pattern names no parameter, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [p for name, p in named.items() if fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, named, n=1, cutoff=0.3) or sorted(named)[:1]
            raise ModelError(f"optim.freeze={pattern!r} names no parameter of the model; one of them is {near[0]}")
        for p in found:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise ModelError(f"optim.freeze={list(patterns)} names all parameters of the model: nothing is left to train")
    return sorted(name for name, p in named.items() if not p.requires_grad)
