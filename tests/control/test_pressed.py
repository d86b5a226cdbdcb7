"""The page's buttons over real sockets: what they ask of the run, who may press, and which presses are none."""

import http.client
import json
import os
import subprocess
import sys
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest

from ray_ep.config.sections.observing import ControlConfig, ObserveConfig
from ray_ep.control.pressed import CALLS, Buttons
from ray_ep.observe.page.serving import served as page_of
from tests.control.scene import served
from tests.control.test_rights import OPERATOR, VIEWER, token_file

RELAY = "a key that only the relay has"


@contextmanager
def shown(path, *overrides):
    """Inside: a run that steps, and the address of its page."""
    with (
        served(path, *overrides) as run,
        page_of(path, ObserveConfig(), pytest.fail, ("127.0.0.1", RELAY), run.controls[0].buttons) as page,
    ):
        run.until(lambda: run.driver.done > 1, "a step")
        run.page = page
        yield run


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    with shown(tmp_path_factory.mktemp("run")) as run:
        yield run


def ask(address, path, method="GET", body=None, **headers):
    """(status, what was answered)."""
    url = urlsplit(address)
    with closing(http.client.HTTPConnection(url.hostname, url.port, timeout=120)) as connection:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items() if v is not None})
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if answer.headers["Content-Type"].startswith(
            "application/json"
        ) else text


def standing(address):
    return ask(address, "/api/ray_ep/control")[1]


def press(address, call, message=None, number=None, **headers):
    """As the page does it, but for `headers`."""
    numbered = {"mutation": {"request_id": number or os.urandom(8).hex()}} | (message or {})
    own = {"Origin": f"http://{urlsplit(address).netloc}", "Content_Type": "application/json"}
    own["X_Ray_Ep_Press"] = standing(address).get("key", "")
    return ask(address, f"/api/ray_ep/control/{call}", "POST", json.dumps(numbered), **own | headers)


def audited(run):
    """What came of each change that was asked for."""
    lines = [json.loads(line) for line in (run.path / "audit.jsonl").read_text().splitlines()]
    return [line for line in lines if line["result"] != "ASKED"]


def test_who_may_read_the_runs_files_steers_it_from_its_page_and_the_audit_says_so(it):
    assert standing(it.page.address) | {"key": ""} == {"closed": False, "why": "", "token": False, "key": ""}
    status, answer = press(it.page.address, "Pause", number="page-1")
    assert (status, answer["code"]) == (200, "OK")
    assert it.status_now().state == 6
    assert press(it.page.address, "Pause", number="page-1")[1] == answer, "the same press again"
    assert press(it.page.address, "Resume")[1]["code"] == "OK"
    assert press(it.page.address, "Resume")[1]["code"] == "FAILED_PRECONDITION"
    assert it.alive()
    first = next(e for e in audited(it) if e["id"] == "page-1")
    assert (first["who"], first["role"], first["what"], first["result"]) == ("control.json", "operator", "Pause", "OK")
    assert first["where"].startswith("page, 127.0.0.1:")


def test_what_a_page_no_longer_shows_is_refused(it):
    stale = {"mutation": {"request_id": "stale", "if_epoch": 7, "if_placement_version": 0}, "ranks": 4}
    assert press(it.page.address, "Scale", stale)[1] == {
        "code": "ABORTED", "words": "if_epoch=7: the run is in epoch 0",
    }  # fmt: skip


