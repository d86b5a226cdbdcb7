"""The image: what it copies is there, what it installs is what is pinned, nobody in it is root."""

import fnmatch
import re
from importlib.metadata import metadata

from tests.cluster_files.shell import CLUSTER, ROOT

KNOWN = {"FROM", "ARG", "RUN", "COPY", "ENV", "USER", "WORKDIR"}


def instructions(text):
    """(name, rest) of each instruction; a line that ends in a backslash goes on, comments are none."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def ours():
    return instructions((CLUSTER / "Dockerfile").read_text())


def sent(path):
    """Whether .dockerignore lets `path` into the build; the last line that matches decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").removeprefix("**/")
        if fnmatch.fnmatch(path, pattern) or path.startswith(f"{pattern}/"):
            kept = line.startswith("!")
    return kept


def test_instructions_are_taken_apart():
    text = "# a\nFROM b\nRUN c \\\n    # no\n    && d\n\nCOPY e f ./\n"
    assert instructions(text) == [("FROM", "b"), ("RUN", "c && d"), ("COPY", "e f ./")]


def test_every_instruction_is_one():
    assert ours()[0][0] == "ARG"
    assert {name for name, _ in ours()} <= KNOWN


def test_whatever_is_copied_is_there_and_is_sent_to_the_builder():
    sources = [path for name, rest in ours() if name == "COPY" for path in rest.split()[:-1]]
    assert {"ray_ep", "constraints.txt", "cluster/machine.py"} <= {*sources}
    assert [path for path in sources if not (ROOT / path).exists()] == []
    assert [path for path in sources if not sent(path)] == []
    assert not sent("runs/a/config.yaml")
    assert not sent("tests")


def test_every_argument_that_is_used_is_declared_before():
    """One of before FROM is seen by FROM alone."""
    declared, after_from = set(), False
    for name, rest in ours():
        for used in re.findall(r"\$\{(\w+)\}", rest):
            assert used in declared, used
        if name == "FROM":
            declared, after_from = set(), True
        if name == "ARG":
            declared.add(rest.split("=")[0])
    assert after_from


def test_processor_and_gpu_are_one_argument():
    text = (CLUSTER / "Dockerfile").read_text()
    assert dict(rest.split("=", 1) for name, rest in ours() if name == "ARG")["TORCH"] == "cpu"
    assert "--index-url https://download.pytorch.org/whl/${TORCH}" in text
    extras = re.search(r"EXTRAS=\[(\w+)\]", text)[1]
    assert extras in metadata("ray_ep").get_all("Provides-Extra")


def test_every_install_takes_the_pinned_versions():
    installs = [rest for name, rest in ours() if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("-c constraints.txt" in rest for rest in installs)
    pinned = (ROOT / "constraints.txt").read_text()
    assert {"ray", "torch"} <= set(re.findall(r"^([\w-]+)==", pinned, re.M))


def test_python_is_one_that_the_package_takes():
    least = metadata("ray_ep")["Requires-Python"]
    python = dict(rest.split("=", 1) for name, rest in ours() if name == "ARG")["PYTHON"]
    assert tuple(map(int, python.split("."))) >= tuple(map(int, least.removeprefix(">=").split(".")))


def test_nobody_in_the_image_is_root_and_pods_run_as_its_user():
    assert [rest for name, rest in ours() if name == "USER"] == ["ray"]
    uid = re.search(r"useradd --uid (\d+) .* ray$", "\n".join(rest for _, rest in ours()), re.M)[1]
    assert f"runAsUser: {uid}," in (CLUSTER / "kuberay" / "raycluster.yaml").read_text()


def test_what_pods_run_from_the_image_is_copied_there():
    named = set(re.findall(r"/opt/ray_ep/(\S+\.py)", (CLUSTER / "kuberay" / "raycluster.yaml").read_text()))
    copied = " ".join(rest for name, rest in ours() if name == "COPY")
    assert ("WORKDIR", "/opt/ray_ep") in ours()
    assert named == {"cluster/machine.py"}
    assert "cluster/machine.py cluster/ray.env cluster/" in copied
