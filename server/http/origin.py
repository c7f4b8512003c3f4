"""Protection against other sites' web pages in a user's browser, by Origin and Host of a request.

`OriginMiddleware` refuses pages of origins that are not allowed, and adds the CORS headers for
those that are. `HostMiddleware` refuses names that may have been rebound to this machine by DNS.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig
from cottention.server.http.body import shown
from cottention.server.http.errors import ApiError, invalid
from cottention.server.http.request_id import HEADER

ANY = "*"
DEFAULT_PORTS = {"http": 80, "https": 443}
AUTHORITY = re.compile(r"(\[[^\[\]]+\]|[a-z0-9._~-]+)(?::([0-9]{0,5}))?")
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]+)")

EXPOSED_HEADERS = f"{HEADER}, Retry-After, ETag"
METHODS = ("GET", "HEAD", "POST", "DELETE")
PREFLIGHT_SECONDS = 7200
"""How long a browser may keep the answer to a preflight; the most that Chromium does."""

PREFLIGHT_VARY = (
    "Origin, Access-Control-Request-Method, Access-Control-Request-Headers,"
    " Access-Control-Request-Private-Network"
)


class Authority(NamedTuple):
    """Host and port of a URL. host: in lower case, an IPv6 address in brackets."""

    host: str
    port: int | None

    @property
    def is_address(self) -> bool:
        """Whether the host is an IP address."""
        return self.host.startswith("[") or self.host.rpartition(".")[2].isdecimal()


class Origin(NamedTuple):
    """An origin of web pages with its port, which is None for schemes without a default port."""

    scheme: str
    host: str
    port: int | None


def parse_authority(text: str) -> Authority | None:
    """The authority in `text`, such as a Host header; None where it is malformed."""
    found = AUTHORITY.fullmatch(text.lower())
    host = _plain_host(found[1]) if found else None
    if found is None or host is None:
        return None
    return Authority(host, int(found[2]) if found[2] else None)


def _plain_host(host: str) -> str | None:
    """One spelling for each host: without the root's dot, and addresses as they are printed."""
    if host.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(host[1:-1].replace('%25', '%'))}]"
        except ValueError:
            return None
    host = host.removesuffix(".")
    if not host.rpartition(".")[2].isdecimal():
        return host or None
    try:
        return socket.inet_ntoa(socket.inet_aton(host))  # 127.1 is an address, too
    except OSError:
        return None


def parse_origin(text: str) -> Origin | None:
    """The origin in `text`; None for "null" and what is malformed."""
    found = ORIGIN.fullmatch(text.lower())
    authority = parse_authority(found[2]) if found else None
    if found is None or authority is None:
        return None
    port = authority.port if authority.port is not None else DEFAULT_PORTS.get(found[1])
    return Origin(found[1], authority.host, port)


class AllowedOrigins:
    """The origins whose pages may send requests."""

    def __init__(self, origins: Collection[str]) -> None:
        """origins: as `--cors-origin` takes them. Raises ConfigurationError."""
        self.is_any = ANY in origins
        self._has_null = "null" in origins
        self._origins = {_named_origin(each) for each in origins if each not in (ANY, "null")}

    def __bool__(self) -> bool:
        """Whether any origin is allowed."""
        return self.is_any or self._has_null or bool(self._origins)

    def __contains__(self, origin: str) -> bool:
        """Whether the origin of an Origin header is allowed."""
        if self.is_any or (self._has_null and origin == "null"):
            return True
        return parse_origin(origin) in self._origins


def _named_origin(text: str) -> Origin:
    origin = parse_origin(text.removesuffix("/"))
    if origin is None:
        raise ConfigurationError(
            "--cors-origin must be an origin such as https://chat.example:8443, null, or * for"
            f" any; it is {shown(text)}"
        )
    return origin


class AllowedHosts:
    """The hosts that requests without a key may be addressed to.

    IP addresses, localhost, names below it, names without dots and those of this machine always
    are: an attacker's DNS cannot answer for them.
    """

    def __init__(self, hosts: Iterable[str], own_names: Iterable[str] = ()) -> None:
        """hosts: as `--allowed-hosts` takes them. Raises ConfigurationError."""
        patterns = [_host_pattern(each) for each in hosts]
        own = (parse_authority(each) for each in own_names)
        self._is_any = ANY in patterns
        self._names = {each for each in patterns if not each.startswith("*")}
        self._names |= {each.host for each in own if each is not None}
        self._suffixes = tuple(each[1:] for each in patterns if each.startswith("*."))

    def __contains__(self, host: str) -> bool:
        """Whether the host of a Host header is allowed."""
        if self._is_any:
            return True
        authority = parse_authority(host)
        if authority is None:
            return False
        name = authority.host
        is_local = "." not in name or name.endswith(".localhost")
        return authority.is_address or is_local or self._is_named(name)

    def _is_named(self, name: str) -> bool:
        return name in self._names or name.endswith(self._suffixes)


