"""How the code is built: sizes, environment variables, error mapping. Named exceptions are listed here."""

import ast
import re
import sys
from importlib.metadata import requires
from pathlib import Path

from ray_ep.config import fields

ROOT = Path(__file__).parent.parent / "ray_ep"
FILES = sorted(ROOT.rglob("*.py"))
READS_ENVIRONMENT = {"driver/cluster.py", "cli/__init__.py", "bench/layer.py", "bench/trainers.py"}


MODULE_OF = {"pyyaml": "yaml", "cupy-cuda12x": "cupy", "nvidia-ml-py": "pynvml"}
COMES_WITH = {"tokenizers": "transformers", "markupsafe": "jinja2", "yaml": "omegaconf"}
OURS = {"ray_ep", "tests", "llep", "lab", "network", "nodes"}  # the last three: cluster/netlab


def imported(path):
    """Packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (name.split(".")[0] for name in names)


def functions(path):
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_files_and_functions_stay_small():
    assert len(FILES) > 25
    for path in [*FILES, *Path(__file__).parent.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.name != "utils.py"
    for path in FILES:
        for f in functions(path):
            assert f.end_lineno - f.lineno < 80, f"{path}:{f.name}"
            count = (
                len(f.args.args)
                + len(f.args.kwonlyargs)
                - (bool(f.args.args) and f.args.args[0].arg in ("self", "cls"))
            )
            most = 9 if f.name == "plan" else 8  # its arguments are the public contract of the planner
            assert count <= most, f"{path}:{f.name} has {count} parameters"


def test_every_module_says_what_lives_in_it():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_environment_is_read_in_the_launcher_only():
    for path in FILES:
        if str(path.relative_to(ROOT)) not in READS_ENVIRONMENT:
            assert "os.environ" not in path.read_text(), path


def test_nothing_is_left_for_later_in_the_code():
    for path in FILES:
        text = path.read_text()
        assert not any(word in text for word in ("TODO", "FIXME", "NotImplementedError")), path


def test_every_configuration_key_is_read_by_somebody():
    code = "\n".join(p.read_text() for p in FILES if p.parent.name != "config")
    for key, _, _ in fields():
        section, _, leaf = key.rpartition(".")
        reads = rf"(?<!import )(?<!from ray_ep)\b(?:cfg|{section or 'cfg'})\.(?:\w+\.)?{leaf}\b"
        assert re.search(reads, code), f"nobody reads {key}"


def test_whatever_is_imported_is_declared():
    """A package that happens to be installed here is missing elsewhere."""
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requires("ray_ep")}
    declared = {MODULE_OF.get(name, name.replace("-", "_")) for name in names}
    for path in [*FILES, *(ROOT.parent / "tests").rglob("*.py"), *(ROOT.parent / "cluster").rglob("*.py")]:
        for module in set(imported(path)) - sys.stdlib_module_names - OURS:
            assert COMES_WITH.get(module, module) in declared, f"{path}: {module}"


def test_whoever_starts_ray_says_which():
    """Without an address Ray joins whatever it finds on the machine, or looks for one that was killed."""
    root, here = ROOT.parent, Path(__file__)
    places = [root / "README.md", *(root / "docs").glob("*.md"), *FILES]
    places += [p for folder in ("tests", "cluster") for p in (root / folder).rglob("*.*") if p.suffix in (".py", ".md")]
    for path in places:
        if path != here:
            assert not re.search(r"\bray\.init\((?!address=)", path.read_text()), path
