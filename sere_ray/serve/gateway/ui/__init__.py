"""The page at ``/sere/ui``: static files that ask the control API for everything they show.

The files hold no data, so they need no token; what the page asks does. Their headers let a browser
load nothing from elsewhere, run no script but these files, and make no HTML of a string.
"""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import RedirectResponse, Response

FOLDER = Path(__file__).parent / "static"
PAGE = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = (
    "api.js",
    "app.js",
    "audit.js",
    "charts.js",
    "format.js",
    "heatmap.js",
    "history.js",
    "icon.svg",
    "page.css",
    "policy.js",
    "ranks.js",
    "tiles.js",
    "uPlot.iife.min.js",
    "uPlot.min.css",
)
"""What is served beside the page: these names and no other."""
PATHS = frozenset({"/sere/ui", "/sere/ui/", *(f"/sere/ui/{name}" for name in FILES)})
"""What anybody may GET."""
HEADERS = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept by the browser, and asked for whether it is still the same
}

Endpoint = Callable[[Request], Awaitable[Response]]


def add_page(app: FastAPI) -> None:
    """Serve the page at ``/ui`` of the control application, its files below."""
    app.add_route("/ui", _endpoint(PAGE), include_in_schema=False)
    app.add_route("/ui/", _to_page, include_in_schema=False)
    for name in FILES:
        app.add_route(f"/ui/{name}", _endpoint(name), include_in_schema=False)


def _endpoint(name: str) -> Endpoint:
    """Answers with a file, read once."""
    path = FOLDER / name
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": tag}

    async def get(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=TYPES[path.suffix])

    return get


async def _to_page(request: Request) -> Response:
    return RedirectResponse("../ui", headers=HEADERS)
