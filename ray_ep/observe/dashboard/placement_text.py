"""The placement of a run as plain text, for readers of log files."""

from __future__ import annotations

from ray_ep.observe.state import RunState

MOST_LINES = 2000
"""Of layers and versions; a longer file is a wall of numbers."""


def placement_text(state: RunState) -> str:
    """Who holds which expert, and which placements there were and why, the newest first."""
    tree = state.snapshot("run", "membership", "placement")
    ranks, placement = tree["membership"]["ranks"], tree["placement"]
    lines = [f"run {tree['run']['path']}, epoch {tree['membership']['epoch']}, placement {placement['version']}", ""]
    lines += [f"rank {r['rank']} ({r['member']}): {r['host']} ({r['address']}), {r['device']}" for r in ranks]
    lines += ["", "experts of each layer by rank; * owns the expert, others are its replicas"]
    for layer, (slots, primary) in enumerate(zip(placement["slots"], placement["primary"], strict=True)):
        held = [_held(experts, primary, rank) for rank, experts in enumerate(slots)]
        lines.append(f"layer {layer}: " + " | ".join(f"rank {rank}: {words}" for rank, words in enumerate(held)))
    lines += ["", "placements, the newest first"]
    for version in reversed(placement["versions"]):
        moved = f", {version['moved']} experts moved" if version.get("moved") else ""
        lines.append(f"{version['version']}, after step {version.get('step')}: {version.get('words', '')}{moved}")
    return "\n".join(lines[:MOST_LINES]) + "\n"


def _held(experts: list[int], primary: list[int], rank: int) -> str:
    return " ".join(f"{e}{'*' if primary[e] == rank else ''}" for e in sorted(experts) if e >= 0) or "none"
