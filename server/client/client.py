"""A client of this server, or of any other with OpenAI's interface, for the commands."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from cottention.engine.errors import ConfigurationError, CottentionError
from cottention.server.client.settings import ClientConfig

CONNECT_SECONDS = 10.0
SCHEMES = ("http://", "https://")
UNIX = "unix:"
FORMS = "give http://HOST:PORT, https://NAME or unix:PATH"


class RemoteError(CottentionError):
    """A server that cannot be reached, or its answer that is an error."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """One server. Every failure is a RemoteError with a message of one line."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """url: with or without /v1 at its end, or unix:PATH. Raises ConfigurationError."""
        self.url, self.key = url, key
        base, path = address_of(url)
        try:
            self._http = httpx2.Client(
                base_url=base,
                headers=headers_of(key),
                timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
                transport=None if path is None else httpx2.HTTPTransport(uds=path),
            )
        except httpx2.InvalidURL as error:
            raise ConfigurationError(f"{url} is not a URL: {error}; {FORMS}") from None

    @classmethod
    def of(cls, config: ClientConfig) -> "Client":
        """The client of --url and its key. Raises ConfigurationError."""
        assert config.url is not None
        return cls(config.url, key_of(config))

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def get(self, path: str) -> Any:
        """The JSON of a GET."""
        return self._json(self._request("GET", path))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of a POST."""
        return self._json(self._request("POST", path, json=body or {}))

    def delete(self, path: str) -> None:
        """DELETE something."""
        self._request("DELETE", path)

    def download(self, path: str) -> Iterator[bytes]:
        """The bytes of a GET."""
        with self._open("GET", path) as response:
            try:
                yield from response.iter_bytes()
            except httpx2.HTTPError as error:
                raise unreachable(self.url, error) from None

    def upload(self, path: str, content: bytes) -> Any:
        """The JSON of a POST of bytes."""
        headers = {"content-type": "application/octet-stream"}
        return self._json(self._request("POST", path, content=content, headers=headers))

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The chunks of a streamed answer; an event that is an error raises RemoteError."""
        with self._open("POST", path, json=dict(body)) as response:
            try:
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    chunk = self._parsed(data)
                    if chunk.get("error"):
                        raise RemoteError(message_of(chunk) or "the answer ended with an error")
                    yield chunk
            except httpx2.HTTPError as error:
                raise unreachable(self.url, error) from None

    def _request(self, method: str, path: str, **more: Any) -> httpx2.Response:
        with self._open(method, path, **more) as response:
            try:
                response.read()
            except httpx2.HTTPError as error:
                raise unreachable(self.url, error) from None
            return response

    @contextlib.contextmanager
    def _open(self, method: str, path: str, **more: Any) -> Iterator[httpx2.Response]:
        """A response whose body has not been read."""
        try:
            request = self._http.build_request(method, path, **more)
            response = self._http.send(request, stream=True)
        except (httpx2.HTTPError, OSError) as error:
            raise unreachable(self.url, error) from None
        with contextlib.closing(response):
            if not response.is_success:
                raise self._refused(response)
            yield response

    def _refused(self, response: httpx2.Response) -> RemoteError:
        with contextlib.suppress(httpx2.HTTPError):
            response.read()
        try:
            text = message_of(json.loads(response.content))
        except (ValueError, httpx2.StreamError):
            text = ""
        status = f"{response.status_code} {response.reason_phrase}".strip()
        where = f"{self.url} answers {response.request.url.path} with {status}"
        return RemoteError(text or where, response.status_code)

    def _json(self, response: httpx2.Response) -> Any:
        return self._parsed(response.content)

    def _parsed(self, raw: str | bytes) -> Any:
        try:
            found = json.loads(raw)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RemoteError(f"{self.url} does not answer with JSON objects, as OpenAI's API does")
        return found


def unreachable(url: str, error: Exception) -> RemoteError:
    """The error where a request could not be sent, or its answer not be read."""
    reason = _ERRNO.sub("", str(error)) or type(error).__name__
    return RemoteError(
        f"{url} cannot be reached: {reason}; start a server there (cottention serve), or give --url"
        " the address of one that runs"
    )


_ERRNO = re.compile(r"^\[Errno -?\d+\] ")


def address_of(url: str) -> tuple[str, str | None]:
    """The base URL of requests, and the path of a unix socket. Raises ConfigurationError."""
    if url.startswith(UNIX) and len(url) > len(UNIX):
        return "http://localhost", url.removeprefix(UNIX)
    if not url.startswith(SCHEMES) or url in SCHEMES:
        raise ConfigurationError(f"{url} is not the URL of a server: {FORMS}")
    return url.rstrip("/").removesuffix("/v1"), None


def headers_of(key: str | None) -> dict[str, str]:
    """Those of every request."""
    return {} if key is None else {"authorization": f"Bearer {key}"}


def key_of(config: ClientConfig) -> str | None:
    """The key to send, if there is one. Raises ConfigurationError."""
    key = config.api_key[0] if config.api_key else None
    if key is None and config.api_key_file is not None:
        key = _first_key(config.api_key_file)
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigurationError("--api-key: a key must be printable ASCII")
    return key


def _first_key(path: str) -> str:
    """The first key of a file as the server reads it: lines, or JSON by name."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"--api-key-file {path} cannot be read: {reason}; give it a file that this process may"
            " read, with the key on its first line"
        ) from None
    lines = [line.strip() for line in text.splitlines()]
    found = next((line for line in lines if line and not line.startswith("#")), None)
    if text.lstrip().startswith("{"):
        try:
            found = next(iter(json.loads(text).values()))["key"]
        except (ValueError, StopIteration, LookupError, TypeError, AttributeError):
            found = None
    if not isinstance(found, str):
        raise ConfigurationError(
            f"--api-key-file {path} has no key in it; write one on its first line"
        )
    return found


def message_of(body: Any) -> str:
    """The message of an error's body, in OpenAI's form or another; empty where there is none."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""
