"""Responses at two servers of one PostgreSQL: made once for each key, and reached at either."""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cottention.server.responses.values import INTERRUPTED
from tests.engine.postgres import Postgres
from tests.server.live import eventually
from tests.server.replicas.cluster import (
    RETRY_SECONDS,
    TRIES,
    Cluster,
    cluster,
    request,
    send,
    stream,
)
from tests.server.responses.test_responses import events_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BODY: dict[str, Any] = {"input": "x", "max_output_tokens": 60, "temperature": 1}
"""Without a seed: two executions say different things."""
LONG = {"max_output_tokens": 100_000, "temperature": 0}
"""Greedy, the model repeats itself and never ends; sampled, an answer may end at any token."""
RUNNING = ("queued", "in_progress")
LAST_EVENTS = ("response.completed", "response.incomplete", "response.failed")


@pytest.fixture(scope="module")
def group(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = ("--chat-template", "plain", "--drain-seconds", "1", "--max-slots", "32")
    with cluster(postgres, tmp_path_factory.mktemp("responses"), *flags, num=2) as made:
        yield made


def found(url: str, response_id: str) -> Any:
    return send("GET", f"{url}/v1/responses/{response_id}").json()


def test_duplicates_of_responses_and_messages_are_made_once(group: Cluster) -> None:
    """Ten of each, at once, at both servers: whole, streamed, in the background."""
    message = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "temperature": 1}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("responses", BODY | {"store": False}),
        ("responses", BODY),
        ("responses", BODY | {"stream": True}),
        ("responses", BODY | {"background": True}),
        ("responses", BODY | {"background": True, "stream": True}),
        ("messages", message),
        ("messages", message | {"stream": True}),
    ]

    def answered(n: int) -> bytes:
        path, body = kinds[n % len(kinds)]
        headers = {"Idempotency-Key": f"duplicate{n % len(kinds)}"}
        return request("POST", group, f"/v1/{path}", json=body, headers=headers).content

    with ThreadPoolExecutor(32) as pool:
        answers = [*pool.map(answered, range(10 * len(kinds)))]
    for n, kind in enumerate(kinds):
        assert len({*answers[n :: len(kinds)]}) == 1, kind
    num_kept = "SELECT count(*) FROM cottention.sessions WHERE owner = '/responses'"
    assert group.rows(num_kept) == [(4,)]
    headers = {"Idempotency-Key": "duplicate0"}
    for each in group.replicas:
        other = send("POST", f"{each.url}/v1/responses", json=BODY, headers=headers)
        assert other.status_code == 422


def test_a_response_in_the_background_is_reached_at_either(group: Cluster) -> None:
    """Read as it is now, followed, cancelled and deleted, wherever it runs."""
    one, two = (each.url for each in group.replicas)
    for end in ("cancel", "delete"):
        body = BODY | LONG | {"background": True}
        response_id = send("POST", f"{one}/v1/responses", json=body).json()["id"]
        eventually(lambda response_id=response_id: bool(found(two, response_id)["output"]))
        path = f"{two}/v1/responses/{response_id}"
        if end == "delete":
            assert send("DELETE", path).json()["deleted"] is True
            assert {
                send("GET", f"{url}/v1/responses/{response_id}").status_code for url in (one, two)
            } == {404}
            continue
        with stream("GET", path, params={"stream": "true"}) as response:
            pieces = response.iter_text()
            text = next(pieces)
            cancelled = send("POST", f"{path}/cancel").json()
            text += "".join(pieces)
        assert cancelled["status"] == "cancelled"
        assert events_of(text)[-1]["response"] == cancelled == found(one, response_id)


def test_one_that_does_not_run_in_the_background_is_cancelled_at_either(group: Cluster) -> None:
    one, two = (each.url for each in group.replicas)
    with stream("POST", f"{one}/v1/responses", json=BODY | LONG | {"stream": True}) as response:
        pieces = response.iter_text()
        text = next(pieces)
        created = events_of(text.rpartition("\n\n")[0] + "\n\n")[0]
        cancelled = send("POST", f"{two}/v1/responses/{created['response']['id']}/cancel")
        text += "".join(pieces)
    assert cancelled.json()["status"] == "cancelled"
    assert events_of(text)[-1]["response"] == cancelled.json()
    unknown = send("POST", f"{two}/v1/responses/resp_{'0' * 32}/cancel")
    assert unknown.status_code == 404


NUM_TOKENS = 300


def whole_twin(group: Cluster, body: dict[str, Any], least: int = NUM_TOKENS) -> dict[str, Any]:
    """The body with a seed for which the answer is long, and what it says undisturbed."""
    url = group.replicas[0].url
    for seed in range(50):
        asked = body | {"seed": seed, "max_output_tokens": NUM_TOKENS}
        twin = send("POST", f"{url}/v1/responses", json=asked).json()
        if twin["usage"]["output_tokens"] >= least:
            return asked | {"twin": twin}
    raise AssertionError("no answer is long enough")


