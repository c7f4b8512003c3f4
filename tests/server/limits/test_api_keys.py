"""Who may ask: keys, what is open without, requests' ids, pages in browsers, the warning."""

from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.cli.serve import bind_socket, describe_access, warn_of_open_access
from cottention.server.config import ServerConfig
from cottention.server.limits.api_keys import load_api_keys
from tests.server.http.test_bad_input import refused
from tests.server.live import serving


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_each_key_opens_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\nthird-key \n\n")
    keys: dict[str, Any] = {"api_key": ("one", "two"), "api_key_file": str(tmp_path / "keys")}
    with serving(**keys) as live:
        for key in ("one", "two", "third-key"):
            assert live.client.get("/v1/models", headers=bearer(key)).status_code == 200
        for headers in ({}, bearer("on"), bearer("one two"), {"Authorization": "Basic one"}):
            response = live.client.get("/v1/models", headers=headers)
            error = refused(response, 401)
            assert error["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "x-request-id" in response.headers
        for path in ("/tokenize", "/v1/completions", "/v1/nowhere"):
            refused(live.client.post(path, json={"prompt": "x"}), 401)
        for path in ("/health", "/ready", "/metrics"):
            assert live.client.get(path).status_code == 200
        for path in ("/version", "/openapi.json"):
            assert live.client.get(path).status_code == 401
            assert live.client.get(path, headers=bearer("one")).status_code == 200


def test_a_refused_body_is_not_read() -> None:
    with serving(api_key=("one",), max_body_bytes=10) as live:
        refused(live.complete(prompt="x" * 1000), 401)


def test_figures_may_have_a_key_of_their_own() -> None:
    with serving(api_key=("one",), metrics_key="two") as live:
        assert live.client.get("/metrics").status_code == 401
        assert live.client.get("/metrics", headers=bearer("one")).status_code == 401
        assert live.client.get("/metrics", headers=bearer("two")).status_code == 200
        assert live.client.get("/v1/models", headers=bearer("two")).status_code == 401


def test_without_keys_any_key_is_taken() -> None:
    with serving() as live:
        assert live.client.get("/v1/models", headers=bearer("x")).status_code == 200


@pytest.mark.parametrize(
    "config",
    [
        {"api_key": (" one",)},
        {"api_key": ("é",)},
        {"api_key_file": "/nowhere/keys"},
    ],
)
def test_keys_that_cannot_be_sent_are_refused_at_the_start(config: Any) -> None:
    with pytest.raises(ConfigurationError):
        load_api_keys(ServerConfig(**config))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key-one1\nkey-two2\n", ["key-one1", "key-two2"]),
        ("key-one1\r\n\r\nkey-two2", ["key-one1", "key-two2"]),
        ("# ours\r\nkey-one1\r\n  # note\r\n\t#two\r\n", ["key-one1"]),
        ("  key-one1  \n \nkey-two#2\n", ["key-one1", "key-two#2"]),
    ],
)
def test_a_file_of_keys_as_editors_save_it(
    mark: bytes, text: str, expected: list[str], tmp_path: Path
) -> None:
    """A mark or a line's end in a key would refuse who has it; a note would let anyone in."""
    path = tmp_path / "keys"
    path.write_bytes(mark + text.encode())
    assert [key.secret for key in load_api_keys(ServerConfig(api_key_file=str(path)))] == expected
    path.write_bytes(mark + b'\r\n {\r\n"a": {"key": "one"}\r\n}\r\n')
    (key,) = load_api_keys(ServerConfig(api_key_file=str(path)))
    assert (key.name, key.secret) == ("a", "one")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("key-one1\n{\n}\n", "line 2 cannot be a key"),
        ('# ours\n\n"key-one1"\n', "line 3 cannot be a key"),
        ("key-one1\nkey two2", "line 2 cannot be a key"),
        ("secret1\n", "line 1 cannot be a key"),
        ("clé-secret\n", "line 1 cannot be a key"),
        ('["key-one1"]', "must be a JSON object; it is a list"),
        ('{"key-one1": "alice"}', 'entry 1 must be "NAME": '),
    ],
)
def test_what_cannot_be_a_key_is_refused_at_the_start_and_not_printed(
    text: str, where: str, tmp_path: Path
) -> None:
    """Else a fragment of another format would be a key that anyone can guess."""
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=f"^--api-key-file {path}") as caught:
        load_api_keys(ServerConfig(api_key_file=str(path)))
    assert where in str(caught.value)
    assert not any(each in str(caught.value) for each in ("key-one1", "key two2", "secret"))


@pytest.mark.parametrize("name", ["keys", "keys.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("one".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        ("one".encode("utf-16-le"), "it has zero bytes, as UTF-16 has"),
        (b"on\xe9", "it is not UTF-8 at byte 2"),
        (None, "No such file"),
    ],
)
def test_a_file_of_keys_that_cannot_be_read_is_one_line(
    name: str, content: bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=says) as caught:
        load_api_keys(ServerConfig(api_key_file=str(path)))
    assert str(caught.value).startswith(f"--api-key-file {path} cannot be read: ")
    assert "\n" not in str(caught.value)


def test_an_empty_file_of_keys_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n# none\n")
    with pytest.raises(ConfigurationError, match="no key"):
        load_api_keys(ServerConfig(api_key_file=str(tmp_path / "keys")))


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "a\tb"])
def test_a_harmful_id_is_replaced(given: str) -> None:
    with serving() as live:
        response = live.client.get("/health", headers={"X-Request-Id": given})
        assert len(response.headers["x-request-id"]) == 32
        other = live.client.get("/health", headers={"X-Request-Id": given})
        assert other.headers["x-request-id"] != response.headers["x-request-id"]


def test_pages_are_answered_where_their_origin_is_named() -> None:
    asking = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    with serving() as live:
        assert (
            "access-control-allow-origin" not in live.client.get("/health", headers=asking).headers
        )
    with serving(cors_origin=("https://chat.example",), api_key=("one",)) as live:
        preflight = live.client.options("/v1/completions", headers=asking)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        answer = live.client.get("/v1/models", headers=asking)
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        other = live.client.get("/health", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("host", "settings", "warns", "reached"),
    [
        (
            "127.0.0.1",
            {},
            False,
            "localhost only; no API key required; use --host 0.0.0.0 to open it,"
            " --api-key-file FILE to require keys",
        ),
        (
            "127.0.0.1",
            {"api_key_file": "keys"},
            False,
            "localhost only; API key required; use --host 0.0.0.0 to open it",
        ),
        ("0.0.0.0", {}, True, "open to other machines; no API key required"),
        (
            "0.0.0.0",
            {"api_key": ("one",)},
            False,
            "open to other machines; API key required",
        ),
        (
            "0.0.0.0",
            {"allow_unauthenticated": True},
            False,
            "open to other machines; no API key required",
        ),
    ],
)
def test_who_gets_to_the_port_is_told_and_warned_of(
    host: str, settings: Any, warns: bool, reached: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServerConfig(**settings)
    with bind_socket(host, 0) as sock:
        warn_of_open_access(sock, config)
        assert describe_access(sock, config) == reached
    assert ("--api-key" in caplog.text) is warns
