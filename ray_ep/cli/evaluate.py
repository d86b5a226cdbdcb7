"""`ray-ep eval`: how well a checkpoint predicts documents, or does tasks. A thin shell around ray_ep.serve."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ray_ep.config.schema import Config
    from ray_ep.driver.interrupt import Interrupt
    from ray_ep.observe.phases import Phases
    from ray_ep.serve.checked import Checked


@click.command("eval")
@click.argument("checkpoint", type=str, metavar="CKPT")
@click.argument("rest", nargs=-1, metavar="[DATA] [key=value]...")
@click.option("--window", type=int, help="Most tokens of a pass; the model's context, at most 1024, if not given.")
@click.option("--stride", type=int, help="Tokens that a window scores; half of --window if not given.")
@click.option("--packed", is_flag=True, help="Put documents behind each other; else each begins anew.")
@click.option("--tasks", help="In place of DATA: tasks of the lm-evaluation-harness, such as arc_easy,hellaswag.")
@click.option("--task-dir", type=click.Path(exists=True, file_okay=False), help="Directory with more task files.")
@click.option("--limit", type=click.IntRange(1), help="Examples of each task; all if not given.")
@click.option("--config", "-c", type=click.Path(), help="YAML file with any subset of the configuration's keys.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON line.")
def evaluate(checkpoint: str, rest: tuple[str, ...], config: str | None, as_json: bool, **options: Any) -> None:
    """Perplexity of CKPT, a transformers checkpoint of a MoE model, on DATA: a file, a glob or a URL of text.

    DATA is read as data.files is in training: text, JSON, CSV, Parquet or Arrow files, by data.text_field. Windows
    slide over each document; each of its tokens but the first is scored once. With --tasks (the extra lm-eval), what
    the lm-evaluation-harness says of its tasks.

    \b
      ray-ep eval /models/my-moe 'held-out/*.jsonl'
      ray-ep eval /models/my-moe corpus.txt --window 2048 --stride 512 cluster.ranks=4 --json
      ray-ep eval /models/my-moe --tasks arc_easy,hellaswag --limit 100
    """
    import ray_ep
    from ray_ep.cli.loading import loading
    from ray_ep.errors import BadInput

    data, overrides = [a for a in rest if "=" not in a], [a for a in rest if "=" in a]
    if len(data) != (0 if options["tasks"] else 1):
        raise BadInput("ray-ep eval: give one DATA (a file, a glob or a URL without '='), or --tasks, one of the two")
    files = [f"data.files={json.dumps(data)}"] if data else []
    cfg = ray_ep.load_config(config, [f"model.path={checkpoint}", *files, *overrides])
    loading("eval")
    from ray_ep.driver.interrupt import Interrupt
    from ray_ep.observe.phases import Phases
    from ray_ep.serve.checked import check_checkpoint

    with Interrupt().caught() as interrupt, Phases() as phase:
        phase("reading the checkpoint's headers")
        checked = check_checkpoint(cfg)
        length = options["window"] or min(checked.context or 1024, 1024)
        if not 2 <= length <= (checked.context or length):
            raise BadInput(f"--window {length}: allowed are 2 to {checked.context}, the model's context")
        if options["tasks"]:
            told, words = _tasks(cfg, checked, length, options, (phase, interrupt))
        else:
            told, words = _perplexity(cfg, checked, length, options, (phase, interrupt))
    click.echo(json.dumps(told) if as_json else words)


def _perplexity(
    cfg: Config, checked: Checked, length: int, options: dict[str, Any], start: tuple[Phases, Interrupt]
) -> tuple[dict[str, Any], str]:
    from ray_ep.errors import BadInput
    from ray_ep.rank.data.documents import open_source
    from ray_ep.serve.engine import formed
    from ray_ep.serve.perplexity import Windows, encoded, measure

    phase, interrupt = start
    stride = options["stride"] or max(1, length // 2)
    if not 1 <= stride < length:
        raise BadInput(f"--stride {stride}: allowed are 1 to {length - 1}, below --window")
    phase("reading the data")
    documents = list(open_source(cfg.data).documents)
    vocabulary = int(checked.config.get_text_config().vocab_size)
    tokens = encoded(documents, checked.text.encode, vocabulary)
    rows = list(Windows(length, stride, options["packed"]).rows(tokens, checked.eos))
    with formed(cfg, checked, interrupt, phase) as ranks:
        phase("scoring")
        found = measure(ranks, rows, len(documents), sum(map(len, documents)))
    return found.to_dict(), found.words()


def _tasks(
    cfg: Config, checked: Checked, length: int, options: dict[str, Any], start: tuple[Phases, Interrupt]
) -> tuple[dict[str, Any], str]:
    from ray_ep.errors import BadInput
    from ray_ep.serve.engine import formed

    try:
        from ray_ep.serve.harness import RanksLM, check_tasks, run_tasks
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != "lm_eval":
            raise
        raise BadInput("--tasks needs the lm-evaluation-harness: pip install 'ray_ep[lm-eval]'") from None
    phase, interrupt = start
    names = [name for name in options["tasks"].split(",") if name]
    manager = check_tasks(names, options["task_dir"])
    with formed(cfg, checked, interrupt, phase) as ranks:
        phase("computing the tasks")
        model = RanksLM(cfg, checked, ranks, length, interrupt)
        found = run_tasks(model, names, manager, options["limit"])
    lines = [f"{task}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()) for task, figures in found.items()]
    return found, "\n".join(lines)
