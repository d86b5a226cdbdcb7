"""control.proto: its rules, and that what is generated from it is up to date."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ep.control.service import CODES, SERVICE
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.requests import Why
from ray_ep.driver.states import State

ROOT = Path(__file__).parents[2]
PROTO = Path("ray_ep/control/v1/control.proto")


def test_what_is_generated_is_up_to_date(tmp_path):
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, str(PROTO)], cwd=ROOT, check=True)
    for name in ("control_pb2.py", "control_pb2.pyi"):
        assert (tmp_path / PROTO.parent / name).read_text() == (ROOT / PROTO.parent / name).read_text(), (
            "run `make proto`"
        )


@pytest.mark.skipif(shutil.which("buf") is None, reason="buf is not installed (npm install -g @bufbuild/buf)")
def test_buf_finds_nothing():
    said = subprocess.run(["buf", "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


def test_every_change_carries_its_mutation_and_answers_with_its_outcome():
    changes = [m for m in SERVICE.methods if "mutation" in m.input_type.fields_by_name]
    assert [m.name for m in changes] == [
        "Rebalance", "ApplyPlacement", "Drain", "Scale", "Checkpoint", "Pause", "Resume", "Stop",
    ]  # fmt: skip
    for method in changes:
        assert method.input_type.fields_by_name["mutation"].message_type.name == "Mutation"
        assert method.output_type.fields_by_name["outcome"].message_type.name == "Outcome"


def test_each_state_of_a_run_and_each_refusal_has_its_name_on_the_wire():
    names = {name.removeprefix("RUN_STATE_").lower() for name in pb.RunState.keys()}  # noqa: SIM118  # no mapping
    assert names == {s.value for s in State} | {"unspecified"}
    assert CODES.keys() == set(Why)
    assert len(set(CODES.values())) == len(CODES)
