"""`ray-ep eval`: how well a checkpoint predicts documents. A thin shell around ray_ep.serve.perplexity."""

from __future__ import annotations

import json

import click


@click.command("eval")
@click.argument("checkpoint", type=str, metavar="CKPT")
@click.argument("data", type=str, metavar="DATA")
@click.option("--window", type=int, help="Most tokens of a pass; the model's context, at most 1024, if not given.")
@click.option("--stride", type=int, help="Tokens that a window scores; half of --window if not given.")
@click.option("--packed", is_flag=True, help="Put documents behind each other; else each begins anew.")
@click.option("--config", "-c", type=click.Path(), help="YAML file with any subset of the configuration's keys.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON line.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def evaluate(
    checkpoint: str,
    data: str,
    window: int | None,
    stride: int | None,
    packed: bool,
    config: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Perplexity of CKPT, a transformers checkpoint of a MoE model, on DATA: a file, a glob or a URL of text.

    DATA is read as data.files is in training: text, JSON, CSV, Parquet or Arrow files, by data.text_field. Windows
    slide over each document; each of its tokens but the first is scored once.

    \b
      ray-ep eval /models/my-moe 'held-out/*.jsonl'
      ray-ep eval /models/my-moe corpus.txt --window 2048 --stride 512 cluster.ranks=4 --json
    """
    import ray_ep
    from ray_ep.cli.loading import loading
    from ray_ep.errors import BadInput

    given = [f"model.path={checkpoint}", f"data.files={json.dumps([data])}", *overrides]
    cfg = ray_ep.load_config(config, given)
    loading("eval")
    from ray_ep.driver.interrupt import Interrupt
    from ray_ep.observe.phases import Phases
    from ray_ep.rank.data.documents import open_source
    from ray_ep.serve.checked import check_checkpoint
    from ray_ep.serve.engine import formed
    from ray_ep.serve.perplexity import Windows, encoded, measure

    with Interrupt().caught() as interrupt, Phases() as phase:
        phase("reading the checkpoint's headers and the data")
        checked = check_checkpoint(cfg)
        length = window or min(checked.context or 1024, 1024)
        if not 2 <= length <= (checked.context or length):
            raise BadInput(f"--window {length}: allowed are 2 to {checked.context}, the model's context")
        step = stride or max(1, length // 2)
        if not 1 <= step < length:
            raise BadInput(f"--stride {step}: allowed are 1 to {length - 1}, below --window")
        documents = list(open_source(cfg.data).documents)
        vocabulary = int(checked.config.get_text_config().vocab_size)
        tokens = encoded(documents, checked.text.encode, vocabulary)
        rows = list(Windows(length, step, packed).rows(tokens, checked.eos))
        with formed(cfg, checked, interrupt, phase) as ranks:
            phase("scoring")
            found = measure(ranks, rows, len(documents), sum(map(len, documents)))
    click.echo(json.dumps(found.to_dict()) if as_json else found.words())
