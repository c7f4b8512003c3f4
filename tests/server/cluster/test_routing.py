"""docker/haproxy/haproxy.cfg in a real HAProxy: which server gets a request, and how streams pass.

The servers are small, since the configuration is what is tested; test_replicas.py has real ones.
"""

import http.client
import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import httpx
import pytest

from tests.ports import free_port
from tests.server.cluster.haproxy import Balancer, running_haproxy
from tests.server.cluster.tiny import TinyServer, tiny_servers
from tests.server.live import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ADDRESSES = [f"127.0.1.{n}" for n in range(1, 6)]
NUM_SESSIONS = 1000


class Farm(NamedTuple):
    """Four servers behind HAProxy, and a fifth that it has not been told of."""

    balancer: Balancer
    servers: list[TinyServer]
    wire: http.client.HTTPConnection

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> str:
        """Which server answers."""
        raw = None if body is None else json.dumps(body)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.wire.request(method, path, raw, names)
        answer = self.wire.getresponse()
        told = answer.read()
        assert answer.status == 200, told
        address: str = json.loads(told)["server"]
        return address

    def of_session(self, session_id: str) -> str:
        return self.ask("GET", f"/v1/sessions/{session_id}")


@pytest.fixture
def farm() -> Iterator[Farm]:
    port = free_port()
    with (
        tiny_servers(ADDRESSES, port) as servers,
        running_haproxy(ADDRESSES[:4], port) as balancer,
    ):
        balancer.wait_for(4)
        wire = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=60)
        yield Farm(balancer, servers, wire)
        wire.close()


def test_the_three_keys_of_a_session_agree(farm: Farm) -> None:
    """Else a session's turns, appends and events would be at servers without its state."""
    used = Counter[str]()
    for n in range(300):
        name = f"session-{n:x}"
        body = {"prompt": "x" * (n * 200), "session_id": name, "max_tokens": 1}
        asked = {
            farm.ask("GET", f"/v1/sessions/{name}"),
            farm.ask("POST", f"/v1/sessions/{name}/append", {"prompt": "y"}),
            farm.ask("POST", "/v1/completions", body),
            farm.ask("POST", "/v1/chat/completions", {"messages": [], "session_id": name}),
            farm.ask("POST", "/v1/completions", {"prompt": "x"}, X_Session_Id=name),
        }
        assert len(asked) == 1, name
        used.update(asked)
    assert used.keys() == set(ADDRESSES[:4])
    large = {"session_id": "session-1", "prompt": "x" * 200_000}
    assert farm.ask("POST", "/v1/completions", large) == farm.of_session("session-1")
    assert farm.ask("POST", "/v1/completions", dict(reversed(large.items()))) in ADDRESSES
    assert farm.ask("POST", "/v1/sessions/import", {}) in ADDRESSES


def test_a_fifth_server_takes_a_fifth_of_the_sessions(farm: Farm) -> None:
    """And no session moves between those that were there: that would cost each its state."""
    names = [f"{n:032x}" for n in range(NUM_SESSIONS)]
    before = [farm.of_session(name) for name in names]
    farm.balancer.names.addresses.append(ADDRESSES[4])
    farm.balancer.wait_for(5)
    after = [farm.of_session(name) for name in names]
    moved = [new for old, new in zip(before, after, strict=True) if new != old]
    shares = [count / NUM_SESSIONS for count in Counter(before).values()]
    print(f"moved {len(moved) / NUM_SESSIONS:.1%}; shares of four {min(shares):.1%} to ", end="")
    print(f"{max(shares):.1%}")
    assert set(moved) == {ADDRESSES[4]}
    assert 0.17 <= len(moved) / NUM_SESSIONS <= 0.23


