"""control.proto: its rules, that nothing breaks what was released, and that what is generated from it is up to date."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ep.control.service import CODES, SERVICE
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.requests import Why
from ray_ep.driver.states import State
from tests.control.breaking import PROTO, RELEASED, ROOT, broken, compiled

BUF = shutil.which("buf", path=Path(sys.executable).parent) or shutil.which("buf")
with_buf = pytest.mark.skipif(BUF is None, reason="buf is not installed (pip install buf-bin)")

BREAKS = [
    ("uint64 step = 2;", "", "field 2 of Outcome (step) is gone"),
    ("uint64 step = 2;", "uint64 step = 5;", "field 2 of Outcome (step) is gone"),
    ("uint64 step = 2;", "uint64 done = 2;", "field 2 of Outcome was uint64 step, is uint64 done"),
    ("uint64 step = 2;", "string step = 2;", "field 2 of Outcome was uint64 step, is string step"),
    ("uint64 step = 2;", "repeated uint64 step = 2;", "is repeated uint64 step"),
    ("uint64 step = 2;", "optional uint64 step = 2;", "is optional uint64 step"),
    ("optional uint64 if_epoch", "uint64 if_epoch", "was optional uint64 if_epoch, is uint64 if_epoch"),
    ("  Step step = 9;", "  Rank step = 9;", "field 9 of RunStatus was .ray_ep.control.v1.Step step"),
    ("string request_id = 2;\n  }", "}\n  string request_id = 2;", "in oneof of, is string request_id"),
    ("RUN_STATE_PAUSED = 6;", "", "value 6 of RunState was RUN_STATE_PAUSED, is gone"),
    ("RUN_STATE_PAUSED = 6;", "RUN_STATE_RESTING = 6;", "was RUN_STATE_PAUSED, is RUN_STATE_RESTING"),
    ("  rpc Pause(PauseRequest) returns (PauseResponse);", "", "call ControlService.Pause is gone"),
    ("returns (stream WatchStatusResponse)", "returns (WatchStatusResponse)", "call ControlService.WatchStatus was"),
    ("rpc Pause(PauseRequest)", "rpc Pause(ResumeRequest)", "call ControlService.Pause was"),
    ("message Hop {", "message Leap {", "message Hop is gone"),
    ("service ControlService {", "service SteerService {", "service ControlService is gone"),
    ("package ray_ep.control.v1;", "package ray_ep.control.v2;", "package 'ray_ep.control.v1' is 'ray_ep.control.v2'"),
]
"""(text of control.proto, what stands there instead, what that breaks)."""


def test_what_is_generated_is_up_to_date(tmp_path):
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, PROTO], cwd=ROOT, check=True)
    for name in ("ray_ep/control/v1/control_pb2.py", "ray_ep/control/v1/control_pb2.pyi"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), "run `make proto`"


def test_nothing_breaks_what_was_released():
    assert broken(RELEASED.read_bytes(), compiled()) == []


def edited(folder, text, instead):
    """A folder with another control.proto: the first place of `text` says something else."""
    proto = (ROOT / PROTO).read_text()
    assert text in proto
    proto = proto.replace("(Hop", "(Leap").replace(" Hop ", " Leap ") if "Leap" in instead else proto
    proto = proto.replace(text, instead, 1)
    (folder / PROTO).parent.mkdir(parents=True)
    (folder / PROTO).write_text(proto)
    return folder


@pytest.mark.parametrize(("text", "instead", "says"), BREAKS)
def test_what_breaks_a_program_that_was_built_before_is_named(tmp_path, text, instead, says):
    found = broken(compiled(), compiled(edited(tmp_path, text, instead)))
    assert any(says in words for words in found), found


def test_what_is_added_breaks_nothing(tmp_path):
    more = "uint64 step = 2; string who = 5; repeated Extra extras = 6; message Extra { bool there = 1; }"
    assert broken(compiled(), compiled(edited(tmp_path, "uint64 step = 2;", more))) == []


def buf(*words, cwd=ROOT):
    said = subprocess.run([BUF, *words], cwd=cwd, capture_output=True, text=True, check=False)
    return said.returncode, said.stdout + said.stderr


@with_buf
def test_buf_finds_nothing():
    assert buf("lint") == (0, "")
    assert buf("breaking", "--against", RELEASED) == (0, "")


@with_buf
@pytest.mark.slow
def test_buf_agrees_about_what_breaks(tmp_path):
    for number, (text, instead, says) in enumerate(BREAKS):
        folder = edited(tmp_path / str(number), text, instead)
        shutil.copy(ROOT / "buf.yaml", folder)
        assert buf("breaking", "--against", RELEASED, cwd=folder)[0] == 100, says


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
