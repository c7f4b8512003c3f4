"""Swagger UI at /docs as HTTP; what it does is tested in a browser, by tests/ui."""

import re

import pytest

from tests.server.live import Live, serving

pytest.importorskip("fastapi_swagger", reason="Swagger UI's files are not installed")

FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "start.js", "page.css", "icon.svg")
PATHS = ["/docs", *(f"/docs/{name}" for name in FILES)]


@pytest.mark.parametrize("path", PATHS)
def test_its_files_are_fenced_in(shared: Live, path: str) -> None:
    answer = shared.client.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'none'"
    assert {"script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert not any("http" in each for each in policy)


def test_what_it_refers_to_is_there_and_relative(shared: Live) -> None:
    """A proxy may put a path before it; with a slash at its end its URLs would be others."""
    found = re.findall(r'(?:href|src)="([^"]+)"', shared.client.get("/docs").text)
    assert {f"/{name}" for name in found} == {*PATHS[1:]}
    moved = shared.client.get("/docs/")
    assert moved.is_redirect
    assert moved.headers["location"] == "../docs"


def test_the_files_need_no_key_and_the_description_does() -> None:
    with serving(api_key=("a-key",)) as live:
        assert {live.client.get(path).status_code for path in PATHS} == {200}
        for path in ("/openapi.json", "/docsx"):
            assert live.client.get(path).status_code == 401, path


def test_without_the_page_there_are_no_docs() -> None:
    with serving(ui=False) as live:
        assert {live.client.get(path).status_code for path in PATHS} == {404}
        assert live.client.get("/openapi.json").status_code == 200
