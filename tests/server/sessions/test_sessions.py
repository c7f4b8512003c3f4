"""Sessions over HTTP: their life, their turns, and what cannot be done with them."""

import socket
from typing import Any, cast

import pytest

from cottention.engine import Engine
from cottention.engine.errors import SessionMovedError
from cottention.engine.scheduling.context_policy import ContextPolicies
from cottention.engine.sessions.memory_usage import ID_BYTES
from cottention.engine.state.context_window import context_schedules
from cottention.server.api.dependencies import session_bytes
from cottention.server.config import ServerConfig
from cottention.server.sessions.turn import num_delivered
from tests.server.fake_engine import FakeEngine, FakeTokenizer
from tests.server.fake_sessions import FULL, FakeSessions
from tests.server.live import PATIENCE, Live, eventually, serving

TOLD = {"context_start": 0, "durable": True}


@pytest.fixture(scope="module")
def live() -> Any:
    with serving(max_snapshot_bytes=100) as live:
        yield live
        assert not live.sessions.leased


def error_of(response: Any) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


def test_a_session_opens_with_what_it_read(live: Live) -> None:
    body = {"prompt": "abc", "metadata": {"name": "é"}, "ttl_seconds": 60}
    response = live.client.post("/v1/sessions", json=body)
    session = response.json()
    assert response.status_code == 200
    assert response.headers["etag"] == '"3"'
    assert session["object"] == "session"
    assert session["position"] == 3
    assert session["metadata"] == {"name": "é"}
    assert session["expires_at"] > session["created"]
    assert (session["context_policy"], session["context_start"]) == ("renew", 0)
    assert live.text_of(session["id"]) == "abc"
    assert live.session(session["id"]) == session


def test_an_empty_session_opens_and_is_not_continued_with_nothing(live: Live) -> None:
    session_id = live.opened()
    assert live.session(session_id)["position"] == 0
    assert error_of(live.complete(session_id=session_id))[:2] == (400, "prompt")


def test_pages_have_the_newest_first() -> None:
    with serving() as live:
        ids = [live.opened("x") for _ in range(5)][::-1]
        first = live.client.get("/v1/sessions?limit=2").json()
        assert first["object"] == "list"
        assert [each["id"] for each in first["data"]] == ids[:2]
        assert first["has_more"]
        rest = live.client.get(f"/v1/sessions?after={ids[1]}").json()
        assert [each["id"] for each in rest["data"]] == ids[2:]
        assert not rest["has_more"]
        assert error_of(live.client.get("/v1/sessions?limit=0"))[:2] == (400, "limit")
        assert live.client.get("/v1/sessions?after=none").status_code == 404
        unknown = live.client.get("/v1/sessions?limit=2&before=x")
        assert error_of(unknown)[:2] == (400, "before")
        assert 'no field "before"' in unknown.json()["error"]["message"]


WHOLE = "limit must be a whole number from 1 to 100; it is"
TTL = "ttl_seconds must be a number of seconds above 0, up to 315360000; it is"


@pytest.mark.parametrize(
    ("verb", "query", "message"),
    [
        ("GET", "?limit=x", f'{WHOLE} "x"'),
        ("GET", "?limit=", f'{WHOLE} ""'),
        ("GET", "?limit=2.5", f'{WHOLE} "2.5"'),
        ("GET", "?limit=101", f'{WHOLE} "101"'),
        ("POST", "/import?ttl_seconds=x", f'{TTL} "x"'),
        ("POST", "/import?ttl_seconds=-1", f"{TTL} -1.0"),
        ("POST", "/import?ttl_seconds=nan", f"{TTL} nan"),
    ],
)
def test_a_query_is_refused_in_the_words_that_a_body_is(
    live: Live, verb: str, query: str, message: str
) -> None:
    error = live.client.request(verb, f"/v1/sessions{query}").json()["error"]
    assert error["message"] == message
    assert error["param"] == message.split()[0]


def test_a_turn_leaves_the_session_after_its_last_token(live: Live) -> None:
    session_id = live.opened("say")
    answer = live.complete(prompt="!", session_id=session_id, max_tokens=3).json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["session"] == {"id": session_id, "position": 7} | TOLD
    assert answer["usage"]["prompt_tokens"] == 1
    again = live.complete(session_id=session_id, prompt="", max_tokens=2).json()
    assert again["session"]["position"] == 9
    assert live.text_of(session_id) == "say!abcab"