def _host_pattern(text: str) -> str:
    """`*`, `*.example.com` or a host; a port is dropped, since any is allowed."""
    if text == ANY:
        return text
    prefix = "*." if text.startswith("*.") else ""
    authority = parse_authority(text.removeprefix(prefix))
    if authority is None:
        raise ConfigurationError(
            "--allowed-hosts must be a host name such as llm.example.com, *.example.com for the"
            f" names below it, or * for any; it is {shown(text)}"
        )
    return prefix + authority.host


def allowed_origins(config: ServerConfig) -> AllowedOrigins:
    """The origins of --cors-origin. Raises ConfigurationError."""
    return AllowedOrigins(_listed(config.cors_origin))


def allowed_hosts(config: ServerConfig) -> AllowedHosts:
    """The hosts of --allowed-hosts and this machine's names. Raises ConfigurationError."""
    return AllowedHosts(_listed(config.allowed_hosts), (socket.gethostname(), config.host))


def _listed(values: Iterable[str]) -> list[str]:
    """Values that a variable may separate by commas, as it cannot be repeated."""
    return [each.strip() for value in values for each in value.split(",") if each.strip()]


def check_access(config: ServerConfig) -> None:
    """Raise ConfigurationError for origins or hosts that cannot be."""
    allowed_origins(config)
    allowed_hosts(config)


class OriginMiddleware:
    """Lets browsers' pages in by their Origin; requests without one are not of another's page."""

    def __init__(self, app: ASGIApp, origins: AllowedOrigins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; one that is refused is refused before its body is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = ", ".join(headers.getlist("origin"))
        is_named = origin != "" and origin in self._origins
        if origin and not is_named and not _is_same(origin, headers.get("host", "")):
            await _origin_refused(origin).response()(scope, receive, send)
        elif is_named and _is_preflight(scope, headers):
            await self._preflight(origin, headers)(scope, receive, send)
        elif self._origins:
            named = origin if is_named else None
            await self._app(scope, receive, self._with_headers(named, send))
        else:
            await self._app(scope, receive, send)

    def _preflight(self, origin: str, headers: Headers) -> Response:
        """Allows what the browser asks for: what a key may do is decided by its requests."""
        method = headers["access-control-request-method"]
        methods = METHODS if method in METHODS else (*METHODS, method)
        allowed = self._origin_headers(origin) | {
            "Access-Control-Allow-Methods": ", ".join(methods),
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
            "Vary": PREFLIGHT_VARY,
        }
        if (asked := headers.get("access-control-request-headers")) is not None:
            allowed["Access-Control-Allow-Headers"] = asked
        if "access-control-request-private-network" in headers:
            allowed["Access-Control-Allow-Private-Network"] = "true"
        return Response(status_code=200, headers=allowed)

    def _origin_headers(self, origin: str) -> dict[str, str]:
        """Cookies, of a proxy's log-in for instance, are for origins that are named one by one."""
        if self._origins.is_any:
            return {"Access-Control-Allow-Origin": ANY}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Credentials": "true",
        }

    def _with_headers(self, origin: str | None, send: Send) -> Send:
        """A `send` that adds the headers by which a page of `origin` may read the response."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if origin is not None:
                    headers.update(self._origin_headers(origin))
                    headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
                if not self._origins.is_any:
                    headers.add_vary_header("Origin")
            await send(message)

        return send_with_headers


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


def _is_same(origin: str, host: str) -> bool:
    """Whether an origin has the authority of a Host header, under the origin's scheme."""
    page, server = parse_origin(origin), parse_authority(host)
    if page is None or server is None or page.scheme not in DEFAULT_PORTS:
        return False
    port = server.port if server.port is not None else DEFAULT_PORTS[page.scheme]
    return (page.host, page.port) == (server.host, port)


def _origin_refused(origin: str) -> ApiError:
    message = (
        f"pages of the origin {shown(origin)} may not use this server;"
        f" --cors-origin {origin} allows it"
    )
    return ApiError(403, message, code="origin_not_allowed")


class HostMiddleware:
    """Refuses requests that are addressed to other hosts, where a browser needs no key.

    A page whose name was rebound to this machine has that name as its Host. Clients that send no
    Host, as HTTP/1.0 allows, are no browsers.
    """

    def __init__(
        self, app: ASGIApp, hosts: AllowedHosts, is_checked: Callable[[str], bool]
    ) -> None:
        """is_checked: whether requests of a path must be addressed to one of `hosts`."""
        self._app = app
        self._hosts = hosts
        self._is_checked = is_checked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; one that is refused is refused before its body is read."""
        error = self._error(scope) if scope["type"] == "http" else None
        await (self._app if error is None else error.response())(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) > 1:
            return invalid("Host", f"the request has {len(hosts)} Host headers; send one")
        host = "".join(hosts)
        if not host or not self._is_checked(scope["path"]) or host in self._hosts:
            return None
        return _host_refused(host)


def _host_refused(host: str) -> ApiError:
    authority = parse_authority(host)
    name = "NAME" if authority is None else authority.host
    message = (
        f"this server does not answer to the host {shown(host)} without an API key;"
        f" --allowed-hosts {name} allows it"
    )
    return ApiError(403, message, code="host_not_allowed")
