"""One live WebSocket: commands out, replies matched by id, everything else handed on in the order of the wire."""

import ssl as ssl_module
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from kimera_stream.client.errors import ConnectionLostError, error_of
from kimera_stream.client.wire import Codec
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.errors import (
    BadRequestError,
    ForbiddenError,
    InternalError,
    KimeraError,
    UnauthorizedError,
    UnavailableError,
)
from kimera_stream.protocol.messages import AnyServerMessage, Command, Error, Push, Reply

R = TypeVar("R", bound=Reply)
CLOSE_DEADLINE = 2.0
"""Seconds that a polite close may take before the socket is dropped."""


@dataclass(slots=True)
class _Pending:
    on_reply: Callable[[Reply], None] | None
    done: anyio.Event = field(default_factory=anyio.Event)
    reply: Reply | None = None
    error: Exception | None = None


class Link:
    """One connection. ``read`` must run in exactly one task; ``call`` may run in many."""

    def __init__(self, socket: ClientConnection, codec: Codec, on_push: Callable[[Push], None]) -> None:
        self._socket = socket
        self._codec = codec
        self._on_push = on_push
        self._pending: dict[int, _Pending] = {}
        self._next_id = 1
        self._lost: ConnectionLostError | None = None

    async def call(
        self, make: Callable[[int], Command], expect: type[R], *, on_reply: Callable[[Reply], None] | None = None
    ) -> R:
        """Send the command that ``make`` builds for a fresh id and wait for its reply.

        ``on_reply`` is called by the reader, before it looks at the next message: for state that later events rest on.

        Raises:
            OperationalError: the server answered with an error.
            ConnectionLostError: the connection broke first.
        """
        if self._lost is not None:
            raise self._lost
        command_id = self._next_id
        self._next_id = self._next_id % 0xFFFF_FFFF + 1
        pending = self._pending[command_id] = _Pending(on_reply)
        try:
            try:
                await self._socket.send(self._codec.encode(make(command_id)))
            except ConnectionClosed as exc:
                raise ConnectionLostError(f"the connection was lost before the command was sent: {exc}") from exc
            await pending.done.wait()
        finally:
            self._pending.pop(command_id, None)
        if pending.error is not None:
            raise pending.error
        if not isinstance(pending.reply, expect):
            raise InternalError(f"the server answered with {type(pending.reply).__name__}, not {expect.__name__}")
        return pending.reply

    async def read(self) -> tuple[int | None, str]:
        """Dispatch messages until the connection ends; returns the close code (None: broken) and reason."""
        try:
            while True:
                message = self._codec.decode(await self._socket.recv())
                if message is not None:
                    self._dispatch(message)
        except ConnectionClosed as exc:
            return (exc.rcvd.code, exc.rcvd.reason) if exc.rcvd is not None else (None, "")
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            with anyio.move_on_after(CLOSE_DEADLINE, shield=True):
                await self._socket.close(CloseCode.PROTOCOL_ERROR, "bad_message")
            return None, f"the server sent something that is not a message ({exc})"
        finally:
            self._lost = ConnectionLostError("the connection was lost before the reply came")
            for pending in self._pending.values():
                pending.error = self._lost
                pending.done.set()

    async def close(self) -> None:
        """Close politely within a deadline, then drop the socket. Safe to call in a cancelled scope."""
        with anyio.move_on_after(CLOSE_DEADLINE, shield=True):
            await self._socket.close()
        self._socket.transport.abort()

    def _dispatch(self, message: AnyServerMessage) -> None:
        if isinstance(message, Push):
            self._on_push(message)
            return
        pending = None if message.id is None else self._pending.get(message.id)
        if pending is None:
            return
        if isinstance(message, Error):
            pending.error = error_of(
                message.code, message.message, field=message.field, retry_after=message.retry_after
            )
        else:
            pending.reply = message
            if pending.on_reply is not None:
                pending.on_reply(message)
        pending.done.set()


async def open_link(
    url: str,
    codec: Codec,
    on_push: Callable[[Push], None],
    *,
    max_message_bytes: int,
    ssl: ssl_module.SSLContext | None,
    open_timeout: float,
) -> Link:
    """Shake hands with the server at the WebSocket URL ``url``.

    Raises:
        UnavailableError: it cannot be reached or is not ready; another attempt may work.
        KimeraError: it refused for good.
    """
    try:
        socket = await open_websocket(
            url,
            subprotocols=[Subprotocol(codec.subprotocol)],
            max_size=max_message_bytes,
            compression=None,
            open_timeout=open_timeout,
            close_timeout=CLOSE_DEADLINE / 2,
            ssl=ssl,
            proxy=None,
            user_agent_header="kimera-stream-python",
        )
    except InvalidStatus as exc:
        raise _refusal(exc.response.status_code, url) from exc
    except InvalidURI as exc:
        raise BadRequestError(f"url: {exc}", field="url") from exc
    except (OSError, InvalidHandshake, TimeoutError, EOFError) as exc:
        reason = str(exc) or type(exc).__name__
        raise UnavailableError(f"cannot reach {url}: {reason}") from exc
    return Link(socket, codec, on_push)


def _refusal(status: int, url: str) -> KimeraError:
    what = f"{url} refused the handshake with HTTP {status}"
    if status == 401:
        return UnauthorizedError(f"{what}; give a valid token")
    if status == 403:
        return ForbiddenError(what)
    if status in (408, 425, 429) or status >= 500:
        return UnavailableError(what)
    return BadRequestError(f"{what}; is this a Kimera Stream server?", field="url")
