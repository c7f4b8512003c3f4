"""Swagger UI at /docs in Chromium: below a prefix, with a key, and a request that it sends."""

from typing import TYPE_CHECKING

from tests.ui.conftest import serving, tab_of
from tests.ui.test_page import KEY, proxied

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_it_asks_for_the_key_and_sends_requests_below_a_prefix(browser: "Browser") -> None:
    """Nothing is loaded from elsewhere, and nothing violates its Content-Security-Policy."""
    with (
        serving("--api-key", KEY) as served,
        proxied(served.url, "/some/where") as url,
        tab_of(browser, url) as tab,
    ):
        tab.expects_failures = True
        tab.page.goto(f"{url}/docs")
        tab.page.locator("#key").fill("wrong")
        tab.page.get_by_role("button", name="Show").click()
        tab.page.get_by_text("That is not a key of this server.").wait_for()
        tab.page.locator("#key").fill(KEY)
        tab.page.get_by_role("button", name="Show").click()
        operation = tab.page.locator("#operations-default-version_version_get")
        operation.locator("button").first.click()
        operation.get_by_role("button", name="Try it out").click()
        operation.get_by_role("button", name="Execute").click()
        answer = operation.locator(".live-responses-table .microlight, .live-responses-table pre")
        answer.get_by_text('"version"').first.wait_for()
        assert tab.problems == []
