"""Who may do what over the control of a run, and what strangers reach: nothing."""

import json
import socket
import threading
import time
from contextlib import ExitStack

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_ep.control import calls, door, server
from ray_ep.control.keys import Key, Role, opened_by
from ray_ep.control.server import MESSAGE_BYTES
from ray_ep.control.v1 import control_pb2 as pb
from tests.control.messages import METHODS, messages_of
from tests.control.scene import RAY_TOKEN, change, code_of, raw, served, shows

VIEWER, OPERATOR = "v" * 32, "o" * 32
CHANGES = [m.name for m in METHODS if "mutation" in m.input_type.fields_by_name]
LOOKS = ["Status", "GetPlacement"]
RAY_EP, DESCRIBE = (
    "ray_ep.control.v1.ControlService",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)


def token_file(folder, name, token, mode=0o600):
    path = folder / name
    path.write_text(f"{token}\n")
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    """One run for all that changes nothing of it."""
    folder = tmp_path_factory.mktemp("tokens")
    viewer, operator = token_file(folder, "viewer", VIEWER), token_file(folder, "operator", OPERATOR)
    keys = [f"control.viewer_token_file={viewer}", f"control.operator_token_file={operator}"]
    with served(tmp_path_factory.mktemp("run"), *keys) as run:
        run.until(lambda: run.driver.done > 1, "a step")
        yield run
        assert (run.driver.mover.placement.version, run.ranks.calls.count("save"), run.ranks.calls.count("beat")) == (
            0, 0, 0,
        ), "nobody without a right has changed anything"  # fmt: skip


def audited(it, result):
    return [e for e in map(json.loads, (it.path / "audit.jsonl").read_text().splitlines()) if e["result"] == result]


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        shows("wrong" * 8),
        shows(OPERATOR[:-1]),
        shows(f"{OPERATOR}x"),
        shows(""),
        (("authorization", OPERATOR),),
        (("authorization", f"Basic {OPERATOR}"),),
        (*shows(OPERATOR), *shows(VIEWER)),
        (("x-ray-authorization", f"Bearer {OPERATOR}"),),
    ],
)
def test_without_a_token_of_the_run_nobody_is_let_in(it, metadata):
    for method in METHODS:
        kind = change(pb.PauseRequest).SerializeToString() if method.name == "Pause" else b""
        assert code_of(lambda m=method.name, k=kind: raw(it.target(), m, k, metadata)) == "UNAUTHENTICATED", method.name
    refused = audited(it, "UNAUTHENTICATED")[-1]
    assert (refused["who"], refused["role"], refused["asked"]) == ("", "", "")
    assert it.alive()


def test_a_viewer_looks_and_changes_nothing(it):
    for name in LOOKS:
        assert code_of(lambda n=name: raw(it.target(), n, b"", shows(VIEWER))) == "OK"
    assert code_of(lambda: raw(it.target(), "ProposePlacement", b"", shows(VIEWER))) == "OK"
    for name in CHANGES:
        assert code_of(lambda n=name: raw(it.target(), n, b"", shows(VIEWER))) == "PERMISSION_DENIED"
    refused = audited(it, "PERMISSION_DENIED")[-1]
    assert (refused["who"], refused["role"]) == ("control.viewer_token_file", "viewer")
    assert it.alive()


@pytest.mark.parametrize("token", [OPERATOR, RAY_TOKEN])
def test_an_operators_token_and_that_of_the_ray_cluster_open_for_changes(it, token):
    assert code_of(lambda: raw(it.target(), "Resume", change(pb.ResumeRequest).SerializeToString(), shows(token))) == (
        "FAILED_PRECONDITION"
    )


def test_a_token_that_is_taken_back_opens_no_more(tmp_path):
    file, run = token_file(tmp_path, "operator", OPERATOR), tmp_path / "run"
    run.mkdir()
    with served(run, f"control.operator_token_file={file}") as it:

        def opens(token):
            return code_of(lambda: raw(it.target(), "Status", b"", shows(token))) == "OK"

        assert (opens(OPERATOR), opens(VIEWER)) == (True, False)
        token_file(tmp_path, "operator", VIEWER)
        assert (opens(OPERATOR), opens(VIEWER)) == (False, True)
        file.chmod(0o644)
        assert (opens(VIEWER), opens(it.target().token)) == (False, True)
        said = it.until(lambda: it.said("control")[1:], "the event")
        assert "can be read by others (mode 0644): chmod 600 it; until that is mended, no token of" in said[0]
        file.chmod(0o600)
        assert opens(VIEWER)


