"""The files of `ray up`, by Ray's own schema, defaults, autoscaler and command line. Nothing is started."""

import copy
import json
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.providers import _get_default_config
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_ep.cli.dashboards import PORT
from tests.cluster_files.autoscaling import launches
from tests.cluster_files.shell import CLUSTER, ROOT, check, ray_knows, script, split

CLOUDS = ["aws", "gcp", "azure"]
COMMANDS = ["setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"]
STARTS = ["head_start_ray_commands", "worker_start_ray_commands"]


def read(cloud):
    return yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text())


def local():
    return yaml.safe_load((CLUSTER / "local" / "autoscaler.yaml").read_text().replace("ADDRESS", "127.0.0.1:6399"))


def prepared(config):
    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


def commands(cloud):
    return [line for key in (*COMMANDS, *STARTS) for line in read(cloud).get(key, [])]


@pytest.fixture(params=CLOUDS)
def cloud(request):
    return request.param


def test_ray_takes_the_file(cloud):
    assert prepared(read(cloud))["available_node_types"].keys() == read(cloud)["available_node_types"].keys()


def test_ray_takes_the_file_of_the_local_cluster():
    assert prepared(local())["max_workers"] == 3


@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: c.update(max_worker=3),
        lambda c: c["available_node_types"]["gpu-spot"].update(priorty=3),
        lambda c: c["available_node_types"]["gpu-spot"].update(labels={"ep.block": 3}),
        lambda c: c.update(head_node_type="haed"),
        lambda c: c["available_node_types"]["gpu-spot"].update(min_workers=30),
    ],
)
def test_ray_refuses_a_file_with_a_mistake(cloud, break_it):
    config = read(cloud)
    break_it(config)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        prepared(config)


def test_nothing_that_is_run_on_a_machine_comes_from_rays_defaults(cloud):
    """They install a nightly build of Ray."""
    defaults = _get_default_config({"type": cloud})
    run = {key for key in defaults if key.endswith("_commands") and defaults[key]}
    assert len(run) >= 3
    assert run - read(cloud).keys() == set()


def test_ranks_land_on_gpu_machines_alone_and_drivers_beside_the_head(cloud):
    types = read(cloud)["available_node_types"]
    assert {name for name, t in types.items() if t["resources"].get("CPU")} == {"gpu-spot", "gpu-on-demand"}
    assert {name for name, t in types.items() if t["resources"].get("GPU")} == {"gpu-spot", "gpu-on-demand"}
    assert [name for name, t in types.items() if t["resources"].get("driver")] == ["driver"]
    assert types["driver"]["min_workers"] == 1


def test_spot_machines_come_first_and_others_where_they_do_not_suffice(cloud):
    config = read(cloud)
    gpus = config["available_node_types"]["gpu-spot"]["resources"]["GPU"]
    rank = {"GPU": 1, "CPU": 1}
    assert launches(config, []) == {"driver": 1}
    assert launches(config, [rank] * gpus) == {"driver": 1, "gpu-spot": 1}
    assert launches(config, [rank] * (gpus + 1)) == {"driver": 1, "gpu-spot": 2}
    config["available_node_types"]["gpu-spot"]["max_workers"] = 1
    assert launches(config, [rank] * (gpus + 1)) == {"driver": 1, "gpu-spot": 1, "gpu-on-demand": 1}


def test_while_spot_machines_are_refused_others_are_asked_for(cloud, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(read(cloud)))
    script("fallback").update(file, {"gpu-spot": 1000.0}, 1001.0, 600.0)
    assert launches(yaml.safe_load(file.read_text()), [{"GPU": 1}]) == {"driver": 1, "gpu-on-demand": 1}
    script("fallback").update(file, {"gpu-spot": 1000.0}, 1601.0, 600.0)
    assert launches(yaml.safe_load(file.read_text()), [{"GPU": 1}]) == {"driver": 1, "gpu-spot": 1}


def test_the_two_types_of_gpu_machine_differ_in_their_market_alone(cloud):
    types = read(cloud)["available_node_types"]
    spot, demand = types["gpu-spot"], types["gpu-on-demand"]
    assert spot["resources"] == demand["resources"]
    assert spot["labels"]["ray.io/market-type"] == "spot"
    assert demand["labels"]["ray.io/market-type"] == "on-demand"
    if cloud == "azure":
        spot, demand = ({"node_config": t["node_config"]["azure_arm_parameters"]} for t in (spot, demand))
    different = {
        key
        for key in spot["node_config"].keys() | demand["node_config"].keys()
        if spot["node_config"].get(key) != demand["node_config"].get(key)
    }
    assert (
        different
        == {
            "aws": {"InstanceMarketOptions"},
            "gcp": {"scheduling"},
            "azure": {"priority", "evictionPolicy", "billingProfile"},
        }[cloud]
    )


@pytest.mark.parametrize("config", [*map(read, CLOUDS), local()], ids=[*CLOUDS, "local"])
def test_labels_are_what_ray_takes_as_labels(config):
    labels = [t["labels"] for t in config["available_node_types"].values() if "labels" in t]
    assert len(labels) >= 2
    for one in labels:
        validate_node_label_syntax(one)


