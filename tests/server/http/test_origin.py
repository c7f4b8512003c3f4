"""Pages in a browser: whose may send requests, what their preflights get, and rebound names."""

import json
import socket
from typing import Any

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig
from cottention.server.http.origin import (
    AllowedHosts,
    AllowedOrigins,
    allowed_hosts,
    check_access,
    parse_authority,
)
from tests.server.http.test_bad_input import refused
from tests.server.http.test_routing import raw_answer
from tests.server.limits.test_api_keys import bearer
from tests.server.live import Live, serving

CHAT = "https://chat.example"
BODY = json.dumps({"prompt": "x", "max_tokens": 1})
FOREIGN = [CHAT, "http://127.0.0.1", "http://localhost:1", "null", "file://", "not an origin"]
FOREIGN += ["chrome-extension://abcdef", "http://127.0.0.1:8000@evil.example", f"{CHAT}, {CHAT}"]
TYPES = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
TYPES += ["application/json"]


def asked(live: Live, origin: str | None, content_type: str | None = None, **headers: str) -> Any:
    """A completion that a page asks for."""
    sent = {"Origin": origin, "Content-Type": content_type} | headers
    given = {name: value for name, value in sent.items() if value is not None}
    return live.client.post("/v1/completions", content=BODY, headers=given)


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("content_type", TYPES)
def test_a_page_of_another_origin_is_refused_before_any_work(
    shared: Live, origin: str, content_type: str | None
) -> None:
    num_seen = len(shared.engine.seen)
    error = refused(asked(shared, origin, content_type), 403)
    assert error["code"] == "origin_not_allowed"
    assert f"--cors-origin {origin}" in error["message"]
    assert len(shared.engine.seen) == num_seen


def test_what_it_sends_is_not_even_read() -> None:
    with serving(max_body_bytes=10) as live:
        refused(asked(live, CHAT), 403)
        assert asked(live, None).status_code == 413


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/v1/sessions"])
def test_a_foreign_page_reads_nothing(shared: Live, path: str) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        response = shared.client.request(method, path, headers={"Origin": CHAT})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


SAME = [
    ("http://127.0.0.1:8000", "127.0.0.1:8000"),
    ("http://localhost", "localhost"),
    ("http://localhost", "localhost:80"),
    ("https://LLM", "llm:443"),
    ("https://llm", "LLM"),
    ("http://llm:8000", "llm.:8000"),
    ("http://[::1]:8000", "[::1]:8000"),
    ("http://[::1]", "[0:0:0:0:0:0:0:1]"),
]


@pytest.mark.parametrize(("origin", "host"), SAME)
@pytest.mark.parametrize("settings", [{}, {"cors_origin": (CHAT,)}], ids=["none", "another"])
def test_the_server_s_own_page_always_passes(
    origin: str, host: str, settings: dict[str, Any]
) -> None:
    with serving(**settings) as live:
        for content_type in ("application/json", "text/plain"):
            assert asked(live, origin, content_type, Host=host).status_code == 200


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:8000", "localhost:8001"),
        ("https://localhost", "localhost:80"),
        ("http://localhost", "127.0.0.1"),
        ("http://[::1]", "[::2]"),
        ("tauri://localhost", "localhost"),
        ("http://localhost", ""),
    ],
)
def test_almost_the_same_is_another(shared: Live, origin: str, host: str) -> None:
    assert refused(asked(shared, origin, Host=host), 403)["code"] == "origin_not_allowed"


NAMED = [
    ("https://chat.example", "https://chat.example"),
    ("https://chat.example/", "https://chat.example"),
    ("HTTPS://Chat.Example:443", "https://chat.example"),
    ("http://localhost:3000", "http://localhost:3000"),
    ("null", "null"),
    ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    (f"http://other, {CHAT}", CHAT),
]


@pytest.mark.parametrize(("setting", "origin"), NAMED)
def test_a_named_origin_passes_and_may_read(setting: str, origin: str) -> None:
    with serving(cors_origin=(setting,)) as live:
        for content_type in ("application/json", "text/plain"):
            response = asked(live, origin, content_type)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == origin
            assert response.headers["access-control-allow-credentials"] == "true"
            assert "X-Request-Id" in response.headers["access-control-expose-headers"]
            assert response.headers["vary"] == "Origin"
        refused(asked(live, "https://chat.example.evil"), 403)


