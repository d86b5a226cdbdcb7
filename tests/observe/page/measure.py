"""How fast the page is at 58 layers x 256 experts x 64 ranks: `python -m tests.observe.page.measure [THEME] [PNG]`.

Prints the time until the first view is drawn, and from Chromium's own trace the longest tasks of the main thread while
somebody drags the slider over all placements.
"""

import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from ray_ep.observe.page.report import write_report
from tests.browser import CHROMIUM
from tests.observe.page.runs import BIG, write_run

DRAWN = "() => window.page && page.overview.chart.figure && page.overview.chart.view && page.cluster.chart.view"
SCRUB = """async () => {
  const slider = document.getElementById("version");
  for (let round = 0; round < 2; round += 1) {
    for (let at = 0; at <= Number(slider.max); at += 1) {
      slider.value = String(round ? Number(slider.max) - at : at);
      slider.dispatchEvent(new Event("input"));
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    }
  }
}"""


def main(theme="light", picture=""):
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = Path(folder) / "big"
        write_run(run, BIG)
        began = time.perf_counter()
        report = write_report(run)
        print(f"written in {time.perf_counter() - began:.2f} s, {report.stat().st_size / 1e6:.2f} MB")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_context(viewport={"width": 1360, "height": 900}, color_scheme=theme).new_page()
        tab.goto(report.as_uri(), wait_until="commit")
        tab.wait_for_function(DRAWN, polling=10, timeout=60_000)
        print(f"first view after {tab.evaluate('performance.now()') / 1e3:.2f} s")
        tab.wait_for_timeout(500)
        session = tab.context.new_cdp_session(tab)
        for part in ("overview", "bars", "company", "time.phases"):
            tab.evaluate(f"page.{part}.chart.host.scrollIntoView({{block: 'center'}})")
            tab.wait_for_function(f"() => page.{part}.chart.view")
            tab.wait_for_timeout(500)
            wall, cpu = traced(session, lambda: tab.evaluate(SCRUB))
            print(f"scrubbing over {BIG.versions} placements and back, {part} in sight: {len(wall)} tasks")
            print("the longest, ms:", *wall[:6])
            print("the longest, ms of CPU (what counts where others use the machine, too):", *cpu[:6])
        tab.evaluate("scrollTo(0, 0)")
        if picture:
            tab.screenshot(path=picture, full_page=True)
        browser.close()


def traced(session, act):
    """Milliseconds and CPU milliseconds of the main thread's tasks meanwhile, the longest first."""
    events, over = [], []
    session.on("Tracing.dataCollected", lambda data: events.extend(data["value"]))
    session.on("Tracing.tracingComplete", lambda data: over.append(data))
    session.send(
        "Tracing.start",
        {
            "categories": "devtools.timeline,disabled-by-default-devtools.timeline,toplevel",
            "transferMode": "ReportEvents",
        },
    )
    act()
    session.send("Tracing.end")
    limit = time.monotonic() + 30
    while not over and time.monotonic() < limit:
        session.send("Runtime.evaluate", {"expression": "0"})
    main = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and e["args"].get("name") == "CrRendererMain"
    }
    tasks = [e for e in events if (e["pid"], e["tid"]) in main and e.get("ph") == "X" and e["name"] == "RunTask"]
    return [sorted((round(e.get(clock, 0) / 1e3, 1) for e in tasks), reverse=True) for clock in ("dur", "tdur")]


if __name__ == "__main__":
    main(*sys.argv[1:])
