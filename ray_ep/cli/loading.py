"""The first words of a command that takes longer than a moment: on stderr, before torch and Ray are imported."""

from __future__ import annotations

import sys

import click


def loading(verb: str, what: str = "torch, transformers and Ray", mark: str = "") -> None:
    """Say that `verb` loads what it needs; on a cold machine that takes most of a minute. Silent once it is loaded.

    At once, not after a while: loading a library keeps every other thread of Python from running. `mark` goes before
    it, as before every line of a run with a forced router.
    """
    if "torch" not in sys.modules:
        click.echo(f"{mark}ray-ep {verb}: loading {what} ...", err=True)
