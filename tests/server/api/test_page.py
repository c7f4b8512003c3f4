"""The page's files as HTTP: open to everybody, fenced in, and gone where they are not wanted.

What the page does is tested in a browser, by tests/ui.
"""

import re

import pytest

from cottention.server.api.page import FOLDER, MEDIA_TYPES
from tests.server.live import Live, serving

PATHS = ["/", *(f"/ui/{path.name}" for path in FOLDER.iterdir() if path.suffix != ".html")]


@pytest.mark.parametrize("path", PATHS)
def test_a_file_is_served_with_what_fences_it_in(shared: Live, path: str) -> None:
    answer = shared.client.get(path)
    assert answer.status_code == 200
    suffix = "." + path.rpartition(".")[2] if path != "/" else ".html"
    assert answer.headers["content-type"] == MEDIA_TYPES[suffix]
    policy = answer.headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'none'"
    assert {"frame-ancestors 'none'", "connect-src 'self'"} <= set(policy)
    assert not any("unsafe" in each for each in policy)
    assert answer.headers["x-content-type-options"] == "nosniff"
    known = {"If-None-Match": answer.headers["etag"]}
    assert shared.client.get(path, headers=known).status_code == 304


def test_what_the_page_refers_to_is_there_and_relative(shared: Live) -> None:
    for path in PATHS:
        text = shared.client.get(path).text
        for url in re.findall(r'(?:href|src)="([^#"]+)"|from "([^"]+)"', text):
            (name,) = filter(None, url)
            assert f"/ui/{name.removeprefix('ui/').removeprefix('./')}" in PATHS


def test_the_files_need_no_key_and_the_rest_does() -> None:
    with serving(api_key=("a-key",)) as live:
        assert {live.client.get(path).status_code for path in PATHS} == {200}
        for path in ("/v1/models", "/ui", "/uix", "/openapi.json"):
            assert live.client.get(path).status_code == 401, path
        assert live.client.get("/ui/../v1/models").status_code == 401


def test_a_name_that_was_rebound_gets_no_page(shared: Live) -> None:
    assert shared.client.get("/", headers={"Host": "evil.example"}).status_code == 403


def test_without_the_page_its_paths_are_unknown() -> None:
    with serving(ui=False) as live:
        assert {live.client.get(path).status_code for path in PATHS} == {404}
