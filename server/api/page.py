"""The page at / and its files, which lie in server/ui and are read once, at start.

They are static and refer to each other and to the endpoints by relative URLs, so that they work
below any path that a proxy puts before them.
"""

import functools
import hashlib
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response

from cottention.server.limits.api_keys import PAGE_PATH

FOLDER = Path(__file__).parents[1] / "ui"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src"
        " 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""What the model wrote is shown as text; should it ever become markup, nothing of it runs."""


@functools.cache
def make_router() -> APIRouter:
    """The page at /, and its other files below PAGE_PATH; they are no part of the description.

    One for all applications of a process.
    """
    router = APIRouter(include_in_schema=False)
    files = {path.name: path for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES}
    add_file(router, "/", files.pop("index.html"), HEADERS)
    for name, path in files.items():
        add_file(router, f"{PAGE_PATH}/{name}", path, HEADERS)
    return router


def add_file(router: APIRouter, url: str, path: Path, headers: dict[str, str]) -> None:
    """Serve a file at a path, with these headers and an ETag."""
    content, media_type = path.read_bytes(), MEDIA_TYPES[path.suffix]
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = headers | {"ETag": etag}

    @router.get(url)
    async def get_file(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        if if_none_match is not None and etag in if_none_match:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)
