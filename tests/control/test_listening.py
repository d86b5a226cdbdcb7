"""How a control comes to listen, with certificates and without; what is wrong there is one event: the run goes on."""

import re
import socket
import threading
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import grpc
import pytest

from ray_ep.config import load_config
from ray_ep.control import address
from ray_ep.control.address import target_of
from ray_ep.control.client import Client
from ray_ep.control.server import Control
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.requests import Requests
from ray_ep.driver.run.claim import Claim
from ray_ep.driver.run.rundir import RunDir
from ray_ep.errors import BadInput, ConfigError, ControlError
from tests.control.certificates import DAY, Authority
from tests.control.scene import LIMIT_S, code_of, raw, served, shows


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def secured(cert, key, *more):
    return [f"control.tls_cert={cert}", f"control.tls_key={key}", *more]


def test_the_file_that_tells_where_it_listens_is_the_owners_alone_and_goes_with_the_run(tmp_path):
    with served(tmp_path) as it:
        file = tmp_path / address.FILE
        assert file.stat().st_mode & 0o777 == 0o600
        target = it.target()
        assert target.address.startswith("127.0.0.1:")
        assert not target.tls
        assert target.token not in it.said("control")[0]
        assert target.token not in (tmp_path / "config.yaml").read_text()
        file.chmod(0o644)
        with pytest.raises(BadInput, match=r"control\.json' can be read by others \(mode 0644\): chmod 600 it"):
            it.target()
    assert not file.exists()
    with pytest.raises(BadInput, match="this run has ended"):
        target_of(str(tmp_path))


def test_what_a_killed_driver_left_is_gone_before_the_next_one_has_formed(tmp_path):
    address.write(tmp_path, address.Target("127.0.0.1:9", "t" * 32, pid=1))
    (tmp_path / "config.yaml").touch()
    claim = Claim(tmp_path, datetime(2026, 7, 1))
    with pytest.raises(BadInput, match="this run has no control: it is forming still"):
        target_of(str(tmp_path))
    claim.release()
    with Control(load_config(None, []).control, RunDir(tmp_path), Requests(), lambda event: None):
        assert not (tmp_path / address.FILE).exists()


@pytest.mark.parametrize(
    ("where", "tls"),
    [("127.0.0.1:7500", False), ("localhost:7500", False), ("[::1]:7500", False), ("10.0.3.17:7500", True)],
)
def test_a_token_goes_to_no_other_machine_in_the_open(tmp_path, where, tls):
    file = tmp_path / "token"
    file.write_text("t" * 32)
    file.chmod(0o600)
    assert target_of(where, str(file)).tls is tls


def test_a_control_that_is_off_listens_nowhere(tmp_path):
    with served(tmp_path, "control.enabled=false") as it:
        assert it.alive()
        with pytest.raises(BadInput, match=r"this run has no control: .* control\.enabled=false"):
            it.target()


def test_a_port_in_use_is_one_event_and_the_run_goes_on(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with served(tmp_path, f"control.port={taken.getsockname()[1]}") as it:
            (said,) = it.said("control")
            assert "cannot listen there: Address already in use: give another port, or 0 for a free one" in said
            assert it.alive()


def test_two_runs_do_not_share_a_port(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with served(tmp_path / "a") as first:
        port = first.target().address.rpartition(":")[2]
        with served(tmp_path / "b", f"control.port={port}") as second:
            assert "Address already in use" in second.said("control")[0]
            assert first.alive()


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("t" * 32, 0o640, r"can be read by others \(mode 0640\): chmod 600 it"),
        ("short", 0o600, "expected one token there, of 16 to 4096 visible ASCII characters"),
        ("two tokens of some length", 0o600, "expected one token there"),
        (None, 0o600, "No such file or directory"),
    ],
)
def test_a_token_file_that_is_wrong_is_one_event_and_the_run_goes_on(tmp_path, text, mode, says):
    file = tmp_path / "token"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    run = tmp_path / "run"
    run.mkdir()
    with served(run, f"control.operator_token_file={file}") as it:
        (said,) = it.said("control")
        assert "nobody can see or steer this run from outside: control.operator_token_file=" in said
        assert re.search(says, said)
        assert "t" * 32 not in said
        assert it.alive()


def test_one_token_for_both_roles_is_refused(tmp_path):
    file = tmp_path / "token"
    file.write_text("t" * 32)
    file.chmod(0o600)
    run = tmp_path / "run"
    run.mkdir()
    with served(run, f"control.operator_token_file={file}", f"control.viewer_token_file={file}") as it:
        assert "its token opens as operator, too: give each role its own" in it.said("control")[0]


def test_a_certificate_that_does_not_match_its_key_is_one_event_and_the_run_goes_on(tmp_path, authority):
    (cert, _), (_, key) = authority.issue("one"), authority.issue("other")
    with served(tmp_path, *secured(cert, key)) as it:
        assert "does not match its key: control.tls_key=" in it.said("control")[0]
        assert it.alive()


def test_what_is_no_certificate_is_said(tmp_path, authority):
    _, key = authority.issue("plain")
    text = tmp_path / "no.pem"
    text.write_text("no certificate")
    run = tmp_path / "run"
    run.mkdir()
    with served(run, *secured(text, key)) as it:
        assert "are no pair that can be used" in it.said("control")[0]


