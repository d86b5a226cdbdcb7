"""`ray-ep plan`: would other places for the experts be faster, and what would moving them cost. Needs no cluster.

Reading is inputs.py, deciding ray_ep.placement, drawing ray_ep.observe.plan_page; run.py puts them together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_ENGINES = ("ray_ep", "sglang", "tensorrt-llm", "vllm-ascend")


@click.command()
@click.argument("statistics", type=_PATH)
@click.option("--topology", "-t", type=_PATH, help="topology.json, a run directory or a YAML description of a cluster.")
@click.option(
    "--slots", help="Slots of a rank and layer: 9, or one a rank: 9,9,5,5. Not given: as now, or just enough."
)
@click.option("--level", type=click.Choice(["node", "rank"]), help="What must be even; see above.")
@click.option("--current", type=_PATH, help="The placement that runs now; a run directory's own if not given.")
@click.option(
    "--survive-nodes", type=click.IntRange(0), default=0, help="So many nodes may go, any of them; see above."
)
@click.option("--horizon", type=float, default=1000.0, show_default=True, help="Steps over which a move must pay back.")
@click.option("--experts", type=click.IntRange(1), help="Experts of a layer, where a short record does not tell.")
@click.option("--routed", metavar="LAYERSxTOP_K", help="Shape of SGLang's routed experts, where responses do not tell.")
@click.option("--cost", "costs", multiple=True, metavar="NAME=VALUE", help="A figure of the cost model; see above.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the search and of random.")
@click.option("--out", type=_PATH, help="Write the plan there.")
@click.option("--engine", type=click.Choice(_ENGINES), help="Whose format --out has; that of the statistics if it can.")
@click.option("--html", type=_PATH, help="Write the table and the heat maps as one page.")
@click.option("--plots", type=_PATH, metavar="DIR", help="Write the heat maps as SVG files.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON line.")
def plan(statistics: Path, as_json: bool, html: Path | None, plots: Path | None, **options: Any) -> None:
    """Compare placements of the experts under recorded routing, and plan a better one. Starts nothing.

    STATISTICS is a run directory, a routing.npz of ray_ep, or what SGLang, vLLM or TensorRT-LLM recorded. Compared are
    what runs now, contiguous, random, a balancer of load alone (EPLB's kind) and the plan, by predicted time of the
    expert layers of a step.

    --level node: ranks of a node are balanced within each step, so nodes must be even (the default for ray_ep);
    rank: nothing evens ranks out in a step (the default for other engines).

    \b
    --cost: tokens_per_rank, token_bytes (of a hidden state), expert_seconds (one token through one expert),
    expert_bytes, optimizer_bytes (of one expert). A run directory tells its own.

    --survive-nodes K: whichever K nodes are lost, every expert still has a replica. The price in memory, traffic and
    time is that against the plan without it. Without --slots: the fewest that do.

    \b
    A cluster in YAML:
      nodes: 4
      ranks_per_node: 8
      links:
        inside: {bandwidth: 300 GB/s, latency: 5 us}
        across: {bandwidth: 400 Gbit/s, latency: 20 us}
      speeds: [1, 1, 1, 0.5]

    \b
      ray-ep plan runs/NAME
      ray-ep plan runs/NAME --topology cluster.yaml --slots 10 --out placement.json
      ray-ep plan /records/sglang -t cluster.yaml --slots 9 --engine sglang --out map.json --html plan.html
    """
    from ray_ep.cli.plan import run as plan_run

    found = plan_run.planned(statistics, options)
    if html is not None or plots is not None:
        plan_run.draw(found, html, plots)
    click.echo(json.dumps(plan_run.tree(found)) if as_json else plan_run.text(found))
