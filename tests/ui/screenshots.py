"""Pictures of the page for docs/ and README: each view in light, in dark and 400 pixels wide.

`make screenshots` writes them to docs/page. They show the shipped model with fixed seeds; times in
them are those of the machine.
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.ui.conftest import ROOT, Tab, launched, serving, tab_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FOLDER = ROOT / "docs" / "page"
MAX_BYTES = 200_000
WIDE = {"width": 1240, "height": 740}
NARROW = {"width": 400, "height": 800}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": WIDE},
    "dark": {"color_scheme": "dark", "viewport": WIDE},
    "narrow": {"color_scheme": "light", "viewport": NARROW},
}
PROMPT = "def read_lines(path):\n"
SAMPLING = {"temperature": 0.8, "repetition_penalty": 1.1, "seed": 3}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, launched() as browser:
        for look, options in LOOKS.items():
            flags = ("--session-dir", f"{folder}/{look}")
            with serving(*flags) as server, tab_of(browser, server.url, **options) as tab:
                take_all(tab, look)
            with serving("--api-key", "one-key-for-it") as server:
                take_key(browser, server.url, look, options)
    too_large = [each.name for each in FOLDER.iterdir() if each.stat().st_size > MAX_BYTES]
    if too_large:
        print(f"larger than {MAX_BYTES} bytes: {', '.join(too_large)}", file=sys.stderr)
    return len(too_large)


def take_all(tab: Tab, look: str) -> None:
    """A session with colours, one that is older than the window, and two branches."""
    tab.open()
    tab.send(PROMPT, max_tokens=110, probabilities=True, **SAMPLING)
    tab.finished(0)
    tab.pane().locator(".answer .p3").nth(2).hover()
    take(tab, "tokens", look)
    tab.page.mouse.move(0, 0)
    tab.send("", max_tokens=1400, probabilities=False)
    tab.finished(1)
    tab.pane().locator(".horizon:visible").scroll_into_view_if_needed()
    take(tab, "memory", look)
    tab.set_open("sessions-box", True)
    tab.page.locator("#new-session").click()
    tab.send("class Stack:\n", max_tokens=60)
    tab.finished(0)
    tab.button("Fork").click()
    tab.pane("b").locator(".turn").wait_for()
    for seed, letter in ((1, "a"), (2, "b")):
        tab.send("    def pop(self):\n", letter, max_tokens=60, seed=seed)
        tab.finished(1, letter)
    take(tab, "branches", look)


def take_key(browser: "Browser", url: str, look: str, options: dict[str, Any]) -> None:
    """The dialog that asks for a key."""
    with tab_of(browser, url, **options) as tab:
        tab.expects_failures = True
        tab.page.goto(url)
        tab.page.locator("#key-input").wait_for()
        take(tab, "key", look)


def take(tab: Tab, view: str, look: str) -> None:
    """Save what is in the window; of a narrow page all of it, with the parts that a view shows."""
    if look == "narrow" and view != "key":
        tab.set_open("sessions-box", False)
        tab.set_open("parameters-box", False)
        tab.set_open("measurements", view != "tokens")
    tab.page.locator("aside").evaluate("(element) => { element.scrollTop = 0; }")
    path: Path = FOLDER / f"{view}-{look}.png"
    tab.page.screenshot(
        path=path, full_page=look == "narrow" and view != "key", animations="disabled"
    )


if __name__ == "__main__":
    sys.exit(main())
