"""The page's server over real sockets: what it answers, whom it answers, and a run that goes on without it."""

import http.client
import json
import socket
import threading
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from ray_ep.config.sections.observing import ObserveConfig
from ray_ep.observe.page import server
from ray_ep.observe.page.serving import served
from ray_ep.observe.state import RunState
from tests.observe.page.runs import write_run

KEY = "a key that only the relay has"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(run):
    with served(run, ObserveConfig(), pytest.fail, relay=("127.0.0.1", KEY)) as shown:
        yield shown


def ask(address, path, method="GET", **headers):
    """(status, headers, body)."""
    url = urlsplit(address)
    with closing(http.client.HTTPConnection(url.hostname, url.port, timeout=120)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_the_state_is_the_one_that_the_directory_says(page, run):
    status, headers, body = ask(page.address, "/api/ray_ep/state")
    told, here = json.loads(body), RunState(run).snapshot()
    assert status == 200
    assert headers["Content-Type"].startswith("application/json")
    assert told["steps"]["columns"]["loss"] == here["steps"]["columns"]["loss"]
    assert told["placement"] == here["placement"]
    again = json.loads(ask(page.address, f"/api/ray_ep/state?since={told['version']}")[2])
    assert "steps" not in again  # nothing has changed


def test_placements_layers_and_words_are_answered(page):
    kept = json.loads(ask(page.address, "/api/ray_ep/placements?after=2")[2])["kept"]
    assert [entry["version"] for entry in kept] == [3]
    assert json.loads(ask(page.address, "/api/ray_ep/layers/1")[2])["flows"]
    assert json.loads(ask(page.address, "/api/ray_ep/layers/99")[2]) is None
    assert json.loads(ask(page.address, "/api/ray_ep/summary")[2])["headlines"][0]["label"] == "Loss"


def test_the_page_names_its_parts_relative_to_itself_and_allows_no_other_script(page):
    status, headers, body = ask(page.address, "/ray_ep/")
    text = body.decode()
    assert status == 200
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert "unsafe-eval" not in headers["Content-Security-Policy"]
    assert '"ray_ep/main.js": "./assets/main.js"' in text
    for name in ("main.js", "page.css", "bokeh.min.js"):
        status, headers, _ = ask(page.address, f"/ray_ep/assets/{name}")
        assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
    assert ask(page.address, "/ray_ep")[1]["Location"] == "/ray_ep/"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404), ("/ray_ep/assets/../index.html", 404), ("/ray_ep/assets/%2e%2e%2fpage.css", 404),
        ("/ray_ep/assets/index.html", 404), ("/api/ray_ep/layers/-1", 400), ("/api/ray_ep/layers/x", 400),
        ("/api/ray_ep/state?since=new", 400), ("/api/ray_ep/config.yaml", 404),
    ],
)  # fmt: skip
def test_what_is_not_there_or_not_a_number_is_refused(page, path, status):
    assert ask(page.address, path)[0] == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_it_only_reads(page, method):
    assert ask(page.address, "/api/ray_ep/state", method)[0] == 405


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"}, {"Host": "evil.example:80"}, {"Host": ""}, {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, {"Sec-Fetch-Site": "same-site"},
        {"Origin": "null"},
    ],
)  # fmt: skip
def test_a_foreign_page_gets_nothing(page, headers):
    for path in ("/api/ray_ep/state", "/ray_ep/", "/ray_ep/assets/main.js", "/api/ray_ep/stream"):
        status, told, body = ask(page.address, path, **headers)
        assert (status, len(body)) == (403, len(b"not for you\n")), path
        assert "Access-Control-Allow-Origin" not in told


def test_a_link_from_elsewhere_may_lead_to_the_page_and_its_own_origin_may_ask(page):
    host = urlsplit(page.address).netloc
    assert ask(page.address, "/ray_ep/", **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})[0] == 200
    assert ask(page.address, "/api/ray_ep/summary", Origin=f"http://{host}")[0] == 200
    assert ask(page.address, "/api/ray_ep/summary", Host=f"localhost:{urlsplit(page.address).port}")[0] == 200


def test_the_relays_port_answers_those_alone_who_have_the_key(page):
    assert ask(page.relayed, "/api/ray_ep/summary")[0] == 403
    assert ask(page.relayed, "/api/ray_ep/summary", **{server.KEY_HEADER: "guess"})[0] == 403
    assert ask(page.relayed, "/api/ray_ep/summary", **{server.KEY_HEADER: KEY})[0] == 200


def test_whoever_watches_hears_of_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "LOOK_S", 0.05)
    with served(tmp_path, ObserveConfig(), pytest.fail) as shown:
        url = urlsplit(shown.address)
        with closing(http.client.HTTPConnection(url.hostname, url.port, timeout=120)) as connection:
            connection.request("GET", "/api/ray_ep/stream")
            answer = connection.getresponse()
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            assert answer.readline() == b"event: state\n"
            first = answer.readline()
            answer.readline()
            (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
            assert answer.readline() == b"event: state\n"
            assert answer.readline() != first
        assert json.loads(ask(shown.address, "/api/ray_ep/state")[2])["steps"]["step"] == [1]


def test_a_port_in_use_is_one_sentence_and_no_page():
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port, said = other.getsockname()[1], []
        with served("/nowhere", ObserveConfig(port=port), said.append) as shown:
            assert (shown.address, shown.relayed) == ("", "")
    (words,) = said
    assert words == (
        f"observe.host='127.0.0.1' observe.port={port}: Address already in use: the run goes on without its page"
    )


def test_an_address_that_is_not_of_this_machine_is_one_sentence_too():
    said = []
    with served("/nowhere", ObserveConfig(host="192.0.2.77"), said.append) as shown:
        assert shown.address == ""
    assert len(said) == 1
    assert "192.0.2.77" in said[0]


def test_on_every_address_it_answers_to_the_machines_own_names_and_no_other(run):
    with served(run, ObserveConfig(host="0.0.0.0"), pytest.fail) as shown:
        port = urlsplit(shown.address).port
        here = f"http://127.0.0.1:{port}"
        for host, status in ((socket.gethostname(), 200), ("127.0.0.1", 200), ("10.1.2.3", 403), ("evil.example", 403)):
            assert ask(here, "/api/ray_ep/summary", Host=f"{host}:{port}")[0] == status, host
        other = f"http://127.0.0.2:{port}"  # an address of this machine that nobody has named
        assert ask(other, "/api/ray_ep/summary")[0] == 200


def test_a_run_without_a_page_has_no_thread_and_says_nothing(run):
    before = threading.active_count()
    with served(run, ObserveConfig(page=False), pytest.fail) as shown:
        assert shown.address == ""
        assert threading.active_count() == before


def test_the_thread_and_the_port_are_gone_at_the_end_though_somebody_watches(run):
    with served(run, ObserveConfig(), pytest.fail) as shown:
        url = urlsplit(shown.address)
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=120)
        connection.request("GET", "/api/ray_ep/stream")
        connection.getresponse().readline()
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        ask(shown.address, "/ray_ep/")
