"""`ray-ep probe`: measures the links of a cluster. A thin shell around ray_ep.probe."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.option("--config", "-c", type=click.Path(), help="YAML file with any subset of the configuration's keys.")
@click.option("--budget", type=float, default=20.0, show_default=True, help="About how long it may take, seconds.")
@click.option("--out", type=click.Path(), help="Write the topology there, as a run does into its topology.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the topology and what contradicts it as one JSON line.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def probe(config: str | None, budget: float, out: str | None, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Measure latency and bandwidth between the ranks of a cluster.

    Starts or joins Ray and places ranks as `train` does with the same cluster.* keys, without a model, and sends
    messages between them over the transport of the job. Where the links are not what Ray says of the nodes, it says so.

    \b
      ray-ep probe cluster.ranks=4 cluster.cpus_per_rank=0.5
      ray-ep probe cluster.address=HOST:PORT cluster.ranks=16 --out topology.json
      ray-ep plan runs/NAME --topology topology.json
    """
    import ray_ep
    from ray_ep.cli.loading import loading
    from ray_ep.cli.table import table
    from ray_ep.errors import BadInput, ConfigError
    from ray_ep.placement.links.groups import contradictions
    from ray_ep.placement.links.rows import HEAD, link_rows, shared_cards

    if not 0.01 <= budget < float("inf"):
        raise ConfigError(f"--budget {budget:g}: expected seconds, at least 0.01")
    cfg = ray_ep.load_config(config, overrides)
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise BadInput(f"--out {out}: no such directory")  # before a cluster is started
    if out is not None and Path(out).is_dir():
        raise BadInput(f"--out {out}: a directory; give a file")
    loading("probe")
    topology = ray_ep.probe(cfg, budget)
    found = contradictions(topology)
    if out is not None:
        try:
            Path(out).write_text(topology.to_json(), encoding="utf-8")
        except OSError as e:
            raise BadInput(f"--out {out}: {e.strerror or e}") from None
    if as_json:
        tree = {"ranks": topology.num_ranks, "contradictions": found, "topology": json.loads(topology.to_json())}
        click.echo(json.dumps(tree))
        return
    click.echo(f"{topology.num_ranks} ranks on {len(set(topology.node_of.tolist()))} node(s)")
    click.echo(table(HEAD, [row.cells() for row in link_rows(topology)]))
    for sentence in (*shared_cards(topology), *(f"contradiction: {sentence}" for sentence in found)):
        click.echo(sentence)
    if out is not None:
        click.echo(f"written: {out}")