def test_a_stream_tells_the_session_with_its_end(live: Live) -> None:
    session_id = live.opened("x")
    events = live.events(prompt=[33], session_id=session_id, max_tokens=3)
    told = [each.get("session") for each in events[:-1]]
    assert told[-1] == {"id": session_id, "position": 5} | TOLD
    assert not any(told[:-1])
    assert live.text_of(session_id) == "x!abc"


def test_an_unread_prompt_is_read_without_an_answer(live: Live) -> None:
    session_id = live.opened("x")
    url = f"/v1/sessions/{session_id}/append"
    response = live.client.post(url, json={"prompt": "yz"})
    assert response.json()["position"] == 3
    assert response.headers["etag"] == '"3"'
    assert live.text_of(session_id) == "xyz"
    assert error_of(live.client.post(url, json={}))[:2] == (400, "prompt")
    assert error_of(live.client.post(url, json={"prompt": [999]}))[:2] == (400, "prompt")


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_append_is_no_turn(live: Live, prompt: Any) -> None:
    session_id = live.opened("x")
    url = f"/v1/sessions/{session_id}"
    live.client.post(f"{url}/append", json={"prompt": "y"})
    before = live.session(session_id)
    response = live.client.post(f"{url}/append", json={"prompt": prompt})
    assert (response.status_code, response.json()) == (200, before)
    assert response.headers["etag"] == '"2"'
    stale = live.client.post(f"{url}/append", json={"prompt": ""}, headers={"If-Match": '"1"'})
    assert error_of(stale) == (412, "session_id", "session_moved")
    assert live.client.post("/v1/sessions/none/append", json={"prompt": ""}).status_code == 404
    assert live.client.post(f"{url}/rewind").json()["position"] == 1


def test_rewind_goes_back_a_turn_until_there_is_none(live: Live) -> None:
    session_id = live.opened("x")
    url = f"/v1/sessions/{session_id}/rewind"
    live.complete(session_id=session_id, prompt="y", max_tokens=3)
    assert live.client.post(url).json()["position"] == 1
    refused = live.client.post(url)
    assert error_of(refused) == (409, "session_id", "nothing_to_rewind")
    assert "--session-checkpoints" in refused.json()["error"]["message"]


def test_what_rewind_and_delete_do_not_take_is_named_and_changes_nothing(live: Live) -> None:
    session_id = live.opened("x")
    url = f"/v1/sessions/{session_id}"
    for prompt in ("y", "z", "!"):
        live.client.post(f"{url}/append", json={"prompt": prompt})
    for method, path in (("POST", f"{url}/rewind"), ("DELETE", url)):
        wrong = live.client.request(method, path, json={"turns": 3})
        assert error_of(wrong)[:2] == (400, "turns")
        for raw in (b"[]", b"x", b" ", b"{"):
            assert live.client.request(method, path, content=raw).status_code == 400
    assert live.text_of(session_id) == "xyz!"
    for left, content in ((3, b""), (2, b"{}"), (1, b' {"turns": null} ')):
        assert live.client.post(f"{url}/rewind", content=content).json()["position"] == left
    assert live.client.request("DELETE", url, json={}).status_code == 200


def test_forks_go_on_by_themselves(live: Live) -> None:
    session_id = live.opened("x")
    url = f"/v1/sessions/{session_id}/fork"
    forks = live.client.post(url, json={"n": 3}).json()
    assert (forks["object"], forks["has_more"], len(forks["data"])) == ("list", False, 3)
    first, second, _ = (each["id"] for each in forks["data"])
    live.complete(session_id=first, prompt="y", max_tokens=1)
    assert [live.text_of(each) for each in (session_id, first, second)] == ["x", "xya", "x"]
    for wrong in (0, 2000, "two"):
        assert error_of(live.client.post(url, json={"n": wrong}))[:2] == (400, "n")


