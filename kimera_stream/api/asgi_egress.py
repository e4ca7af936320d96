"""The way out where the server does not offer ``kimera.egress``: plain ASGI ``send``, behind the same handle."""

from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import anyio

from kimera_stream.protocol import frames
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.streaming.egress import EgressListener

SendMessage = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_HIGH_WATER: Final = 65_536
_LOW_WATER: Final = 16_384


class AsgiEgress:
    """Queues frames, and sends them one message at a time from a task of the connection (``run``).

    Bounded by its listener: above the high-water mark it reports ``paused``, and events are no longer written to it.

    Args:
        send: The ASGI send of an accepted connection.
        close_deadline: Seconds that a close may wait for what is queued.
        on_closed: Called when nothing more will be sent.
    """

    def __init__(
        self, send: SendMessage, *, close_deadline: float = 5.0, on_closed: Callable[[], None] | None = None
    ) -> None:
        self._send = send
        self._close_deadline = close_deadline
        self._on_closed = on_closed
        self._listener: EgressListener | None = None
        self._queue: deque[bytes] = deque()
        self._news = anyio.Event()
        self._close: tuple[CloseCode, str] | None = None
        self._scope = anyio.CancelScope()
        self.fd = -1
        self.buffered = 0
        self.paused = False
        self.closing = False

    def listen(self, listener: EgressListener | None) -> None:
        self._listener = listener

    def write(self, frames: bytes) -> None:
        if self.closing:
            return
        self._queue.append(frames)
        self.buffered += len(frames)
        self._news.set()
        if self.buffered > _HIGH_WATER and not self.paused:
            self.paused = True
            if self._listener is not None:
                self._listener.egress_paused()

    def close(self, code: CloseCode, reason: str) -> None:
        if not self.closing:
            self.closing = True
            self._close = (code, reason)
            self._scope.deadline = anyio.current_time() + self._close_deadline
            self._news.set()

    def abort(self) -> None:
        self.closing = True
        self._scope.cancel()

    async def run(self) -> None:
        """Send until closed or aborted; a child of the connection's task group."""
        try:
            with self._scope:
                while True:
                    await self._news.wait()
                    self._news = anyio.Event()
                    await self._drain()
                    if self._close is not None:
                        code, reason = self._close
                        await self._send({"type": "websocket.close", "code": int(code), "reason": reason})
                        return
        except OSError:
            # The peer went away; `receive` says so to the connection.
            return
        finally:
            self.closing = True
            if self._on_closed is not None:
                self._on_closed()

    async def _drain(self) -> None:
        while self._queue:
            batch = self._queue.popleft()
            for opcode, payload in frames.split(batch):
                if opcode == frames.OP_TEXT:
                    await self._send({"type": "websocket.send", "text": payload.decode()})
                else:
                    await self._send({"type": "websocket.send", "bytes": payload})
            self.buffered -= len(batch)
            if self.paused and self.buffered <= _LOW_WATER:
                self.paused = False
                if self._listener is not None:
                    self._listener.egress_resumed()
