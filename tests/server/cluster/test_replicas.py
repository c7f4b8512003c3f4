"""Three servers over one PostgreSQL, behind HAProxy: what clients see when one of them goes."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.cluster.haproxy import START
from tests.server.cluster.replicas import Cluster, running_cluster
from tests.server.live import PATIENCE, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

LONG = 500_000
"""Tokens of a turn that is not over before it is ended."""


@pytest.fixture(scope="module")
def all_tests(gptj_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(gptj_folder, tmp_path_factory.mktemp("cluster"), 3) as cluster:
        yield cluster


@pytest.fixture
def cluster(all_tests: Cluster) -> Iterator[Cluster]:
    """Whole again after each test."""
    yield all_tests
    for replica in all_tests.replicas:
        replica.revive()
    for replica in all_tests.replicas:
        eventually(replica.is_ready, seconds=START)
        eventually(replica.num_running, equals=0)
    all_tests.balancer.wait_for(3)


def test_the_three_keys_agree_on_the_replica(cluster: Cluster) -> None:
    """Real requests by each of a session's three ways get to where its state is in memory."""
    for _ in range(8):
        session_id = cluster.opened()
        before = cluster.balancer.num_answers("sessions")
        assert cluster.turn(session_id).status_code == 200
        path = f"/v1/sessions/{session_id}/append"
        assert cluster.client.post(path, json={"prompt": "y"}).status_code == 200
        headers = {"X-Session-Id": session_id}
        body = {"prompt": "z", "session_id": session_id, "max_tokens": 2}
        answer = cluster.client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        used = cluster.balancer.num_answers("sessions") - before
        assert list(used.values()) == [3]


def test_a_server_that_answers_nothing_is_down_and_its_streams_are_cut(cluster: Cluster) -> None:
    """Its client would wait for ever: the connection says nothing of a machine that is gone.

    The session goes on at another server, from before the turn.
    """
    session_id = cluster.opened()
    before = cluster.position(session_id)
    with cluster.stream(session_id, LONG) as lines:
        frozen = cluster.runner()
        frozen.send(signal.SIGSTOP)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
        assert cluster.balancer.states("sessions")["DOWN"] == 1
        assert cluster.position(session_id) == before
        eventually(lambda: cluster.turn(session_id).status_code, equals=200)


def test_a_server_that_is_stopped_ends_its_streams_and_gets_no_new_requests(
    cluster: Cluster,
) -> None:
    """What a load balancer that cuts streams of all that is not ready would break."""
    with cluster.stream(cluster.opened(), 10_000) as lines:
        stopped = cluster.runner()
        stopped.send(signal.SIGTERM)
        cluster.balancer.wait_for(2)
        assert [cluster.turn(cluster.opened()).status_code for _ in range(6)] == [200] * 6
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert stopped.wait() == 0


def test_a_server_that_is_killed_is_passed_over_at_once(cluster: Cluster) -> None:
    """Before any check has found it: whoever cannot be connected to is replaced in the request."""
    sessions = [cluster.opened() for _ in range(9)]
    assert {cluster.turn(each).status_code for each in sessions} == {200}
    killed = cluster.replicas[1]
    killed.send(signal.SIGKILL)
    killed.wait()
    assert {cluster.turn(each).status_code for each in sessions} == {200}


def test_a_client_that_leaves_ends_its_request(cluster: Cluster) -> None:
    """An answer that nobody waits for would be computed to its end behind the load balancer."""
    body = {"prompt": "x", "max_tokens": LONG, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        cluster.client.post("/v1/completions", json=body, timeout=httpx.Timeout(PATIENCE, read=2))
    eventually(lambda: sum(each.num_running() for each in cluster.replicas), equals=0)


def test_without_the_database_streams_go_on_and_sessions_are_told_to_come_back(
    cluster: Cluster,
) -> None:
    """Else a restart of the database would cut every turn that waits for it to come back."""
    session_id = cluster.opened()
    with cluster.stream(session_id, LONG) as lines:
        cluster.postgres.stop(signal.SIGQUIT)
        eventually(lambda: cluster.balancer.states("sessions")["NOLB"], equals=3)
        asked = time.monotonic()
        answer = cluster.turn(session_id)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        print(f"answered after {time.monotonic() - asked:.2f} s")
        assert cluster.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        cluster.postgres.start()
        cluster.balancer.wait_for(3)
        assert len([next(lines) for _ in range(50)]) == 50


def test_a_rolling_restart_gives_nothing_but_503s_to_retry(cluster: Cluster) -> None:
    """And what was answered is done once: no turn is lost, none is doubled."""
    sessions = [cluster.opened() for _ in range(4)]
    start = cluster.position(sessions[0])
    assert cluster.turn(sessions[0]).status_code == 200
    length = cluster.position(sessions[0]) - start
    stopping = threading.Event()
    answered, retried = [1, 0, 0, 0], [0] * 4
    wrong: list[object] = []

    def talk(index: int) -> None:
        with httpx.Client(base_url=cluster.balancer.url, timeout=PATIENCE) as client:
            body = {"prompt": "x", "max_tokens": 4, "ignore_eos": True}
            body["session_id"] = sessions[index]
            while not stopping.is_set():
                try:
                    answer = client.post("/v1/completions", json=body)
                except httpx.TransportError as error:
                    wrong.append(error)
                    return
                if answer.status_code == 200:
                    answered[index] += 1
                elif answer.status_code == 503 and int(answer.headers["retry-after"]) > 0:
                    retried[index] += 1
                    time.sleep(0.05)
                else:
                    wrong.append((answer.status_code, answer.text))

    threads = [threading.Thread(target=talk, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for replica in cluster.replicas:
        replica.send(signal.SIGTERM)
        assert replica.wait() == 0
        replica.start()
        eventually(replica.is_ready, seconds=START)
        cluster.balancer.wait_for(3)
    stopping.set()
    for thread in threads:
        thread.join()
    print(f"{sum(answered)} turns answered, {sum(retried)} told to come back")
    assert wrong == []
    assert min(answered) > 0
    for session_id, turns in zip(sessions, answered, strict=True):
        assert cluster.position(session_id) == start + turns * length