def test_forks_may_have_metadata_of_their_own(live: Live) -> None:
    session_id = live.opened("x", metadata={"name": "first"})
    url = f"/v1/sessions/{session_id}/fork"
    for given, expected in (({}, {"name": "first"}), ({"metadata": {"a": "b"}}, {"a": "b"})):
        [fork] = live.client.post(url, json=given).json()["data"]
        assert fork["metadata"] == expected
    assert live.session(session_id)["metadata"] == {"name": "first"}
    refused = live.client.post(url, json={"metadata": {"a": 1}})
    assert error_of(refused)[:2] == (400, "metadata")


def test_the_last_ids_of_a_session_can_be_read(live: Live) -> None:
    """Of a longer one only those of a window are kept; the rest of it is in the state alone."""
    session_id = live.opened("x" * 510)
    live.complete(session_id=session_id, prompt="y", max_tokens=3)
    response = live.client.get(f"/v1/sessions/{session_id}/tokens")
    told = response.json()
    assert response.headers["etag"] == '"514"'
    assert (told["object"], told["id"]) == ("session.tokens", session_id)
    assert (told["position"], told["start"]) == (514, 2)
    assert told["context_start"] == live.session(session_id)["context_start"] > 0
    assert bytes(told["tokens"]) == b"x" * 508 + b"yabc"
    assert live.client.get("/v1/sessions/other/tokens").status_code == 404


def test_a_deleted_session_is_gone(live: Live) -> None:
    session_id = live.opened("x")
    url = f"/v1/sessions/{session_id}"
    told = live.client.delete(url).json()
    assert told == {"id": session_id, "object": "session", "deleted": True}
    gone = live.client.get(url)
    assert error_of(gone) == (404, "session_id", "session_not_found")
    assert "GET /v1/sessions lists" in gone.json()["error"]["message"]
    assert live.client.delete(url).status_code == 404
    assert live.complete(session_id=session_id, prompt="x").status_code == 404
    assert error_of(live.complete(session_id="é", prompt="x", stream=True))[0] == 404


def test_a_snapshot_becomes_a_session(live: Live) -> None:
    session_id = live.opened("xyz")
    got = live.client.get(f"/v1/sessions/{session_id}/snapshot")
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["etag"] == '"3"'
    params = {"metadata": '{"a": "b"}', "ttl_seconds": "9"}
    made = live.client.post("/v1/sessions/import", content=got.content, params=params)
    assert made.status_code == 200
    assert made.json()["metadata"] == {"a": "b"}
    assert made.json()["expires_at"]
    assert live.text_of(made.json()["id"]) == "xyz"


