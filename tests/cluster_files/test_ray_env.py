"""cluster/ray.env: settings that Ray reads, and the same in every kind of cluster."""

import subprocess

from ray._raylet import Config

from tests.cluster_files.manifests import containers, read
from tests.cluster_files.shell import CLUSTER, ray_knows, split


def settings():
    lines = (CLUSTER / "ray.env").read_text().splitlines()
    return split("; ".join(line for line in lines if line and not line.startswith("#")))[1]


def test_a_shell_that_reads_the_file_has_its_settings():
    done = subprocess.run(
        ["env", "-i", "PATH=/bin:/usr/bin", "sh", "-c", ". ./ray.env; env"],
        cwd=CLUSTER,
        capture_output=True,
        text=True,
        check=True,
    )
    there = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert len(settings()) == 7
    assert settings().items() <= there.items()
    assert done.stderr == ""


def test_every_setting_is_one_that_ray_reads():
    assert [name for name in settings() if name != "RAY_AUTH_MODE" and not ray_knows(name)] == []
    assert ray_knows("RAY_AUTH_MODE")
    assert not ray_knows("RAY_health_check_perod_ms")
    assert not ray_knows("RAY_AUTH_MODES")


def test_a_lost_node_is_noticed_within_seconds():
    """The head asks every period; a node is dead once `threshold` answers in turn have not come."""

    def notice_s(value):
        names = ("period_ms", "timeout_ms", "failure_threshold")
        period, timeout, threshold = (int(value(f"health_check_{name}")) for name in names)
        return threshold * (period + timeout) / 1000

    assert notice_s(lambda name: settings()[f"RAY_{name}"]) <= 6
    assert notice_s(lambda name: getattr(Config, name)()) > 30  # what Ray does by itself


def test_pods_have_the_same_settings():
    """There the operator sets the mode of authentication, from authOptions."""
    wanted = {name: value for name, value in settings().items() if name != "RAY_AUTH_MODE"}
    found = [c for name in ("raycluster", "rayjob") for c in containers(read(name))]
    assert len(found) == 8
    for container in found:
        assert {e["name"]: e["value"] for e in container["env"]} == wanted
