"""What a rented machine knows about itself: the block that it stands in, and that it is about to be taken away.

    python machine.py block --cloud aws            prints the block, for `ray start --labels=ep.block=…`
    python machine.py watch --cloud aws --address HEAD:6379   waits for the cloud's notice, then drains this Ray node
    python machine.py drain --address HEAD:6379 --seconds 90  drains it now, and returns once no rank is on it

A drained node's ranks hand over what they own and leave (docs/elastic.md). Only a drain imports Ray.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

BASE = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal", "azure": "http://169.254.169.254"}
"""Where each cloud answers a machine's questions about itself."""

HEADERS = {"aws": {}, "gcp": {"Metadata-Flavor": "Google"}, "azure": {"Metadata": "true"}}
"""What it wants to see in each question."""

POLL_S = 5.0
"""AWS advises to ask every 5 s. GCP and Azure give 30 s of notice."""

GCP_NOTICE_S = 30.0
"""What is left when a spot machine of GCP is told; it does not say a time."""

Get = Callable[[str], "str | None"]
"""Path of the metadata service -> what it says; None where it has nothing to say."""


@dataclass(frozen=True, slots=True)
class Notice:
    """The cloud takes the machine away, in `seconds`."""

    why: str
    seconds: float


def metadata(cloud: str, base: str) -> Get:
    """The metadata service of `cloud` at `base`; raises OSError where nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine's own: never by a proxy

    def ask(path: str, method: str = "GET", **headers: str) -> str | None:
        told = {**HEADERS[cloud], **{k.replace("_", "-"): v for k, v in headers.items()}}
        request = urllib.request.Request(f"{base}/{path}", headers=told, method=method)
        try:
            with opener.open(request, timeout=2) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return None
            raise

    def get_from_aws(path: str) -> str | None:
        token = ask("latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
        return ask(path, X_aws_ec2_metadata_token=token or "")

    return get_from_aws if cloud == "aws" else ask


def notice(cloud: str, get: Get, now: float) -> Notice | None:
    """What the cloud has said about taking this machine away; None: nothing. `now`: seconds since 1970."""
    if cloud == "gcp":
        taken = (get("computeMetadata/v1/instance/preempted") or "").strip() == "TRUE"
        return Notice("gcp preempts the machine", GCP_NOTICE_S) if taken else None
    if cloud == "azure":
        name = get("metadata/instance/compute/name?api-version=2021-02-01&format=text")
        events = json.loads(get("metadata/scheduledevents?api-version=2020-07-01") or "{}").get("Events", [])
        for event in events:
            if event["EventType"] in ("Preempt", "Terminate") and name in event["Resources"]:
                # No time: it has begun.
                end = parsedate_to_datetime(event["NotBefore"]).timestamp() if event.get("NotBefore") else now
                return Notice(f"azure: {event['EventType']}", max(0.0, end - now))
        return None
    told = get("latest/meta-data/spot/instance-action")
    if told is None:
        return None
    action = json.loads(told)
    end = datetime.strptime(action["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
    return Notice(f"aws: spot {action['action']}", max(0.0, end - now))


def nvlink_domain(report: str) -> str:
    """The NVLink domain in the report of `nvidia-smi -q`; "" where NVLink ends at the machine."""
    uuid = re.search(r"^\s*ClusterUUID\s*:\s*([0-9a-f-]{36})\s*$", report, re.M)
    clique = re.search(r"^\s*CliqueId\s*:\s*(\d+)\s*$", report, re.M)
    if uuid is None or clique is None or not uuid[1].strip("0-"):
        return ""
    return f"{uuid[1]}.{clique[1]}"


def block(cloud: str, get: Get, report: str) -> str:
    """Name of the machines with the fastest links among them: their NVLink domain, else what the cloud says.

    It is a value that Ray takes as a node label; "unknown" where nobody says anything: all such machines are one block.
    """
    found = nvlink_domain(report)
    if not found and cloud == "aws":
        parts = [get(f"latest/meta-data/placement/{p}") for p in ("group-name", "availability-zone-id")]
        found = ".".join(p for p in parts if p)
    elif not found and cloud == "gcp":
        told = json.loads(get("computeMetadata/v1/instance/attributes/physical_host_topology") or "{}")
        found = ".".join(told[k] for k in ("block", "subblock") if told.get(k))
    elif not found and cloud == "azure":
        query = "api-version=2021-02-01&format=text"
        parts = [get(f"metadata/instance/compute/{p}?{query}") for p in ("placementGroupId", "zone")]
        found = ".".join(p for p in parts if p)
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", found)[:63].strip("-_.") or "unknown"


def gpu_report() -> str:
    """What `nvidia-smi -q` says; "" on a machine without GPUs."""
    try:
        return subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def drain(address: str, told: Notice, wait: bool) -> None:
    """Tell Ray that this machine's node goes; with `wait`, until it is gone or the time is over.

    Raises:
        SystemExit: no living node of the cluster is on this machine, or Ray refuses.
    """
    import ray
    from ray._private.services import get_node_ip_address
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    end = time.time() + told.seconds
    client = GcsClient(address=address)

    def here() -> list[str]:
        nodes = client.get_all_node_info().items()
        alive = [(n, i) for n, i in nodes if i.state == gcs_pb2.GcsNodeInfo.ALIVE and not i.is_head_node]
        return [n.hex() for n, i in alive if i.node_manager_address == get_node_ip_address(address)]

    nodes = here()
    if not nodes:
        raise SystemExit(f"no node of the Ray cluster at {address} is on this machine (Ray {ray.__version__})")
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    for node in nodes:
        accepted, why_not = client.drain_node(node, reason, told.why, int(end * 1000))
        if not accepted:
            raise SystemExit(f"Ray does not drain node {node}: {why_not}")
        print(f"draining node {node}, {told.seconds:.0f} s left: {told.why}", flush=True)
    while wait and time.time() < end and set(here()) & set(nodes):
        time.sleep(0.5)


def watch(cloud: str, get: Get, poll_s: float = POLL_S) -> Notice:
    """Wait until the cloud says that it takes this machine away."""
    while True:
        try:
            told = notice(cloud, get, time.time())
        except (OSError, ValueError, KeyError) as e:
            print(f"no answer from the metadata service: {e!r}", file=sys.stderr, flush=True)
            told = None
        if told is not None:
            return told
        time.sleep(poll_s)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("block", "watch", "drain"):
        one = verbs.add_parser(verb)
        if verb != "drain":
            one.add_argument("--cloud", required=True, choices=sorted(BASE))
            one.add_argument("--base", help="address of the metadata service; default: the cloud's own")
        if verb != "block":
            one.add_argument("--address", required=True, help="the Ray head, as HOST:PORT")
    one.add_argument("--seconds", type=float, default=90.0, help="until the machine goes")
    one.add_argument("--why", default="the machine is stopped", help="what is told to whoever asks")
    return parser


def main() -> None:
    """The command."""
    given = parser().parse_args()
    if given.verb == "drain":
        return drain(given.address, Notice(given.why, given.seconds), wait=True)
    get = metadata(given.cloud, given.base or BASE[given.cloud])
    if given.verb == "block":
        try:
            print(block(given.cloud, get, gpu_report()))
        except (OSError, ValueError) as e:
            print(f"no answer from the metadata service: {e!r}", file=sys.stderr)
            print("unknown")
        return None
    return drain(given.address, watch(given.cloud, get), wait=False)


if __name__ == "__main__":
    main()
