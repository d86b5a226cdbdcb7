"""The page's buttons in a real browser: by keyboard, with and without a token, and another site's page that tries."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.control.test_pressed import audited, shown
from tests.control.test_rights import OPERATOR, VIEWER, token_file
from tests.observe.page.test_in_chromium import AXE, axe_of

pytestmark = pytest.mark.slow
EVIL = """<!doctype html><title>x</title>
<form id="form" method="post" enctype="text/plain" action="URL/api/ray_ep/control/Stop">
<input name='{"mutation": {"request_id": "evil"}, "x' value='": 1}'></form><script>
window.tried = Promise.allSettled([
  fetch("URL/api/ray_ep/control/Stop", { method: "POST", mode: "no-cors", body: '{"mutation": {"request_id": "e1"}}' }),
  fetch("URL/api/ray_ep/control/Stop", { method: "POST", headers: { "content-type": "application/json" }, body: "{}" }),
  fetch("URL/api/ray_ep/control"), fetch("URL/api/ray_ep/state"), fetch("URL/ray_ep/"),
]).then((all) => all.map((one) => one.value?.type ?? "refused"));
</script>"""


@contextmanager
def site(page):
    """Another site on this machine."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def answered(tab, words):
    tab.wait_for_function("(words) => document.getElementById('answer').textContent.includes(words)", arg=words)


@pytest.mark.usefixtures("browser")  # first: without one, nothing is started
def test_a_run_is_steered_from_its_page_by_keyboard_and_a_foreign_page_cannot(opened, tmp_path):
    with shown(tmp_path / "run") as run:
        tab = opened(run.page.address)
        tab.wait_for_function("() => window.page && page.view.state.steps.step.length > 1")
        tab.get_by_role("button", name="Pause").focus()
        tab.keyboard.press("Enter")
        answered(tab, "Pause: ")
        assert run.status_now().state == 6
        tab.get_by_role("button", name="Resume").wait_for()
        tab.keyboard.press("Space")  # the same place
        answered(tab, "Resume: ")
        tab.get_by_role("button", name="Checkpoint").click()
        answered(tab, "Checkpoint: ")
        tab.fill("#ranks", "0")
        tab.get_by_role("button", name="Scale").click()
        assert tab.locator("dialog").is_hidden(), "no such number"
        tab.fill("#ranks", "2")
        tab.get_by_role("button", name="Scale").click()
        assert "2 ranks" in tab.inner_text("dialog p")
        tab.keyboard.press("Escape")
        assert [e["what"] for e in audited(run)] == ["Pause", "Resume", "Checkpoint"]
        for theme in ("light", "dark"):
            tab.emulate_media(color_scheme=theme)
            tab.get_by_role("button", name="Stop").click()
            tab.evaluate(Path(axe_of()).read_text())  # the page lets no script in
            assert tab.evaluate(AXE, {}) == []
            tab.keyboard.press("Escape")

        with site(EVIL.replace("URL", run.page.address.removesuffix("/ray_ep/"))) as evil:
            foreign = opened(evil)
            assert foreign.evaluate("tried") == ["opaque", "refused", "refused", "refused", "refused"]
            foreign.evaluate("form.submit()")
            foreign.wait_for_url("**/control/Stop")
            assert "not for you" in foreign.content()
            opened.complaints.clear()  # of a browser that was refused
        assert {e["result"] for e in audited(run) if e["what"] == "Stop"} == {"PERMISSION_DENIED"}
        assert run.alive()

        tab.get_by_role("button", name="Stop").click()
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        answered(tab, "Stop: ")
        run.until(lambda: run.status == "interrupted", "the end")
        assert [e["result"] for e in audited(run) if e["what"] == "Stop"][-1] == "OK"
        tab.wait_for_function("() => page.control.element.hidden")
    tab.context.close()
    opened.complaints.clear()  # of a browser whose server has gone


@pytest.mark.usefixtures("browser")
def test_where_tokens_are_set_the_page_asks_for_one_and_keeps_it_nowhere(opened, tmp_path):
    viewer, operator = token_file(tmp_path, "viewer", VIEWER), token_file(tmp_path, "operator", OPERATOR)
    keys = [f"control.viewer_token_file={viewer}", f"control.operator_token_file={operator}"]
    with shown(tmp_path / "run", *keys) as run:
        tab = opened(run.page.address)
        tab.wait_for_function("() => window.page && page.view.state.steps.step.length > 1")
        for token, words in (("", "takes a token"), (VIEWER, "opens for viewers"), (OPERATOR, "Pause: ")):
            tab.fill("#token", token)
            tab.get_by_role("button", name="Pause").click()
            answered(tab, words)
        assert run.status_now().state == 6
        held = "[location.href, document.cookie, JSON.stringify(localStorage), JSON.stringify(sessionStorage)].join()"
        assert OPERATOR not in tab.evaluate(held)
        tab.reload()
        tab.wait_for_function("() => window.page")
        assert tab.input_value("#token") == ""
    tab.context.close()
    opened.complaints.clear()  # of a browser whose server has gone
