"""`ray-ep serve`: an OpenAI-compatible server of a checkpoint. A thin shell around ray_ep.serve.running."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING

import click

from ray_ep.cli.loading import loading

if TYPE_CHECKING:
    from ray_ep.serve.running import Front


@click.command()
@click.argument("checkpoint", type=click.Path(), metavar="CKPT")
@click.option("--config", "-c", type=click.Path(), help="YAML file with any subset of the configuration's keys.")
@click.option("--json", "as_json", is_flag=True, help="Print the address, once it answers, as one JSON line.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def serve(checkpoint: str, config: str | None, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Serve CKPT over HTTP, as OpenAI's API has it, from ranks with expert parallelism.

    CKPT is the directory of a transformers checkpoint, such as `ray-ep export` writes. It serves until Ctrl-C or
    SIGTERM; then answers under way may end (serve.grace_s).

    \b
    Examples:
      ray-ep serve models/my-moe
      ray-ep serve models/my-moe cluster.ranks=4 serve.port=9000 serve.api_key_file=keys.txt
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "my-moe", "prompt": "Once upon", "max_tokens": 20}'
    """
    import ray_ep

    cfg = ray_ep.load_config(config, [f"model.path={checkpoint}", *overrides])
    loading("serve")
    from ray_ep.serve.running import serve as run

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("ray_ep.serve").setLevel(logging.INFO)

    def tell(address: str, front: Front) -> None:
        limits, name = front.desk.engine.limits, front.served.name
        if as_json:
            click.echo(json.dumps({"address": address, "model": name, "context": limits.context}))
            return
        for note in front.checked.notes:
            click.echo(note)
        click.echo(f"serving {name} at {address}: up to {limits.context} tokens of prompt and answer together")

    sys.exit(130 if run(cfg, tell) == "SIGINT" else 0)
