"""A run in the dashboard of Ray: its page at the dashboard's own address, and what Ray's own views say of the run."""

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from subprocess import PIPE, Popen
from urllib.parse import quote

import pytest

from ray_ep.observe.state import PARTS, RunState

pytestmark = pytest.mark.slow

TOKEN = os.environ["RAY_AUTH_TOKEN"]


def get(url, token=TOKEN, limit_s=20):
    """(status, text) of an address."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=limit_s) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def page_of(run, here, lines, name="run"):
    """Addresses of a run's page: its own, and in Ray's dashboard."""
    events = here.path / name / "events.jsonl"
    told = run.until(lambda: [e for e in lines(events) if e["kind"] == "page"], 200, "the page")
    return told[0]["fields"]["address"], told[0]["fields"]["dashboard"]


def ended(run):
    """Stop a run by its signal."""
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(200) == 130


def test_a_local_run_with_a_dashboard_has_its_page_there_without_anything_to_set_up(here, lines):
    name = "Zürich <b>&'%41"
    run = here.train(f"run_dir={name}", "optim.steps=100000", "cluster.dashboard=true")
    live = RunState(here.path / name)
    own, seen = page_of(run, here, lines, name)
    root, quoted = seen.removesuffix(f"/ray_ep/{quote(name)}/"), quote(name)
    assert get(seen, token="")[0] == 401  # Ray's own login
    status, page = get(seen)
    assert (status, get(own, token="")[1]) == (200, page)
    state = json.loads(get(f"{root}/api/ray_ep/{quoted}/state")[1])
    assert state["run"]["name"] == name
    assert json.loads(get(f"{root}/api/ray_ep/{quoted}/control")[1])["closed"]
    assert state["membership"]["active"] == 2
    assert 'document.getElementById("ray_ep")' in get(f"{root}/")[1]
    assert json.loads(get(f"{root}/api/version")[1])["ray_version"]
    assert get(f"{root}/ray_ep/other/")[0] == 410
    run.until(lambda: live.refresh() and live.snapshot("load")["load"].get("experts"), 200, "the loads of recent steps")
    assert live.snapshot("run")["run"]["state"] == "stepping"
    assert not [e for e in lines(live.path / "events.jsonl") if e["kind"] in ("metrics", "not-written")]
    ended(run)
    live.refresh()
    assert {p: live.snapshot(p)[p] for p in PARTS} == {p: RunState(live.path).snapshot(p)[p] for p in PARTS}
    assert live.snapshot("run")["run"]["outcome"] == "interrupted"


def test_a_run_on_a_cluster_is_found_by_its_dashboard_and_named_in_rays_own_views(here, cluster, lines):
    run = here.train("run_dir=shown", "optim.steps=100000", RAY_ADDRESS=cluster.driver)
    own, seen = page_of(run, here, lines, "shown")
    assert seen == f"{cluster.job}/ray_ep/shown/"
    assert get(seen)[0] == 200
    actors = json.loads(get(f"{cluster.job}/api/v0/actors?detail=1&limit=1000")[1])["data"]["result"]["result"]
    assert {"ep/shown/rank0", "ep/shown/rank1"} <= {a["name"] for a in actors if a["state"] == "ALIVE"}
    jobs = json.loads(get(f"{cluster.job}/api/jobs/")[1])
    (job,) = (j for j in jobs if (j["metadata"] or {}).get("ray_ep_run") == str(here.path / "shown"))
    assert (job["metadata"]["ray_ep_page"], job["metadata"]["job_name"]) == (own, "shown")
    node = RunState(here.path / "shown").snapshot("membership")["membership"]["ranks"][0]["node_id"]
    job_id = job["job_id"]
    file = f"{cluster.job}/api/v0/logs/file?node_id={node}&lines=1000&filename=ray_ep-shown-{job_id}"
    logs = json.dumps(json.loads(get(f"{cluster.job}/api/v0/logs?node_id={node}&glob=*{job_id}*")[1]))
    assert all(f"ray_ep-shown-{job_id}.{what}" in logs for what in ("driver.log", "placement.txt")), (
        "as Other logs asks"
    )
    assert f"event kind=page shown at {own}" in get(f"{file}.driver.log")[1]
    assert "layer 0: rank 0:" in get(f"{file}.placement.txt")[1]
    rank = next(a["actor_id"] for a in actors if a["name"] == "ep/shown/rank1")
    assert "joined epoch=0 rank=1 of=2" in get(f"{cluster.job}/api/v0/logs/file?actor_id={rank}&suffix=err")[1]
    os.kill(run.process.pid, signal.SIGSTOP)  # a page that hangs: the dashboard goes on
    try:
        assert get(seen)[0] == 504
        assert json.loads(get(f"{cluster.job}/api/version")[1])["ray_version"]
    finally:
        os.kill(run.process.pid, signal.SIGCONT)
    ended(run)
    assert get(seen)[0] == 410


ANNOUNCES = """
import sys, time, ray
from ray_ep.driver.actors.shown import Page, Shown, announced
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
with announced(Shown(Page("killed", "/runs/killed", "http://127.0.0.1:1"))):
    print("announced", flush=True)
    sys.stdin.read()
"""


def test_a_run_whose_driver_was_killed_is_listed_as_ended_until_it_is_resumed(here, cluster):
    def listed():
        runs = json.loads(get(f"{cluster.job}/api/ray_ep/")[1])["runs"]
        return [r["ended"] for r in runs if r["name"] == "killed"]

    def until(expected):
        limit = time.monotonic() + 120
        while listed() != expected and time.monotonic() < limit:
            time.sleep(0.2)
        assert listed() == expected

    for end in (Popen.kill, lambda driver: driver.stdin.close()):
        with Popen([sys.executable, "-c", ANNOUNCES, cluster.driver], stdin=PIPE, stdout=PIPE) as driver:
            assert driver.stdout.readline() == b"announced\n"
            until([False])
            end(driver)
        until([True] if end is Popen.kill else [])
        if end is Popen.kill:
            status, words = get(f"{cluster.job}/ray_ep/killed/")
            assert (status, "has ended, for its driver is gone" in words) == (410, True)


def test_a_link_to_the_runs_stands_in_the_navigation_in_its_looks(cluster, browser):
    context = browser.new_context(viewport={"width": 1400, "height": 500})
    context.add_cookies([{"name": "ray-authentication-token", "value": TOKEN, "url": cluster.job}])
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    look = "s => { const c = getComputedStyle(document.querySelector(s)); return [c.color, c.fontSize, c.fontWeight] }"
    try:
        tab.goto(f"{cluster.job}/#/overview")
        tab.locator("#ray_ep").wait_for()
        assert tab.locator("nav p > a").all_inner_texts()[-2:] == ["Logs", "Experts"]
        for dark in (False, True):
            if dark:
                tab.get_by_label("Dark mode").click()
                tab.get_by_label("Light mode").wait_for()
            assert tab.evaluate(look, "#ray_ep") == tab.evaluate(look, 'nav a[href="#/jobs"]')
        tab.locator('nav a[href="#/jobs"]').click()
        assert tab.locator("nav p > a").all_inner_texts().count("Experts") == 1
        tab.locator("#ray_ep").click()
        tab.wait_for_url("**/ray_ep/**")
    finally:
        context.close()