def test_any_origin_passes_where_any_is_named() -> None:
    with serving(cors_origin=("*",)) as live:
        for origin in FOREIGN:
            response = asked(live, origin)
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (
                200,
                "*",
            )
            assert "access-control-allow-credentials" not in response.headers


PREFLIGHTS: list[dict[str, str]] = [
    {},
    {"Access-Control-Request-Headers": "authorization,content-type"},
    {"Access-Control-Request-Headers": "x-stainless-os, x-anything, if-match"},
    {"Access-Control-Request-Private-Network": "true"},
    {"Access-Control-Request-Headers": "*"},
]


@pytest.mark.parametrize("asks", PREFLIGHTS, ids=repr)
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "HEAD", "PUT", "patch"])
@pytest.mark.parametrize("keys", [(), ("one",)])
def test_named_origins_pass_every_preflight(
    asks: dict[str, str], method: str, keys: tuple[str, ...]
) -> None:
    """Also with keys, which a preflight never has."""
    with serving(cors_origin=(CHAT,), api_key=keys) as live:
        headers = {"Origin": CHAT, "Access-Control-Request-Method": method} | asks
        response = live.client.options("/v1/chat/completions", headers=headers)
        assert (response.status_code, response.content) == (200, b"")
        told = response.headers
        assert told["access-control-allow-origin"] == CHAT
        assert method in told["access-control-allow-methods"].split(", ")
        assert int(told["access-control-max-age"]) > 0
        asked_for = asks.get("Access-Control-Request-Headers")
        assert told.get("access-control-allow-headers") == asked_for
        network = asks.get("Access-Control-Request-Private-Network")
        assert told.get("access-control-allow-private-network") == network
        other = live.client.options("/v1/models", headers=headers | {"Origin": "https://other"})
        refused(other, 403)


def test_a_named_origin_still_needs_the_key() -> None:
    with serving(cors_origin=(CHAT,), api_key=("one",)) as live:
        response = asked(live, CHAT)
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == CHAT
        assert asked(live, CHAT, **bearer("one")).status_code == 200
        refused(asked(live, "null", **bearer("one")), 403)


ALLOWED = ["127.0.0.1", "127.0.0.1:8000", "10.1.2.3:80", "[::1]", "[::1]:8000", "[fe80::1%25eth0]"]
ALLOWED += ["localhost", "LOCALHOST:8000", "localhost.", "a.localhost", "a.b.localhost:8000"]
ALLOWED += ["server", "my_box:8000", "127.1", "", socket.gethostname()]
REFUSED = ["evil.example", "evil.example:8000", "evil.example.", "localhost.evil.example"]
REFUSED += ["127.0.0.1.evil.example", "x.nip.io:8000", "server.namespace.svc", "evillocalhost.com"]
REFUSED += ["1.2.3.4.5", "[::1", "[::1].evil.example", "localhost#.evil", "a b", "localhost:x"]


@pytest.mark.parametrize("host", ALLOWED)
def test_local_names_and_addresses_are_allowed(shared: Live, host: str) -> None:
    assert asked(shared, None, Host=host).status_code == 200


@pytest.mark.parametrize("host", REFUSED)
def test_a_name_that_may_be_rebound_is_refused(shared: Live, host: str) -> None:
    """Also where the page is of that name, and its Origin the same."""
    num_seen = len(shared.engine.seen)
    for origin in (None, f"http://{host}"):
        response = asked(shared, origin, "text/plain", Host=host)
        assert response.status_code == 403
    error = refused(shared.client.get("/v1/models", headers={"Host": host}), 403)
    assert error["code"] == "host_not_allowed"
    assert "--allowed-hosts" in error["message"]
    assert len(shared.engine.seen) == num_seen
    for path in ("/health", "/ready", "/health/", "//ready"):
        response = shared.client.get(shared.url + path, headers={"Host": host})
        assert response.status_code == 200


