"""The `ray-ep` command: verbs, exit status, messages. Thin shells around ray_ep's public functions.

Imports torch and Ray only inside a verb, so `ray-ep --help` answers at once.
"""

from __future__ import annotations

import click

import ray_ep


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ray_ep.__version__, prog_name="ray-ep")
def main() -> None:
    """Mixture-of-Experts models with expert parallelism on a Ray cluster."""
