"""The contract from outside: messages as they are, over sockets as they are. Nothing of the server's own client is used,
so that no bug of it can hide one of the server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage

PATIENCE = 5.0
"""Seconds that a handshake or an answer to ``connect`` may take before a client tries again."""
PING = 1.5
"""Seconds between pings, and for which a client waits for a pong: that is how half-open sockets are noticed."""

UNAUTHORIZED = 4500
REVOKED = 4003
"""Close codes of the contract: a token does not count, or counts no longer."""


class Gone(Exception):
    """The connection is over. ``code`` is that of its close frame, 1006 where none came."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


_encode_json = msgspec.json.Encoder().encode
_decode_json = msgspec.json.Decoder().decode
_encode_msgpack = msgspec.msgpack.Encoder().encode
_decode_msgpack = msgspec.msgpack.Decoder().decode


class Wire:
    """One WebSocket connection in one encoding."""

    def __init__(self, socket: ClientConnection, encoding: str) -> None:
        self._socket = socket
        self._encoding = encoding
        self._last_id = 0
        self.connected: dict[str, Any] = {}

    @property
    def next_id(self) -> int:
        """Id that the next command will have."""
        return self._last_id + 1

    async def send(self, op: str, **fields: Any) -> int:
        """Send a command; returns its id.

        Raises:
            Gone: there is no connection any more.
        """
        self._last_id += 1
        message = {"op": op, "id": self._last_id, **fields}
        data = _encode_json(message).decode() if self._encoding == "json" else _encode_msgpack(message)
        try:
            await self._socket.send(data)
        except (ConnectionClosed, OSError) as error:
            raise _gone(error) from error
        return self._last_id

    async def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            Gone: there is no connection any more.
        """
        try:
            data = await self._socket.recv()
        except (ConnectionClosed, OSError) as error:
            raise _gone(error) from error
        if self._encoding == "json":
            assert isinstance(data, str), "a JSON connection got a binary message"
            message = _decode_json(data)
        else:
            assert isinstance(data, bytes), "a MessagePack connection got a text message"
            message = _decode_msgpack(data)
        assert isinstance(message, dict)
        return message

    async def answer(self, id: int) -> dict[str, Any]:
        """The reply to one command on a connection that has no other under way; what is pushed meanwhile is dropped."""
        with anyio.move_on_after(PATIENCE):
            while True:
                message = await self.receive()
                if message.get("id") == id:
                    return message
        raise Gone(1006, "no answer in time")


def _gone(error: Exception) -> Gone:
    if isinstance(error, ConnectionClosed) and error.rcvd is not None:
        return Gone(error.rcvd.code, error.rcvd.reason)
    return Gone(1006, type(error).__name__)


@asynccontextmanager
async def connected(url: str, encoding: str, token: str | None = None) -> AsyncIterator[Wire]:
    """A connection that has said ``connect`` and was let in, by a token if there is one.

    Raises:
        Gone: it could not be made, or ended; with ``UNAUTHORIZED`` where the token is refused.
    """
    try:
        socket = await connect(
            url,
            subprotocols=[f"kimera.v1.{encoding}"],  # type: ignore[list-item]
            compression=None,
            open_timeout=PATIENCE,
            ping_interval=PING,
            ping_timeout=2 * PING,
            close_timeout=0.5,
            max_size=None,
            proxy=None,
        )
    except (OSError, TimeoutError, InvalidHandshake, InvalidMessage, ConnectionClosed, EOFError) as error:
        raise Gone(1006, f"handshake: {type(error).__name__}") from error
    try:
        wire = Wire(socket, encoding)
        shown = {} if token is None else {"token": token}
        wire.connected = await wire.answer(await wire.send("connect", client={"name": "oracle"}, **shown))
        if wire.connected.get("code") == "unauthorized":
            raise Gone(UNAUTHORIZED, "refused: unauthorized")
        if wire.connected["op"] != "connected":
            raise Gone(1006, f"refused: {wire.connected.get('code')}")
        yield wire
    finally:
        with anyio.move_on_after(1, shield=True):
            await socket.close()


class Web:
    """HTTP as a client sees it.

    Args:
        url: Base address.
        patience: Seconds that an answer may take.
    """

    def __init__(self, url: str, *, patience: float = PATIENCE) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=patience, trust_env=False, verify=False)

    async def __aenter__(self) -> "Web":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        """Status and body.

        Raises:
            Gone: no answer came.
        """
        try:
            response = await self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise Gone(1006, type(error).__name__) from error
        try:
            body = _decode_json(response.content) if response.content else {}
        except msgspec.DecodeError as error:
            raise Gone(1006, f"status {response.status_code} with a body that is no JSON") from error
        return response.status_code, body

    @asynccontextmanager
    async def stream(self, path: str, **options: Any) -> AsyncIterator[AsyncIterator[dict[str, str]]]:
        """Server-Sent Events of one request, each as its fields.

        Raises:
            Gone: it could not be made, or ended.
        """
        timeout = httpx.Timeout(PATIENCE, read=4 * PING)
        try:
            async with self._client.stream("GET", path, timeout=timeout, **options) as response:
                if response.status_code != 200:
                    raise Gone(1006, f"status {response.status_code}")
                yield _events(response)
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise Gone(1006, type(error).__name__) from error


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, str]]:
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif fields:
            if "data" in fields:
                yield fields
            fields = {}
    raise Gone(1006, "the stream ended")
