"""HEAD is GET without a body, and a path means the same with a slash too many."""

import socket
from typing import Any

import pytest

from cottention.server.http.routing import plain_path
from tests.server.limits.test_api_keys import bearer
from tests.server.live import PATIENCE, Live, eventually, serving

GETS = ["/health", "/ready", "/version", "/metrics", "/openapi.json", "/v1/models"]
GETS += ["/v1/models/fake", "/v1/models/other", "/v1/capacity", "/v1/sessions", "/v1/sessions/none"]
UNEQUAL = {"date", "x-request-id", "content-length"}


def raw_answer(live: Live, head: str) -> bytes:
    """All bytes that come after a head sent by hand."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
        sock.sendall(head.encode())
        received = b""
        while piece := sock.recv(1 << 16):
            received += piece
    return received


@pytest.mark.parametrize("path", GETS)
def test_head_has_the_status_and_headers_of_get(shared: Live, path: str) -> None:
    got, head = shared.client.get(path), shared.client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers.keys() == got.headers.keys()
    assert {n: v for n, v in head.headers.items() if n not in UNEQUAL} == {
        n: v for n, v in got.headers.items() if n not in UNEQUAL
    }
    if path != "/metrics":  # they change from one answer to the next
        assert head.headers["content-length"] == got.headers["content-length"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/health", "/v1/models/other", "/v1/completions"])
def test_nothing_comes_after_a_head(shared: Live, version: str, path: str) -> None:
    head = f"HEAD {path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n\r\n"
    first, _, body = raw_answer(shared, head).partition(b"\r\n\r\n")
    assert body == b""
    assert first.split()[1] in (b"200", b"404", b"405")


def test_head_needs_the_key_that_get_needs() -> None:
    with serving(api_key=("one",), metrics_key="two") as live:
        for path in ("/v1/models", "/version", "/v1/sessions", "/metrics"):
            response = live.client.head(path)
            assert (response.status_code, response.content) == (401, b"")
            assert response.headers["www-authenticate"] == "Bearer"
        assert live.client.head("/v1/models", headers=bearer("one")).status_code == 200
        assert live.client.head("/metrics", headers=bearer("two")).status_code == 200
        assert live.client.head("/health").status_code == 200


def test_head_of_a_snapshot_and_of_kept_events_sends_none_of_their_bytes(shared: Live) -> None:
    name = shared.opened("hello")
    body = {"session_id": name, "prompt": "x", "max_tokens": 3, "on_disconnect": "continue"}
    assert shared.complete(**body, stream=True).status_code == 200
    for path in (f"/v1/sessions/{name}/snapshot", f"/v1/sessions/{name}/events"):
        got = shared.client.get(path)
        assert (got.status_code, len(got.content) > 0) == (200, True)
        head = f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        first, _, rest = raw_answer(shared, head).partition(b"\r\n\r\n")
        assert b"200 OK" in first
        assert b"content-length: %d" % len(got.content) in first
        assert rest == b""


def test_head_of_events_that_go_on_is_answered_at_once() -> None:
    """And its endpoint does not go on following them."""
    with serving() as live:
        name = live.opened("hello")
        live.engine.may_step.clear()
        body = {"session_id": name, "prompt": "x", "max_tokens": 3, "on_disconnect": "continue"}
        with live.connect(**body, stream=True):
            eventually(lambda: live.engine.running)
        eventually(lambda: not live.server.server_state.tasks)
        response = live.client.head(f"/v1/sessions/{name}/events")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        eventually(lambda: not live.server.server_state.tasks)
        live.engine.may_step.set()


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/v1/sessions/x/append"])
def test_head_is_not_allowed_where_get_is_not(shared: Live, path: str) -> None:
    response = shared.client.head(path)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_allow_names_head_beside_get(shared: Live) -> None:
    assert shared.client.put("/health").headers["allow"] == "GET, HEAD"
    assert shared.client.options("/v1/sessions").headers["allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/", "/"),
        ("", "/"),
        ("///", "/"),
        ("/a", "/a"),
        ("//a///b//", "/a/b"),
        ("/a/b/", "/a/b"),
    ],
)
def test_one_spelling(path: str, plain: str) -> None:
    assert plain_path(path) == plain


SPELLINGS = ["{}/", "{}//", "/{}", "//{}/"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("path", ["/v1/models", "/version", "/v1//models/fake", "/openapi.json"])
def test_a_slash_too_many_changes_nothing_of_a_get(shared: Live, spelling: str, path: str) -> None:
    given = shared.client.get(shared.url + spelling.format(path))
    assert (given.status_code, given.history) == (200, [])
    assert given.content == shared.client.get(plain_path(path)).content


@pytest.mark.parametrize("spelling", [*SPELLINGS, "/v1//completions"])
def test_a_slash_too_many_changes_nothing_of_a_post(shared: Live, spelling: str) -> None:
    body = {"prompt": "say:hi"}
    url = shared.url + spelling.format("/v1/completions")
    given = shared.client.post(url, json=body)
    assert given.status_code == 200
    assert given.json()["choices"] == shared.complete(**body).json()["choices"]
    refusal = shared.client.get(url)
    assert (refusal.status_code, refusal.headers["allow"]) == (405, "POST")


def test_sessions_have_both_spellings(shared: Live) -> None:
    opened = shared.client.post("/v1/sessions/", json={"prompt": "x"}).json()
    path = f"/v1//sessions/{opened['id']}/"
    assert shared.client.get(path).json()["id"] == opened["id"]
    assert shared.client.post(f"{path}/append/", json={"prompt": "y"}).status_code == 200
    assert shared.client.delete(path).status_code == 200


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_opens_nothing(spelling: str) -> None:
    with serving(api_key=("one",), metrics_key="two") as live:
        for path, status in (("/v1/models", 401), ("/metrics", 401), ("/health", 200)):
            assert live.client.get(live.url + spelling.format(path)).status_code == status
        url = live.url + spelling.format("/metrics")
        assert live.client.get(url, headers=bearer("one")).status_code == 401
        assert live.client.get(url, headers=bearer("two")).status_code == 200


@pytest.mark.parametrize("name", ["/models/x", "owner/name", "plain"])
def test_a_model_is_found_whatever_slashes_its_name_has(name: str) -> None:
    with serving(served_model_name=name) as live:
        for path in (f"/v1/models/{name}", f"/v1/models/{name}/", f"//v1/models//{name}"):
            response = live.client.get(live.url + path)
            assert (response.status_code, response.json()["id"]) == (200, name)
        assert live.client.get("/v1/models/other").status_code == 404


def test_the_description_has_each_path_once(shared: Live) -> None:
    paths: dict[str, Any] = shared.client.get("/openapi.json").json()["paths"]
    assert len({plain_path(path) for path in paths}) == len(paths)
    assert not [path for path in paths if path.endswith("/")]
    assert not [path for path, methods in paths.items() if "head" in methods]