def test_with_tls_the_certificate_must_be_known_and_in_date_and_plain_text_gets_nothing(tmp_path, authority):
    cert, key = authority.issue("server")
    with served(tmp_path, *secured(cert, key)) as it:
        target = it.target()
        assert target.tls
        known = replace(target, ca=authority.ca)
        with Client(known) as client:
            assert client.call(pb.StatusRequest()).status.run == tmp_path.name
        stranger = Authority(tmp_path, "a stranger")
        for wrong in (replace(known, ca=stranger.ca), replace(known, tls=False)):
            with (
                Client(wrong) as client,
                pytest.raises(ControlError, match="no control of a run that can be talked to"),
            ):
                client.call(pb.StatusRequest(), LIMIT_S)
        assert code_of(lambda: raw(target, "Status", b"", shows(target.token))) == "UNAVAILABLE"


def test_a_certificate_that_was_renewed_is_shown_and_one_that_cannot_be_is_not(tmp_path, authority):
    (cert, key), other = authority.issue("renewed"), Authority(tmp_path, "another authority")
    with served(tmp_path, *secured(cert, key)) as it:

        def knows(ca):
            with Client(replace(it.target(), ca=ca)) as client:
                return client.call(pb.StatusRequest(), LIMIT_S).status.run == tmp_path.name

        assert knows(authority.ca)
        for old, new in zip((cert, key), other.issue("renewed"), strict=True):
            Path(old).write_bytes(Path(new).read_bytes())
        assert knows(other.ca)
        with pytest.raises(ControlError):
            knows(authority.ca)
        Path(cert).write_text("no certificate")
        assert knows(other.ca)
        said = it.until(lambda: it.said("control")[1:], "the event")
        assert "until that is mended, connections are made with the certificate of before" in said[0]


def test_a_connection_that_is_lost_is_said_to_be(tmp_path):
    with served(tmp_path) as it, socket.create_server(("127.0.0.1", 0)) as door:
        host, port = it.target().address.rsplit(":", 1)
        ends = []

        def carry(one, other):
            with suppress(OSError):
                while some := one.recv(1 << 16):
                    other.sendall(some)

        def accept():
            ends.extend((door.accept()[0], socket.create_connection((host, int(port)))))
            threading.Thread(target=carry, args=ends, daemon=True).start()
            carry(*ends[::-1])

        threading.Thread(target=accept, daemon=True).start()
        through = replace(it.target(), address=f"127.0.0.1:{door.getsockname()[1]}", run="")
        with Client(through) as client:
            watching = client.watch(0.2)
            assert next(watching).run == tmp_path.name
            for end in ends:
                end.shutdown(socket.SHUT_RDWR)
            with pytest.raises(ControlError, match="the connection is lost"):
                list(watching)


def test_a_certificate_that_is_out_of_date_is_not_trusted(tmp_path, authority):
    cert, key = authority.issue("late", valid_for=-DAY)
    with (
        served(tmp_path, *secured(cert, key)) as it,
        Client(replace(it.target(), ca=authority.ca)) as client,
        pytest.raises(ControlError, match="a certificate that is out of date"),
    ):
        client.call(pb.StatusRequest(), LIMIT_S)


def test_with_mtls_clients_show_a_certificate_that_is_known_and_in_date(tmp_path, authority):
    cert, key = authority.issue("server")
    good, late = authority.issue("alice"), authority.issue("bob", valid_for=-timedelta(hours=1))
    stranger = Authority(tmp_path, "a stranger").issue("mallory")
    with served(tmp_path, *secured(cert, key, f"control.tls_client_ca={authority.ca}")) as it:
        known = replace(it.target(), ca=authority.ca)
        with pytest.raises(BadInput, match=r"--cert='.*' does not match its key: --key="):
            Client(replace(known, cert=good[0], key=late[1]))
        for shown in (("", ""), late, stranger):
            with Client(replace(known, cert=shown[0], key=shown[1])) as client, pytest.raises(ControlError):
                client.call(pb.StatusRequest(), LIMIT_S)
        with Client(replace(known, cert=good[0], key=good[1])) as client:
            client.call(pb.PauseRequest(mutation=pb.Mutation(request_id="x")))
        assert "certificate of alice" in (tmp_path / "audit.jsonl").read_text()
        assert (
            code_of(lambda: raw(known, "Status", b"", None, LIMIT_S, tls(known.address, authority, good)))
            == "UNAUTHENTICATED"
        )


def tls(where, authority, shown):
    ca, cert, key = (Path(path).read_bytes() for path in (authority.ca, *shown))
    return grpc.secure_channel(where, grpc.ssl_channel_credentials(ca, key, cert))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["control.address=0.0.0.0"], "is reached from other machines.*give control.tls_cert and control.tls_key"),
        (["control.address=example.org"], "is reached from other machines"),
        (["control.address="], "expected an address of this machine"),
        (["control.port=70000"], "allowed are 0 .* to 65535"),
        (["control.port=-1"], "must be at least 0"),
        (["control.tls_cert=a.pem"], "needs control.tls_key, too"),
        (["control.tls_key=a.key"], "needs control.tls_cert, too"),
        (["control.tls_client_ca=a.pem"], "needs control.tls_cert, too"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_before_anything_starts(keys, says):
    with pytest.raises(ConfigError, match=says):
        load_config(None, keys)


@pytest.mark.parametrize("where", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_certificate(where):
    assert load_config(None, [f"control.address={where}"]).control.address == where


def test_beyond_this_machine_is_allowed_with_tls():
    keys = ["control.address=0.0.0.0", "control.tls_cert=a.pem", "control.tls_key=a.key"]
    assert load_config(None, keys).control.address == "0.0.0.0"
