"""The unix socket of --uds: who connects, and what is done with a file that is there already."""

import socket
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.cli.serve import describe_access, listening, url_of, warn_of_open_access
from cottention.server.config import ServerConfig
from tests.server.live import PATIENCE, serving


def test_clients_of_a_unix_socket_are_served_and_share_all_connections(tmp_path: Path) -> None:
    """They have no addresses: half of the connections for them all would halve what a proxy has."""
    path = str(tmp_path / "socket")
    with serving(uds=path, max_connections=4) as live, ExitStack() as held:
        answer = live.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 5})
        assert answer.json()["usage"]["completion_tokens"] == 5
        others = [held.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        for each in others:
            each.settimeout(PATIENCE)
            each.connect(path)
        others[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert others[-1].recv(12) == b"HTTP/1.1 200"
        assert len(live.server._table) == 4
        assert live.client.get("/health").status_code == 200
    assert not Path(path).exists()


def test_only_owner_and_group_can_connect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ServerConfig(uds=str(tmp_path / "socket"))
    with listening(config) as sock:
        assert stat.S_IMODE((tmp_path / "socket").stat().st_mode) == 0o660
        assert url_of(sock) == f"unix:{tmp_path}/socket"
        warn_of_open_access(sock, config)
        assert describe_access(sock, config).startswith("the socket's owner and group; no API key")
    assert "API key" not in caplog.text


def test_what_is_there_already_is_replaced_only_if_it_is_a_dead_servers(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    config = ServerConfig(uds=str(path))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listening(config):
        for _ in range(2):  # asking whether someone listens leaves the path usable
            with pytest.raises(ConfigurationError, match="another server listens there"):
                listening(config).__enter__()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"  # the end of a server removes no other's file
    with pytest.raises(ConfigurationError, match="it exists and is not a socket"):
        listening(config).__enter__()


@pytest.mark.parametrize(
    ("path", "says"), [("no/folder/socket", "No such file"), ("x" * 120, "AF_UNIX path too long")]
)
def test_a_path_that_cannot_be_is_told(tmp_path: Path, path: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{says}.*choose another with --uds"):
        listening(ServerConfig(uds=str(tmp_path / path))).__enter__()
