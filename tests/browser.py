"""Headless Chromium for the page: skipped, with the reason, where it or Playwright is not there."""

import json
import re
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MOST_MS = 20_000


@pytest.fixture(scope="module")
def browser():
    """A browser that tests of a module share; each opens pages of its own.

    No longer: while it is there an event loop runs in this thread, which others and signals do not expect."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """`opened(url, theme=…)`: a tab that shows a page, which must not have complained at the end.

    Addresses that are `missing` answer 404."""
    contexts, complaints = [], []

    def go(url, theme="light", height=900, missing=()):
        context = browser.new_context(
            color_scheme=theme, viewport={"width": 1360, "height": height}, reduced_motion="reduce"
        )
        contexts.append(context)
        for address in missing:
            context.route(address, lambda route: route.fulfill(status=404))
        tab = context.new_page()
        tab.set_default_timeout(MOST_MS)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        tab.goto(url)
        return tab

    go.complaints = complaints
    yield go
    for context in contexts:
        context.close()
    assert complaints == []


def data_of(html):
    """What a self-contained page shows: the tree that its scripts draw from."""
    (held,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    return json.loads(held)
