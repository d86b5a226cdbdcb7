"""Shell commands of cluster files as words, and what Ray's and our own command lines say of them."""

import contextlib
import functools
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import click
import ray
from ray.scripts.scripts import cli as ray_cli

from ray_ep.cli import main as ray_ep_cli
from ray_ep.config import load_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RAY = Path(ray.__file__).parent


def split(command):
    """(simple commands as words, variables that it sets) of a line of shell, what `$(…)` calls included."""
    inner = re.findall(r"\$\(([^()]*)\)", command)
    lexer = shlex.shlex(re.sub(r"\$\([^()]*\)", "value", command), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    calls, words, variables = [], [], {}
    skip = False  # a file that is written or read
    for word in [*lexer, ";"]:
        if re.fullmatch(r"[;&|]+", word):
            calls += [words] if words else []
            words = []
        elif re.fullmatch(r"[<>&]+", word):
            if words and words[-1].isdigit():  # 2>&1
                words.pop()
            skip = True
        elif skip:
            skip = False
        elif not words and re.match(r"\w+=", word):
            variables.update([word.split("=", 1)])
        else:
            words.append(word)
    for words in calls:
        if words[0] == "export":
            variables.update(w.split("=", 1) for w in words[1:])
    calls = [words[1:] if words[0] in ("nohup", "!") else words for words in calls if words[0] != "export"]
    for text in inner:
        more, set_there = split(text)
        calls += more
        variables |= set_there
    return calls, variables


@functools.cache
def script(name):
    """A Python file of cluster/ as a module."""
    spec = importlib.util.spec_from_file_location(name, CLUSTER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_ray(words):
    """Take `ray …` apart as Ray does; the parameters. Raises click.ClickException."""
    return _parse(ray_cli, words[1:])


def _parse(command, words):
    while isinstance(command, click.Group):
        name, words = words[0], words[1:]
        if name not in command.commands:
            raise click.UsageError(f"no such command: {name}")
        command = command.commands[name]
    return command.make_context(command.name, list(words)).params


def check(words):
    """Take one simple command apart as its program does; raises what that raises."""
    program, rest = words[0], words[1:]
    if program == "ray":
        parse_ray(words)
    elif program == "ray-ep":
        load_config(None, rest[1:]) if rest[0] == "train" else _parse(ray_ep_cli, rest)
    elif program == "python" and (own := re.fullmatch(r"(?:~|/opt)/ray_ep/cluster/(\w+)\.py", rest[0])):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                script(own[1]).parser().parse_args(rest[1:])
            except SystemExit:
                raise ValueError(said.getvalue()) from None


@functools.cache
def _text_of_ray():
    files = [p for folder in ("_private", "autoscaler", "dashboard/modules/job") for p in (RAY / folder).rglob("*.py")]
    return "\n".join(p.read_text() for p in files)


@functools.cache
def _programs_of_ray():
    return [p.read_bytes() for p in (RAY / "core/src/ray/gcs/gcs_server", *RAY.glob("_raylet*.so"))]


def ray_knows(name):
    """Whether Ray reads the environment variable `name`: its table of settings is compiled in, name by name."""
    compiled = b"\0" + name[len("RAY_") :].encode() + b"\0"
    return any(compiled in program for program in _programs_of_ray()) or f'"{name}"' in _text_of_ray()
