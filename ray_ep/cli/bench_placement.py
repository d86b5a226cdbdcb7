"""`ray-ep bench placement`: the planner beside other placements. A thin shell around ray_ep.bench.placement."""

from __future__ import annotations

import json

import click


@click.command("placement")
@click.option("--shape", "shapes", default="v3-64", show_default=True, help="One or several, or `all`: see above.")
@click.option("--seed", "seeds", default="7", show_default=True, help="Of the routing; one or several, such as 7,8.")
@click.option("--drift", type=float, default=0.15, show_default=True, help="Share of later tokens from another mix.")
@click.option("--slow", default="none", show_default=True, help="Ranks at half speed: none, spread or node.")
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True, help="Timings; the best one counts.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a row.")
def bench_placement(shapes: str, seeds: str, drift: float, slow: str, repeats: int, as_json: bool) -> None:
    """The planner at both levels beside contiguous, random and load-only placements, on drawn routing.

    Figures are predicted for tokens that no plan saw. "moved" and "kept" are a replan's: the share of slots that it
    fills anew, and of the gain that a fresh plan would have. Last: how long planning the balance inside a step takes.

    \b
    Shapes (layers x experts top-k, ranks on nodes, slots a rank):
      v3-32 8x256 top-8, 32 on 4, 9        v3-64 the same, 64 on 8, 5       v3-64-whole 58 layers of it
      qwen-16 8x128 top-8, 16 on 4, 10     mixtral-8 8x8 top-2, 8 on 4, 2
      v3-256 and v3-1024: 8x256 top-8, on 32 and 128 nodes of 8 ranks, 2 and 1 slots
      olmoe-8 8x64 top-8, 8 on 1, 8
    """
    click.echo("ray-ep bench placement: planning ...", err=True)
    from ray_ep.bench.placement import SHAPES, TITLE, run_balance, run_placement
    from ray_ep.errors import BadInput

    if not all(s.strip().isdigit() for s in seeds.split(",")):
        raise BadInput(f"bench placement: --seed={seeds}: expected numbers, such as 7,8")
    if not as_json:
        click.echo(TITLE)
    for shape in SHAPES if shapes == "all" else shapes.split(","):
        for seed in seeds.split(","):
            for row in run_placement(shape, int(seed), drift, slow, repeats):
                click.echo(json.dumps(row.to_dict()) if as_json else row.line())
            balance = run_balance(shape, int(seed), drift, slow)
            click.echo(json.dumps(balance.to_dict()) if as_json else balance.line())