def test_a_server_with_a_name_of_its_own_keeps_its_place_at_another_address() -> None:
    """As pods that are replaced do: their sessions come back to them, and the others' stay.

    The weights of SRV records would make all shares uneven.
    """
    port, names = free_port(), [f"{n:032x}" for n in range(600)]
    with (
        tiny_servers(ADDRESSES, port) as servers,
        running_haproxy(ADDRESSES[:3], port, by_service=True) as balancer,
    ):
        balancer.wait_for(3)
        wire = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=60)
        farm = Farm(balancer, servers, wire)
        before = [farm.of_session(name) for name in names]
        assert min(Counter(before).values()) > 600 / 3 * 0.8
        balancer.names.addresses[1] = ADDRESSES[4]
        servers[1].closes = True  # the connections that HAProxy has to it would be used on
        moved = names[before.index(ADDRESSES[1])]
        eventually(lambda: farm.of_session(moved), equals=ADDRESSES[4])
        expected = [ADDRESSES[4] if old == ADDRESSES[1] else old for old in before]
        assert [farm.of_session(name) for name in names] == expected
        wire.close()


def test_requests_without_a_session_are_grouped_by_affinity_else_spread(farm: Farm) -> None:
    """One group shares a prefix cache; who names none goes where the fewest requests are."""
    grouped = {
        group: {farm.ask("POST", "/v1/completions", {}, X_Affinity=group) for _ in range(5)}
        for group in map(str, range(40))
    }
    assert all(len(servers) == 1 for servers in grouped.values())
    assert set().union(*grouped.values()) == set(ADDRESSES[:4])
    with httpx.Client(base_url=farm.balancer.url, timeout=60) as client:
        streams = [
            client.send(client.build_request("POST", "/v1/completions", json=body), stream=True)
            for body in [{"stream": True}] * 8
        ]
        eventually(lambda: [each.num_streams for each in farm.servers], equals=[2, 2, 2, 2, 0])
        for server in farm.servers:
            for _ in range(server.num_streams):
                server.events.put(b"")
        for stream in streams:
            stream.read()
            stream.close()


def test_an_event_is_passed_on_before_the_next_is_there(farm: Farm) -> None:
    """Each event is sent only when the one before has been received: a buffer would wait for ever.

    Nothing here depends on time.
    """
    body = {"stream": True, "session_id": "one"}
    with httpx.stream("POST", f"{farm.balancer.url}/v1/completions", json=body, timeout=60) as got:
        eventually(lambda: sum(each.num_streams for each in farm.servers), equals=1)
        [server] = [each for each in farm.servers if each.num_streams]
        received = got.iter_raw()
        for n in range(200):
            event = b"data: %d\n\n" % n
            server.events.put(event)
            assert next(received) == event
        server.events.put(b"")
        assert list(received) == []


def test_a_server_that_takes_no_new_requests_keeps_its_streams(farm: Farm) -> None:
    """As one that is being stopped: neither may a turn be cut, nor a new one be sent there."""
    body = {"stream": True, "session_id": "one"}
    with httpx.stream("POST", f"{farm.balancer.url}/v1/completions", json=body, timeout=60) as got:
        eventually(lambda: sum(each.num_streams for each in farm.servers), equals=1)
        [server] = [each for each in farm.servers if each.num_streams]
        server.status = 503
        eventually(lambda: farm.balancer.states("sessions")["NOLB"], equals=1)
        assert farm.of_session("one") != server.address
        server.events.put(b"data: still\n\n")
        assert next(got.iter_raw()) == b"data: still\n\n"
        server.events.put(b"")
    server.status = 200
    farm.balancer.wait_for(4)
    assert farm.of_session("one") == server.address


def test_without_servers_the_answer_is_a_503_to_retry(farm: Farm) -> None:
    """In OpenAI's form: clients parse it and send the request again."""
    for server in farm.servers:
        server.status = 503
    eventually(lambda: farm.balancer.states("sessions")["NOLB"], equals=4)
    answer = httpx.get(f"{farm.balancer.url}/v1/sessions/x", timeout=60)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "unavailable"


def test_nobody_reads_the_metrics_of_some_server_through_it(farm: Farm) -> None:
    """Which server would answer is chance, and servers' metrics may be open to their network."""
    for path in ("/metrics", "//metrics", "/metrics/"):
        answer = httpx.get(f"{farm.balancer.url}{path}", timeout=60)
        assert answer.status_code == 404, path
