"""`ray-ep simulate`: what a step would take on clusters that do not exist. Needs no cluster.

Predicting is ray_ep.placement.whatif.simulate's; simulate_inputs.py reads, simulate_run.py puts them together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("statistics", type=_PATH, required=False)
@click.option("--synthetic", metavar="KEY=VALUE,...", help="Invented routing instead of STATISTICS; see above.")
@click.option("--topology", "-t", type=_PATH, help="topology.json, a run directory or a YAML description of a cluster.")
@click.option("--nodes", help="Number of nodes, one or several: 2,4,8.")
@click.option("--ranks-per-node", help="Ranks (GPUs) of a node, one or several; 8, or as in --topology.")
@click.option("--slots", help="Slots of a rank and layer, one or several: 4,8; just enough if not given.")
@click.option("--gpu", "gpus", multiple=True, metavar="KIND", help="Kind of GPU, may be given again; see above.")
@click.option("--inside", help="Bandwidth between ranks of a node, such as '300 GB/s'.")
@click.option("--across", help="Bandwidth between ranks of different nodes, such as '400 Gbit/s'.")
@click.option("--lanes", type=click.FloatRange(1), help="Ranks of a node that its network cards serve at full speed.")
@click.option("--latency-inside", help="Such as '3 us'.")
@click.option("--latency-across", help="Such as '10 us'.")
@click.option("--speeds", help="Relative speeds of ranks, given out in turn, such as 1,1,1,0.5.")
@click.option("--placement", "placements", default="plan", show_default=True, help="contiguous, load-only, plan.")
@click.option("--level", type=click.Choice(["node", "rank"]), help="What must be even; see `ray-ep plan --help`.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens of a step, all ranks together.")
@click.option("--cost", "costs", multiple=True, metavar="NAME=VALUE", help="As of `ray-ep plan`.")
@click.option("--experts", type=click.IntRange(1), help="Experts of a layer, where a short record does not tell.")
@click.option("--routed", metavar="LAYERSxTOP_K", help="Shape of SGLang's routed experts, where responses do not tell.")
@click.option("--layers", type=click.IntRange(1), help="Predict at most so many layers; they stand for the others.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the search.")
@click.option("--html", type=_PATH, help="Write the table, the answer and a plot as one page.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a row, then one with the answer.")
def simulate(statistics: Path | None, as_json: bool, html: Path | None, **options: Any) -> None:
    """Predict steps on clusters that do not exist: how many GPUs of which kind. Starts nothing.

    STATISTICS is what `ray-ep plan` takes: a run directory, a routing.npz of ray_ep, or another engine's record.
    Every combination of --gpu, --nodes, --ranks-per-node and --slots is a row: predicted time of the expert layers of
    a step, balance, traffic, memory, tokens/s. At most 4,096 ranks.

    \b
    --synthetic: layers, experts, top_k, and if they differ from the defaults tokens=4096 (sampled), zipf=0.5 (skew),
    topics=16, focus=2.0 (how much tokens of a topic share experts), seed=0.

    \b
    --gpu: b200, h200, h100, h800, h20, a100, l40s, l4 with the figures of their data sheets, h100:price=3.5 with an
    hour's price, or one's own: NAME:speed=0.4,inside=64 GB/s,memory_gb=24 (speed 1: what --cost expert_seconds is of).

    The tokens of a step stay the same on all clusters with --tokens and for a run directory (its batch); else each rank
    brings its own, --cost tokens_per_rank.

    \b
      ray-ep simulate --synthetic layers=58,experts=256,top_k=8 --nodes 4,8,16 --gpu h100 --gpu l40s
      ray-ep simulate runs/NAME --nodes 2,4,8 --slots 4,8
      ray-ep simulate routing.npz -t cluster.yaml --placement contiguous,load-only,plan
    """
    from ray_ep.cli.simulate import run as simulate_run

    found = simulate_run.simulated(statistics, options)
    if html is not None:
        simulate_run.draw(found, html)
    click.echo("\n".join(simulate_run.lines(found)) if as_json else simulate_run.text(found))