def read_events(response: httpx.Response, num: int | None = None) -> list[Any]:
    """The events that come, at least `num` of them; None: until the stream ends or breaks."""
    raw = ""
    with contextlib.suppress(httpx.TransportError):
        for piece in response.iter_text():
            raw += piece
            if num is not None and raw.count("\n\n") >= num:
                break
    return events_of(raw[: raw.rindex("\n\n") + 2]) if "\n\n" in raw else []


def rest_of(group: Cluster, response_id: str, told: list[Any]) -> list[Any]:
    """The events of a response after those that were told, asked for at any server."""
    told = [*told]
    for _ in range(TRIES):
        params = {"stream": "true"}
        if told:
            params["starting_after"] = str(told[-1]["sequence_number"])
        with contextlib.suppress(httpx.TransportError):
            url = f"{group.url()}/v1/responses/{response_id}"
            with stream("GET", url, params=params) as response:
                if response.status_code == 200:
                    told += read_events(response)
                else:
                    response.read()
                    assert response.status_code == 503, response.text
        if told and told[-1]["type"] in LAST_EVENTS:
            return told
        time.sleep(RETRY_SECONDS)
    raise AssertionError(f"it has not ended after {told[-1:]}")


@pytest.mark.parametrize("kind", ["text", "a grammar", "log-probabilities", "a branch"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_in_the_background_goes_on_without_its_server(
    group: Cluster, number: signal.Signals, kind: str
) -> None:
    """At another, as undisturbed; whoever follows it gets each event once."""
    victim, other = group.replicas
    for each in group.replicas:
        each.wait()
    body: dict[str, Any] = {"input": "x", "temperature": 1, "top_k": 4}
    least = NUM_TOKENS
    if kind == "a grammar":
        items = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 100, "maxItems": 200}
        schema = {"type": "object", "properties": {"a": items}, "required": ["a"]}
        named = {"type": "json_schema", "name": "n", "schema": schema}
        body |= {"text": {"format": named}}
        least = 200
    elif kind == "log-probabilities":
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    elif kind == "a branch":
        before = send("POST", f"{other.url}/v1/responses", json=BODY | {"seed": 1}).json()["id"]
        body |= {"previous_response_id": before}
    asked = whole_twin(group, body, least)
    twin = asked.pop("twin")
    with stream(
        "POST", f"{victim.url}/v1/responses", json=asked | {"background": True, "stream": True}
    ) as response:
        told = read_events(response, 20)
    response_id = told[0]["response"]["id"]
    if kind == "a branch":  # the state to go on from must not go with what it was of
        send("DELETE", f"{other.url}/v1/responses/{before}")
    victim.send(number)
    assert victim.ended() in (0, -signal.SIGKILL)
    status = request("GET", group, f"/v1/responses/{response_id}").json()["status"]
    assert status in (*RUNNING, twin["status"])  # on a busy machine the other may have ended it
    told = rest_of(group, response_id, told)
    victim.start()
    assert [each["sequence_number"] for each in told] == [*range(len(told))]
    ended = told[-1]["response"]
    changed = {"id", "created_at", "completed_at", "background", "output"}
    assert {key: value for key, value in ended.items() if key not in changed} == {
        key: value for key, value in twin.items() if key not in changed
    }
    deltas = [each for each in told if each["type"] == "response.output_text.delta"]
    [item] = ended["output"]
    [part] = item["content"]
    [twins] = twin["output"][0]["content"]
    assert part == twins
    assert "".join(each["delta"] for each in deltas) == part["text"]
    assert found(other.url, response_id) == ended
    again = rest_of(group, response_id, [])
    assert again == told
    assert group.rows("SELECT * FROM cottention.turns") == []
    assert group.rows("SELECT * FROM cottention.chunks") == []
    victim.wait()


def test_one_that_was_adopted_is_cancelled_at_another(group: Cluster) -> None:
    one, two = group.replicas
    for each in group.replicas:
        each.wait()
    body = BODY | LONG | {"background": True}
    response_id = send("POST", f"{one.url}/v1/responses", json=body).json()["id"]
    eventually(lambda: bool(found(two.url, response_id)["output"]))
    one.kill()
    one.start()
    one.wait()
    # before it is adopted it is a 503
    eventually(lambda: bool(found(two.url, response_id).get("output")))
    path = f"/v1/responses/{response_id}"
    cancelled = send("POST", f"{one.url}{path}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert cancelled["output"]
    assert found(one.url, response_id) == found(two.url, response_id) == cancelled
    assert send("DELETE", one.url + path).json()["deleted"] is True


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_key_goes_on_with_its_response(group: Cluster, is_stream: bool) -> None:
    """Executed again beside it, the key would have two responses."""
    victim, other = group.replicas
    for each in group.replicas:
        each.wait()
    asked = whole_twin(group, {"input": "x", "temperature": 1, "top_k": 4})
    asked.pop("twin")
    [[num_before]] = group.rows("SELECT count(*) FROM cottention.sessions")
    body = asked | {"background": True, "stream": is_stream}
    headers = {"Idempotency-Key": f"goes on{is_stream}".replace(" ", "-")}
    with stream("POST", f"{victim.url}/v1/responses", json=body, headers=headers) as response:
        first = b"" if is_stream else response.read()
        told = read_events(response, 20) if is_stream else [{"response": json.loads(first)}]
    response_id = told[0]["response"]["id"]
    eventually(lambda: bool(found(other.url, response_id)["output"]))
    victim.kill()
    answers = [
        request("POST", group, "/v1/responses", json=body, headers=headers).content
        for _ in range(2)
    ]
    victim.start()
    ended = rest_of(group, response_id, [])[-1]["response"]
    victim.wait()
    for each in group.replicas:
        later = send("POST", f"{each.url}/v1/responses", json=body, headers=headers)
        answers.append(later.content)
    assert len({*answers}) == 1
    if is_stream:
        events = events_of(answers[0].decode())
        assert [each["sequence_number"] for each in events] == [*range(len(events))]
        assert events[: len(told)] == told
        assert events[-1]["response"] == ended
    else:
        assert answers[0] == first
    assert group.rows("SELECT count(*) FROM cottention.sessions") == [(num_before + 1,)]


def test_a_key_whose_server_died_is_executed_again(group: Cluster) -> None:
    """Of a response that is not in the background nothing is left."""
    victim, other = group.replicas
    for each in group.replicas:
        each.wait()
    headers = {"Idempotency-Key": "killed"}
    body = BODY | LONG | {"stream": True}
    with stream("POST", f"{victim.url}/v1/responses", json=body, headers=headers) as response:
        [first, *_] = read_events(response, 5)
        victim.kill()
    victim.start()

    def again() -> str:
        """Asked as clients do: until the dead server is known to be, it may be a 503."""
        for _ in range(TRIES):
            url = f"{other.url}/v1/responses"
            with stream("POST", url, json=body, headers=headers) as response:
                if response.status_code == 200:
                    [first, *_] = read_events(response, 5)
                    return str(first["response"]["id"])
                assert response.status_code == 503, response.read()
            time.sleep(RETRY_SECONDS)
        raise AssertionError("it is not executed again")

    second = again()
    assert second != first["response"]["id"]
    assert again() == second
    victim.wait()
    assert send("POST", f"{victim.url}/v1/responses/{second}/cancel").status_code == 200


def test_where_bits_may_differ_events_wait_for_the_journal(
    postgres: Postgres, tmp_path: Path
) -> None:
    """Each comes once; log-probabilities, which cannot be computed again, end with their server."""
    flags = ("--chat-template", "plain", "--dtype", "bfloat16", "--max-slots", "4")
    with cluster(postgres, tmp_path, *flags, num=2) as group:
        victim, other = group.replicas
        asked = whole_twin(group, {"input": "x", "temperature": 1, "top_k": 4})
        asked.pop("twin")
        body = asked | {"background": True, "stream": True}
        with stream("POST", f"{victim.url}/v1/responses", json=body) as response:
            told = read_events(response, 20)
        more = {"background": True, "include": ["message.output_text.logprobs"]}
        lost = send("POST", f"{victim.url}/v1/responses", json=asked | more).json()["id"]
        victim.kill()
        told = rest_of(group, told[0]["response"]["id"], told)
        assert [each["sequence_number"] for each in told] == [*range(len(told))]
        ended = told[-1]["response"]
        deltas = [each for each in told if each["type"] == "response.output_text.delta"]
        text = ended["output"][0]["content"][0]["text"]
        assert "".join(each["delta"] for each in deltas) == text
        assert ended["usage"]["output_tokens"] == NUM_TOKENS
        eventually(lambda: found(other.url, lost)["status"] == "failed")
        assert found(other.url, lost)["error"]["message"] == INTERRUPTED


def test_a_message_is_followed_with_the_key_that_anthropic_s_clients_send(
    postgres: Postgres, tmp_path: Path
) -> None:
    """The other server checks it like any other: without it, it would refuse the relay."""
    flags = ("--chat-template", "plain", "--api-key", "a-key-of-many", "--max-slots", "4")
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300, "stream": True}
    headers = {"X-Api-Key": "a-key-of-many", "Idempotency-Key": "message"}
    # a stream that a stop of the machine has cut is not asked for again here
    with cluster(postgres, tmp_path, *flags, num=2, life_seconds=4.0) as group:
        one, two = (f"{each.url}/v1/messages" for each in group.replicas)
        with stream("POST", one, json=body, headers=headers) as response:
            pieces = response.iter_bytes()
            first = next(pieces)
            same = send("POST", two, json=body, headers=headers)
            assert same.status_code == 200
            assert same.content == first + b"".join(pieces)
