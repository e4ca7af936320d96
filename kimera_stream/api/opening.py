"""The opening handshake of a WebSocket, recognised from the first bytes of a connection.

uvicorn's way is to build an HTTP protocol, parse the request, print it again and have ``websockets`` parse what was printed. For
the ordinary handshake, all of which is there with the first read and about which nothing is doubtful, the request is parsed once
and answered from what was found. Everything else (slow heads, bodies, odd or repeated headers, extensions where they are offered,
plain HTTP) goes uvicorn's way, so what is refused, and how, is decided there alone.
"""

import asyncio
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import httptools
from uvicorn.config import Config
from uvicorn.server import ServerState
from websockets.utils import accept_key

from kimera_stream.api.http_protocol import BoundedHttpProtocol

_KEY: Final = re.compile(rb"[A-Za-z0-9+/]{22}==")
_TOKENS: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
_HEAD_BYTES: Final = 8_192
"""What ``websockets`` takes as one line at most; a head longer than that is not ordinary."""
_SINGLE: Final = frozenset(
    {
        b"connection", b"content-length", b"host", b"origin", b"sec-websocket-extensions", b"sec-websocket-key",
        b"sec-websocket-protocol", b"sec-websocket-version", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip


@dataclass(slots=True)
class Opening:
    """An ordinary handshake request; ``accept`` is what ``Sec-WebSocket-Accept`` has to say."""

    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    subprotocols: list[str]
    accept: str


class _Head:
    """What the parser calls back."""

    __slots__ = ("headers", "url")

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


def read_opening(data: bytes, *, extensions: bool = False) -> Opening | None:
    """The handshake that ``data`` is, from the first byte to the last; None: not one, or not an ordinary one.

    Args:
        extensions: Whether any are offered here; a request that asks for one is then not ordinary.
    """
    if (
        not data.startswith(b"GET /")
        or not data.endswith(b"\r\n\r\n")
        or len(data) > _HEAD_BYTES
        or b"websocket" not in data
    ):
        return None
    head = _Head()
    parser = httptools.HttpRequestParser(head)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade as upgrade:
        if upgrade.args[0] != len(data):
            return None
    except httptools.HttpParserError:
        return None
    else:
        return None
    single: dict[bytes, bytes] = {}
    for name, value in head.headers:
        if name in _SINGLE:
            if name in single:
                return None
            single[name] = value
    connection = single.get(b"connection", b"")
    key = single.get(b"sec-websocket-key", b"")
    protocol = single.get(b"sec-websocket-protocol")
    ordinary = (
        parser.get_http_version() == "1.1"
        and head.url.isascii()
        and single.get(b"upgrade") == b"websocket"
        and (
            connection == b"Upgrade"
            or (
                _TOKENS.fullmatch(connection) is not None
                and b"upgrade" in [token.strip() for token in connection.lower().split(b",")]
            )
        )
        and single.get(b"sec-websocket-version") == b"13"
        and _KEY.fullmatch(key) is not None
        and (protocol is None or _TOKENS.fullmatch(protocol) is not None)
        and not (extensions and b"sec-websocket-extensions" in single)
        and b"content-length" not in single
        and b"transfer-encoding" not in single
    )
    if not ordinary:
        return None
    path, _, query = head.url.partition(b"?")
    offered = [] if protocol is None else [token.strip() for token in protocol.decode("ascii").split(",")]
    return Opening(path.decode("ascii"), query, head.headers, offered, accept_key(key.decode("ascii")))


class Reception(asyncio.Protocol):
    """What ``uvicorn.Config(http=...)`` is given: takes the first bytes, and hands on to WebSocket or HTTP.

    Rests on what uvicorn asks of an HTTP protocol class: its arguments, a place in ``server_state.connections``, ``shutdown``.
    """

    __slots__ = ("_app_state", "_config", "_loop", "_server_state", "_timer", "_transport")

    http: ClassVar[type[BoundedHttpProtocol]] = BoundedHttpProtocol
    head_deadline: ClassVar[float] = 10.0
    """Seconds from the opening of the connection to the end of its first head."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._config = config
        self._server_state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._server_state.connections.add(self)  # type: ignore[arg-type]
        self._timer = self._loop.call_later(self.head_deadline, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()

    def shutdown(self) -> None:
        """The server stops, and nothing has been asked of it here."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._leave()
        config, transport = self._config, self._transport
        # Another protocol class than ours begins with bytes, as uvicorn has it.
        begin = getattr(config.ws_protocol_class, "begin", None)
        opening = None if begin is None else read_opening(data, extensions=config.ws_per_message_deflate)
        if begin is None or opening is None:
            http = self.http(config, self._server_state, self._app_state, self._loop)
            transport.set_protocol(http)
            http.connection_made(transport)
            http.await_head_until(self._timer.when())
            http.data_received(data)
        else:
            begin(config, self._server_state, self._app_state, transport, opening)

    def _leave(self) -> None:
        self._timer.cancel()
        self._server_state.connections.discard(self)
