"""Commands that a newcomer copies from the documentation: what they train is small."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_ep.cli import main
from ray_ep.config import load_config
from ray_ep.rank.model import meta_model, model_config

DOCS = Path(__file__).parents[2] / "docs"


def commands(text):
    """`ray-ep train model.type=...` of a page, one each."""
    return [shlex.split(line)[2:] for line in re.findall(r"^ *(ray-ep train model\.type=.*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("place", ["getting-started.md", "--help"])
def test_a_model_by_type_in_an_example_is_small(place):
    help_text = CliRunner().invoke(main, ["train", "--help"], terminal_width=200).output
    found = commands(help_text if place == "--help" else (DOCS / place).read_text())
    assert found
    for overrides in found:
        model = meta_model(model_config(load_config(None, overrides).model, 256))
        assert sum(p.numel() for p in model.parameters()) < 2e7, overrides
