"""Redis through a socket in the file system.

anyio 4.16 waits for such a socket with ``add_reader(socket, future.set_result)``, and takes the reader away in a callback of the future.
What arrives in the turn of the loop in which the wait is cancelled is set on a future that is over, and the loop logs an
``InvalidStateError``. A transport of the loop's own has no such moment.
"""

import asyncio

import anyio
from anyio.abc import ByteStream
from coredis.connection import UnixDomainSocketConnection


class UnixStream(ByteStream):
    """A stream over a transport."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        try:
            data = await self._reader.read(max_bytes)
        except OSError as error:
            raise anyio.BrokenResourceError from error
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        try:
            self._writer.write(item)
            await self._writer.drain()
        except OSError as error:
            raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        self._writer.write_eof()
        await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self._writer.transport.abort()  # whoever closes waits for no answer any more
        await anyio.lowlevel.checkpoint()


class UnixConnection(UnixDomainSocketConnection):
    """coredis's, over a ``UnixStream``."""

    async def _connect(self) -> ByteStream:
        with anyio.fail_after(self._connect_timeout):
            return UnixStream(*await asyncio.open_unix_connection(self.location.path))
