"""When routing has collapsed: a pure function of recent loads, its answer with its reason. NumPy only."""

from __future__ import annotations

import numpy as np

from ray_ep.config.schema import RouterConfig

WINDOW = 20
"""Steps whose loads are added up before they are judged; what was quiet for as long is told again."""


def collapse(load: np.ndarray, cfg: RouterConfig) -> dict[tuple[str, int], str]:
    """What is wrong with the loads [L, E] of the last WINDOW steps.

    Returns:
        {(kind, layer): sentence naming layer and experts}; empty if all is well. kind is starved or unbalanced.
    """
    found: dict[tuple[str, int], str] = {}
    for layer, row in enumerate(load):
        mean, top = float(row.mean()), int(row.argmax())
        if mean == 0:
            continue
        starved = np.nonzero(row < cfg.alarm_starved * mean)[0]
        if len(starved):
            names = ", ".join(map(str, starved[:8])) + (" ..." if len(starved) > 8 else "")
            found["starved", layer] = (
                f"layer {layer}: {len(starved)} of {len(row)} experts starve (under {cfg.alarm_starved:g} of "
                f"their fair load): {names}"
            )
        if mean / row[top] < cfg.alarm_balancedness:
            found["unbalanced", layer] = (
                f"layer {layer}: balancedness {mean / row[top]:.2f} is under {cfg.alarm_balancedness:g}; expert {top} "
                f"gets {row[top] / mean:.1f} times the mean load"
            )
    return found
