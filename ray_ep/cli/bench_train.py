"""`ray-ep bench train`: whole training steps beside other trainers. A thin shell around ray_ep.bench.train."""

from __future__ import annotations

import json

import click

from ray_ep.cli.loading import loading


@click.command("train")
@click.option("--model", "models", help="small, fine, wide or several: see above; small if not given.")
@click.option("--dtype", "dtypes", help="float32, bfloat16 or both; model.dtype if not given.")
@click.option("--ranks", help="One or several, such as 2,4; cluster.ranks if not given.")
@click.option("--peers", help="plain, ddp, transformers, deepspeed or several; all that are installed if not given.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Steps of a round that count.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of each contender.")
@click.option(
    "--malloc", type=click.Choice(["tuned", "default"]), default="tuned", show_default=True,
    help="glibc of the peers: keeping memory, as ranks of ray_ep do, or as it comes.",
)  # fmt: skip
@click.option("--config", "-c", type=click.Path(), help="YAML file with any subset of the configuration's keys.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a case, with every step.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def bench_train(
    models: str | None,
    dtypes: str | None,
    ranks: str | None,
    peers: str | None,
    config: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
    **turns: int | str,
) -> None:
    """Whole training steps: `ray-ep train` beside what one would use in its place, on the same work.

    Same initial weights, batches, AdamW, learning rates and clipping; one thread a rank. Contenders take turns, each
    round in fresh processes; minutes a case. What is compared, and how: docs/benchmarks.md, "Whole steps".

    \b
    Models: small: the default one; the others over it (hidden, experts of ffn, top-k):
      fine  512, 64 of 256, top-8        wide  512, 32 of 512, top-4
      With --config, or overrides of model.type, model.path or model.overrides: that model.
    Peers:
      plain         transformers in one process, with as many threads as ranks
      ddp           torch's DistributedDataParallel, all experts on each rank
      transformers  its own expert parallelism (AllToAllEP)
      deepspeed     AutoEP with ZeRO-2 (pip install 'ray_ep[bench]')
    """
    loading("bench train")
    from ray_ep.bench.train import OWN_MODEL, cases, run
    from ray_ep.bench.train_rows import TITLE
    from ray_ep.config import load_config
    from ray_ep.errors import BadInput

    named = config is not None or any(
        o.split("=")[0] == "model" or o.startswith(("model.type", "model.path", "model.overrides")) for o in overrides
    )
    if named and models:
        raise BadInput(f"bench train: --model={models}: the configuration names a model: give one of the two")
    if not all(r.isdigit() and int(r) >= 1 for r in _words(ranks) or []):
        raise BadInput(f"bench train: --ranks={ranks}: expected numbers, such as 2,4")
    todo = cases(
        load_config(config, overrides),
        [OWN_MODEL] if named else _words(models) or ["small"],
        _words(dtypes) or [],
        [int(r) for r in _words(ranks) or []],
        _words(peers),
        **turns,  # type: ignore[arg-type]
    )
    if not as_json:
        click.echo(TITLE)
    for case in todo:
        result = run(case, lambda words: click.echo(f"ray-ep bench train: {words} ...", err=True))
        click.echo(json.dumps(result.to_dict()) if as_json else result.lines())


def _words(given: str | None) -> list[str] | None:
    return None if given is None else [word for word in given.split(",") if word]
