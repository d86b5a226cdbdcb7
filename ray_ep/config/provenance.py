"""`provenance.sample` in words -> which share of the tokens of which steps is recorded; pure. Imports errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ray_ep.errors import ConfigError

_ALLOWED = "allowed are off, a share of the tokens of every step such as 0.01, or steps such as steps:1,100-110"


@dataclass(frozen=True, slots=True)
class Sample:
    """What is recorded.

    Args:
        rate: share of the tokens of a recorded step, 0 to 1.
        steps: first and last of each span of recorded steps, from 1; empty: every step.
    """

    rate: float
    steps: tuple[tuple[int, int], ...] = ()

    def of_step(self, step: int) -> float:
        """Share of the tokens of `step` (from 1) that are recorded."""
        wanted = not self.steps or any(first <= step <= last for first, last in self.steps)
        return self.rate if wanted else 0.0


def sample_of(text: str) -> Sample:
    """The sample that `provenance.sample` names; of chosen steps all tokens. Raises ConfigError."""
    words = text.strip().lower()
    if words == "off":
        return Sample(0.0)
    if words.startswith("steps:"):
        spans = [re.fullmatch(r"\s*(\d{1,15})\s*(?:-\s*(\d{1,15})\s*)?", part) for part in words[6:].split(",")]
        found = tuple((int(m[1]), int(m[2] or m[1])) for m in spans if m)
        if len(found) < len(spans) or any(not 1 <= first <= last for first, last in found):
            raise ConfigError(
                f"provenance.sample={text!r}: steps count from 1, the first of a span comes first: {_ALLOWED}"
            )
        return Sample(1.0, found)
    try:
        rate = float(words)
    except ValueError:
        raise ConfigError(f"provenance.sample={text!r}: {_ALLOWED}") from None
    if not 0 <= rate <= 1:
        raise ConfigError(f"provenance.sample={text!r}: a share is from 0 to 1; one step is steps:{words}: {_ALLOWED}")
    return Sample(rate)


def check_provenance(cfg: Any) -> None:
    """Raise ConfigError for a sample that cannot be taken."""
    text, steps = cfg.provenance.sample, cfg.optim.steps
    spans = sample_of(text).steps
    if spans and all(first > steps for first, _ in spans):
        raise ConfigError(f"provenance.sample={text!r}: none of these is a step of the run: optim.steps={steps}")
