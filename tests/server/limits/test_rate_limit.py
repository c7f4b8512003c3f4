"""What one key may have, by itself and at a live server; keys with names and limits."""

import json
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig
from cottention.server.generation.chat_template import find_template
from cottention.server.http.errors import ApiError
from cottention.server.limits.api_keys import load_api_keys
from cottention.server.limits.key_limits import KeyLimits
from cottention.server.limits.rate_limit import KeyUsage
from tests.server.generation.test_admission import Clock
from tests.server.limits.test_api_keys import bearer
from tests.server.live import eventually, serving
from tests.server.observability.test_access_log import leave_early


def seconds_refused(usage: KeyUsage) -> int:
    with pytest.raises(ApiError) as caught:
        usage.enter()
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.headers
    return int(caught.value.headers["Retry-After"])


def test_requests_at_a_time() -> None:
    usage = KeyUsage("a", KeyLimits(max_requests=2))
    usage.enter()
    usage.enter()
    assert seconds_refused(usage)
    usage.leave()
    usage.enter()


def test_tokens_of_a_minute_come_back_with_time() -> None:
    clock = Clock()
    usage = KeyUsage("a", KeyLimits(max_tokens_per_minute=600), clock)
    usage.enter()
    usage.charge(700)
    assert seconds_refused(usage) == 11  # 100 overdrawn and one more, at 10 a second
    clock.now += 11
    usage.enter()
    usage.charge(10)
    assert seconds_refused(usage) == 1
    clock.now += 3600
    usage.enter()
    usage.charge(600)
    assert seconds_refused(usage) == 1


def test_a_key_s_requests_at_a_time_are_bounded_and_another_s_are_not() -> None:
    with serving(api_key=("one", "two"), key_max_requests=2) as live:
        live.engine.may_step.clear()
        live.client.headers.update(bearer("one"))
        socks = [live.connect(prompt="x") for _ in range(2)]
        eventually(lambda: len(live.engine.running), equals=2)
        refused = live.complete(prompt="x")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert live.client.get("/v1/models").status_code == 200
        live.engine.may_step.set()
        other = live.client.post("/v1/completions", json={"prompt": "x"}, headers=bearer("two"))
        assert other.status_code == 200
        for sock in socks:
            sock.close()
        eventually(lambda: live.complete(prompt="x").status_code, equals=200)


@pytest.mark.parametrize("body", [{"prompt": ["a"] * 3}, {"prompt": "a", "n": 3}])
def test_each_choice_counts(body: dict[str, Any]) -> None:
    """Of a limit of four, three are taken: two more are a 429, and five could never be served."""
    with serving(key_max_requests=4) as live:
        live.engine.may_step.clear()
        sock = live.connect(**body)
        eventually(lambda: sum(each.params.n for each in live.engine.seen), equals=3)
        error = live.complete(prompt="x", n=2).json()["error"]
        assert error["code"] == "rate_limit_exceeded"
        assert "prompts times n, and 4 are running" in error["message"]  # with this one
        refused = live.complete(prompt=["x"] * 5)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("prompts times n must be at most 4")
        live.engine.may_step.set()
        sock.close()
        eventually(lambda: live.complete(prompt="x", n=4).status_code, equals=200)


def test_tokens_read_and_said_are_counted() -> None:
    with serving(key_max_tokens_per_minute=40) as live:
        assert live.complete(prompt="x" * 10, max_tokens=20).status_code == 200
        assert live.opened("x" * 15)
        refused = live.complete(prompt="x")
        assert refused.status_code == 429
        assert 8 <= int(refused.headers["retry-after"]) <= 9  # 5 overdrawn and one more
        assert live.client.get("/v1/models").status_code == 200


def test_ids_that_wait_outside_a_session_s_state_are_counted_by_the_turn_that_reads_them() -> None:
    """A snapshot may have any number of them, and every turn that is undone reads them again."""
    with serving(key_max_tokens_per_minute=40) as live:
        session_id = live.opened("x" * 30)
        assert len(live.sessions.state_of(session_id).pending) == 30
        answer = live.complete(prompt="", session_id=session_id, max_tokens=1)
        assert answer.status_code == 200
        assert live.complete(prompt="x", max_tokens=1).status_code == 429


