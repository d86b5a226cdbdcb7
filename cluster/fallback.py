"""On-demand machines where spot machines are refused: a node type that was refused loses its priority for a while.

    python fallback.py --config ~/ray_bootstrap_config.yaml --address HEAD:6379    # on the head, beside Ray

Ray 2.60's autoscaler asks for the node type of the highest priority again at each update, however often it is refused.
It reads its configuration anew each time, so this changes priorities there.
With KubeRay it is not needed: raycluster.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LOWERED = 1_000_000
"""What a refused type loses; priorities of one's own are far below it, so it shows in the file who is lowered."""


def priorities(types: Mapping[str, Any], refused: Mapping[str, float], now: float, cool_s: float) -> dict[str, int]:
    """Priority of each node type: its own, less `LOWERED` while it was refused within `cool_s`.

    Args:
        types: `available_node_types` of the configuration, in which types may be lowered already.
        refused: when each type was refused last, in seconds since 1970.
    """
    found = {}
    for name, node_type in types.items():
        own = node_type.get("priority", 0)
        own += LOWERED if own < -LOWERED // 2 else 0
        found[name] = own - LOWERED if now - refused.get(name, -cool_s) < cool_s else own
    return found


def update(config: Path, refused: Mapping[str, float], now: float, cool_s: float) -> dict[str, int]:
    """Write the priorities that have changed into `config`, in one piece; returns them."""
    tree = yaml.safe_load(config.read_text())
    types = tree["available_node_types"]
    wanted = priorities(types, refused, now, cool_s)
    changed = {name: p for name, p in wanted.items() if p != types[name].get("priority", 0)}
    if changed:
        for name, priority in changed.items():
            types[name]["priority"] = priority
        new = config.with_name(config.name + ".new")
        new.write_text(json.dumps(tree))  # JSON is YAML
        os.replace(new, config)
    return changed


def refused_types(address: str) -> dict[str, float]:
    """When each node type was refused last, as Ray's autoscaler tells."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    last: dict[str, float] = {}
    for launch in get_cluster_status(address).failed_launches:
        last[launch.ray_node_type_name] = max(last.get(launch.ray_node_type_name, 0.0), launch.failed_ts_s or 0.0)
    return last


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, type=Path, help="the file of `ray start --autoscaling-config`")
    parser.add_argument("--address", required=True, help="the Ray head, as HOST:PORT")
    parser.add_argument("--cool-s", type=float, default=600.0, help="how long a refused type is asked for last")
    parser.add_argument("--poll-s", type=float, default=5.0, help="how often to look")
    return parser


def main() -> None:
    """The command: until its configuration is gone."""
    given = parser().parse_args()
    while given.config.exists():
        try:
            refused = refused_types(given.address)
        except Exception as e:  # whatever Ray raises while its head is away
            print(f"the autoscaler does not answer: {e!r}", file=sys.stderr, flush=True)
        else:
            for name, priority in update(given.config, refused, time.time(), given.cool_s).items():
                print(f"priority of {name} is {priority} now", flush=True)
        time.sleep(given.poll_s)


if __name__ == "__main__":
    main()
