"""The page in Chromium, with a server process of its own environment behind it.

Every test ends with the check that the page caused no violation of its Content-Security-Policy, no
error in the console, and no request to another origin.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "engine" / "pretrained" / "cottention-python-7m"
AXE = ROOT / ".venv-ui" / "node" / "node_modules" / "axe-core" / "axe.min.js"
SERVER_PYTHON = os.environ.get("COTTENTION_TEST_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
PATIENCE = 60.0
"""Seconds after which something hangs, on a machine that does other things as well."""

if importlib.util.find_spec("playwright") is None:
    collect_ignore_glob = ["test_*.py"]
elif TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page


@dataclass
class Server:
    """A server process, and how it was started."""

    popen: "subprocess.Popen[str]"
    url: str

    def get(self, path: str) -> Any:
        """The JSON of a GET, without a key."""
        import httpx

        return httpx.get(f"{self.url}{path}", timeout=PATIENCE).raise_for_status().json()

    def post(self, path: str, **body: Any) -> Any:
        """The JSON of a POST, without a key."""
        import httpx

        return (
            httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE).raise_for_status().json()
        )


@contextlib.contextmanager
def serving(*flags: str, model: Path = SHIPPED, port: int = 0) -> Iterator[Server]:
    """A server process; killed at the end."""
    settings = ["--port", str(port), "--max-slots", "8", *flags]
    command = [SERVER_PYTHON, "-m", "cottention.server", "serve", str(model), *settings]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stdout
            lines = iter(popen.stdout.readline, "")
            url = next((line.split()[-1] for line in lines if line.startswith("ready")), None)
            assert url, "the server did not start"
            yield Server(popen, url)
        finally:
            popen.kill()


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model without an end of text, so that a turn is as long as a test asks for."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("generation_config.json"))
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        fields = json.loads((folder / name).read_text())
        ends = [each for each in fields if each.startswith("eos_token")]
        (folder / name).write_text(json.dumps({k: v for k, v in fields.items() if k not in ends}))
    return folder


@pytest.fixture(scope="session")
def server(endless: Path) -> Iterator[Server]:
    """One server for the tests that leave it running."""
    with serving("--chat-template", "plain", model=endless) as served:
        yield served


@contextlib.contextmanager
def launched() -> Iterator["Browser"]:
    """Chromium, as it is installed. Skips the test where it is not."""
    from playwright.sync_api import sync_playwright

    named = os.environ.get("COTTENTION_TEST_BROWSER")
    path = named or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no chromium: apt-get install chromium, or COTTENTION_TEST_BROWSER")
    # its sandbox needs a user of its own, which root in a container has not
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """One browser for all tests; each has a profile of its own."""
    with launched() as chromium:
        yield chromium


VIOLATIONS = """
addEventListener("securitypolicyviolation",
  (event) => console.error("violates " + event.effectiveDirective + ": " + event.blockedURI));
"""


@dataclass
class Tab:
    """A tab with the page, and what went wrong in it."""

    page: "Page"
    url: str
    problems: list[str] = field(default_factory=list)
    expects_failures: bool = False
    """Whether answers that are no success, and a server that is away, are part of the test."""

    def open(self) -> None:
        """Load the page, wait until it knows what is served, and choose to continue text."""
        self.page.goto(f"{self.url}/")
        self.page.locator("#server[data-state=ready]").wait_for()
        self.pane().locator("select").select_option("text")

    def pane(self, letter: str = "a") -> Any:
        """The locator of one of the conversations."""
        return self.page.locator(f".pane.{letter}")

    def button(self, name: str, letter: str = "a") -> Any:
        """A button of a conversation."""
        return self.pane(letter).get_by_role("button", name=name, exact=True)

    def send(self, text: str, letter: str = "a", **parameters: Any) -> None:
        """Send a prompt with values of the form of parameters; None empties a field."""
        self.set_open("parameters-box", True)
        for name, value in parameters.items():
            control = self.page.locator(f"#p-{name}")
            if isinstance(value, bool):
                control.set_checked(value)
            else:
                control.fill("" if value is None else str(value))
        self.pane(letter).locator("textarea").fill(text)
        self.pane(letter).locator(".composer .main-action").click()

    def set_open(self, box: str, is_open: bool) -> None:
        """Open or close a part of the page that narrow windows begin without."""
        self.page.locator(f"#{box}").evaluate("(box, is_open) => { box.open = is_open; }", is_open)

    def finished(self, number: int, letter: str = "a") -> str:
        """The text of a turn, counted from 0, once it has ended."""
        turn = self.pane(letter).locator(".turn").nth(number)
        turn.and_(self.page.locator("[aria-busy=false]")).wait_for(timeout=1000 * PATIENCE)
        return turn.locator(".answer").evaluate(TEXT)

    def session_id(self, letter: str = "a") -> str:
        """The id of the session in a pane."""
        found: str = self.pane(letter).locator("h2").get_attribute("title")
        return found


TEXT = (
    "(element) => [...element.querySelectorAll('.block')].map((each) => each.textContent).join('')"
)


@contextlib.contextmanager
def tab_of(browser: "Browser", url: str, **options: Any) -> Iterator[Tab]:
    """A tab of a new profile; at the end nothing may have gone wrong in it."""
    context: BrowserContext = browser.new_context(**options)
    context.set_default_timeout(1000 * PATIENCE)
    context.add_init_script(VIOLATIONS)
    tab = Tab(context.new_page(), url)
    origin = "/".join(url.split("/")[:3])

    def on_request(request: Any) -> None:
        if not request.url.startswith((f"{origin}/", "blob:" + origin)):
            tab.problems.append(f"request to {request.url}")

    def on_console(message: Any) -> None:
        is_expected = tab.expects_failures and "Failed to load resource" in message.text
        if message.type in ("error", "warning") and not is_expected:
            tab.problems.append(f"{message.type}: {message.text}")

    context.on("request", on_request)
    tab.page.on("console", on_console)
    tab.page.on("pageerror", lambda error: tab.problems.append(str(error)))
    yield tab
    context.close()
    assert tab.problems == []


@pytest.fixture
def tab(browser: "Browser", server: Server) -> Iterator[Tab]:
    """A tab with the page of the shared server."""
    with tab_of(browser, server.url) as opened:
        opened.open()
        yield opened


def eventually(read: Callable[[], Any], *, equals: Any = True) -> None:
    """Wait until what `read` returns is true, or equals a given value."""
    deadline = time.monotonic() + PATIENCE
    while (value := read()) != equals and not (equals is True and value):
        assert time.monotonic() < deadline, f"after {PATIENCE:.0f} s it is still {value!r}"
        time.sleep(0.02)
