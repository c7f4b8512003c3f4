"""HTTPS with a certificate made here: who may connect, and what clients that stay silent cost."""

import contextlib
import signal
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.cli.tls import tls_context
from cottention.server.config import ServerConfig
from tests.server.live import PATIENCE, Live, eventually, serving
from tests.server.process import served


def make_certificate(folder: Path, *options: str) -> tuple[str, str]:
    """Paths of a certificate for localhost, signed by itself, and of its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += [*(options or ("-nodes",)), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return str(cert), str(key)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def silent(live: Live) -> socket.socket:
    """A client that connects and never begins its handshake."""
    url = httpx.URL(live.url)
    return socket.create_connection((url.host, url.port or 0), PATIENCE)


def test_a_client_that_knows_the_certificate_streams_and_one_that_does_not_is_refused(
    certificate: tuple[str, str],
) -> None:
    cert, key = certificate
    body = {"prompt": "x", "max_tokens": 5, "stream": True}
    with serving(tls_cert=cert, tls_key=key) as live:
        known = ssl.create_default_context(cafile=cert)
        with httpx.Client(base_url=live.url, verify=known, timeout=PATIENCE) as client:
            answer = client.post("/v1/completions", json=body)
        assert answer.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{live.url}/health", timeout=PATIENCE)
        with pytest.raises(httpx.RemoteProtocolError):  # plain HTTP
            httpx.get(live.url.replace("https:", "http:"), timeout=PATIENCE)
        assert live.client.get("/health").status_code == 200


def test_handshakes_without_end_have_places_and_lose_them_to_others(
    certificate: tuple[str, str],
) -> None:
    """Else they would take all descriptors uncounted, or keep others from being accepted."""
    cert, key = certificate
    limits = {"max_connections": 2, "max_connections_per_address": 2}
    with serving(tls_cert=cert, tls_key=key, **limits) as live, silent(live) as first, silent(live):
        eventually(lambda: len(live.server._table), equals=2)
        assert live.client.get("/health").status_code == 200
        assert first.recv(1) == b""


@pytest.mark.slow
def test_a_flood_of_handshakes_cuts_no_stream_and_keeps_nobody_out(
    certificate: tuple[str, str],
) -> None:
    """Hundreds of clients that say nothing, half of a hello, or what is no TLS."""
    cert, key = certificate
    limits = {"max_connections": 40, "max_connections_per_address": 40}
    body = {"prompt": "x", "max_tokens": 1_000_000, "stream": True}
    hellos = [b"", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/1.1\r\n\r\n"]
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(serving(tls_cert=cert, tls_key=key, **limits))
        live.engine.step_seconds = 0.005
        stream = stack.enter_context(live.client.stream("POST", "/v1/completions", json=body))
        lines = stream.iter_lines()
        for n in range(400):
            sock = stack.enter_context(silent(live))
            with contextlib.suppress(ConnectionError):
                sock.sendall(hellos[n % 3])
            if n % 100 == 99:
                assert len(live.server._table) <= 40
                assert next(line for line in lines if line).startswith("data: ")
                with httpx.Client(base_url=live.url, verify=False, timeout=PATIENCE) as client:
                    assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_a_server_that_is_stopped_ends_its_encrypted_streams(
    certificate: tuple[str, str], gptj_folder: Path
) -> None:
    """And waits neither for a handshake that never ends nor for a client that says no goodbye."""
    cert, key = certificate
    flags = ["--tls-cert", cert, "--tls-key", key, "--drain-seconds", "300"]
    body = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    known = ssl.create_default_context(cafile=cert)
    with served(gptj_folder, None, *flags) as (popen, client):
        where = (client.base_url.host, client.base_url.port or 0)
        with (
            httpx.Client(base_url=client.base_url, verify=known, timeout=PATIENCE) as mine,
            socket.create_connection(where),
            known.wrap_socket(socket.create_connection(where), server_hostname="localhost"),
            mine.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            popen.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
            assert popen.wait(2 * PATIENCE) == 0


def test_a_certificate_and_its_key_may_share_a_file(
    certificate: tuple[str, str], tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_text("".join(Path(each).read_text() for each in certificate))
    assert tls_context(ServerConfig(tls_cert=str(both))) is not None


def test_files_that_are_no_certificate_and_key_are_told(
    certificate: tuple[str, str], tmp_path: Path
) -> None:
    cert, key = certificate
    (tmp_path / "other").mkdir()
    _, other_key = make_certificate(tmp_path / "other")
    (tmp_path / "secret").mkdir()
    _, encrypted = make_certificate(tmp_path / "secret", "-passout", "pass:x")
    for tls_cert, tls_key, says in (
        (cert, str(tmp_path / "none"), "--tls-key .*/none cannot be read: No such file"),
        (key, key, "are not a certificate and its key"),
        (cert, other_key, "are not a certificate and its key in PEM: KEY_VALUES_MISMATCH"),
        (cert, encrypted, "is encrypted"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            tls_context(ServerConfig(tls_cert=tls_cert, tls_key=tls_key))
    with pytest.raises(ConfigurationError, match="needs the certificate of --tls-cert"):
        ServerConfig(tls_key=key)
