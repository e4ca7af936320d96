"""One HTTP request that sends lines and reads results at the same time.

Ordinary HTTP clients send a whole body before they look at the response. Here both directions of one HTTP/1.1
exchange run side by side (anyio for the socket, h11 for the syntax), so a file of any size goes through one request
with a bounded number of lines on the way.
"""

import ssl as ssl_module
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
import h11
from anyio.abc import ByteStream

from kimera_stream.client.errors import ConnectionLostError
from kimera_stream.client.http import problem_of
from kimera_stream.client.wire import http_base
from kimera_stream.protocol.errors import UnavailableError

CLOSE_DEADLINE = 2.0
MAX_RESULT_BYTES = 16 * 1024 * 1024


class LineStream:
    """Lines out, results in. One task may send while another iterates; made by ``open_line_stream``."""

    def __init__(self, stream: ByteStream, host: str, path: str, token: str | None) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=64 * 1024)
        self._request = h11.Request(
            method="POST",
            target=path,
            headers=[
                ("host", host),
                ("content-type", "application/x-ndjson"),
                ("accept", "application/x-ndjson"),
                ("transfer-encoding", "chunked"),
                ("user-agent", "kimera-stream-python"),
                *([("authorization", f"Bearer {token}")] if token is not None else []),
            ],
        )

    async def start(self) -> None:
        """Send the head of the request."""
        await self._write(self._http.send(self._request))

    async def send(self, lines: bytes) -> None:
        """Send whole lines, each ended by a newline.

        Raises:
            ConnectionLostError: the connection broke.
        """
        await self._write(self._http.send(h11.Data(data=lines)))

    async def finish(self) -> None:
        """No more lines; the server answers those on their way and ends the response."""
        await self._write(self._http.send(h11.EndOfMessage()))

    async def results(self) -> AsyncIterator[bytes]:
        """One line per line sent, in order, until the server has answered all of them.

        Raises:
            OperationalError: the server refused the request as a whole.
            ConnectionLostError: the connection broke.
        """
        rest = b""
        status = 200
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                rest += bytes(event.data)
                if status >= 400:
                    continue
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    if line.strip():
                        yield line
                if len(rest) > MAX_RESULT_BYTES:
                    raise ConnectionLostError(f"a result line of more than {MAX_RESULT_BYTES} bytes")
            elif isinstance(event, h11.EndOfMessage):
                if status >= 400:
                    raise problem_of(status, rest)
                if rest.strip():
                    yield rest
                return
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionLostError("the server closed the connection before it had answered every line")

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        try:
            while True:
                event = self._http.next_event()
                if event is not h11.NEED_DATA:
                    return event  # type: ignore[return-value]
                try:
                    data = await self._stream.receive()
                except anyio.EndOfStream:
                    data = b""
                self._http.receive_data(data)
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise ConnectionLostError(f"the connection was lost: {str(exc) or type(exc).__name__}") from exc
        except h11.RemoteProtocolError as exc:
            raise ConnectionLostError(f"the connection ended in the middle of the response: {exc}") from exc

    async def _write(self, data: bytes | None) -> None:
        if data is None:
            raise ConnectionLostError("the connection is closed")
        try:
            await self._stream.send(data)
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise ConnectionLostError(f"the connection was lost: {str(exc) or type(exc).__name__}") from exc


@asynccontextmanager
async def open_line_stream(
    url: str, *, token: str | None = None, ssl: ssl_module.SSLContext | None = None, connect_timeout: float = 10.0
) -> AsyncIterator[LineStream]:
    """A stream of lines to ``POST /v1/geoids`` of the server at ``url``.

    Raises:
        UnavailableError: the server cannot be reached.
    """
    base = urlsplit(http_base(url))
    secure = base.scheme == "https"
    host = base.hostname or ""
    port = base.port or (443 if secure else 80)
    stream: ByteStream
    try:
        with anyio.fail_after(connect_timeout):
            if secure:
                stream = await anyio.connect_tcp(
                    host, port, tls=True, ssl_context=ssl, tls_hostname=host, tls_standard_compatible=False
                )
            else:
                stream = await anyio.connect_tcp(host, port)
    except (OSError, TimeoutError) as exc:
        raise UnavailableError(f"cannot reach {http_base(url)}: {str(exc) or type(exc).__name__}") from exc
    try:
        lines = LineStream(stream, base.netloc.rpartition("@")[2], f"{base.path}/v1/geoids", token)
        await lines.start()
        yield lines
    finally:
        with anyio.move_on_after(CLOSE_DEADLINE, shield=True):
            await stream.aclose()
