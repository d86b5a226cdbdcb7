"""`ray-ep dashboards`: `open` says where a run's page is, from its directory; `proxy` says why it cannot be there."""

import re
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

import ray_ep
from ray_ep.cli import main
from ray_ep.cli.dashboards import PORT
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import claimed

OWN, SEEN = "http://127.0.0.1:40123/ray_ep/", "http://10.0.0.1:8265/ray_ep/r/"


def typed(*words):
    return CliRunner().invoke(main, ["dashboards", *words])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of this process, which has said where its page is."""
    monkeypatch.chdir(tmp_path)
    cfg = ray_ep.load_config(None, ["run_dir=r"])
    run = claimed(cfg, datetime(2026, 7, 1))
    run.create(cfg)
    run.event(Event("page", f"shown at {OWN}", {"address": OWN, "dashboard": SEEN}))
    yield run
    run.release()


def test_the_page_of_a_run_that_goes_is_at_its_own_address_also_without_a_name(run):
    for words in (["open", "r"], ["open"], ["open", "r", "--print"]):
        answer = typed(*words)
        assert (answer.exit_code, answer.stdout, answer.stderr) == (0, f"{OWN}\n", "")


def test_of_a_run_on_another_host_it_is_at_that_of_rays_dashboard(run, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert typed("open", "r").stdout == f"{SEEN}\n"
    run.event(Event("page", "shown", {"address": OWN, "dashboard": ""}))
    answer = typed("open", "r")
    assert answer.stdout == f"{OWN}\n"
    assert re.search(r"the run is on \S+: from here", answer.stderr)


def test_of_a_run_that_has_ended_it_is_its_report(run):
    run.release()
    answer = typed("open", "r")
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert "'r': the run has no page now, and no report.html" in answer.stderr
    (run.path / "report.html").write_text("<html>")
    answer = typed("open", "r")
    assert answer.stdout == f"{(run.path / 'report.html').absolute().as_uri()}\n"
    assert answer.stderr == "the run has ended: this is its report\n"


def test_what_is_no_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, said in ((["open"], "no run was started from here"), (["open", "nowhere"], "is not a run directory")):
        answer = typed(*words)
        assert answer.exit_code == 2
        assert said in answer.stderr


def test_a_proxy_whose_port_is_taken_says_so():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        answer = typed("proxy", f"--port={taken.getsockname()[1]}", "--address=127.0.0.1:1")
    assert answer.exit_code == 2
    assert re.search(r"--port=\d+: cannot listen there: .*in use", answer.stderr)


def test_opening_loads_neither_torch_nor_ray(run):
    code = (
        "import sys; from ray_ep.cli import main; main.main(['dashboards', 'open', 'r'], standalone_mode=False); "
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=run.path.parent)
    assert done.stdout.splitlines() == [OWN, "[]"], done.stderr


def test_the_documented_port_is_that_of_the_command():
    text = (Path(__file__).parents[2] / "docs" / "dashboards.md").read_text()
    assert f"--proxy-server-url=http://127.0.0.1:{PORT}" in text
