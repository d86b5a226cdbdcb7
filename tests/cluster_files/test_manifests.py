"""The manifests for KubeRay, by KubeRay's definitions and by what Ray's own autoscaler reads in them."""

import copy
import json
import re

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from ray_ep.cli.dashboards import PORT
from ray_ep.config import load_config
from tests.cluster_files.autoscaling import launches
from tests.cluster_files.manifests import claim, cluster, containers, groups, problems, read
from tests.cluster_files.shell import ROOT, check, parse_ray, ray_knows, split


@pytest.fixture(params=["raycluster", "rayjob"])
def manifest(request):
    return copy.deepcopy(read(request.param))


def group(manifest, name):
    (found,) = (g for g in groups(manifest) if g.get("groupName") == name)
    return found


def autoscaling(manifest):
    named = {"name": "ray-ep", "namespace": "default"}
    return _derive_autoscaling_config_from_ray_cr({"metadata": named, "spec": cluster(manifest)})


def test_kuberay_takes_the_manifest(manifest):
    assert problems(manifest) == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: c["autoscalerOptions"].update(version="v3"),
        lambda c: c["gcsFaultToleranceOptions"].update(backend="rockdb"),
        lambda c: c["workerGroupSpecs"][1].update(maxReplicas="8"),
        lambda c: c["workerGroupSpecs"][1].pop("groupName"),
        lambda c: c["headGroupSpec"].update(label={}),
        lambda c: c["workerGroupSpecs"][1]["template"]["spec"].update(tolerationz=[]),
        lambda c: c["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["lifecycle"].update(prestop={}),
    ],
)
def test_a_manifest_with_a_mistake_is_found(manifest, break_it):
    break_it(cluster(manifest))
    assert problems(manifest) != []


def test_a_job_has_the_cluster_of_the_other_file_and_its_volume():
    assert cluster(read("rayjob")) == cluster(read("raycluster"))
    assert claim("rayjob") == claim("raycluster")


def test_pods_run_the_version_of_ray_that_is_pinned(manifest):
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert cluster(manifest)["rayVersion"] == pinned


def test_rays_autoscaler_reads_groups_with_their_labels_priorities_and_bounds(manifest):
    types = autoscaling(manifest)["available_node_types"]
    assert types["gpu-spot"]["labels"] == {"ray.io/market-type": "spot", "ep.block": "pool-a"}
    assert [types[g]["priority"] for g in ("gpu-spot", "gpu-on-demand")] == [10, 0]
    assert {g: (t["min_workers"], t["max_workers"]) for g, t in types.items()} == {
        "headgroup": (0, 0),
        "driver": (1, 1),
        "gpu-spot": (0, 8),
        "gpu-on-demand": (0, 8),
    }
    assert types["headgroup"]["resources"]["CPU"] == types["driver"]["resources"]["CPU"] == 0
    assert types["driver"]["resources"]["driver"] == 1
    assert types["gpu-spot"]["resources"] == types["gpu-on-demand"]["resources"]


def test_spot_pods_come_first_and_others_after_a_spot_pod_has_not_come_up(manifest):
    config = autoscaling(manifest)
    assert launches(config, [{"GPU": 1}] * 9) == {"driver": 1, "gpu-spot": 2}
    assert launches(config, [{"GPU": 1}], available={"gpu-spot": 0.5}) == {"driver": 1, "gpu-on-demand": 1}
    (waits,) = (e for e in cluster(manifest)["autoscalerOptions"]["env"] if e["value"].isdigit())
    assert ray_knows(waits["name"])
    assert 60 <= int(waits["value"]) <= 1800


def test_parameters_of_ray_start_are_parameters(manifest):
    given = [g["rayStartParams"] for g in groups(manifest)]
    assert any(given)
    for params in given:
        parse_ray(["ray", "start", *(f"--{key}={value}" for key, value in params.items())])


def test_rays_dashboard_asks_a_server_first_that_the_heads_pod_starts(manifest):
    head = groups(manifest)[0]
    (container,) = head["template"]["spec"]["containers"]
    *_, line = container["lifecycle"]["postStart"]["exec"]["command"]
    (words,) = split(line)[0]
    check(words)
    assert words == ["ray-ep", "dashboards", "proxy"]
    assert head["rayStartParams"]["proxy-server-url"] == f"http://127.0.0.1:{PORT}"


def test_a_pod_is_not_killed_before_its_ranks_have_left_or_its_driver_has_saved(manifest):
    for one in groups(manifest):
        spec = one["template"]["spec"]
        (container,) = spec["containers"]
        stop = int(next(e["value"] for e in container["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S"))
        assert spec["terminationGracePeriodSeconds"] > stop
    hooks = [c.get("lifecycle", {}) for c in containers(manifest)]
    ends = [hook["preStop"]["exec"]["command"] for hook in hooks if "preStop" in hook]
    assert len(ends) == 2
    for shell, option, line in ends:
        assert (shell, option) == ("/bin/sh", "-c")
        calls = split(line)[0]
        for words in calls:
            check(words)
        assert calls[1:] == [["ray", "stop"]]
        seconds = float(re.search(r"--seconds=(\d+)", line)[1])
        assert group(manifest, "gpu-spot")["template"]["spec"]["terminationGracePeriodSeconds"] > seconds


def test_the_job_is_a_run_that_goes_on_where_a_try_before_has_ended():
    spec = read("rayjob")["spec"]
    words = spec["entrypoint"].split()
    check(words)
    cfg = load_config(None, words[2:])
    assert spec["backoffLimit"] >= 1
    assert cfg.resume == "auto"
    assert any(
        cfg.run_dir.startswith(m["mountPath"])
        for m in group(read("rayjob"), "driver")["template"]["spec"]["containers"][0]["volumeMounts"]
    )
    assert claim("rayjob")["spec"]["accessModes"] == ["ReadWriteMany"]
    gpus = sum(8 * g["maxReplicas"] for g in cluster(read("rayjob"))["workerGroupSpecs"] if "gpu" in g["groupName"])
    assert cfg.elastic.min_ranks <= cfg.cluster.ranks <= gpus


def test_the_jobs_driver_runs_beside_the_head():
    asked = json.loads(read("rayjob")["spec"]["entrypointResources"])
    types = autoscaling(read("rayjob"))["available_node_types"]
    assert [n for n, t in types.items() if all(t["resources"].get(k, 0) >= v for k, v in asked.items())] == ["driver"]


def test_every_pod_of_ranks_and_the_driver_have_the_volume_of_runs(manifest):
    name = claim("raycluster")["metadata"]["name"]
    for one in cluster(manifest)["workerGroupSpecs"]:
        (volume,) = one["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == name
        assert [m["name"] for m in one["template"]["spec"]["containers"][0]["volumeMounts"]] == [volume["name"]]