def test_hosts_that_are_named_are_allowed() -> None:
    hosts = ("LLM.example:443", "*.svc.cluster.local, api.example")
    with serving(allowed_hosts=hosts) as live:
        for host in ("llm.example", "llm.example:8000", "a.b.svc.cluster.local", "api.example"):
            assert asked(live, None, Host=host).status_code == 200
        for host in ("svc.cluster.local", "x.llm.example", "evilsvc.cluster.local"):
            refused(asked(live, None, Host=host), 403)
    assert "evil.example" in AllowedHosts(["*"])
    assert "box.corp.example" in allowed_hosts(ServerConfig(host="box.corp.example"))
    assert "Box.local" in AllowedHosts([], ["box.local"])


def test_with_a_key_any_host_is_allowed() -> None:
    with serving(api_key=("one",)) as live:
        assert asked(live, None, Host="evil.example", **bearer("one")).status_code == 200
        assert asked(live, None, Host="evil.example").status_code == 401
        assert live.client.get("/metrics", headers={"Host": "evil.example"}).status_code == 200


def test_metrics_with_a_key_of_their_own_have_any_host() -> None:
    with serving(metrics_key="two") as live:
        headers = {"Host": "evil.example"}
        assert live.client.get("/metrics", headers=headers | bearer("two")).status_code == 200
        assert live.client.get("/v1/models", headers=headers).status_code == 403


RAW = [
    ("GET /version HTTP/1.0\r\n", 200),
    ("GET /version HTTP/1.1\r\nConnection: close\r\n", 200),
    ("GET /version HTTP/1.0\r\nHost: evil.example\r\n", 403),
    ("GET http://evil.example/version HTTP/1.0\r\nHost: localhost\r\n", 403),
    ("GET http://evil.example:80/version HTTP/1.0\r\n", 403),
    ("GET http://localhost/version HTTP/1.0\r\nHost: evil.example\r\n", 200),
    ("GET http://[::1]:80/version HTTP/1.0\r\nHost: evil.example\r\n", 200),
    ("GET /version HTTP/1.0\r\nHost: localhost\r\nHost: localhost\r\n", 400),
    ("GET /version HTTP/1.0\r\nHost: localhost\r\nHost: evil.example\r\n", 400),
    ("GET http://localhost/version HTTP/1.0\r\nHost: localhost\r\nHost: evil.example\r\n", 400),
    ("GET /version HTTP/1.0\r\nOrigin: http://a\r\nHost: a\r\n", 200),
    ("GET http://b/version HTTP/1.0\r\nOrigin: http://a\r\nHost: a\r\n", 403),
]


@pytest.mark.parametrize(("head", "status"), RAW)
def test_which_host_counts(shared: Live, head: str, status: int) -> None:
    """None is no browser's; that of the target comes before the header; two are none."""
    received = raw_answer(shared, f"{head}\r\n")
    assert int(received.split()[1]) == status, received


def test_several_hosts_are_refused_with_a_key_too() -> None:
    with serving(api_key=("one",)) as live:
        head = "GET /version HTTP/1.0\r\nHost: a\r\nHost: b\r\nAuthorization: Bearer one\r\n\r\n"
        assert b" 400 " in raw_answer(live, head).partition(b"\r\n")[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"cors_origin": ("chat.example",)},
        {"cors_origin": ("https://chat.example/path",)},
        {"cors_origin": ("https://*.example",)},
        {"allowed_hosts": ("https://llm.example",)},
        {"allowed_hosts": ("llm.*",)},
        {"allowed_hosts": ("*.",)},
    ],
)
def test_what_is_no_origin_or_host_ends_the_start(settings: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"--cors-origin must|--allowed-hosts must"):
        check_access(ServerConfig(**settings))


def test_one_spelling_of_each_authority() -> None:
    assert parse_authority("EXAMPLE.com.:0080") == ("example.com", 80)
    assert parse_authority("127.1:") == ("127.0.0.1", None)
    assert parse_authority("[::FFFF:0:1]") == ("[::ffff:0:1]", None)
    for text in ("", ":80", "a:b", "a/b", "u@h", "[::g]", "300.1.1.1", "."):
        assert parse_authority(text) is None
    assert not AllowedOrigins([])
    assert AllowedOrigins(["null"])
