"""The endpoints' description for people at /docs: Swagger UI, whose files a package brings.

Nothing is loaded from another host, and all URLs are relative, so that it works below any path that
a proxy puts before it. The files need no key; the description that they show does.
"""

import functools
import importlib.util
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from cottention.server.api.page import FOLDER as PAGE
from cottention.server.api.page import HEADERS as PAGE_HEADERS
from cottention.server.api.page import add_file
from cottention.server.limits.api_keys import DOCS_PATH

FOLDER = PAGE.parent / "swagger"
PACKAGE = "fastapi_swagger"
"""Its code is not imported: it would load from elsewhere what it does not find."""

HEADERS = PAGE_HEADERS | {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self'"
        " data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
"""Swagger UI writes styles into its markup, and has pictures in its style sheet."""


@functools.cache
def make_router() -> APIRouter:
    """The page at DOCS_PATH and its files below it; empty where the package is not installed."""
    router = APIRouter(include_in_schema=False)
    resources = _resources()
    if resources is None:
        return router
    files = {path.name: path for path in FOLDER.iterdir()}
    files |= {name: resources / name for name in ("swagger-ui-bundle.js", "swagger-ui.css")}
    files["icon.svg"] = PAGE / "icon.svg"
    _add_page(router, files.pop("index.html"))
    for name, path in files.items():
        add_file(router, f"{DOCS_PATH}/{name}", path, HEADERS)
    return router


def _add_page(router: APIRouter, path: Path) -> None:
    content = path.read_bytes()

    @router.get(DOCS_PATH)
    async def get_page(request: Request) -> Response:
        if request.scope["raw_path"].endswith(b"/"):  # relative URLs would begin in another folder
            return RedirectResponse("../docs")
        return Response(content, headers=HEADERS, media_type="text/html; charset=utf-8")


def _resources() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "resources"