def test_health_is_open_and_what_describes_the_service_is_not(it):
    with grpc.insecure_channel(it.target().address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "ray_ep.control.v1.ControlService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        describe = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        assert code_of(lambda: list(describe(iter([asked]), timeout=60))) == "UNAUTHENTICATED"
        (told,) = describe(iter([asked]), timeout=60, metadata=shows(VIEWER))
        names = [s.name for s in told.list_services_response.service]
        assert "ray_ep.control.v1.ControlService" in names
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert code_of(lambda: next(watch)) == "UNAUTHENTICATED", "whoever waits takes room"


def test_calls_that_send_no_message_hold_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "CALLS", 8)
    monkeypatch.setattr(door, "CHECKS", 2)
    monkeypatch.setattr(calls, "MESSAGE_S", 600.0)  # so none of them ends by itself
    with served(tmp_path) as it:
        names = [f"/ray_ep.control.v1.ControlService/{name}" for name in ("Pause", "Status", "WatchStatus")]
        names += ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"]
        never = threading.Event()
        with grpc.insecure_channel(it.target().address) as channel:
            held = [channel.stream_unary(name).future(silent(never), 600) for name in names for _ in range(8)]

            def answered():
                return code_of(lambda: raw(it.target(), "Status", b"", shows(it.target().token))) == "OK"

            it.until(answered, "an answer meanwhile")
            it.until(lambda: sum(not call.done() for call in held) <= 2, "the others refused")
            never.set()
            codes = {call.code().name for call in held}
        assert codes <= {"UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}, codes


def test_connections_that_say_nothing_take_few_files_of_the_driver_and_not_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "CONNECTIONS", 8)
    monkeypatch.setattr(server, "GREETING_S", 2.0)
    with served(tmp_path) as it, ExitStack() as opened:
        host, port = it.target().address.rsplit(":", 1)
        strangers = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(40)]

        def still_open():
            return sum(map(hears, strangers))

        it.until(lambda: still_open() <= 8, "those over the limit closed")
        assert it.alive()
        it.until(lambda: not still_open(), "the others closed")
        assert it.status_now().done


def hears(stranger):
    """Whether the other end has not closed a connection."""
    stranger.setblocking(False)
    try:
        while stranger.recv(1 << 12):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def test_callers_who_send_rubbish_or_go_while_they_are_refused_leave_no_word_on_the_terminal(it, capfd, caplog):
    loop, names = it.controls[0]._loop, [f"/{m.containing_service.full_name}/{m.name}" for m in METHODS]
    names += [f"/{RAY_EP}/Reboot", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", DESCRIBE]
    damaged = b"\xff\xff"
    for metadata in (None, shows(OPERATOR)):
        for name in names:
            with grpc.insecure_channel(it.target().address) as channel:
                code = code_of(lambda c=channel, n=name, m=metadata: list(c.stream_stream(n)(iter([damaged]), 60, m)))
                assert code in ("INVALID_ARGUMENT", "UNAUTHENTICATED", "UNIMPLEMENTED"), name
                for pause in (0.0, 0.001, 0.003):
                    busy = threading.Event()
                    loop.call_soon_threadsafe(busy.wait, 1.0)  # so that what comes and goes is seen at once
                    calls = [channel.stream_stream(name)(iter([damaged]), metadata=metadata) for _ in range(4)]
                    busy.set()
                    time.sleep(pause)
                    for call in calls:
                        call.cancel()
    assert it.status_now().done
    assert [r.getMessage() for r in caplog.records if r.name.startswith(("grpc", "asyncio"))] == []
    assert capfd.readouterr().err == ""


def silent(never):
    never.wait(600)
    yield from ()


def test_a_message_that_is_too_large_or_damaged_is_refused(it):
    large = pb.DrainRequest(node="x" * MESSAGE_BYTES).SerializeToString()
    assert code_of(lambda: raw(it.target(), "Drain", large, shows(OPERATOR))) == "RESOURCE_EXHAUSTED"
    for method in METHODS:
        if not method.server_streaming:
            damaged = code_of(lambda m=method.name: raw(it.target(), m, b"\x0a\xff", shows(OPERATOR)))
            assert damaged == "INVALID_ARGUMENT", method.name
    assert code_of(lambda: raw(it.target(), "Reboot", b"", shows(OPERATOR))) == "UNIMPLEMENTED"
    assert it.alive()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_message_of_who_has_no_right_and_no_bytes_crash_the_server_or_change_the_run(it, data):
    method = data.draw(st.sampled_from([m for m in METHODS if not m.server_streaming and m.name != "ProposePlacement"]))
    token = data.draw(st.sampled_from([VIEWER, "wrong" * 8, OPERATOR]))
    if token == OPERATOR:  # changes have no proper id, so none may be carried out
        message = data.draw(st.binary(max_size=64)) if data.draw(st.booleans()) else unnamed(data, method)
    else:
        message = data.draw(messages_of(method.input_type)).SerializeToString()
    code = code_of(lambda: raw(it.target(), method.name, message, shows(token)))
    allowed = {"OK", "NOT_FOUND"} if method.name in (*LOOKS, "Trace") else {"PERMISSION_DENIED"}
    allowed |= {"NOT_FOUND", "INVALID_ARGUMENT"} if method.name == "Trace" and token == VIEWER else set()
    allowed |= {"UNAUTHENTICATED"} if token not in (VIEWER, OPERATOR) else {"INVALID_ARGUMENT"}
    assert code in allowed, (method.name, message)
    assert it.driver.states.now.value == "stepping"


def unnamed(data, method):
    message = data.draw(messages_of(method.input_type))
    if "mutation" in method.input_type.fields_by_name:
        message.mutation.request_id = data.draw(st.sampled_from(["", " ", "?", "x" * 129]))
    return message.SerializeToString()


def test_a_token_is_compared_with_every_key_whichever_opens():
    keys = [Key("a", Role.OPERATOR, "x" * 16), Key("b", Role.VIEWER, "y" * 16)]
    assert opened_by(keys, shows("y" * 16)).name == "b"
    assert opened_by(keys, [("authorization", f"bearer  {'x' * 16} ")]).name == "a"
    assert opened_by(keys, [("authorization-bin", b"x")]) is None
    assert "x" * 16 not in repr(keys), "a log never shows one"
