"""The lm-evaluation-harness's tasks, computed by ranks: its own model interface over scores and an engine.

Needs the extra `lm-eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ray_ep.config.schema import Config
from ray_ep.driver.interrupt import Interrupt
from ray_ep.errors import BadInput, brief
from ray_ep.rank.generate.requests import Request, Sampling
from ray_ep.rank.generate.score import Row
from ray_ep.serve.answers import Answer
from ray_ep.serve.checked import Checked
from ray_ep.serve.engine_ranks import GeneratingRanks
from ray_ep.serve.job import answer_on
from ray_ep.serve.prompts import Prompt

_NEW = 256
"""Tokens of an answer where a task does not say how many."""


class RanksLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint on ranks, as the harness sees a model.

    Args:
        window: most tokens of one pass.
    """

    def __init__(self, cfg: Config, checked: Checked, ranks: GeneratingRanks, window: int, interrupt: Interrupt):
        super().__init__()
        self.cfg, self.checked, self.ranks, self.interrupt = cfg, checked, ranks, interrupt
        self.max_length = window
        self.tokenizer = checked.text.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text that begins."""
        return self.checked.eos[0] if self.checked.eos else 0

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.cfg.model.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text."""
        if self.tokenizer is None or add_special_tokens is None:
            return self.checked.text.encode(string)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        if self.tokenizer is None:
            raise BadInput("the checkpoint has no tokenizer, and so no chat template")
        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, **how))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(logarithm of its probability, whether it is the most likely one) of each continuation; cut on the left."""
        rows = []
        for _texts, context, continuation in requests:
            tokens = (*context, *continuation)[-self.max_length - 1 :]
            rows.append(Row(tokens, max(1, len(tokens) - len(continuation))))
        return [(s.logprob, s.greedy) for s in self.ranks.score(rows)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Logarithm of each text's probability."""
        rows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, predicted = make_disjoint_window(window)
                rows.append(Row((*context, *predicted), len(context)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, scored in zip(owners, self.ranks.score(rows), strict=True):
            totals[owner] += scored.logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its `until`."""
        prompts = [self._prompt(number, *request.args) for number, request in enumerate(requests)]
        texts: dict[str, str] = {}

        def told(answer: Answer) -> None:
            texts[answer.prompt.request.id] = str(answer.to_dict(self.checked.text.decode, self.checked.eos)["text"])

        answer_on(self.cfg, self.ranks, prompts, told, self.interrupt)
        return [_cut(texts[p.request.id], p.given) for p in prompts]

    def _prompt(self, number: int, context: str, how: dict[str, Any]) -> Prompt:
        until = how.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        new = min(int(how.get("max_gen_toks", _NEW)), self.max_length - 1)
        temperature = float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0
        sampling = Sampling(
            temperature=temperature, top_k=int(how.get("top_k", 0)), top_p=float(how.get("top_p", 1.0)),
            seed=self.cfg.seed + number,
        )  # fmt: skip
        tokens = self.tok_encode(context)[-(self.max_length - new) :] or [self.prefix_token_id]
        eos = self.checked.eos
        request = Request(id=str(number), prompt=tuple(tokens), max_new_tokens=new, sampling=sampling, eos=eos)
        return Prompt(until, request)


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [text.find(u) for u in until if u]
    return text[: min((e for e in ends if e >= 0), default=len(text))]


def check_tasks(names: Sequence[str], directory: str | None) -> Any:
    """The harness's manager of tasks, which knows all of `names`. Raises BadInput."""
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=directory)
    except Exception as e:  # of any kind: it reads whatever is in the directory
        raise BadInput(f"--task-dir {directory}: {brief(e)}") from None
    unknown = [n for n in names if n not in manager.all_tasks]
    if unknown:
        raise BadInput(f"--tasks: the lm-evaluation-harness knows no {', '.join(unknown)}; --task-dir names your own")
    return manager


def run_tasks(model: RanksLM, names: Sequence[str], manager: Any, limit: int | None) -> dict[str, Any]:
    """Figures of each task, as the harness gives them."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return {name: _plain(figures) for name, figures in found["results"].items()}


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if isinstance(value, (int, float)) and "stderr" not in key}
