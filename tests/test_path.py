"""The drawing in docs/architecture.md is the path that runs by default: a real start and a real step are followed."""

import inspect
import pkgutil
import re
import sys
import threading
from pathlib import Path

from click.testing import CliRunner

from ray_ep.cli import main
from ray_ep.collective.gloo_group import GlooGroup
from ray_ep.config import load_config
from ray_ep.placement import contiguous
from ray_ep.rank.data.corpus import load_corpus
from ray_ep.rank.model import model_config
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.trainer import Trainer
from tests.cli.test_bad_input import TINY

ROOT = Path(__file__).parent.parent
DRAWN = re.findall(r"└─ (ray_ep[\w.]+)", (ROOT / "docs" / "architecture.md").read_text())
HERE = DRAWN.index("ray_ep.rank.trainer.Trainer.train_step")
"""The first function that runs on a rank."""


def code_of(name):
    return inspect.unwrap(pkgutil.resolve_name(name)).__code__


def stacks_at(code, work):
    """What was being called whenever a function was entered on this thread while `work()` ran, outermost first."""
    stacks = []

    def entered(frame, event, arg):
        if event == "call" and frame.f_code is code:
            stack = []
            while frame is not None:
                stack.append(frame.f_code)
                frame = frame.f_back
            stacks.append(stack[::-1])

    sys.setprofile(entered)
    try:
        work()
    finally:
        sys.setprofile(None)
    return stacks


def named(stack):
    return [name for code in stack for name in DRAWN if code_of(name) is code]


def test_the_drawing_is_short():
    assert len(DRAWN) <= 7
    assert len({code_of(name).co_filename for name in DRAWN}) <= 6


def test_ray_ep_train_calls_what_the_drawing_names_up_to_the_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A mixture of experts. " * 400)
    far = ["cluster.address=127.0.0.1:1"]  # nobody is there: it ends before a rank is made

    def start():
        assert CliRunner().invoke(main, ["train", *TINY, *far]).exit_code == 2

    (stack,) = stacks_at(code_of(DRAWN[HERE - 1]), start)
    assert named(stack) == DRAWN[:HERE]


def test_a_default_step_reaches_all_to_all_through_what_the_drawing_names_in_that_order(tmp_path, ranks):
    (tmp_path / "text.txt").write_text("A mixture of experts. " * 400)
    cfg = load_config(None, [*TINY[:1], f"data.files=[{tmp_path}/text.txt]", "batch.sequences=4", "batch.length=16"])
    assert (cfg.balance.in_step, cfg.exchange.kind) == ("auto", "auto")
    corpus = load_corpus(cfg.data, cfg.batch.length, cfg.seed)
    config, lock = model_config(cfg.model, corpus.vocab_size), threading.Lock()
    placement = contiguous(2, 8, 2)

    def work(group):
        with lock:  # weights are drawn from torch's one global generator
            rank = Trainer(ModelRank(cfg, config, group, placement), corpus)
        if group.rank:
            return rank.train_step(0)
        return stacks_at(GlooGroup.all_to_all.__code__, lambda: rank.train_step(0))

    paths = [named(stack) for stack in ranks(2, work)[0]]
    assert DRAWN[HERE:] in paths
    assert {path[0] for path in paths} == {DRAWN[HERE]}
