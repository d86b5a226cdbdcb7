"""Why Ray could not be started or joined: one line that names what the user set. Real sockets, no Ray."""

import http.server
import platform
import socket
import threading

import pytest
import ray

from ray_ep.config import load_config
from ray_ep.driver.actors.cluster import connected, starting
from ray_ep.driver.actors.joining import check_head, check_temporary, refusal
from ray_ep.errors import ClusterError

MISMATCH = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n    Python: 3.9.1\n"
    f"This process on node 10.0.0.1 was started with:\n    Ray: {ray.__version__}\n    Python: 3.11.2\n"
)
LONG = "/tmp/" + "x" * 120
SOCKET = OSError(f"validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: {LONG}/ray/session")


@pytest.fixture
def web_server():
    """Port of a server that is no Ray."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *a: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_an_address_of_something_else_than_ray_is_refused_at_once(web_server):
    with pytest.raises(ClusterError, match=r"^RAY_ADDRESS='a': no Ray listens there.*ray start --head"):
        check_head(f"127.0.0.1:{web_server}", "RAY_ADDRESS='a'", {}, 10)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_at_once(scheme):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(ClusterError, match=r"^cluster\.address='a': no Ray cluster answers there: .*refused"):
        check_head(f"{scheme}127.0.0.1:{port}", "cluster.address='a'", {})


@pytest.mark.parametrize(
    ("variable", "address", "says"),
    [("", "", "starting Ray"), ("local", "", "starting Ray"), ("h:1", "", "joining the cluster"),
     ("", "h:1", "joining the cluster")],
)  # fmt: skip
def test_what_is_said_before_names_whether_a_cluster_is_joined(monkeypatch, variable, address, says):
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert starting(load_config(None, [f"cluster.address={address}"]).cluster) == says


@pytest.mark.parametrize("address", ["auto", "http://127.0.0.1:1", ""])
def test_what_is_no_host_and_port_is_left_to_ray(address):
    check_head(address, "", {})


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_full_temporary_directory_is_named_before_a_local_ray_starts(tmp_path, monkeypatch, name):
    free = {"bytes": 90_000}
    monkeypatch.setattr("shutil.disk_usage", lambda where: type("usage", (), {"free": free["bytes"]}))
    with pytest.raises(ClusterError) as e:
        check_temporary({name: str(tmp_path)})
    assert str(e.value).startswith(f"{name}={tmp_path} has 0.1 MB free")
    free["bytes"] = 10**9
    check_temporary({name: str(tmp_path)})


def test_a_temporary_directory_that_is_not_there_is_left_to_ray(tmp_path):
    check_temporary({"RAY_TMPDIR": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("error", "address", "environ", "says"),
    [
        (SOCKET, "", {"RAY_TMPDIR": LONG}, [f"RAY_TMPDIR={LONG}", "too long", "at most 40"]),
        (SOCKET, "", {"TMPDIR": LONG}, [f"TMPDIR={LONG}", "set RAY_TMPDIR"]),
        (NotADirectoryError(20, "Not a directory", "/f/ray"), "", {"RAY_TMPDIR": "/f"}, ["RAY_TMPDIR=/f", "Not a dir"]),
        (PermissionError(13, "Permission denied", "/tmp/ray"), "", {}, ["/tmp cannot be", "Permission denied"]),
        (OSError(28, "No space left on device"), "", {"TMPDIR": "/small"}, ["TMPDIR=/small", "No space left"]),
        (RuntimeError(MISMATCH), "RAY_ADDRESS='h:1'", {}, ["Ray 2.40.0 and Python 3.9.1", platform.python_version()]),
        (RuntimeError("Invalid auth token"), "RAY_ADDRESS='h:1'", {"RAY_AUTH_MODE": "token"},
         ["'token' here", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"]),
        (ConnectionError("Could not find any running Ray instance."), "cluster.address='auto'", {},
         ["cluster.address='auto'", "Could not find any running Ray", "ray start --head"]),
        (RuntimeError("two\nlines"), "", {}, ["a local Ray could not be started: two lines"]),
    ],
)  # fmt: skip
def test_what_ray_raises_becomes_one_line_that_names_what_was_set(error, address, environ, says):
    line = refusal(error, address, environ)
    assert [s for s in says if s not in line] == [], line
    assert "\n" not in line
    assert line.startswith(address)


@pytest.mark.parametrize("error", [Exception("The current node timed out during startup."), OSError("no"), KeyError(7)])
def test_whatever_ray_raises_as_it_starts_is_told_as_ours(monkeypatch, error):
    def init(**options):
        raise error

    monkeypatch.setattr(ray, "init", init)  # a start that takes 60 s to fail
    cfg = load_config(overrides=["cluster.address=local"]).cluster
    with pytest.raises(ClusterError, match=r"^a local Ray could not be|^\S+ cannot be Ray"), connected(cfg):
        pass