def test_a_snapshot_s_tag_is_that_of_its_bytes(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn ends just before the bytes are read."""
    session_id = live.opened("xyz")
    export = live.sessions.open_export

    def late(*args: str) -> Any:
        assert live.complete(session_id=session_id, prompt="y", max_tokens=1).is_success
        return export(*args)

    monkeypatch.setattr(live.sessions, "open_export", late)
    got = live.client.get(f"/v1/sessions/{session_id}/snapshot")
    assert (got.headers["etag"], got.content) == ('"5"', b"fake:xyzya")


@pytest.mark.parametrize(
    ("raw", "params", "expected"),
    [
        (b"?", {}, (400, None, "bad_snapshot")),
        (b"other:", {}, (409, None, "snapshot_mismatch")),
        (b"fake:" + bytes(100), {}, (413, None, "body_too_large")),
        (b"fake:", {"metadata": "{"}, (400, "metadata", None)),
        (b"fake:", {"metadata": "[]"}, (400, "metadata", None)),
        (b"fake:", {"ttl_seconds": "-1"}, (400, "ttl_seconds", None)),
        (b"fake:", {"ttl_seconds": "soon"}, (400, "ttl_seconds", None)),
        (b"fake:", {"ttl": "9"}, (400, "ttl", None)),
    ],
)
def test_what_is_no_snapshot_is_refused(live: Live, raw: bytes, params: Any, expected: Any) -> None:
    response = live.client.post("/v1/sessions/import", content=raw, params=params)
    assert error_of(response) == expected


def test_an_import_larger_than_any_snapshot_is_refused_before_it_is_sent() -> None:
    """Whatever --max-snapshot-bytes allows: a session of this model takes no more."""
    sessions = FakeSessions()
    sessions.max_snapshot_nbytes = 99
    with serving(sessions=sessions) as live:
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), PATIENCE) as sock:
            sock.sendall(
                b"POST /v1/sessions/import HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 100\r\n\r\n"
            )
            assert sock.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"ttl_seconds": -1}, "ttl_seconds"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": "1"}, "ttl_seconds"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"x" * 65: "a"}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": ["a"]}, "metadata"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": [999]}, "prompt"),
        ({"context_policy": "forgetful"}, "context_policy"),
        ({"name": "x"}, "name"),
    ],
)
def test_bad_fields_are_named(live: Live, body: Any, param: str) -> None:
    assert error_of(live.client.post("/v1/sessions", json=body))[:2] == (400, param)


def test_a_prompt_that_is_neither_text_nor_ids(live: Live) -> None:
    message = live.client.post("/v1/sessions", json={"prompt": [1, "a"]}).json()["error"]["message"]
    assert message == 'prompt must be text or a list of token ids; at index 1 is "a"'


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"on_conflict": "fight"}, "on_conflict"),
        ({"on_cancel": "stop"}, "on_cancel"),
        ({"session_id": 7}, "session_id"),
        ({"session_id": None, "on_conflict": "wait"}, "on_conflict"),
        ({"session_id": None, "on_cancel": "rollback"}, "on_cancel"),
    ],
)
def test_what_a_turn_cannot_be_is_named(live: Live, body: Any, param: str) -> None:
    asked = {"session_id": live.opened("x"), "prompt": "x"} | body
    assert error_of(live.complete(**asked))[:2] == (400, param)


def test_if_match_refuses_what_has_moved(live: Live) -> None:
    session_id = live.opened("abc")
    url = f"/v1/sessions/{session_id}"
    stale, current = {"If-Match": '"2"'}, {"If-Match": '"3"'}
    asked = {"prompt": "d", "session_id": session_id, "max_tokens": 1}
    for path, body in (
        (f"{url}/append", {"prompt": "d"}),
        (f"{url}/fork", {}),
        (f"{url}/rewind", {}),
    ):
        response = live.client.post(path, json=body, headers=stale)
        assert error_of(response) == (412, "session_id", "session_moved"), path
    assert live.client.delete(url, headers=stale).status_code == 412
    for stream in (False, True):
        body = asked | {"stream": stream}
        assert live.client.post("/v1/completions", json=body, headers=stale).status_code == 412
    whole = live.client.post("/v1/completions", json=asked, headers=current)
    assert (whole.status_code, whole.headers["etag"]) == (200, '"5"')
    assert live.client.post(f"{url}/fork", json={}, headers={"If-Match": "*"}).status_code == 200
    wrong = live.client.post(f"{url}/fork", json={}, headers={"If-Match": "abc"})
    assert error_of(wrong)[:2] == (400, "If-Match")


def test_what_one_key_keeps_is_not_there_for_another() -> None:
    with serving(api_key=("one", "two")) as live:
        mine, other = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        made = live.client.post("/v1/sessions", json={"prompt": "x"}, headers=mine).json()
        url, turn = f"/v1/sessions/{made['id']}", {"session_id": made["id"], "prompt": "y"}
        assert live.client.get("/v1/sessions", headers=other).json()["data"] == []
        assert live.client.get(url, headers=other).status_code == 404
        assert live.client.get(f"{url}/snapshot", headers=other).status_code == 404
        assert live.client.delete(url, headers=other).status_code == 404
        for path, body in (("append", {"prompt": "x"}), ("fork", {}), ("rewind", {})):
            response = live.client.post(f"{url}/{path}", json=body, headers=other)
            assert response.status_code == 404, path
        assert live.client.post("/v1/completions", json=turn, headers=other).status_code == 404
        assert live.client.post("/v1/completions", json=turn, headers=mine).status_code == 200


def test_a_session_keeps_the_ids_of_a_window_which_may_be_shorter_than_what_was_trained() -> None:
    engine = FakeEngine()
    engine.policies = ContextPolicies("renew", 100, 100, context_schedules(100))
    assert session_bytes(cast(Engine, engine), ServerConfig()).items["ids"] == 101 * ID_BYTES


def test_capacity_and_metrics_tell_where_sessions_are(live: Live) -> None:
    capacity = live.client.get("/v1/capacity").json()
    assert capacity["object"] == "capacity"
    snapshot = 500 + 4 * 513 + 8 * 256 + 262_144 + 2048
    assert capacity["bytes_per_session"] == {
        "state": 400,
        "denominator": 100,
        "spare": 500,
        "logits": 0,
        "counts": 120 * 256,
        "ids": 40 * 513,
        "event_log": 262_144,
        "turn_copy": 500,
        "checkpoints": 4 * snapshot,
    }
    parked = 4096 + 3 + 500 + 120 * 256 + 40 * 513 + 2 * 262_144
    places = {"resident": 1000, "parked": parked, "stored": 5 * snapshot}
    assert capacity["bytes_per_place"] == places
    per_gb = {place: 10**9 // nbytes for place, nbytes in places.items()}
    assert capacity["sessions_per_gb"] == per_gb
    assert (capacity["slots"], capacity["free_slots"]) == (64, 64)
    assert capacity["softmax_bytes_per_token"] == 80
    assert capacity["parked"] == len(live.sessions.kept)
    metrics = live.client.get("/metrics").text
    assert f'num_sessions_parked{{model_name="fake"}} {len(live.sessions.kept)}.0' in metrics
    assert 'sessions_stored_bytes{model_name="fake"} 7.0' in metrics
    lines = [each.rsplit(" ", 1) for each in metrics.splitlines() if each[0] != "#"]
    found = {name: float(figure) for name, figure in lines}
    for name, label, told in (
        ("session_bytes", "item", capacity["bytes_per_session"]),
        ("session_bytes_by_place", "place", places),
        ("sessions_per_gb", "place", per_gb),
    ):
        for what, figure in told.items():
            labels = sorted([f'{label}="{what}"', 'model_name="fake"'])
            assert found[f"cottention:{name}{{{','.join(labels)}}}"] == figure


def test_a_full_disk_loses_no_turn() -> None:
    with serving(sessions=FakeSessions(fails={"open": FULL})) as live:
        response = live.client.post("/v1/sessions", json={"prompt": "x"})
        assert error_of(response) == (507, "session_id", "store_full")
        session_id = live.opened("x")
        live.sessions.is_full = True
        answer = live.complete(prompt="y", session_id=session_id, max_tokens=2).json()
        assert answer["choices"][0]["text"] == "ab"
        assert answer["session"]["durable"] is False
        assert live.session(session_id)["durable"] is False


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_cannot_be_kept_is_not_told_as_if_it_were(stream: bool) -> None:
    with serving() as live:
        session_id = live.opened("x")
        live.sessions.fails["commit"] = SessionMovedError("fenced off")
        body = {"prompt": "y", "session_id": session_id, "max_tokens": 2}
        if stream:
            last = live.stream_data(**body)[-1]
            assert "session_moved" in last
        else:
            assert error_of(live.complete(**body))[0] == 412
        eventually(lambda: live.sessions.ends, equals=["abandon"])
        assert live.text_of(session_id) == "x"


@pytest.mark.parametrize(
    ("ids", "text", "undecoded", "expected"),
    [
        (b"abc", "ab", b"", 2),
        (b"abc", "", b"", 0),
        ("aéb".encode(), "aé", b"", 3),
        ("aéb".encode()[:2], "a", b"", 1),
        (b"\xa9x", "éx", b"\xc3", 2),
        (b"\xffab", "�a", b"", 2),
        (b"", "", b"", 0),
    ],
)
def test_ids_count_once_their_text_is_out(
    ids: bytes, text: str, undecoded: bytes, expected: int
) -> None:
    assert num_delivered(list(ids), text, FakeTokenizer.token_bytes, undecoded) == expected


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/sessions", "GET, HEAD, POST"),
        ("/v1/sessions/one", "DELETE, GET, HEAD"),
        ("/v1/sessions/import", "POST"),
        ("/v1/models/owner/name", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_a_405_tells_all_that_a_path_takes(live: Live, path: str, allowed: str) -> None:
    answer = live.client.put(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json()["error"]["message"] == f"{path} does not allow PUT; send {allowed}"
