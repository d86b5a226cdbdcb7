"""The manifests of cluster/kuberay, and KubeRay's definitions of their kinds where this machine has them."""

import functools
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.cluster_files.shell import CLUSTER, ROOT

DEFINITIONS = Path(os.environ.get("KUBERAY_CRDS") or ROOT.parent / "shared" / "schemas")
"""A directory with ray.io_rayclusters.yaml and ray.io_rayjobs.yaml of KubeRay's ray-operator/config/crd/bases."""


@functools.cache
def _documents(name):
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / f"{name}.yaml").read_text()))


def claim(name):
    """The claim of a volume in a file of cluster/kuberay."""
    (document,) = (d for d in _documents(name) if d["kind"] == "PersistentVolumeClaim")
    return document


def read(name):
    """The RayCluster or RayJob of a file of cluster/kuberay."""
    (document,) = (d for d in _documents(name) if d["apiVersion"] == "ray.io/v1")
    return document


def cluster(document):
    """Specification of the Ray cluster of a RayCluster or RayJob."""
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def groups(document):
    """Its groups of pods, the head's first."""
    return [cluster(document)["headGroupSpec"], *cluster(document)["workerGroupSpecs"]]


def containers(document):
    return [c for group in groups(document) for c in group["template"]["spec"]["containers"]]


def problems(document):
    """What KubeRay's own schema has against `document`, and what it does not know in it."""
    schema = schema_of(document["kind"])
    return [e.message for e in jsonschema.Draft7Validator(schema).iter_errors(document)] + unknown(schema, document)


def schema_of(kind):
    """KubeRay's own schema of `kind`; skips the test where it is not at hand."""
    path = DEFINITIONS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"no {path}: KubeRay's definitions are not at hand; KUBERAY_CRDS names their directory")
    tree = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (version,) = (v for v in tree["spec"]["versions"] if v["name"] == "v1")
    return version["schema"]["openAPIV3Schema"]


def unknown(schema, value, path=""):
    """Paths in `value` that `schema` does not name: a Kubernetes server drops them without a word."""
    if isinstance(value, list):
        return [p for i, item in enumerate(value) for p in unknown(schema.get("items", {}), item, f"{path}[{i}]")]
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    known, more = schema.get("properties", {}), schema.get("additionalProperties")
    if not known and more is None:  # such as metadata, which Kubernetes itself knows
        return []
    found = []
    for key, item in value.items():
        if key in known or isinstance(more, dict):
            found += unknown(known.get(key, more), item, f"{path}.{key}")
        else:
            found.append(f"{path}.{key}")
    return found
