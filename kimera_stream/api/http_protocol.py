"""uvicorn's HTTP protocol with a bound on the head of a request, in bytes and in time.

A WebSocket handshake begins as an HTTP request. uvicorn limits neither how long its head may take nor how long it may be, so
connections that send a header now and then would be kept for ever.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection whose request head is not there in time, or is too long (431)."""

    head_deadline: ClassVar[float] = 10.0
    """Seconds from the opening of the connection, or from the first byte of a later request, to the end of its head."""
    head_bytes: ClassVar[int] = 65_536

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None:
            self._head_size += len(data)
            if self._head_size > self.head_bytes and b"\r\n\r\n" not in data:
                self._refuse()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_done()
        super().on_headers_complete()

    def await_head_until(self, when: float) -> None:
        """The connection is older than this protocol: its first head has until ``when`` on the loop's clock."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = self.loop.call_at(when, self._too_slow)

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_size = 0
            self._head_timer = self.loop.call_later(self.head_deadline, self._too_slow)

    def _head_done(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.abort()

    def _refuse(self) -> None:
        self._head_done()
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        )
        self.transport.close()
