"""Responses at two servers of one PostgreSQL: made once for each key, and reached at either."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engine.postgres import Postgres
from tests.server.live import eventually
from tests.server.replicas.cluster import Cluster, cluster, request, send, stream
from tests.server.responses.test_responses import events_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BODY: dict[str, Any] = {"input": "x", "max_output_tokens": 60, "temperature": 1}
"""Without a seed: two executions say different things."""
LONG = {"max_output_tokens": 100_000}
RUNNING = ("queued", "in_progress")


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


def test_a_key_whose_server_died_is_executed_again(group: Cluster) -> None:
    """Its response has failed: to repeat its id would tell a client nothing for a day."""
    victim, other = group.replicas
    body, headers = BODY | {"background": True}, {"Idempotency-Key": "killed"}
    first = send("POST", f"{victim.url}/v1/responses", json=body | LONG, headers=headers).json()
    same = send("POST", f"{other.url}/v1/responses", json=body | LONG, headers=headers).json()
    assert same == first
    victim.kill()

    def again() -> Any:
        return send("POST", f"{other.url}/v1/responses", json=body | LONG, headers=headers).json()

    second = again()
    assert second["id"] != first["id"]
    assert found(other.url, first["id"])["status"] == "failed"
    assert again() == second
    victim.start()
    victim.wait()
    assert send("POST", f"{victim.url}/v1/responses/{second['id']}/cancel").status_code == 200


def test_a_message_is_followed_with_the_key_that_anthropic_s_clients_send(
    postgres: Postgres, tmp_path: Path
) -> None:
    """The other server checks it like any other: without it, it would refuse the relay."""
    flags = ("--chat-template", "plain", "--api-key", "a-key-of-many", "--max-slots", "4")
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300, "stream": True}
    headers = {"X-Api-Key": "a-key-of-many", "Idempotency-Key": "message"}
    with cluster(postgres, tmp_path, *flags, num=2) as group:
        one, two = (f"{each.url}/v1/messages" for each in group.replicas)
        with stream("POST", one, json=body, headers=headers) as response:
            pieces = response.iter_bytes()
            first = next(pieces)
            same = send("POST", two, json=body, headers=headers)
            assert same.status_code == 200
            assert same.content == first + b"".join(pieces)
