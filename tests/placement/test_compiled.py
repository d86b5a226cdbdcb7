"""Kernels on disk: what is loaded again, and what is compiled anew when a source changes."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import ray_ep
from ray_ep.placement.compiled import sources_digest
from ray_ep.placement.in_step import search

CALLEE = """
from typing import Any, NamedTuple
from ray_ep.placement.compiled import inlined, kernel

class {pair}(NamedTuple):
    a: Any
    b: Any

@{how}
def {name}(x):
    return x + {plus}
"""
CALLER = """
from kernels_callee import PAIR, added as grown
from ray_ep.placement.compiled import kernel

@kernel
def twice(pair):
    return 2 * grown(PAIR(pair.a, 0).a)
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Writes the two files where they changed, loads them afresh, and calls the caller's kernel."""

    def load(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    def run(pair="Pair", **callee):
        text = CALLEE.format(**{"how": "kernel", "name": "added", "plus": 1, "pair": pair, **callee})
        first = load("kernels_callee", text)
        kernel = load("kernels_caller", CALLER.replace("PAIR", pair)).twice
        found = kernel(getattr(first, pair)(3, 4))
        return found, sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())

    return run


def test_a_kernel_whose_sources_stay_is_loaded_and_one_whose_callee_changed_is_compiled_anew(modules):
    assert modules() == (8, 0, 1)
    assert modules() == (8, 1, 0)
    assert modules(plus=5) == (16, 0, 1)
    assert modules(plus=5, how="inlined") == (16, 0, 1)
    assert modules(plus=5, how="inlined") == (16, 1, 0)


def test_after_an_upgrade_that_renames_a_named_tuple_the_kernels_of_before_are_compiled_anew(modules):
    assert modules() == (8, 0, 1)
    assert modules(pair="Couple") == (8, 0, 1)
    assert modules(pair="Couple") == (8, 1, 0)


def test_the_digest_reaches_kernels_in_other_files_and_their_constants(monkeypatch):
    before = sources_digest(search.plan_step.py_func)
    assert sources_digest(search.plan_step.py_func) == before
    monkeypatch.setattr(search, "MOST_LEVELS", search.MOST_LEVELS + 1)  # read by `search`, which `plan_step` calls
    changed = sources_digest(search.plan_step.py_func)
    assert changed != before
    monkeypatch.setitem(search.fill.py_func.__globals__, "SHORTLIST", np.int64(5))  # in fill.py
    assert sources_digest(search.plan_step.py_func) not in (before, changed)


def test_every_kernel_is_compiled_by_the_one_decorator():
    folder = Path(ray_ep.__file__).parent
    others = [p.name for p in folder.rglob("*.py") if re.search(r"\bn?jit\(|@n?jit", p.read_text())]
    assert others == ["compiled.py"]
