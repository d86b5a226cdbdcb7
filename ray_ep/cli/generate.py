"""`ray-ep generate`: answers to prompts from a checkpoint. A thin shell around ray_ep.serve.job."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ray_ep.config.schema import Config
    from ray_ep.driver.interrupt import Interrupt
    from ray_ep.observe.phases import Phases
    from ray_ep.rank.generate.requests import Delta
    from ray_ep.serve.answers import Answer, AnswerFile
    from ray_ep.serve.checked import Checked
    from ray_ep.serve.prompts import Prompt


@click.command()
@click.argument("checkpoint", type=str, metavar="CKPT")
@click.option("--prompt", "texts", multiple=True, help="Text to go on from; several if given several times.")
@click.option("--prompts", type=click.Path(), metavar="FILE", help="JSON lines with prompts: see above.")
@click.option("--out", type=click.Path(), metavar="FILE", help="Write answers there, as they come; goes on with it.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Of an answer, at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the most likely token (greedy).")
@click.option("--top-k", type=int, default=0, show_default=True, help="Choose among so many; 0: among all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Choose among those of this probability.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws; prompt number n has seed + n.")
@click.option("--config", "-c", type=click.Path(), help="YAML file with any subset of the configuration's keys.")
@click.option("--json", "as_json", is_flag=True, help="Print answers and, last, the figures as JSON lines.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def generate(checkpoint: str, texts: tuple[str, ...], prompts: str | None, out: str | None, **options: Any) -> None:
    """Answer prompts from CKPT, the directory of a transformers checkpoint of a MoE model.

    Requests are spread over the ranks, experts are shared by all. Tokens are those of transformers' generate; with a
    seed they are the same on any number of ranks. A line of FILE is {"prompt": "text"} or {"prompt": [token ids]} or
    {"messages": [{"role": "user", "content": "text"}]}, maybe with id, max_new_tokens, temperature, top_k, top_p, seed,
    logprobs.

    \b
      ray-ep generate /models/my-moe --prompt 'def main():'
      ray-ep generate /models/my-moe --prompts prompts.jsonl --out answers.jsonl cluster.ranks=4
      ray-ep export runs/NAME OUT && ray-ep generate OUT --prompt 'import'
    """
    import ray_ep
    from ray_ep.cli.loading import loading
    from ray_ep.errors import BadInput

    if bool(texts) == bool(prompts):
        raise BadInput("ray-ep generate: give --prompt TEXT or --prompts FILE, one of the two")
    cfg = ray_ep.load_config(options["config"], [f"model.path={checkpoint}", *options["overrides"]])
    loading("generate")
    from ray_ep.driver.interrupt import Interrupt
    from ray_ep.observe.phases import Phases
    from ray_ep.serve.answers import AnswerFile
    from ray_ep.serve.checked import check_checkpoint

    with Interrupt().caught() as interrupt, Phases() as phase:
        phase("reading the checkpoint's headers and the prompts")
        checked = check_checkpoint(cfg)
        asked = _asked(cfg, checked, texts, prompts, options)
        file = AnswerFile(Path(out), asked) if out else None
        if file is not None and not file.left:
            click.echo(f"ray-ep: nothing to do: all {len(asked)} answers are in {out}", err=True)
            return
        _answer(cfg, checked, asked, file, options["as_json"], (phase, interrupt))


def _asked(
    cfg: Config, checked: Checked, texts: tuple[str, ...], prompts: str | None, options: dict[str, Any]
) -> list[Prompt]:
    from ray_ep.rank.generate.requests import Sampling
    from ray_ep.serve.prompts import Defaults, Reader

    sampling = Sampling(**{k: options[k] for k in ("temperature", "top_k", "top_p", "seed")})
    reader = Reader(cfg, checked, Defaults(options["max_new_tokens"], sampling))
    if prompts:
        return reader.file(Path(prompts))
    return [reader.one({"prompt": text}, n, _where(text)) for n, text in enumerate(texts)]


def _where(text: str) -> str:
    """Names a prompt in an error; a long one by its beginning."""
    return f"--prompt {text!r}" if len(text) <= 80 else f"--prompt {text[:80]!r}..."


def _answer(
    cfg: Config,
    checked: Checked,
    asked: list[Prompt],
    file: AnswerFile | None,
    as_json: bool,
    start: tuple[Phases, Interrupt],
) -> None:
    from ray_ep.errors import RequestError
    from ray_ep.serve.job import Told, answer_all

    stream = _Stream(checked) if len(asked) == 1 and not as_json and file is None else None

    def told(answer: Answer) -> None:
        line = answer.to_dict(checked.text.decode, checked.eos)
        if file is not None:
            file.write(line)
        elif stream is None:
            click.echo(json.dumps(line, ensure_ascii=False))

    def say(words: str) -> None:
        click.echo(f"ray-ep: {words}", err=True)

    delta = stream.add if stream is not None else (lambda delta: None)
    with nullcontext() if file is None else file:
        left = asked if file is None else file.left
        try:
            figures = answer_all(cfg, checked, left, Told(told, start[0], say, delta), start[1])
        except RequestError as e:
            go_on = f"; the same command goes on behind the answers in {file.path}" if file is not None else ""
            raise RequestError(f"{e}{go_on}") from None
    if stream is not None:
        click.echo()
    say(figures.words())
    if as_json:
        click.echo(json.dumps(figures.to_dict()))


class _Stream:
    """One answer on the terminal as it comes, by whole characters."""

    def __init__(self, checked: Checked):
        self.checked, self.shown = checked, ""
        self.tokens: list[int] = []

    def add(self, delta: Delta) -> None:
        """More tokens."""
        self.tokens += [t for t in delta.tokens if t not in self.checked.eos]
        text = self.checked.text.decode(self.tokens)
        if delta.done or not text.endswith("\ufffd"):
            click.echo(text[len(self.shown) :], nl=False)
            self.shown = text
