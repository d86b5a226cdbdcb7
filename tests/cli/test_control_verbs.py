"""`ray-ep status`, `pause` and the other verbs that talk to a run: what they print, and how they end."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from datetime import datetime, timezone

import pytest
from click.testing import CliRunner

from ray_ep.cli import main
from ray_ep.cli.control.top import View, bars
from ray_ep.cli.control.words import event_of
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.run.claim import Claim
from ray_ep.placement import Placement
from tests.control.scene import served


def typed(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    with served(tmp_path_factory.mktemp("run"), "elastic.max_ranks=4") as run:
        run.until(lambda: run.driver.done > 3, "steps")
        yield run


def test_status_says_what_the_run_is_at(it):
    said = typed("status", it.path)
    assert said.exit_code == 0, said.output
    first, figures, ranks, *_ = said.stdout.splitlines()
    assert first.startswith(f"{it.path.name}: stepping")
    assert "of 1000000 steps, placement 0" in first
    assert figures.startswith("loss 1.0000, ")
    assert ranks.startswith("2 of 2 ranks in epoch 0")
    assert json.loads(typed("status", it.path, "--json").stdout)["status"]["state"] == "RUN_STATE_STEPPING"


def test_a_run_is_paused_saved_and_resumed(it):
    paused = typed("pause", it.path)
    assert (paused.exit_code, paused.stdout.startswith("paused after step ")) == (0, True)
    assert typed("rebalance", it.path).exit_code == 2
    saved = json.loads(typed("checkpoint", it.path, "--json").stdout)
    assert saved["url"].endswith(f"/step-{int(saved['outcome']['step']):06d}")
    assert typed("resume", it.path).exit_code == 0
    again = typed("resume", it.path)
    assert (again.exit_code, "the run is not paused" in again.stderr) == (2, True)
    assert it.alive()


def test_a_request_id_makes_a_repeat_harmless_and_guards_are_passed_on(it):
    before = it.ranks.calls.count("save")
    said = [typed("checkpoint", it.path, "--request-id", "monday") for _ in range(2)]
    assert said[0].stdout == said[1].stdout
    assert it.ranks.calls.count("save") == before + 1
    other = typed("checkpoint", it.path, "--if-epoch", 7)
    assert (other.exit_code, "if_epoch=7: the run is in epoch 0" in other.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("scale", "0"), "N='0': expected a number of ranks from 1 on, or auto"),
        (("scale", "many"), "N='many': expected"),
        (("scale", "9"), "9 ranks are too many: allowed are 1 to 4 (elastic.max_ranks=4)"),
        (("drain", "beta"), "no rank is on a node 'beta': those with ranks are a (host alpha"),
        (("drain", "alpha", "--undo"), "no node is to be left by an order"),
        (("placement", "--version", "99"), "version=99: the run has no placement of that version"),
        (("placement", "--apply", "nowhere.json"), "placement file nowhere.json: No such file"),
        (("placement", "--propose", "--apply", "x"), "give one of --version, --propose, --predict and --apply"),
        (("placement", "--apply", "x", "--out", "y"), "--out writes what is shown: give it without --apply"),
        (("placement", "--if-epoch", "3"), "go with --apply alone"),
        (("placement", "--version", 2**64), "18446744073709551616 is not in the range of 0 to"),
        (("pause", "--if-epoch", 2**64), "18446744073709551616 is not in the range of 0 to"),
        (("pause", "--request-id", "\udcff"), "is not UTF-8"),
        (("pause", "--wait", "nan"), "'nan' is no time"),
        (("pause", "--wait", "inf"), "inf is not in the range"),
        (("drain", "\udcff"), "is not UTF-8"),
        (("top", "--every", "nan"), "'nan' is no time"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(it, words, says):
    refused = typed(words[0], it.path, *words[1:])
    assert (refused.exit_code, says in refused.stderr) == (2, True), refused.stderr
    assert it.alive()


def test_a_placement_is_printed_written_predicted_and_moved_to(it, tmp_path):
    shown = typed("placement", it.path, "--out", tmp_path / "now.json")
    assert shown.exit_code == 0, shown.output
    assert "* owns the expert" in shown.stdout
    now = Placement.load(tmp_path / "now.json")
    assert typed("placement", it.path, "--predict", tmp_path / "now.json").stdout.startswith("stay: ")
    proposed = typed("placement", it.path, "--propose")
    assert "predicted for epoch 0 and placement " in proposed.stdout
    slots = now.slots.copy()
    slots[:, [0, 1], [0, -1]] = slots[:, [1, 0], [-1, 0]]
    (tmp_path / "better.json").write_text(Placement(slots, now.num_experts).to_json())
    moved = typed("placement", it.path, "--apply", tmp_path / "better.json")
    assert (moved.exit_code, moved.stdout.startswith("experts have moved to version ")) == (0, True), moved.output


def test_top_prints_a_line_a_change_where_nobody_looks(tmp_path):
    with served(tmp_path) as run:
        run.until(lambda: run.driver.done > 3, "steps")
        threading.Timer(1.0, lambda: typed("stop", tmp_path)).start()
        said = typed("top", tmp_path, "--every", "0.2")
    assert said.exit_code == 0, said.output
    lines = said.stdout.splitlines()
    assert "stepping" in lines[0]
    assert lines[-1].startswith("interrupted")


def test_top_draws_what_the_status_tells():
    from rich.console import Console

    ranks = [pb.Rank(rank=n, member=f"rank-{n}", host="alpha") for n in range(40)]
    step = pb.Step(step=7, loss=1.5, step_seconds=0.25)
    status = pb.RunStatus(run="a run", state=pb.RUN_STATE_PAUSED, why="as [bold]somebody[/bold] asked", done=7, steps=9)
    status.step.CopyFrom(step)
    status.membership.ranks.extend(ranks)
    view, console = View(), Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    view.add(status)
    console.print(view.drawn(status, 30))
    text = console.export_text()
    assert "paused (as [bold]somebody[/bold] asked)" in text, "what a run says is no markup"
    assert "step 7 of 9" in text
    assert "loss 1.5000, 250 ms a step" in text or "loss 1.5000, 0.25 s a step" in text, text
    assert "more" in text
    assert len(text.splitlines()) <= 30
    assert bars([1.0, 2.0, float("nan")]) == "▁█  1 to 2"


def test_an_event_is_one_line_in_the_time_of_here_that_steers_no_terminal():
    at = datetime(2026, 7, 1, 12, 30, 5, tzinfo=timezone.utc)
    event = pb.Event(time=at.isoformat(), kind="failed", message="\x1b[2Jrank 1 raised\nTraceback")
    assert event_of(event) == f"{at.astimezone():%H:%M:%S} failed: [2Jrank 1 raised"
    assert event_of(pb.Event(time="", kind="page", message="is there")) == "page: is there"


@pytest.mark.parametrize(("width", "height"), [(20, 5), (1, 1), (300, 100)])
def test_top_draws_on_any_terminal(width, height):
    from rich.console import Console

    status = pb.RunStatus(run="a run", steps=9, events=[pb.Event(kind="page", message="x" * 500)] * 9)
    status.membership.ranks.extend(pb.Rank(rank=n, member=f"rank-{n}") for n in range(200))
    console = Console(record=True, width=width, height=height, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(View().drawn(status, height))
    assert console.export_text()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "\udcff", "http://127.0.0.1:80"])
def test_what_no_directory_can_be_called_is_refused_as_it_was_typed(name):
    refused = typed("status", name)
    assert (refused.exit_code, f"{name!r}: expected a run directory" in refused.stderr) == (2, True), refused.output


@pytest.mark.parametrize(
    "words",
    [("export", "x" * 5000, "out"), ("plan", "x" * 5000), ("trace", "x" * 5000), ("dashboards", "open", "x" * 5000)],
)
def test_a_path_that_is_too_long_is_refused_by_every_verb(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = typed(*words)
    assert (refused.exit_code, refused.stderr.splitlines()[-1].endswith("...: File name too long")) == (2, True)


def test_a_run_that_is_forming_is_said_to(tmp_path):
    claim = Claim(tmp_path, datetime(2026, 7, 1))
    assert "this run is forming still" in typed("status", tmp_path).stderr
    claim.release()
    assert "expected a run directory" in typed("status", tmp_path).stderr


@pytest.mark.parametrize("words", [("status",), ("pause",), ("top",), ("scale", "4"), ("drain", "beta")])
def test_what_is_no_run_is_refused(tmp_path, words):
    refused = typed(words[0], tmp_path / "nowhere", *words[1:])
    assert (refused.exit_code, "expected a run directory" in refused.stderr) == (2, True)


def test_an_address_needs_a_token_and_takes_one(it, tmp_path):
    where = it.target().address
    assert "give --token-file FILE, too" in typed("status", where).stderr
    token = tmp_path / "token"
    token.write_text(it.target().token)
    token.chmod(0o644)
    assert "can be read by others (mode 0644): chmod 600 it" in typed("status", where, "--token-file", token).stderr
    token.chmod(0o600)
    assert typed("status", where, "--token-file", token).exit_code == 0
    by_env = CliRunner(env={"RAY_AUTH_TOKEN_PATH": str(token)})
    assert by_env.invoke(main, ["status", where]).exit_code == 0
    token.write_text("wrong" * 8)
    assert by_env.invoke(main, ["status", where]).exit_code == 2
    assert by_env.invoke(main, ["status", str(it.path)]).exit_code == 0, "a run has a token of its own"
    wrong = typed("status", where, "--token-file", token)
    assert (wrong.exit_code, "there was none, or a wrong one" in wrong.stderr) == (2, True)


def test_an_address_where_nobody_or_something_else_listens_is_said(tmp_path):
    token = tmp_path / "token"
    token.write_text("t" * 32)
    token.chmod(0o600)
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        free = it.getsockname()[1]
    nobody = typed("status", f"127.0.0.1:{free}", "--token-file", token)
    assert (nobody.exit_code, "nobody listens there" in nobody.stderr) == (1, True), nobody.stderr
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        said = typed("status", f"127.0.0.1:{other.server_port}", "--token-file", token)
        other.shutdown()
    assert (said.exit_code, "what listens there is no control of a run" in said.stderr) == (1, True), said.stderr


def test_asking_loads_neither_torch_nor_ray(it):
    code = "import sys; from ray_ep.cli import main; main(['status', sys.argv[1]], standalone_mode=False); "
    code += "sys.exit(len({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, str(it.path)], check=False).returncode == 0


def test_help_lists_them():
    said = typed("--help").stdout
    for words in ("status runs/NAME", "scale runs/NAME 4", "drain runs/NAME NODE", "placement runs/NAME"):
        assert f"ray-ep {words}" in said