@pytest.mark.parametrize("stream", [True, False])
def test_a_turn_that_goes_on_without_its_client_is_counted_to_its_end(stream: bool) -> None:
    """Its tokens, and that it runs: whoever leaves does not get a second one for it."""
    with serving(key_max_tokens_per_minute=60, key_max_requests=1) as live:
        leave_early(live, prompt="y", max_tokens=100, stream=stream)
        refused = live.complete(prompt="x", max_tokens=1).json()["error"]
        assert refused["message"] == (
            "the limit of concurrent requests for all clients together is 1, each counted"
            " prompts times n, and 1 are running; retry when one of them has ended"
        )
        live.engine.step_seconds = 0.0
        live.engine.may_step.set()
        eventually(lambda: not live.sessions.leased)

        def overdrawn() -> bool:
            error = live.complete(prompt="x", max_tokens=1).json()["error"]
            return "tokens per minute for all clients together is 60" in error["message"]

        eventually(overdrawn)
        seconds = int(live.complete(prompt="x").headers["retry-after"])
        assert 20 <= seconds <= 44  # 43 overdrawn at one a second, and one more


def test_a_completion_that_names_no_max_tokens_gets_what_its_key_may_have() -> None:
    with serving(key_max_tokens=5) as live:
        assert live.complete(prompt="x").json()["usage"]["completion_tokens"] == 5
    with serving(key_max_tokens=50) as live:
        assert live.complete(prompt="x").json()["usage"]["completion_tokens"] == 16


BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 11}, "max_tokens"),
    ({"n": 3}, "n"),
    ({"n": 1, "best_of": 3}, "best_of"),
    ({"stop": ["a", "b"]}, "stop"),
]


@pytest.mark.parametrize(("body", "param"), BEYOND)
def test_what_one_request_may_ask_for(body: dict[str, Any], param: str) -> None:
    limits = {"key_max_tokens": 10, "key_max_n": 2, "key_max_stop": 1, "key_max_body_bytes": 200}
    with serving(**limits) as live:
        refused = live.complete(prompt="x", **{"max_tokens": 10} | body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param
        assert "with this key" in refused.json()["error"]["message"]
        assert live.complete(prompt="x", max_tokens=10, n=2, stop="a").status_code == 200
        assert live.complete(prompt="x" * 200).status_code == 413


def test_a_chat_ends_where_its_key_does(tmp_path: Path) -> None:
    with serving(template=find_template("plain", tmp_path), key_max_tokens=5) as live:
        assert live.chat("hello").json()["usage"]["completion_tokens"] == 5
        refused = live.chat("hello", max_completion_tokens=6)
        assert refused.json()["error"]["param"] == "max_completion_tokens"


def keys_in(path: Path, content: Any, **settings: Any) -> Any:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_api_keys(ServerConfig(api_key_file=str(path), **settings))


def test_a_file_names_keys_and_their_limits(tmp_path: Path) -> None:
    content = {"alice": {"key": "one", "max_requests": 3}, "bob": {"key": "two", "max_n": None}}
    alice, bob = keys_in(tmp_path / "keys.json", content, key_max_n=4, key_max_requests=1)
    assert (alice.secret, alice.name, alice.limits) == (
        "one",
        "alice",
        KeyLimits(max_requests=3, max_n=4),
    )
    assert (bob.name, bob.limits) == ("bob", KeyLimits(max_requests=1))
    content = {"alice": {"key": "one", "weight": 3}, "bob": {"key": "two"}}
    assert [key.weight for key in keys_in(tmp_path / "keys.json", content)] == [3, 1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ({}, "no key"),
        ({"a": "one"}, "must be"),
        ({"a": {"max_n": 1}}, "must be"),
        ({"a": {"key": "one", "max_m": 1}}, "no limit max_m"),
        ({"a": {"key": "one", "max_n": 0}}, "whole number from 1"),
        ({"a": {"key": "one", "max_n": True}}, "whole number from 1"),
        ({"a": {"key": " one"}}, "printable"),
        ({"a": {"key": "one", "weight": 0}}, "weight must be"),
        ({"a": {"key": "one", "weight": 1.5}}, "weight must be"),
        ('{"a": {"key": "one"}, "a": {"key": "two"}}', "twice"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_refused_at_the_start(
    tmp_path: Path, content: Any, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        keys_in(tmp_path / "keys.json", content)
