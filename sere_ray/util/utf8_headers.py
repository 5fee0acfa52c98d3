"""Headers that Ray's proxy reads as UTF-8: what is none is dropped before, or it would answer 500.

Ray puts :func:`layers` around its proxies where ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names
it. vLLM's own server takes any byte there.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = f"{__name__}:layers"
"""Its value."""


class Utf8HeaderLayer:
    """Pure ASGI middleware: only headers whose values are UTF-8 pass."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one request without the others."""
        if "headers" in scope:
            scope = {**scope, "headers": [h for h in scope["headers"] if _is_utf8(h[1])]}
        await self._app(scope, receive, send)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def layers() -> list[Middleware]:
    """What Ray puts around its proxies."""
    return [Middleware(Utf8HeaderLayer)]
