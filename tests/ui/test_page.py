"""The page around the conversations: key, path prefix, reload, restart, accessibility, size."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.ports import free_port
from tests.ui.conftest import AXE, ROOT, Server, Tab, eventually, serving, tab_of
from tests.ui.test_conversation import GREEDY, PROMPT, continued

if TYPE_CHECKING:
    from playwright.sync_api import Browser

KEY = "a-key-of-the-tests"
MAX_BYTES = 150 * 1024
NARROW = {"width": 400, "height": 800}


def test_the_files_are_small_and_name_no_other_host() -> None:
    files = list((ROOT / "server" / "ui").iterdir())
    assert sum(each.stat().st_size for each in files) <= MAX_BYTES
    for each in files:
        text = each.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, each
        assert "https:" not in text, each
        assert "innerHTML" not in text, each


def test_a_reload_picks_up_the_running_turn(tab: Tab, server: Server) -> None:
    tab.send(PROMPT, max_tokens=6000, continues=True, **GREEDY)
    text = tab.pane().locator(".answer")
    eventually(lambda: len(text.inner_text()) > 500)
    tab.page.reload()
    tab.pane().locator(".turn[aria-busy=true], .turn[aria-busy=false]").wait_for()
    assert tab.finished(0) == continued(server, PROMPT, 6000)


def test_a_reload_ends_a_turn_that_was_not_to_go_on(tab: Tab, server: Server) -> None:
    tab.send(PROMPT, max_tokens=50_000, continues=False, **GREEDY)
    text = tab.pane().locator(".answer")
    eventually(lambda: len(text.inner_text()) > 500)
    tab.page.reload()
    found = tab.finished(0)
    session = server.get(f"/v1/sessions/{tab.session_id()}")
    num = session["position"] - server.post("/tokenize", prompt=PROMPT)["count"]
    assert 0 < num < 50_000
    assert found == continued(server, PROMPT, num)


def test_a_session_of_another_tab_shows_what_the_server_keeps(tab: Tab, server: Server) -> None:
    opened = server.post("/v1/sessions", prompt="import sys\n", metadata={"name": "elsewhere"})
    tab.page.reload()
    tab.page.locator(f".tree button[title='{opened['id']}']").click()
    assert tab.finished(0) == "import sys\n"
    assert "what the server keeps" in tab.pane().locator(".turn-note").inner_text()


def test_a_key_is_asked_for_and_stays_in_the_tab(browser: "Browser", endless: Path) -> None:
    with serving("--api-key", KEY, model=endless) as served, tab_of(browser, served.url) as tab:
        tab.expects_failures = True
        tab.page.goto(served.url)
        dialog = tab.page.locator("#key-dialog")
        for key, is_right in (("wrong", False), (KEY, True)):
            dialog.locator("input").fill(key)
            dialog.get_by_role("button", name="Use this key").click()
            if not is_right:
                dialog.get_by_text("does not accept this key").wait_for()
        dialog.wait_for(state="hidden")
        tab.send("x = ", max_tokens=4)
        tab.finished(0)
        assert tab.page.evaluate("sessionStorage.getItem('cottention.key')") == KEY
        assert KEY not in tab.page.evaluate("JSON.stringify(localStorage) + document.cookie")


def test_a_restart_is_noticed_and_the_running_turn_goes_on(
    browser: "Browser", endless: Path, tmp_path: Path
) -> None:
    flags, port = ("--session-dir", str(tmp_path / "sessions")), free_port()
    with serving(*flags, model=endless, port=port) as served, tab_of(browser, served.url) as tab:
        tab.expects_failures = True
        tab.open()
        tab.send(PROMPT, max_tokens=30, **GREEDY)
        first = tab.finished(0)
        tab.send("", max_tokens=3_000, continues=True)
        text = tab.pane().locator(".answer").nth(1)
        eventually(lambda: len(text.inner_text()) > 100)
        served.popen.kill()
        tab.page.locator("#server[data-state=away]").wait_for()
        with serving(*flags, model=endless, port=port) as again:
            tab.page.locator("#server[data-state=ready]").wait_for()
            second = tab.finished(1)
            tab.send("", max_tokens=30, continues=False)
            whole = first + second + tab.finished(2)
            assert whole == continued(again, PROMPT, 3_060)


def test_below_a_path_prefix(browser: "Browser", server: Server) -> None:
    with proxied(server.url, "/some/where") as url, tab_of(browser, url) as tab:
        tab.open()
        tab.send(PROMPT, max_tokens=20, **GREEDY)
        assert tab.finished(0) == continued(server, PROMPT, 20)


def test_it_is_off_where_it_is_not_wanted(endless: Path) -> None:
    with serving("--no-ui", model=endless) as served:
        for path in ("/", "/ui/main.js"):
            assert httpx.get(served.url + path).status_code == 404


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{"width": 1360, "height": 850}, NARROW], ids=["wide", "narrow"])
def test_axe_finds_nothing_serious(
    browser: "Browser", server: Server, scheme: str, size: dict[str, int]
) -> None:
    if not AXE.exists():
        pytest.skip("axe-core is not installed: npm is missing")
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": size}
    with tab_of(browser, server.url, **options) as tab:
        tab.open()
        for box in ("sessions-box", "measurements", "parameters-box"):
            tab.set_open(box, True)
        assert serious(tab) == []
        tab.send(PROMPT, max_tokens=1300, probabilities=True)
        tab.finished(0)
        tab.pane().locator(".horizon:visible").wait_for()
        tab.button("Fork").click()
        tab.pane("b").locator(".turn").wait_for()
        assert serious(tab) == []
        tab.page.locator("#key-button").click()
        assert serious(tab) == []
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def serious(tab: Tab) -> list[str]:
    """What axe-core calls serious or critical, with the elements."""
    tab.page.evaluate(AXE.read_text(encoding="utf-8"))
    found, num_passed = tab.page.evaluate(
        "axe.run().then((found) => [found.violations, found.passes.length])"
    )
    assert num_passed > 20
    return [
        f"{each['id']}: {each['help']}: {[node['html'][:200] for node in each['nodes'][:3]]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


@contextmanager
def proxied(target: str, prefix: str) -> Iterator[str]:
    """A proxy that takes `prefix` off, as one in front of the server would; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{prefix}/"):
                self.send_error(404)
                return
            num_bytes = int(self.headers.get("content-length", 0))
            content = self.rfile.read(num_bytes) if num_bytes else None
            url = target + self.path.removeprefix(prefix)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            with httpx.stream(
                self.command, url, headers=headers, content=content, timeout=60
            ) as answer:
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name not in ("transfer-encoding", "connection", "date"):
                        self.send_header(name, value)
                self.end_headers()
                for chunk in answer.iter_raw():
                    self.wfile.write(chunk)
                    self.wfile.flush()

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}{prefix}"
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
