"""The way out of a streaming response: a buffer bounded in bytes, and one writer that joins what has gathered."""

from collections import deque
from typing import Final

import anyio
from starlette.types import Message, Send

from kimera_stream.protocol.errors import KimeraError

STOP_PATIENCE: Final = 3.0
"""Seconds that a client has to take the rest of a stream when the server stops."""
CHUNK_BYTES: Final = 65_536
"""Written at once at most, so that the server's own buffer stays near its high-water mark."""


class PeerStalled(KimeraError):  # noqa: N818 - an outcome of a stream
    """The client has not read for so long that the stream is given up."""


class Outflow:
    """Chunks on their way to one client.

    ``put`` waits while the buffer is full: a slow client slows its own stream down and nothing else, and costs ``max_bytes``.
    One task runs ``write_out``; ``close`` lets it end after what is buffered.

    Args:
        max_bytes: Buffered at most; a single larger chunk is taken when the buffer is empty.
        patience: Seconds a full buffer, or the rest after ``close``, may go without the client reading.
    """

    def __init__(self, send: Send, *, max_bytes: int, patience: float) -> None:
        self._send = send
        self._max_bytes = max_bytes
        self._patience = patience
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._closed = False
        self._news = anyio.Event()
        self._room = anyio.Event()
        self._passing: anyio.CancelScope | None = None
        self.sent_at = anyio.current_time()
        """When the client last took something."""

    @property
    def buffered(self) -> int:
        return self._size

    async def put(self, chunk: bytes) -> None:
        """Queue a chunk, after waiting for room.

        Raises:
            PeerStalled: there was no room for ``patience`` seconds.
        """
        while self._size and self._size + len(chunk) > self._max_bytes:
            self._room = anyio.Event()
            with anyio.move_on_after(self._patience) as waiting:
                await self._room.wait()
            if waiting.cancelled_caught:
                raise PeerStalled
        self._chunks.append(chunk)
        self._size += len(chunk)
        self._news.set()

    def close(self, *, within: float | None = None) -> None:
        """Nothing more will be put. ``within``: seconds for the rest, where that is less than ``patience``."""
        self._closed = True
        if within is not None:
            self._patience = min(self._patience, within)
        if self._passing is not None:  # on its way already: from now on it has to be taken in time
            self._passing.deadline = anyio.current_time() + self._patience
        self._news.set()

    async def write_out(self, start: Message) -> None:
        """Send the response: its head at once, then the chunks as they come, until closed and empty.

        Raises:
            PeerStalled: after ``close`` the client did not take the rest.
        """
        await self._send(start)
        while self._chunks or not self._closed:
            if self._chunks:
                await anyio.lowlevel.checkpoint()  # what is ready in this turn of the loop goes out in one write
                await self._pass_on({"type": "http.response.body", "body": self._take(), "more_body": True})
            else:
                self._news = anyio.Event()
                await self._news.wait()
        await self._pass_on({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_on(self, message: Message) -> None:
        with anyio.CancelScope() as self._passing:
            if self._closed:
                self._passing.deadline = anyio.current_time() + self._patience
            await self._send(message)
        if self._passing.cancelled_caught:
            raise PeerStalled
        self.sent_at = anyio.current_time()
        self._size -= len(message["body"])
        self._room.set()

    def _take(self) -> bytes:
        parts = [self._chunks.popleft()]
        size = len(parts[0])
        while self._chunks and size + len(self._chunks[0]) <= CHUNK_BYTES:
            parts.append(self._chunks.popleft())
            size += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)
