"""Runs of `ray-ep train` on labs, the same for the files that measure on shaped links."""

import json
import sys

FOUR = {
    "default": "80mbit",
    "pairs": [
        {"between": ["h0", "h1"], "bandwidth": "400mbit"},
        {"between": ["h2", "h3"], "bandwidth": "400mbit"},
        {"from": "h3", "to": "h0", "bandwidth": "20mbit"},
        {"from": "h3", "to": "h1", "bandwidth": "20mbit"},
    ],
}
TWO = {"default": "80mbit", "pairs": [{"from": "h1", "to": "h0", "bandwidth": "20mbit"}]}
RUN = """cluster.ranks=4 batch.sequences=48 batch.length=64 optim.learning_rate=0.001 optim.warmup_steps=1
optim.schedule=constant_with_warmup router.aux_loss=off exchange.kind=flat balance.in_step=off eval.every=0"""
RAY_EP = [sys.executable, "-c", "import sys; from ray_ep.cli import main; sys.exit(main())"]


def lines(path):
    """Whole lines of a .jsonl file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