def test_every_command_is_one_that_its_program_takes(cloud):
    calls = [words for line in commands(cloud) for words in split(line)[0]]
    seen = {words[0] if words[0] != "ray" else f"ray {words[1]}" for words in calls}
    assert {"ray start", "ray stop", "python"} <= seen
    for words in calls:
        check(words)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ulimit -n 65536; ray start --haed", "haed"),
        ("ray start --address=a:1 --labels=b=$(python ~/ray_ep/cluster/machine.py block --clod=aws)", "--cloud"),
        (". x; nohup python ~/ray_ep/cluster/fallback.py --config ~/c > ~/log 2>&1 < /dev/null &", "--address"),
        ("cd /tmp && ray-ep train optim.stepz=3", "stepz"),
        ("A=b ray job sumbit -- x", "sumbit"),
    ],
)
def test_a_command_with_a_mistake_is_found(line, says):
    with pytest.raises(Exception, match=says):
        [check(words) for words in split(line)[0]]


def test_a_line_of_shell_is_split_into_its_commands():
    line = "a; . b || export C=d E=$HOME/e; F=g nohup h --i=$(j k) > ~/l 2>&1 < /dev/null & ! m 'n o'"
    assert split(line) == (
        [["a"], [".", "b"], ["h", "--i=value"], ["m", "n o"], ["j", "k"]],
        {"C": "d", "E": "$HOME/e", "F": "g"},
    )


def test_every_command_is_one_that_bash_takes(cloud):
    for line in commands(cloud):
        done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)


def test_every_file_that_a_command_takes_from_the_repository_is_there(cloud):
    assert read(cloud)["file_mounts"]["~/ray_ep"] == "."
    named = [w for line in commands(cloud) for call in split(line)[0] for w in call if w.startswith("~/ray_ep/")]
    assert len(named) >= 6
    assert [w for w in named if not (ROOT / w.removeprefix("~/ray_ep/")).exists()] == []


def test_every_setting_of_rays_is_one_that_ray_reads(cloud):
    names = [name for line in commands(cloud) for name in split(line)[1] if name.startswith("RAY_")]
    assert {"RAY_gcs_storage", "RAY_gcs_storage_path"} <= {*names}
    assert [name for name in names if not ray_knows(name)] == []
    assert not ray_knows("RAY_gcs_storage_pth")


def test_rays_dashboard_asks_a_server_first_that_is_started_before_the_head_and_ended_with_it(cloud):
    calls = [words for line in read(cloud)["head_start_ray_commands"] for words in split(line)[0]]
    proxy = calls.index(["ray-ep", "dashboards", "proxy"])
    (head,) = (i for i, words in enumerate(calls) if words[:3] == ["ray", "start", "--head"])
    assert proxy < head
    assert f"--proxy-server-url=http://127.0.0.1:{PORT}" in calls[head]
    assert ["pkill", "-f", "ray-ep dashboards proxy"] in calls[:proxy]


def test_the_head_alone_keeps_tables_and_every_node_has_the_settings_of_ray_env(cloud):
    head, workers = (read(cloud)[key] for key in STARTS)
    assert any("RAY_gcs_storage=rocksdb" in line for line in head)
    assert not any("RAY_gcs_storage" in line for line in workers)
    for line in [*head, *workers]:
        assert "ray start" not in line or ". ~/ray_ep/cluster/ray.env;" in line, line


def test_aws_gives_a_gpu_machine_one_interface_for_ip_and_efa_on_each_card():
    types = read("aws")["available_node_types"]
    interfaces = types["gpu-spot"]["node_config"]["NetworkInterfaces"]
    places = [(i["NetworkCardIndex"], i["DeviceIndex"]) for i in interfaces]
    assert len({*places}) == len(places) == 17
    assert [p for p, i in zip(places, interfaces, strict=True) if i["InterfaceType"] == "interface"] == [(0, 0)]
    assert sorted(c for (c, _), i in zip(places, interfaces, strict=True) if i["InterfaceType"] == "efa-only") == [
        *range(16)
    ]
    # Ray wants subnet and groups of each, and of the type then none.
    assert all(i["SubnetId"] and i["Groups"] for i in interfaces)
    assert {"SubnetIds", "SecurityGroupIds"} & types["gpu-spot"]["node_config"].keys() == set()


def test_gcp_gives_a_gpu_machine_rdma_beside_each_gpu():
    gpu = read("gcp")["available_node_types"]["gpu-spot"]
    kinds = [i["nicType"] for i in gpu["node_config"]["networkInterfaces"]]
    assert kinds == ["GVNIC"] * 2 + ["MRDMA"] * gpu["resources"]["GPU"]
    region = read("gcp")["provider"]["region"]
    for node_type in read("gcp")["available_node_types"].values():
        for interface in node_type["node_config"]["networkInterfaces"]:
            assert interface["subnetwork"].startswith(f"regions/{region}/")


def test_azure_gives_what_rays_template_of_a_machine_takes():
    text = (Path(ray.__file__).parent / "autoscaler/_private/_azure/azure-vm-template.json").read_text()
    known = json.loads(text)["parameters"]
    for node_type in read("azure")["available_node_types"].values():
        given = node_type["node_config"]["azure_arm_parameters"]
        assert given.keys() - known.keys() == set()
        kinds = {"string": str, "int": int, "bool": bool, "object": dict, "array": list}
        assert [k for k, v in given.items() if not isinstance(v, kinds[known[k]["type"]])] == []
    assert not any("availabilitySet" in line for line in text.splitlines())  # so there is no InfiniBand: azure.yaml
