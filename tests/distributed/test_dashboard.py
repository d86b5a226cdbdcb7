"""A run in the dashboard of Ray: its page at the dashboard's own address, and what Ray's own views say of the run."""

import json
import os
import signal
import urllib.error
import urllib.request

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


def page_of(run, here, lines):
    """Addresses of a run's page: its own, and in Ray's dashboard."""
    events = here.path / "run" / "events.jsonl"
    told = run.until(lambda: [e for e in lines(events) if e["kind"] == "page"], 120, "the page")
    return told[0]["fields"]["address"], told[0]["fields"]["dashboard"]


def ended(run):
    """Stop a run by its signal."""
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 130


def test_a_local_run_with_a_dashboard_has_its_page_there_without_anything_to_set_up(here, lines):
    run = here.train("run_dir=run", "optim.steps=100000", "cluster.dashboard=true")
    live = RunState(here.path / "run")
    own, seen = page_of(run, here, lines)
    root = seen.removesuffix("/ray_ep/run/")
    assert get(seen, token="")[0] == 401  # Ray's own login
    status, page = get(seen)
    assert (status, get(own, token="")[1]) == (200, page)
    state = json.loads(get(f"{root}/api/ray_ep/run/state")[1])
    assert state["membership"]["active"] == 2
    assert 'document.getElementById("ray_ep")' in get(f"{root}/")[1]
    assert json.loads(get(f"{root}/api/version")[1])["ray_version"]
    assert get(f"{root}/ray_ep/other/")[0] == 410
    run.until(lambda: live.refresh() and live.snapshot("load")["load"].get("experts"), 60, "the loads of recent steps")
    assert live.snapshot("run")["run"]["state"] == "stepping"
    ended(run)
    live.refresh()
    assert {p: live.snapshot(p)[p] for p in PARTS} == {p: RunState(live.path).snapshot(p)[p] for p in PARTS}
    assert live.snapshot("run")["run"]["outcome"] == "interrupted"


def test_a_run_on_a_cluster_is_found_by_its_dashboard_and_named_in_rays_own_views(here, cluster, lines):
    run = here.train("run_dir=run", "optim.steps=100000", RAY_ADDRESS=cluster.driver)
    own, seen = page_of(run, here, lines)
    assert seen == f"{cluster.job}/ray_ep/run/"
    assert get(seen)[0] == 200
    actors = json.loads(get(f"{cluster.job}/api/v0/actors?detail=1&limit=1000")[1])["data"]["result"]["result"]
    assert {"ep/run/rank0", "ep/run/rank1"} <= {a["name"] for a in actors if a["state"] == "ALIVE"}
    jobs = json.loads(get(f"{cluster.job}/api/jobs/")[1])
    (job,) = (j for j in jobs if (j["metadata"] or {}).get("ray_ep_run") == str(here.path / "run"))
    assert (job["metadata"]["ray_ep_page"], job["metadata"]["job_name"]) == (own, "run")
    node = RunState(here.path / "run").snapshot("membership")["membership"]["ranks"][0]["node_id"]
    logs = json.loads(get(f"{cluster.job}/api/v0/logs?node_id={node}&glob=ray_ep-run*")[1])
    assert "ray_ep-run.placement.txt" in json.dumps(logs)
    os.kill(run.process.pid, signal.SIGSTOP)  # a page that hangs: the dashboard goes on
    try:
        assert get(seen)[0] == 504
        assert json.loads(get(f"{cluster.job}/api/version")[1])["ray_version"]
    finally:
        os.kill(run.process.pid, signal.SIGCONT)
    ended(run)
    assert get(seen)[0] == 410


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