@pytest.mark.parametrize(
    "headers",
    [
        {"X_Ray_Ep_Press": None}, {"X_Ray_Ep_Press": "guess"}, {"Origin": None}, {"Origin": "null"},
        {"Origin": "http://evil.example"}, {"Origin": "http://127.0.0.1:1"}, {"Sec_Fetch_Site": "cross-site"},
        {"Origin": "http://evil.example", "Host": "evil.example"}, {"Host": "127.0.0.1:1"}, {"Via": "1.1 proxy"},
        {"Content_Type": "text/plain"}, {"Content_Type": None}, {"Content_Type": "application/x-www-form-urlencoded"},
        {"Origin": "http://evil.example", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Site": "cross-site"},
        {"X_Forwarded_For": "10.0.0.9"}, {"Sec_Fetch_Site": "same-site"},
    ],
)  # fmt: skip
def test_a_press_that_is_not_the_pages_own_changes_nothing_and_is_noted(it, headers):
    before = len(audited(it))
    status, words = press(it.page.address, "Stop", **headers)
    assert status == 403, words
    (noted,) = it.until(lambda: audited(it)[before:], "a line of the audit")
    assert (noted["who"], noted["what"], noted["result"]) == ("", "Stop", "PERMISSION_DENIED")
    assert it.alive()


def test_there_is_no_button_on_the_relays_port_and_none_is_told_of(it):
    told = ask(it.page.relayed, "/api/ray_ep/control", X_Ray_Ep_Key=RELAY, Via="1.1 ray_ep")[1]
    assert (told["closed"], told["key"]) == (True, "")
    assert "only looked at" in told["why"]
    key = standing(it.page.address)["key"]
    origin = {"Origin": f"http://{urlsplit(it.page.relayed).netloc}", "X_Ray_Ep_Press": key}
    for own in ({}, {"X_Ray_Ep_Key": RELAY}):
        status, _ = ask(
            it.page.relayed, "/api/ray_ep/control/Stop", "POST", "{}", Content_Type="application/json", **origin, **own
        )
        assert status == 403
    assert it.alive()


def test_what_is_no_message_of_a_button_is_refused_by_name(it):
    address = it.page.address
    assert press(address, "ApplyPlacement")[1]["code"] == "UNIMPLEMENTED"
    assert press(address, "Reboot")[1]["words"] == f"'Reboot': the page has {', '.join(CALLS)}"
    assert press(address, "Pause", number="no good id!")[1]["code"] == "INVALID_ARGUMENT"
    assert "nonsense" in press(address, "Pause", {"nonsense": 1})[1]["words"]
    assert press(address, "Scale", {"ranks": -3})[1]["code"] == "INVALID_ARGUMENT"
    own = {"Origin": f"http://{urlsplit(address).netloc}", "Content_Type": "application/json"}
    own["X_Ray_Ep_Press"] = standing(address)["key"]
    for body, status in (("{", 400), ("[" * 9000, 400), ('"x"', 200), ("null", 200), ("x" * 20_000, 413)):
        answered, told = ask(address, "/api/ray_ep/control/Stop", "POST", body, **own)
        assert answered == status, body[:9]
        assert status != 200 or told["code"] == "INVALID_ARGUMENT", told
    assert it.alive()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_of_the_machine_is_asked_for_a_token(it):
    code = f"""
import os, encodings.idna, urllib.request
os.setuid(65534)
print(urllib.request.urlopen({it.page.address.removesuffix("/ray_ep/") + "/api/ray_ep/control"!r}).read().decode())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(told)["token"] is True
    assert standing(it.page.address)["token"] is False


def test_where_tokens_are_set_the_page_wants_one_and_a_viewers_changes_nothing(tmp_path, caplog):
    viewer, operator = token_file(tmp_path, "viewer", VIEWER), token_file(tmp_path, "operator", OPERATOR)
    keys = [f"control.viewer_token_file={viewer}", f"control.operator_token_file={operator}"]
    with shown(tmp_path / "run", *keys) as run:
        address = run.page.address
        assert standing(address)["token"] is True
        codes = {
            token: press(address, "Pause", Authorization=token and f"Bearer {token}")[1]["code"]
            for token in (None, "wrong" * 8, VIEWER, OPERATOR)
        }
        assert list(codes.values()) == ["UNAUTHENTICATED", "UNAUTHENTICATED", "PERMISSION_DENIED", "OK"]
        assert [e["who"] for e in audited(run)] == ["", "", "control.viewer_token_file", "control.operator_token_file"]
        kept = b"".join(p.read_bytes() for p in run.path.rglob("*") if p.is_file())
        assert OPERATOR.encode() not in kept
    assert OPERATOR not in caplog.text


@pytest.mark.parametrize(
    ("cfg", "why"),
    [
        (ControlConfig(enabled=False), "control.enabled=false"),
        (ControlConfig(tls_client_ca="ca.pem"), "control.tls_client_ca"),
    ],
)
def test_a_run_that_cannot_be_steered_from_a_page_says_why(cfg, why):
    closed, said = Buttons(cfg).shut()
    assert closed
    assert why in said


def test_buttons_come_with_the_control_and_go_with_the_run():
    buttons = Buttons(ControlConfig())
    closed, why = buttons.shut()
    assert not closed
    assert why.startswith("No buttons now")
    assert buttons.press("Stop", {}, "", True, "page").result()[0] == "UNAVAILABLE"
    buttons.close()
    assert buttons.shut() == (True, "The run has ended.")
    assert buttons.press("Stop", {}, "", True, "page").result() == ("UNAVAILABLE", "The run has ended.")
