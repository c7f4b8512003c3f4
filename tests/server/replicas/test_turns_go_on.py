"""Turns that go on without their client survive their servers: killed, stopped, restarted."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from tests.engine.making import model_folder
from tests.engine.postgres import Postgres, running_postgres
from tests.server.live import PATIENCE, eventually
from tests.server.replicas.cluster import (
    Cluster,
    Follower,
    Sleeper,
    cluster,
    request,
    send,
    stream,
    twin_of,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

NUM_KILLS = int(os.environ.get("COTTENTION_KILLS", "3"))
NUM_STREAMS = int(os.environ.get("COTTENTION_KILL_STREAMS", "10"))

LEASE_SECONDS = 4.0
"""Longer than a busy machine stops a server: most streams here are read by who does not ask again
for what was cut."""
HANDED_OVER_SECONDS = 1.5
"""For a turn that nobody has, until another server has it and its client has found that one."""
NUM_HOPS = 4
"""Steps of a gap that a busy machine holds up one after the other: the cut, the client's request,
the adoption, the first event."""

GOES_ON: dict[str, Any] = {"on_disconnect": "continue"}


def body_of(n: int, num_tokens: int) -> dict[str, Any]:
    """Of a turn; sampled, with penalties and a stop string that is held back for."""
    return {
        "prompt": [40 + n, 41, 42],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "seed": n,
        "frequency_penalty": 0.2,
        "stop": ["never said in full"],
    }


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(model_folder("cottention"), EngineConfig(max_slots=1))


@pytest.fixture(scope="module")
def group(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    flags = ("--drain-seconds", "1", "--max-slots", "64")
    with cluster(postgres, folder, *flags, life_seconds=LEASE_SECONDS) as made:
        yield made


def followers(group: Cluster, num: int, num_tokens: int, name: str) -> list[Follower]:
    """Turns that have begun to tell."""
    made = [
        Follower(group, group.opened([30 + n]), body_of(n, num_tokens) | GOES_ON, f"{name}{n}")
        for n in range(num)
    ]
    for each in made:
        each.start()
    for each in made:
        eventually(lambda each=each: bool(each.ids) or each.error is not None)
    return made


def check_all(engine: Engine, made: list[Follower], num_tokens: int) -> None:
    for n, each in enumerate(made):
        each.check(
            twin_of(engine, [[30 + n], body_of(n, num_tokens)["prompt"]], body_of(n, num_tokens))
        )


def end_all(engine: Engine, group: Cluster, made: list[Follower]) -> None:
    """Cancel turns that would go on for long; they have said what undisturbed ones begin with."""
    for n, each in enumerate(made):
        request("POST", group, f"/v1/sessions/{each.session_id}/cancel")
        each.join(4 * PATIENCE)
        prompts = [[30 + n], body_of(n, 1)["prompt"]]
        num_tokens = group.session(each.session_id)["position"] - sum(map(len, prompts))
        twin = twin_of(engine, prompts, body_of(n, num_tokens))
        assert len(each.ids) > 5
        each.check(twin[: len(each.text)], is_cut=True)
        assert len(twin) - len(each.text) < 8  # bytes of a character that has not ended


def say(title: str, made: list[Follower]) -> None:
    gaps = [each.longest_gap for each in made]
    print(
        f"{title}: longest gap of a stream p50 {statistics.median(gaps):.2f} s, p95"
        f" {p95(gaps):.2f} s; breaks {sum(each.num_breaks for each in made)}"
    )


def p95(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[int(0.95 * (len(ordered) - 1))]


def check_gaps(
    title: str, group: Cluster, made: list[Follower], seconds: float, sleeper: Sleeper
) -> None:
    """No stream waits for longer than its turn was read again, and so many seconds.

    On a busy machine each of NUM_HOPS has in addition what was waited for where nothing was cut:
    the longest pause of any of the streams, and of who only sleeps.
    """
    say(title, made)
    readings = {each: group.seconds_of_reading(each.session_id) for each in made}
    assert max(readings.values()) > 0, "no server has told what it has read"
    beyond = p95(each.longest_gap - reading for each, reading in readings.items())
    pause = max(sleeper.latest, *(each.longest_pause for each in made))
    print(
        f"of these, reading a turn again p50 {statistics.median(readings.values()):.2f} s, p95"
        f" {p95(readings.values()):.2f} s; the rest p95 {beyond:.2f} s, at most {seconds} s and"
        f" {NUM_HOPS} times the longest pause where nothing is cut, {pause:.2f} s"
    )
    assert beyond <= seconds + NUM_HOPS * pause


def test_killed_under_live_streams(group: Cluster, engine: Engine) -> None:
    """Without adoption a turn would end with its server; without the journal it would repeat or
    skip events."""
    with Sleeper() as sleeper:
        made = followers(group, NUM_STREAMS, 100_000, "kills")
        for n in range(NUM_KILLS):
            victim, other = (group.replicas[each % len(group.replicas)] for each in (n, n + 1))
            victim.wait()
            other.wait()  # one that has been killed before starts beside the streams
            counts = [len(each.ids) for each in made]
            victim.kill()
            victim.start()
            # what was running there goes on elsewhere
            for each, count in zip(made, counts, strict=True):
                eventually(
                    lambda each=each, count=count: len(each.ids) > count + 5 or not each.is_alive()
                )
        end_all(engine, group, made)
    title = f"{NUM_KILLS} kills under {NUM_STREAMS} streams"
    check_gaps(title, group, made, LEASE_SECONDS + HANDED_OVER_SECONDS, sleeper)
    for each in made:
        assert group.session(each.session_id)["version"] == 2
    assert group.rows("SELECT * FROM cottention.turns") == []
    assert group.rows("SELECT * FROM cottention.chunks") == []


def read_available(sock: socket.socket, seconds: float) -> bytes:
    """What has come, and comes within so many seconds of nothing."""
    sock.settimeout(seconds)
    read = b""
    try:
        while piece := sock.recv(65_536):
            read += piece
    except TimeoutError:
        pass
    return read


def read_relayed(url: str, session_id: str, read: list[bytes]) -> None:
    """Read the events that a server passes on, until they end or are cut."""
    path = f"{url}/v1/sessions/{session_id}/events"
    with contextlib.suppress(httpx.TransportError), stream("GET", path, timeout=None) as each:
        read.extend(each.iter_raw())


def test_a_stopped_server_that_wakes_up_tells_and_writes_nothing(
    group: Cluster, engine: Engine
) -> None:
    """Or a client that is still connected to it would get events beside those of the other."""
    num_tokens = 900
    prompts, body = [[7], [8]], body_of(0, num_tokens) | {"prompt": [8]}
    session_id = group.opened(prompts[0])
    for each in group.replicas:
        each.wait()
    stopped, other, relay = group.replicas
    raw = json.dumps(body | GOES_ON | {"session_id": session_id, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", stopped.port), PATIENCE) as sock:
        sock.sendall(head.encode() + raw)
        first = b""
        while first.count(b"\nid: ") < 20:
            first += sock.recv(4096)
        passed_on: list[bytes] = []
        relayed = threading.Thread(
            target=read_relayed, args=(relay.url, session_id, passed_on), daemon=True
        )
        relayed.start()
        eventually(lambda: bool(passed_on))
        stopped.send(signal.SIGSTOP)
        first += read_available(sock, 1.0)
        last = first.rpartition(b"\nid: ")[2].split()[0].decode()

        def adopted() -> bool:
            holder = group.rows(
                "SELECT r.url FROM cottention.sessions s JOIN cottention.replicas r"
                f" ON r.id = s.lease_owner WHERE s.id = '{session_id}'"
            )
            return bool(holder) and holder != [(stopped.url,)]

        eventually(adopted)
        relayed.join(PATIENCE)
        assert not relayed.is_alive()  # it does not wait for the stopped one
        path = f"/v1/sessions/{session_id}/events"
        rest: list[str] = []
        with stream("GET", other.url + path, headers={"Last-Event-ID": last}) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                rest.append(line)
                if len(rest) == 30:
                    stopped.send(signal.SIGCONT)
        late = b""
        sock.settimeout(PATIENCE)
        try:
            while piece := sock.recv(65_536):  # it ends the connection
                late += piece
        except ConnectionResetError:
            pass
    assert b"data: " not in late.replace(b": keep-alive", b""), late
    assert rest[-2] == "data: [DONE]"
    numbers = [int(line.rpartition("-")[2]) for line in rest if line.startswith("id: ")]
    begin = int(last.rpartition("-")[2]) + 1
    assert numbers == [*range(begin, begin + len(numbers))]
    told = re.findall(r"data: (\{.*\})\n", first.decode() + "\n".join([*rest, ""]))
    text = "".join(each["text"] for raw in told for each in json.loads(raw)["choices"])
    assert text == twin_of(engine, prompts, body)
    stopped.wait()
    session = group.session(session_id)
    assert (session["version"], session["position"]) == (2, 1 + 1 + num_tokens)


def test_the_database_restarts_under_running_turns(tmp_path: Path, engine: Engine) -> None:
    """None is lost; what needs a session meanwhile is a 503 that may be sent again."""
    num, num_tokens = 32, 500
    with (
        running_postgres(is_durable=True) as postgres,
        cluster(postgres, tmp_path, "--max-slots", "32", step_seconds=0.02) as group,
    ):
        made = followers(group, num, num_tokens, "restart")
        postgres.stop(signal.SIGINT)
        refused = send("POST", f"{group.replicas[0].url}/v1/sessions", json={"prompt": [1]})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "store_unreachable"
        assert int(refused.headers["retry-after"]) > 0
        alone = send(
            "POST",
            f"{group.replicas[0].url}/v1/completions",
            json={"prompt": [1], "max_tokens": 2},
        )
        assert alone.status_code == 200
        postgres.start()
        check_all(engine, made, num_tokens)
        say(f"restart of PostgreSQL under {num} turns", made)


def test_duplicates_are_executed_once(group: Cluster) -> None:
    """Ten of each, at once, over all servers: streams, whole answers, appends and forks."""
    base = {"max_tokens": 60, "ignore_eos": True}
    sessions = [group.opened([5]) for _ in range(20)]

    def asked(n: int) -> tuple[str, dict[str, Any]]:
        session_id, kind = sessions[n], n % 5
        if kind == 0:
            return f"/v1/sessions/{session_id}/append", {"prompt": [1, 2]}
        if kind == 1:
            return f"/v1/sessions/{session_id}/fork", {"n": 2}
        body = base | {"prompt": [6], "stream": kind == 2}
        return "/v1/completions", body if kind == 4 else body | {"session_id": session_id}

    def answered(n: int) -> bytes:
        path, body = asked(n % 20)
        headers = {"Idempotency-Key": f"duplicate{n % 20}"}
        return request("POST", group, path, json=body, headers=headers).content

    order = [*range(200)]
    random.shuffle(order)
    with ThreadPoolExecutor(64) as pool:
        answers = dict(zip(order, pool.map(answered, order), strict=True))
    for n in range(20):
        told = {answers[n + 20 * copy] for copy in range(10)}
        assert len(told) == 1, (asked(n), told)
        version = group.session(sessions[n])["version"]
        assert version == (1 if n % 5 in (1, 4) else 2), asked(n)
    [[num]] = group.rows(
        "SELECT count(*) FROM cottention.sessions s WHERE s.version = 1"
        " AND s.created >= (SELECT min(created) FROM cottention.sessions)"
        f" AND s.id IN ({_forks(answers)})"
    )
    assert num == 8


def _forks(answers: dict[int, bytes]) -> str:
    ids = {each["id"] for n in range(1, 20, 5) for each in json.loads(answers[n])["data"]}
    assert len(ids) == 8
    return ", ".join(f"'{each}'" for each in ids)


def test_a_rolling_restart_cuts_no_turn_that_goes_on(group: Cluster, engine: Engine) -> None:
    """SIGTERM hands over what is left after the drain; clients see a cut stream, or a 503."""
    with Sleeper() as sleeper:
        made = followers(group, NUM_STREAMS, 100_000, "rolling")
        for each in group.replicas:
            each.send(signal.SIGTERM)
            assert each.ended() == 0
            each.start()
            each.wait()
        end_all(engine, group, made)
    check_gaps("rolling restart of 3 servers", group, made, HANDED_OVER_SECONDS, sleeper)


def test_any_server_cancels_and_tells(group: Cluster) -> None:
    """It relays to the one that runs the turn or the request, whatever X-Session-Id says."""
    for each in group.replicas:
        each.wait()
    one, two, three = (each.url for each in group.replicas)
    body = body_of(1, 3000) | {"stream": True}
    wrong = {"X-Session-Id": "sess-" + "0" * 32}
    session_id = group.opened([3])
    turn = body | GOES_ON | {"session_id": session_id}
    with stream("POST", f"{one}/v1/completions", json=turn) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
    with stream("GET", f"{two}/v1/sessions/{session_id}/events", headers=wrong) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith("data: ")) == first
        cancelled = send("POST", f"{three}/v1/sessions/{session_id}/cancel")
        assert cancelled.json() == {"id": session_id, "status": "cancelled"}
        assert [*lines][-2] == "data: [DONE]"

    # by the id of the answer, which has the session's; and one without a session
    for more in ({"session_id": session_id}, {}):
        with stream("POST", f"{one}/v1/completions", json=body | more) as response:
            lines = response.iter_lines()
            event = next(line for line in lines if line.startswith("data: "))
            name = json.loads(event.removeprefix("data: "))["id"]
            assert (session_id in name) == bool(more)
            cancelled = send("POST", f"{two}/v1/requests/{name}/cancel")
            assert cancelled.json() == {"id": name, "status": "cancelled"}
            assert [*lines][-2] == "data: [DONE]"
    assert send("POST", f"{two}/v1/requests/none/cancel").status_code == 404


def test_a_turn_waits_for_one_at_another_server(group: Cluster) -> None:
    """As it would at one server alone, where it says so."""
    for each in group.replicas:
        each.wait()
    one, two, three = (each.url for each in group.replicas)
    session_id = group.opened([3])
    long = body_of(1, 100_000) | GOES_ON | {"session_id": session_id, "stream": True}
    with stream("POST", f"{one}/v1/completions", json=long) as response:
        next(response.iter_raw())
    short = {"prompt": [4], "max_tokens": 2, "session_id": session_id}
    busy = send("POST", f"{two}/v1/completions", json=short)
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "session_busy")
    with ThreadPoolExecutor(1) as pool:
        body = short | {"on_conflict": "wait"}
        waiting = pool.submit(send, "POST", f"{two}/v1/completions", json=body)
        cancelled = send("POST", f"{three}/v1/sessions/{session_id}/cancel")
        assert cancelled.json()["status"] == "cancelled"
        assert waiting.result().status_code == 200
    assert group.session(session_id)["version"] == 3


def test_relays_have_the_callers_key_and_no_other(postgres: Postgres, tmp_path: Path) -> None:
    """Another key, or none, gets at nothing through a relay, whatever headers it sends."""
    keys = ["--api-key", "first-key-of-many", "--api-key", "second-key-of-many"]
    mine, others = ({"Authorization": f"Bearer {each}"} for each in keys[1::2])
    with cluster(postgres, tmp_path, *keys, num=2) as group:
        one, two = (each.url for each in group.replicas)
        opened = send("POST", f"{one}/v1/sessions", json={"prompt": [1]}, headers=mine)
        session_id = opened.json()["id"]
        body = body_of(1, 3000) | GOES_ON | {"session_id": session_id, "stream": True}
        with stream("POST", f"{one}/v1/completions", json=body, headers=mine) as response:
            next(response.iter_raw())
        more = {"X-Session-Id": session_id, "X-Cottention-Relayed": "1"}
        for headers, status in ((others, 404), (others | more, 404), (more, 401)):
            for method, verb in (("GET", "events"), ("POST", "cancel")):
                path = f"/v1/sessions/{session_id}/{verb}"
                answer = send(method, two + path, headers=headers)
                assert answer.status_code == status, (headers, verb, answer.text)
        path = f"/v1/sessions/{session_id}/cancel"
        ended = send("POST", two + path, headers=mine)
        assert ended.json()["status"] == "cancelled"


def test_where_bits_may_differ_each_event_comes_once(postgres: Postgres, tmp_path: Path) -> None:
    """In bfloat16 nobody promises the same bits again: what was told is in the journal first."""
    num_tokens = 400
    flags = ["--dtype", "bfloat16", "--max-slots", "16"]
    with cluster(postgres, tmp_path, *flags, num=2) as group:
        made = followers(group, 4, num_tokens, "gated")
        group.replicas[0].kill()
        for n, each in enumerate(made):
            each.join(4 * PATIENCE)
            each.check(each.text)
            position = group.session(each.session_id)["position"]
            assert position == 1 + len(body_of(n, num_tokens)["prompt"]) + num_tokens
