"""What a rented machine asks its cloud, with a metadata service of the test's own behind a real socket."""

import http.server
import json
import re
import subprocess
import sys
import threading
from datetime import datetime, timezone

import pytest
from ray._private.label_utils import validate_label_value

from tests.cluster_files.shell import CLUSTER, script

NOW = datetime(2026, 11, 29, 12, 0, 0, tzinfo=timezone.utc).timestamp()
MACHINE = script("machine")
REPORT = """
    Fabric
        State                             : Completed
        Status                            : Success
        CliqueId                          : {clique}
        ClusterUUID                       : {uuid}
"""
UUID = "b78daaec-1c1e-4e6c-bad7-2a2b5e6c4d3a"


class Service(http.server.BaseHTTPRequestHandler):
    """Says what `says` has for a path; 404 for all else, 401 without what each cloud wants to see."""

    def do_PUT(self):
        self._say("a-token" if self.path == "/latest/api/token" else None)

    def do_GET(self):
        asked = {key.lower(): value for key, value in self.headers.items()}
        wanted = self.server.wanted.items()
        self._say(self.server.says.get(self.path) if wanted <= asked.items() else 401)

    def _say(self, text):
        self.send_response(401 if text == 401 else 404 if text is None else 200)
        self.end_headers()
        if isinstance(text, str):
            self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


WANTED = {
    "aws": {"x-aws-ec2-metadata-token": "a-token"},
    "gcp": {"metadata-flavor": "Google"},
    "azure": {"metadata": "true"},
}


@pytest.fixture
def service():
    """service(cloud, {path: text}) -> (get, address)."""
    servers = []

    def start(cloud, says):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
        server.says, server.wanted = says, WANTED[cloud]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        base = f"http://127.0.0.1:{server.server_port}"
        return MACHINE.metadata(cloud, base), base

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"


def azure_event(**changed):
    event = {"EventType": "Preempt", "Resources": ["me"], "NotBefore": "Sun, 29 Nov 2026 12:00:30 GMT"}
    return {AZURE_NAME: "me", AZURE_EVENTS: json.dumps({"Events": [event | changed]})}


@pytest.mark.parametrize(
    ("cloud", "says", "seconds"),
    [
        ("aws", {}, None),
        (
            "aws",
            {"/latest/meta-data/spot/instance-action": '{"action":"terminate","time":"2026-11-29T12:02:00Z"}'},
            120,
        ),
        ("aws", {"/latest/meta-data/spot/instance-action": '{"action":"stop","time":"2026-11-29T11:59:00Z"}'}, 0),
        ("gcp", {"/computeMetadata/v1/instance/preempted": "FALSE\n"}, None),
        ("gcp", {"/computeMetadata/v1/instance/preempted": "TRUE\n"}, 30),
        ("azure", {AZURE_NAME: "me", AZURE_EVENTS: '{"Events": []}'}, None),
        ("azure", azure_event(), 30),
        ("azure", azure_event(NotBefore=""), 0),
        ("azure", azure_event(Resources=["another"]), None),
        ("azure", azure_event(EventType="Reboot"), None),
    ],
)
def test_a_notice_says_how_many_seconds_are_left(service, cloud, says, seconds):
    get, _ = service(cloud, says)
    told = MACHINE.notice(cloud, get, NOW)
    assert (told and told.seconds) == seconds
    assert told is None or cloud in told.why


def test_a_machine_waits_for_its_notice_through_answers_that_do_not_come(capsys):
    answers = iter(["FALSE", OSError("no route"), "FALSE", "TRUE"])

    def get(_):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert MACHINE.watch("gcp", get, poll_s=0.0).seconds == 30
    assert "no route" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cloud", "says", "block"),
    [
        ("aws", {"/latest/meta-data/placement/availability-zone-id": "use2-az1"}, "use2-az1"),
        (
            "aws",
            {
                "/latest/meta-data/placement/availability-zone-id": "use2-az1",
                "/latest/meta-data/placement/group-name": "my group",
            },
            "my-group.use2-az1",
        ),
        ("aws", {}, "unknown"),
        (
            "gcp",
            {
                "/computeMetadata/v1/instance/attributes/physical_host_topology": json.dumps(
                    {"cluster": "c", "block": "b1", "subblock": "s2", "host": "h3"}
                )
            },
            "b1.s2",
        ),
        ("gcp", {}, "unknown"),
        ("azure", {"/metadata/instance/compute/zone?api-version=2021-02-01&format=text": "1"}, "1"),
    ],
)
def test_a_block_is_what_the_cloud_says_of_the_place(service, cloud, says, block):
    get, _ = service(cloud, says)
    assert MACHINE.block(cloud, get, "") == block
    validate_label_value(block)


def test_a_block_is_the_nvlink_domain_where_there_is_one(service):
    get, _ = service("aws", {"/latest/meta-data/placement/availability-zone-id": "use2-az1"})
    inside = REPORT.format(clique=32766, uuid=UUID)
    assert MACHINE.block("aws", get, inside) == f"{UUID}.32766"
    validate_label_value(f"{UUID}.32766")
    for ends_at_the_machine in (
        REPORT.format(clique=0, uuid="00000000-0000-0000-0000-000000000000"),
        REPORT.format(clique="N/A", uuid="N/A"),
        "",
    ):
        assert MACHINE.block("aws", get, ends_at_the_machine) == "use2-az1"


def test_whatever_a_cloud_says_becomes_a_label_that_ray_takes(service):
    says = {"/latest/meta-data/placement/group-name": "-" + "a b/ä" * 30}
    get, _ = service("aws", says)
    found = MACHINE.block("aws", get, "")
    validate_label_value(found)
    assert re.fullmatch(r"a[\w.-]{20,62}", found)


def run(*words):
    return subprocess.run([sys.executable, CLUSTER / "machine.py", *words], capture_output=True, text=True, timeout=60)


def test_the_command_prints_the_block(service):
    _, base = service("gcp", {})
    assert run("block", "--cloud=gcp", f"--base={base}").stdout == "unknown\n"


def test_the_command_prints_a_block_where_no_cloud_answers():
    done = run("block", "--cloud=aws", "--base=http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (0, "unknown\n")
    assert "no answer from the metadata service" in done.stderr
