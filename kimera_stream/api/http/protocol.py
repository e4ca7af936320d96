"""uvicorn's HTTP protocol class, with an end for clients that stop reading.

uvicorn closes a connection by waiting until what is buffered has been sent: for a client that does not read, that is never.
Two things are added. An application can drop the connection at once, through the ASGI extension ``kimera.abort``; and the
operating system drops one whose peer has taken nothing for ``UNREAD_TIMEOUT`` (Linux), which also covers whole answers
whose application is long done.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from kimera_stream.api.http_protocol import BoundedHttpProtocol

ABORT: Final = "kimera.abort"
UNREAD_TIMEOUT: Final = 120.0
"""Seconds; above every deadline of the server's own for a stalled peer."""

_USER_TIMEOUT: Final = getattr(socket, "TCP_USER_TIMEOUT", None)


class KimeraHttpProtocol(BoundedHttpProtocol):
    """For ``uvicorn.Config(http=...)``. Rests on uvicorn's attributes ``app`` and ``transport``."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app = _with_abort(self.app, transport.abort)
        sock = transport.get_extra_info("socket")
        if _USER_TIMEOUT is not None and sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, int(UNREAD_TIMEOUT * 1000))


def _with_abort(application: ASGIApp, drop: Callable[[], None]) -> ASGIApp:
    """The application with the extension. It must not name the protocol, which holds it: every connection would be a cycle."""

    async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
        # A dictionary of its own: uvicorn shares none today, and must not find ours in one tomorrow.
        scope["extensions"] = {**(scope.get("extensions") or {}), ABORT: drop}
        await application(scope, receive, send)

    return with_abort


def abort(scope: Scope) -> None:
    """Drop the connection of a request, with whatever is buffered; without the extension the server drops it when it can."""
    extensions = scope.get("extensions") or {}
    drop: Callable[[], None] | None = extensions.get(ABORT)
    if drop is not None:
        drop()
