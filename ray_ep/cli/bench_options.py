"""`ray-ep bench options`: a run beside itself with other options. A thin shell around ray_ep.bench.options."""

from __future__ import annotations

import json

import click

from ray_ep.cli.loading import loading


@click.command("options")
@click.option(
    "--try", "others", multiple=True, metavar="OPTIONS",
    help="Options of another run, such as --try snapshot.every=0; several of one run with spaces between them. "
    "Give it once for each run.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(20), default=200, show_default=True, help="Steps of a run that count.")
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True, help="Turns of each run.")
@click.option("--config", "-c", type=click.Path(), help="YAML file with any subset of the configuration's keys.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line, with every round.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def bench_options(
    others: tuple[str, ...], config: str | None, as_json: bool, overrides: tuple[str, ...], steps: int, rounds: int
) -> None:
    """What options cost a run, or bring it: `ray-ep train` beside itself with other options.

    Runs take turns, each in fresh processes; a minute or so a run. Printed are milliseconds a step with all that
    happens between two steps, and the ratio to the run as it is. The configuration and [key=value] are all runs'.

    \b
      ray-ep bench options --try snapshot.every=0 --try snapshot.every=1
      ray-ep bench options --try 'observe.page=false control.enabled=false' eval.every=0
    """
    loading("bench options")
    from ray_ep.bench.options import options_case, run_options

    case = options_case(config, overrides, others, steps, rounds)
    result = run_options(case, lambda words: click.echo(f"ray-ep bench options: {words} ...", err=True))
    for line in [json.dumps(result.to_dict())] if as_json else result.lines():
        click.echo(line)
