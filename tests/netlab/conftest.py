"""Labs of real namespaces: brought up by the program as a user would, gone after each module."""

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

NETLAB = Path(__file__).parents[2] / "cluster" / "netlab"
sys.path.insert(0, str(NETLAB))  # the program's modules, as `import lab` and so on

import lab as labs  # noqa: E402
import network  # noqa: E402

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"),
    reason="a network lab needs root, and `ip` and `tc` (Debian: iproute2)",
)


def command(*arguments):
    """The command line of the program."""
    return [sys.executable, str(NETLAB / "netlab.py"), *map(str, arguments)]


def netlab(*arguments, status=0):
    """Run the program; (stdout, stderr)."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stderr + done.stdout
    return done.stdout, done.stderr


def processes(lab):
    """{pid: command line} of what was started in a lab: its name is in the environment, whatever namespace it is in."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"NETLAB={lab.name}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue  # it has ended meanwhile
    return found


def left(lab):
    """Everything of a lab that is still there."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    links = subprocess.run(["ip", "-o", "link", "show"], capture_output=True, text=True, check=True).stdout
    found = [line for line in names.splitlines() if lab.name in line]
    found += [line for line in links.splitlines() if any(h in line for h in ("p-h0", "p-h1", "p-h2"))]
    return found + [str(lab.folder)] * lab.folder.exists() + list(processes(lab).values())


def write_lab(folder, hosts, links, ranks=1):
    """A LAB.yaml whose lab has a name of its own; (path, Lab)."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    path = folder / f"{name}.yaml"
    hosts = [{"name": f"h{i}", "ranks": ranks} for i in range(hosts)]
    path.write_text(yaml.safe_dump({"hosts": hosts, "links": links}))
    return path, labs.read_lab(path)


@pytest.fixture(scope="module")
def make_lab(tmp_path_factory):
    """Write LAB.yaml files; whatever a test did with them is gone at the end."""
    made = []

    def make(hosts, links, ranks=1):
        made.append(write_lab(tmp_path_factory.mktemp("lab"), hosts, links, ranks))
        return made[-1]

    yield make
    for _, lab in made:
        network.remove(lab)
