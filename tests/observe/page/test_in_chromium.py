"""The page in a real browser: figures as in the run, keys that reach everything, a content accessibility checker."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ray_ep.config.sections.observing import ObserveConfig
from ray_ep.observe.page.report import write_report
from ray_ep.observe.page.serving import served
from ray_ep.observe.page.sheet import Heat, Lines, sheet_page
from ray_ep.observe.provenance.path import Hop, Place, TokenPath
from ray_ep.observe.provenance.picture import write_picture
from ray_ep.observe.state import RunState
from tests.observe.page.runs import BIG, Size, write_run

pytestmark = pytest.mark.slow
DRAWN = "() => page.charts.every((chart) => chart.view)"
SEEN = """async () => {
  for (const chart of page.charts) {
    chart.host.scrollIntoView();
    await new Promise((done) => setTimeout(done, 60));
  }
  scrollTo(0, 0);
}"""
AXE = """(rules) => axe.run(document, { resultTypes: ["violations"], ...rules }).then((found) => found.violations
  .filter((v) => ["serious", "critical"].includes(v.impact))
  .map((v) => `${v.id}: ${v.nodes.map((n) => n.target).join(" ")}`))"""
RULES = {"light": {}, "dark": {"runOnly": ["color-contrast"]}}  # in the dark nothing but colours is another


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def report(run):
    return write_report(run).as_uri()


def axe_of():
    """The script that checks."""
    found = find_spec("axe_playwright_python")
    if found is None:
        pytest.skip("axe-playwright-python, which carries axe-core, is not installed")
    return str(Path(found.submodule_search_locations[0]) / "axe.min.js")


def show(opened, url, whole=False, **how):
    """The page, its first charts drawn; or the whole of it, scrolled through."""
    tab = opened(url, **how)
    tab.wait_for_function("() => window.page && page.cluster.chart.view")
    if whole:
        tab.evaluate(SEEN)
        tab.wait_for_function(DRAWN)
    return tab


def test_the_figures_are_those_of_the_run_and_every_chart_is_drawn(opened, report, run):
    tab = show(opened, report, whole=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert tab.evaluate("page.view.state.steps.columns.loss") == [line["loss"] for line in lines]
    assert f"{lines[-1]['loss']:.4f}" in tab.inner_text(".headlines")
    assert tab.inner_text("#status") == "done, step 240 of 240"
    painted = """() => page.charts.map((chart) => {
      const canvas = chart.view.canvas_view.primary.canvas;
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return new Set(new Uint32Array(data.buffer)).size;
    })"""
    assert min(tab.evaluate(painted)) > 3  # colours, of each chart


def test_keys_walk_over_slots_and_tell_expert_load_and_why_it_sits_there(opened, report, run):
    tab, state = show(opened, report), RunState(run)
    placement = state.placements.newest
    tab.focus(".chart")
    tab.keyboard.press("ArrowRight")  # the first slot of layer 0
    words = tab.inner_text("#tip")
    expert = int(placement.slots[0, 0, 0])
    assert words.startswith(f"Expert {expert}\nrank 0 on host-0, slot 0, layer 0")
    assert state.why(0, expert).split(": ", 1)[1] in words
    tab.keyboard.press("ArrowDown")
    assert "layer 1" in tab.inner_text("#tip")
    tab.keyboard.press("Enter")
    assert tab.input_value("#layer") == "1"
    assert tab.evaluate("page.view.expert") == int(placement.slots[1, 0, 0])
    tab.keyboard.press("Escape")
    assert tab.is_hidden("#tip")


def test_the_slider_goes_back_to_any_placement_and_shows_what_it_moved(opened, report, run):
    tab, state = show(opened, report), RunState(run)
    assert tab.inner_text("output") == "3 (4 of 4)"
    tab.focus("#version")
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate("page.view.version") == 2
    moved = {(m.layer, m.expert) for m in state.moved(1, 2) if set(m.after) - set(m.before)}
    shown = tab.evaluate("page.source.placements.moved(2).map((m) => [m.layer, m.expert])")
    assert {tuple(m) for m in shown} == moved
    assert "ms a step predicted" in tab.inner_text("#story")
    slots = tab.evaluate("[...page.view.placement.slots]")
    assert slots == state.placements.read(2).slots.reshape(-1).tolist()
    tab.keyboard.press("Home")
    assert "the first that is kept" in tab.inner_text("#story")
    tab.check("#moves")
    tab.click("text=Newest")
    assert tab.evaluate("page.view.version") == 3


def test_a_long_name_of_a_node_stays_inside_its_box_and_is_whole_in_the_words(opened, tmp_path):
    long = "ip-10-12-33-127.us-west-2.compute.internal.<b>$$x$$</b>"
    write_run(tmp_path, Size(steps=20))
    events = tmp_path / "events.jsonl"
    events.write_text(events.read_text().replace("host-0", long))
    tab = show(opened, write_report(tmp_path).as_uri())
    first, second = tab.evaluate("page.cluster.chart.sources.names.data.text")
    assert first.startswith("node 0  ·  ip-10-12")
    assert first.endswith("…")
    assert second == "node 1  ·  host-1"
    tab.focus(".chart >> nth=1")
    tab.keyboard.press("ArrowRight")
    assert f"on {long}, slot 0" in tab.inner_text("#tip")


def test_pairs_and_flows_of_a_layer_are_its_own(opened, report, run):
    tab, state = show(opened, report), RunState(run)
    tab.select_option("#layer", "2")
    tab.wait_for_function("() => page.flows.found && page.company.pairs && page.flows.caption.includes('layer 2')")
    pairs, flows = state.pairs("coactivation", 2), state.pairs("transitions", 2)
    ratio = tab.evaluate("page.company.pairs[0 * 16 + 1]")
    loads = pairs.sum(1) - pairs.diagonal()
    assert ratio == pytest.approx(pairs[0, 1] * loads.sum() / (loads[0] * loads[1]), rel=0.15)  # but for the diagonal
    assert tab.evaluate("page.flows.found.flows[0][2]") == flows.max()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_checker_of_accessibility_finds_nothing_serious(opened, report, theme):
    tab = show(opened, report, whole=True, theme=theme)
    for details in tab.query_selector_all("details"):
        details.evaluate("(it) => { it.open = true; }")
    tab.wait_for_timeout(300)
    tab.add_script_tag(path=axe_of())
    assert tab.evaluate(AXE, RULES[theme]) == []
    tab.evaluate("document.getElementById('story').style.color = getComputedStyle(document.body).backgroundColor")
    assert any("color-contrast" in found for found in tab.evaluate(AXE, {"runOnly": ["color-contrast"]}))  # it looks


def test_a_theme_is_chosen_and_charts_follow(opened, report):
    tab = show(opened, report)
    assert tab.evaluate("document.documentElement.dataset.theme") == "light"
    tab.click("#theme")
    tab.click("#theme")
    assert tab.inner_text("#theme") == "Theme: dark"
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_run_of_58_layers_256_experts_and_64_ranks_is_shown_whole(opened, tmp_path):
    placements = write_run(tmp_path, replace(BIG, steps=200, versions=4))
    tab = show(opened, write_report(tmp_path).as_uri())
    assert tab.evaluate("new Set(page.overview.grid.of.filter(Boolean).map(String)).size") == 64 * 5
    assert tab.evaluate("[...page.view.placement.slots]") == placements[-1].slots.reshape(-1).tolist()
    tab.focus("#version")
    tab.keyboard.press("Home")
    assert tab.evaluate("[...page.view.placement.slots]") == placements[0].slots.reshape(-1).tolist()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_that_compares_draws_its_charts_and_tells_each_field(opened, tmp_path, theme):
    heat = Heat("load", "Load of ranks", np.array([[1.0, 2.0], [0.5, 1.0]]), "of the mean", True, "layer", "rank")
    lines = Lines("Growth", {"a": [(2, 10.0), (4, 18.0)]}, "GPUs", "tokens/s", log=True, low=0.0)
    html = sheet_page(
        "Compared", ["a note"], [("name", "step"), ("plan", "9 ms")], "legend", ("Advice", ["stay"]), [heat, lines]
    )
    (tmp_path / "sheet.html").write_text(html)
    tab = opened((tmp_path / "sheet.html").as_uri(), theme=theme, height=1600)
    tab.wait_for_function(
        "() => [...document.querySelectorAll('.chart')].every((host) => host.querySelector('div > *'))"
    )
    assert tab.inner_text("h1") == "Compared"
    assert "plan\t9 ms" in tab.inner_text("table")
    tab.focus(".chart")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#tip") == "layer 0, rank 1\n2 of the mean"
    tab.focus(".chart >> nth=1")
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#tip") == "GPUs 2\na: 10"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_path_of_a_token_shows_each_choice_with_its_rank_and_its_reason(opened, tmp_path, theme):
    places = [Place(r, f"n{r // 2}", f"host-{r // 2} <b>", "cpu") for r in (0, 1, 2)]
    hop = Hop(0, 5, 0.75, "primary", places[2], "placement 3, after step 9: it pays </script><i>")
    layers = {0: [hop, replace(hop, expert=1, weight=0.25, kind="guest", place=places[0], why="")], 1: [hop]}
    text = ("</script>", "to\nken", "<img src=x>")
    path = TokenPath("step 3, token 7", 3, None, 7, 0, 7, 65, text[1], text[0], text[2], 1, places[1], 3, 0, 3, layers)
    write_picture(path, tmp_path / "path.html")
    tab = opened((tmp_path / "path.html").as_uri(), theme=theme)
    assert tab.inner_text("h1") == "step 3, token 7"
    assert tab.inner_text(".context") == "</script>to\\nken<img src=x>"
    assert tab.inner_text(".context mark") == "to\\nken"
    rows = [row.split("\t") for row in tab.inner_text("tbody").splitlines() if row.startswith("layer")]
    assert [row[0] for row in rows] == ["layer 0", "layer 1"]
    cells = tab.locator("tbody tr").first.locator("td").all_inner_texts()
    assert cells == ["expert 1 · 0.250 · guest", "", f"expert 5 · 0.750 · primary\n{hop.why}"]
    assert tab.locator("td.home").count() == 2
    assert tab.locator("thead tr").first.locator("th").all_inner_texts() == ["host-0 <b>", "host-1 <b>"]
    tab.add_script_tag(path=axe_of())
    assert tab.evaluate(AXE, RULES[theme]) == []


@pytest.mark.parametrize("missing", [(), ("**/stream*",)], ids=["events", "asking"])
def test_a_live_page_follows_its_run_by_events_and_where_they_cannot_pass_by_asking(opened, tmp_path, missing):
    write_run(tmp_path, Size(layers=2, experts=8, steps=20), outcome="")
    with served(tmp_path, ObserveConfig(), pytest.fail) as shown:
        tab = opened(shown.address, missing=missing)
        tab.wait_for_function("() => window.page")
        assert tab.inner_text("#status").startswith("stepping, step 20 of 20")
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 21, "loss": 0.5}) + "\n")
        tab.wait_for_function("() => page.view.state.steps.step.at(-1) === 21")
        assert tab.evaluate("page.view.state.steps.step") == list(range(1, 22))
        assert tab.evaluate("page.view.state.steps.columns.tokens_per_second.at(-1)") is None
        assert tab.inner_text(".headlines .value") == "0.5000"
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write(json.dumps({"step": 21, "kind": "failed", "message": "rank 1 died", "fields": {}}) + "\n")
    # The run has ended, and its server with it: who was told of it in time shows it, all keep what was said last.
    said = "The driver does not answer" if missing else "failed, step 21 of 20: rank 1 died"
    tab.wait_for_function("(said) => document.getElementById('status').textContent.startsWith(said)", arg=said)
    tab.context.close()
    opened.complaints.clear()  # of a browser whose server has gone
