"""What `ray-ep simulate` is given: routing, clusters, sizes -> what ray_ep.placement.whatif.simulate takes.

Failures name the flag. Imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_ep.cli.plan import inputs as plan_inputs
from ray_ep.errors import BadInput, PlacementError
from ray_ep.observe.state import RunState
from ray_ep.placement.engines.records import Recorded
from ray_ep.placement.links.groups import FASTER, in_words
from ray_ep.placement.whatif.description import bytes_per_second, seconds
from ray_ep.placement.whatif.gpus import Gpu, gpu
from ray_ep.placement.whatif.simulate import Cluster, Given, grid, synthetic

SYNTHETIC: dict[str, Callable[[str], float]] = {
    "layers": int, "experts": int, "top_k": int, "tokens": int, "zipf": float, "topics": int, "focus": float,
    "seed": int,
}  # fmt: skip
"""Keys of --synthetic, and what reads the value of each."""

PLACEMENTS = ("contiguous", "load-only", "plan")
"""Placements that are simulated on each cluster, in the order of the rows."""

LINKS: dict[str, Callable[[Any, str], float]] = {
    "inside": bytes_per_second, "across": bytes_per_second, "lanes": lambda value, _: float(value),
    "latency_inside": seconds, "latency_across": seconds,
}  # fmt: skip
"""Flags that describe links, by the field of `Cluster`, and what reads them."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """What is simulated, and what is to be said of it."""

    found: tuple[tuple[Gpu | None, Cluster | Given], ...]
    notes: tuple[str, ...]


def routing(path: Path | None, given: str | None, experts: int | None, routed: str | None = None) -> Recorded:
    """Recorded statistics, or invented ones; see `plan_inputs.read_recorded`.

    Raises:
        BadInput: neither or both are given, a key or value that is not what it should be.
    """
    if (path is None) == (given is None):
        raise BadInput(
            "give STATISTICS (a run directory, a routing.npz or another engine's record) or --synthetic "
            "layers=58,experts=256,top_k=8, one of them"
        )
    if path is not None:
        return plan_inputs.read_recorded(path, experts, routed)
    values: dict[str, Any] = {}
    for item in str(given).split(","):
        key, sep, text = (x.strip() for x in item.partition("="))
        if not sep or key not in SYNTHETIC:
            raise BadInput(f"--synthetic {item!r}: expected KEY=VALUE, KEY {', '.join(SYNTHETIC)}")
        try:
            values[key] = SYNTHETIC[key](text)
        except ValueError:
            raise BadInput(f"--synthetic {item!r}: expected a number") from None
    missing = [k for k in ("layers", "experts", "top_k") if k not in values]
    if missing:
        raise BadInput(f"--synthetic {given}: {', '.join(missing)} missing, such as layers=58,experts=256,top_k=8")
    if values.get("seed", 0) < 0:
        raise BadInput(f"--synthetic seed={values['seed']}: expected 0 or more")
    layers = values["layers"]
    return Recorded(synthetic(**values), "synthetic", tuple(range(layers)), layers, (f"invented routing: {given}",))


def clusters(options: Mapping[str, Any], run: RunState | None, experts: int) -> Clusters:
    """Every combination of the sizes and kinds that the options name and that has room for every expert.

    Raises:
        BadInput: a flag that is not what it should be, no cluster, no combination with room.
    """
    links: dict[str, Any] = {
        name: read(options[name], _flag(name)) for name, read in LINKS.items() if options[name] is not None
    }
    kinds: list[Gpu | None] = [gpu(text) for text in options["gpus"]] or [None]
    slots: list[int | None] = [*_counts(options["slots"], "--slots")] or [None]
    nodes, per_node = _counts(options["nodes"], "--nodes"), _counts(options["ranks_per_node"], "--ranks-per-node")
    speeds = _speeds(options["speeds"])
    given = _given(options["topology"], run)
    if given is None and not nodes:
        raise BadInput("--nodes or --topology is needed: the clusters to simulate")
    if given is not None and not (nodes or per_node or links or speeds or options["gpus"]):
        known = given.links.bandwidth[~np.eye(given.ranks, dtype=bool)]
        notes = () if np.isfinite(known).all() else ("links are not all measured: those count as infinitely fast",)
        return _with_room([(None, replace(given, slots_per_rank=s)) for s in slots], experts, notes)
    base = Cluster(1, 8) if given is None else given.even()
    base = replace(base, **links, speeds=speeds or base.speeds)
    found: list[tuple[Gpu | None, Cluster | Given]] = []
    for kind in kinds:
        one = base
        if kind is not None:
            inside = base.inside if "inside" in links or kind.inside is None else kind.inside
            one = replace(base, inside=inside, speeds=tuple(s * kind.speed for s in base.speeds))
        found += [(kind, c) for c in grid(one, nodes, per_node, slots)]
    words = _links_in_words(base, given, kinds, "inside" in links)
    return _with_room(found, experts, (words, *_slow_inside(found)))


def _with_room(found: list[tuple[Gpu | None, Cluster | Given]], experts: int, notes: tuple[str, ...]) -> Clusters:
    """Those with a slot for every expert; that others were left out is said."""
    kept: list[tuple[Gpu | None, Cluster | Given]] = []
    out: list[Cluster | Given] = []
    for kind, c in found:
        short = c.slots_per_rank is not None and c.ranks * min(c.slots_per_rank, experts) < experts
        if short:
            out.append(c)
        else:
            kept.append((kind, c))
    words = dict.fromkeys(
        f"{c.nodes} node(s), {c.ranks} ranks x {c.slots_per_rank} slots: {-(-experts // c.ranks)} are needed"
        for c in out
    )
    if not kept:
        raise PlacementError(f"--slots: fewer slots than the {experts} experts of a layer: {'; '.join(words)}")
    left = (f"left out, fewer slots than the {experts} experts of a layer: {'; '.join(words)}",) if words else ()
    return Clusters(tuple(kept), notes + left)


def _given(path: Path | None, run: RunState | None) -> Given | None:
    """The cluster of --topology, else of the run directory where it has one."""
    if path is None and (run is None or not (run.path / "topology.json").is_file()):
        return None
    topology, speed = plan_inputs.read_topology(path, run)
    return Given(topology, speed)


def _links_in_words(base: Cluster, given: Given | None, kinds: list[Gpu | None], told: bool) -> str:
    inside = "as its kind of GPU has" if any(kinds) and not told else in_words(base.inside)
    source = "" if given is None else ", where not given the medians of the known cluster's"
    return (
        f"links of a rank: {inside} inside a node after {1e6 * base.latency_inside:.3g} us, {in_words(base.across)} "
        f"across nodes after {1e6 * base.latency_across:.3g} us"
        + ("" if base.lanes is None else f", for {base.lanes:g} ranks of a node at once")
        + source
    )


def _slow_inside(found: list[tuple[Gpu | None, Cluster | Given]]) -> list[str]:
    """Which kinds' nodes do not count as nodes, as one sentence; see `groups.groups_of`."""
    slow = dict.fromkeys(
        "the ranks" if kind is None else kind.name
        for kind, c in found
        if isinstance(c, Cluster) and c.ranks_per_node > 1 and c.nodes > 1 and c.inside < FASTER * c.across
    )
    if not slow:
        return []
    return [
        f"links inside nodes of {', '.join(slow)} are less than {FASTER:g} times as fast as those across: each "
        "rank counts as a node of its own"
    ]


def placements(text: str) -> list[str]:
    """--placement: names as `whatif.simulate` has them."""
    names = [x.strip() for x in text.split(",")]
    for name in names:
        if name not in PLACEMENTS:
            raise BadInput(f"--placement {name!r}: allowed are {', '.join(PLACEMENTS)}")
    return [n.replace("-", "_") for n in dict.fromkeys(names)]


def _counts(text: str | None, flag: str) -> list[int]:
    """One or several positive numbers; none where nothing is given."""
    if text is None:
        return []
    try:
        numbers = [int(x) for x in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise BadInput(f"{flag} {text!r}: expected a number of at least 1, or several with commas between")
    return list(dict.fromkeys(numbers))


def _speeds(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(x) for x in text.split(","))
    except ValueError:
        raise BadInput(f"--speeds {text!r}: expected numbers with commas between") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
