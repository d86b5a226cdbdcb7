"""How the code is built: sizes, rooms, layers, environment variables, imports. Named exceptions are listed here."""

import ast
import functools
import re
import statistics
import sys
from collections import Counter
from importlib.metadata import requires
from pathlib import Path

from ray_ep.config import fields

TESTS = Path(__file__).parent
ROOT = TESTS.parent / "ray_ep"
FILES = sorted(p for p in ROOT.rglob("*.py") if not p.stem.endswith("_pb2"))  # those are generated
READS_ENVIRONMENT = {
    "driver/actors/cluster.py",
    "cli/__init__.py",
    "bench/layer.py",
    "bench/trainers.py",
    "chaos/processes.py",
    "observe/trackers/otel.py",  # OpenTelemetry's own, as its specification has them
}
LONG_FUNCTIONS = {  # more than 60 lines; never more than 80
    "moe/cpu/fused.py:backward",
    "moe/exchange/choose.py:choose",
    "moe/parallelize.py:parallelize",
}
LARGE_ROOMS = {"collective": 16, "placement/planner": 16, "driver/actors": 16}  # more than 15 modules
NINE_PARAMETERS = {"plan"}  # the public contract of the planner


MODULE_OF = {"pyyaml": "yaml", "cupy-cuda12x": "cupy", "nvidia-ml-py": "pynvml", "mlflow-skinny": "mlflow"}
MODULE_OF |= {"grpcio": "grpc", "grpcio-tools": "grpc_tools"}
MODULE_OF |= {"grpcio-health-checking": "grpc_health", "grpcio-reflection": "grpc_reflection", "protobuf": "google"}
COMES_WITH = {"tokenizers": "transformers", "markupsafe": "jinja2", "yaml": "omegaconf", "jsonschema": "ray"}
COMES_WITH |= {"huggingface_hub": "transformers"}
COMES_WITH |= {"aiohttp": "ray", "opentelemetry": "ray"}  # of its extra `default`
COMES_WITH |= {"starlette": "fastapi", "pydantic": "fastapi", "prometheus_client": "ray", "httpx": "openai"}
OURS = {"ray_ep", "tests", "lab", "network", "nodes"}  # the last three: cluster/netlab
FROM_SOURCE = {"llep", "deep_ep"}  # optional, and in no registry under its own name


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def imported(path):
    """Packages that a file imports, wherever in it."""
    for node in ast.walk(tree_of(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (name.split(".")[0] for name in names)


def functions():
    """(`file:name`, node) of every function of the package."""
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", node


def parameters(node):
    """How many parameters a caller sees; none for a kernel of Triton, which is launched and takes no objects."""
    if any(ast.unparse(d) == "triton.jit" for d in node.decorator_list):
        return 0
    a = node.args
    places = [*a.posonlyargs, *a.args]
    own = bool(places) and places[0].arg in ("self", "cls")
    return len(places) + len(a.kwonlyargs) - own


def lines(path):
    return len(path.read_text().splitlines())


def test_the_package_and_its_tests_were_found():
    assert len(FILES) > 100
    assert sum(1 for _ in functions()) > 1000
    assert len([*TESTS.rglob("test_*.py")]) > 100


def test_files_stay_small():
    assert [str(p) for p in [*FILES, *TESTS.rglob("*.py")] if lines(p) > 400] == []
    assert statistics.median(map(lines, FILES)) <= 150


def test_functions_stay_small():
    sizes = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert {name for name, size in sizes.items() if size > 60} - LONG_FUNCTIONS == set()
    assert {name for name, size in sizes.items() if size > 80} == set()
    assert statistics.median(sizes.values()) <= 12


def test_functions_take_at_most_eight_parameters():
    found = {name: parameters(node) for name, node in functions()}
    assert [n for n, count in found.items() if count > 8 + (n.partition(":")[2] in NINE_PARAMETERS)] == []


def test_rooms_hold_one_purpose_each():
    rooms = Counter(str(p.parent.relative_to(ROOT)) for p in FILES if p.name != "__init__.py")
    assert {room: n for room, n in rooms.items() if n > LARGE_ROOMS.get(room, 15)} == {}
    assert [str(p) for p in [*FILES, *TESTS.rglob("*.py")] if p.name in ("utils.py", "helpers.py", "common.py")] == []


def test_every_room_and_module_at_the_top_has_its_place_in_the_layers():
    """import-linter holds them (`make check`), of those that pyproject.toml lists."""
    text = (ROOT.parent / "pyproject.toml").read_text()
    listed = set(re.findall(r'"ray_ep\.(\w+)"', re.search(r"^layers = \[(.*?)\]", text, re.M | re.S)[1]))
    there = {
        p.stem if p.is_file() else p.name for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert there - {"__init__", "__main__"} == listed


def test_files_of_tests_that_are_in_no_package_have_names_of_their_own():
    """pytest cannot tell two of one name apart there."""
    names = Counter(p.name for p in TESTS.rglob("test_*.py") if not (p.parent / "__init__.py").exists())
    assert len(names) > 20
    assert [name for name, count in names.items() if count > 1] == []


def test_every_module_says_what_lives_in_it():
    assert [str(p) for p in FILES if not ast.get_docstring(tree_of(p))] == []


def constants(path):
    """(name, documented) of every public constant of a module; one docstring speaks for those on one line."""
    body = tree_of(path).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)]
        said = (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        )
        yield from ((n, said) for n in names if re.fullmatch("[A-Z][A-Z0-9_]+", n))


def test_every_public_constant_says_what_it_is():
    found = [(f"{p.relative_to(ROOT)}:{name}", said) for p in FILES for name, said in constants(p)]
    assert len(found) > 150
    assert [name for name, said in found if not said] == []


def test_the_environment_is_read_in_the_launcher_only():
    read = {str(p.relative_to(ROOT)) for p in FILES if re.search(r"\bos\.(environ|getenv)", p.read_text())}
    assert read == READS_ENVIRONMENT


def test_nothing_is_left_for_later_in_the_code():
    words = re.compile("TODO|FIXME|NotImplementedError")
    assert [str(p) for p in FILES if words.search(p.read_text())] == []


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
        for module in set(imported(path)) - sys.stdlib_module_names - OURS - FROM_SOURCE:
            assert COMES_WITH.get(module, module) in declared, f"{path}: {module}"


def test_whoever_starts_ray_says_which():
    """Without an address Ray joins whatever it finds on the machine, or looks for one that was killed."""
    root, here = ROOT.parent, Path(__file__)
    places = [root / "README.md", *(root / "docs").glob("*.md"), *FILES]
    places += [p for folder in ("tests", "cluster") for p in (root / folder).rglob("*.*") if p.suffix in (".py", ".md")]
    for path in places:
        if path != here:
            assert not re.search(r"\bray\.init\((?!address=)", path.read_text()), path
