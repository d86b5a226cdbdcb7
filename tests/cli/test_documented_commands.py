"""Every `ray-ep` command that README and guides show can be typed: verbs, options and keys exist. Starts nothing."""

import re
import shlex
from pathlib import Path

import click

from ray_ep.cli import main
from ray_ep.config.docs import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
KEYS = set(re.findall(r"^\| `([\w.]+)` \|", reference(), re.MULTILINE))


def commands(text):
    """The shown commands of a page, as words: of blocks, of indented lines and of `code` in a sentence."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"^    (.*)", prose, re.MULTILINE)
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    return [
        shlex.split(line)[1:] for line in (re.sub(r".*-- (?=ray-ep )", "", x) for x in lines) if line[:7] == "ray-ep "
    ]


def wrong(words):
    """What is not there of a command: its verb, options, keys."""
    command, words = main, list(words)
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            return []
        if words[0] not in command.commands:
            return words[:1]
        command = command.commands[words.pop(0)]
    known = {option for p in command.params for option in p.opts} | {"--help", "-h"}
    options = [w for w in words if re.match(r"-{1,2}[a-z]", w) and w.split("=")[0] not in known]
    takes_keys = any(isinstance(p, click.Argument) and p.name == "overrides" for p in command.params)
    keys = [w for w in words if takes_keys and re.match(r"[a-z_.]+=", w) and w.split("=")[0] not in KEYS]
    return options + keys


def test_what_is_misspelt_in_a_shown_command_is_found():
    shown = commands(
        "`ray-ep train optim.stepz=4`\n\n    ray-ep plan runs/a --slotz 4\n\n```\nray job -- ray-ep trian\n```\n"
    )
    assert sorted(word for words in shown for word in wrong(words)) == ["--slotz", "optim.stepz=4", "trian"]


def test_every_command_that_readme_and_guides_show_can_be_typed():
    shown = [(page.name, words) for page in PAGES for words in commands(page.read_text())]
    assert len(shown) > 60
    assert [(page, words, wrong(words)) for page, words in shown if wrong(words)] == []


def test_readme_links_every_page_of_docs():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in text] == []
