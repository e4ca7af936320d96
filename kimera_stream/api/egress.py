"""The uvicorn WebSocket protocol class that lets the streaming core write frames straight to the transport.

uvicorn takes it in ``Config(ws=...)``; ``websockets``' sans-I/O ``ServerProtocol`` goes on doing handshake, parsing, pings and
close. The application finds a handle (``streaming.egress.Egress``) in ``scope["extensions"]["kimera.egress"]`` and, once it has
accepted, sends everything through it. This is the one file that touches uvicorn's internals; each fact it rests on has a test
in ``tests/api/test_egress_seams.py``, and docs/adr/0004-egress.md says why it is done so.
"""

import asyncio
import codecs
import contextlib
import logging
import math
import socket
from typing import Any, ClassVar, Final, cast
from urllib.parse import unquote
from uuid import UUID

from uvicorn._types import ASGISendEvent
from uvicorn.config import Config
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Frame
from websockets.protocol import CONNECTING, OPEN, SERVER, State
from websockets.server import ServerProtocol
from websockets.streams import StreamReader

from kimera_stream.api.http_protocol import BoundedHttpProtocol
from kimera_stream.api.opening import Opening, Reception
from kimera_stream.api.slim import SlimEvent, SlimQueue
from kimera_stream.api.transit import Transit, transit
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.kernels.egress import Sink
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.streaming.egress import EgressListener

EXTENSION: Final = "kimera.egress"
_OVERSIZE_FACTOR: Final = 4
"""Messages up to this many times the command limit are read, so that they can be answered with ``too_large``."""

_DEFLATE: Final = [
    # No context from message to message: frames made once are sent to many, between messages made here.
    ServerPerMessageDeflateFactory(
        server_no_context_takeover=True,
        server_max_window_bits=12,
        client_max_window_bits=12,
        compress_settings={"memLevel": 5},
    )
]
_logger: Final = logging.getLogger("uvicorn.error")
_NAMELESS: Final = UUID(int=0)


def _addresses(given: Any) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """Our address and the peer's of a transport's socket, None where they are not of the internet's kind."""
    family = None if given is None else given.family
    if family != socket.AF_INET and family != socket.AF_INET6:
        return None, None
    # uvloop makes a socket of the descriptor at every question, and three system calls to find out of which kind. The type below
    # ``socket.socket`` is enough to ask.
    sock = socket.SocketType(family, socket.SOCK_STREAM, 0, given.fileno())
    try:
        ours, theirs = sock.getsockname(), sock.getpeername()
    except OSError:  # gone already
        return None, None
    finally:
        sock.detach()
    return (ours[0], ours[1]), (theirs[0], theirs[1])


class TransportEgress(Sink):
    """The handle of one connection. See ``streaming.egress.Egress``, and ``kernels.egress`` for the fields of a sink."""

    __slots__ = ("_listener", "_protocol", "paused")

    def __init__(self, protocol: "EgressProtocol", transport: asyncio.Transport, descriptor: int) -> None:
        super().__init__(transport, descriptor)
        self._protocol: EgressProtocol | None = protocol
        self._listener: EgressListener | None = None
        self.paused = False

    @property
    def buffered(self) -> int:
        return int(self.transport.get_write_buffer_size())

    def listen(self, listener: EgressListener | None) -> None:
        self._listener = listener
        if listener is not None and self._protocol is not None:
            self._protocol.forget_handshake()

    def write(self, frames: bytes) -> None:
        if not self.closing and not self.transport.is_closing():
            self.dirty = True
            self.transport.write(frames)

    def close(self, code: CloseCode, reason: str) -> None:
        if not self.closing and self._protocol is not None:
            self.closing = True
            self._protocol.close(int(code), reason)

    def abort(self) -> None:
        self.closing = True
        self.transport.abort()

    def lost(self) -> None:
        """The connection is gone."""
        self.closing = True
        self._listener = self._protocol = None

    def changed(self, paused: bool) -> None:
        """The transport's buffer went above its high-water mark, or below its low one."""
        self.paused = paused
        if self._listener is not None:
            if paused:
                self._listener.egress_paused()
            else:
                self._listener.egress_resumed()

    @property
    def is_watched(self) -> bool:
        """Whether somebody is told of pauses, and gives up a peer that stalls."""
        return self._listener is not None

    def drain(self) -> bool:
        """Tell the listener that the server stops; returns whether there is one."""
        if self._listener is None:
            return False
        self._listener.egress_draining()
        return True


class Conversation(ServerProtocol):
    """``websockets``' protocol, failing with our reasons: one word of the contract where the library has a sentence."""

    def __init__(
        self, *, extensions: list[ServerPerMessageDeflateFactory] | None, state: State, max_size: int | None
    ) -> None:
        # In place of the base classes': a random UUID that nobody reads costs more than all the rest. A test compares the attributes.
        self.id = _NAMELESS
        self.logger = _logger
        self.debug = _logger.isEnabledFor(logging.DEBUG)
        self.side = SERVER
        self._state = state
        self.max_message_size = max_size
        self.max_fragment_size = self.current_size = None
        self.expect_continuation_frame = False
        self.origin = self.subprotocol = None
        self.extensions = []
        self.close_rcvd = self.close_sent = self.close_rcvd_then_sent = None
        self.handshake_exc = self.parser_exc = None
        self.eof_sent = False
        self.reader = StreamReader()
        self.events = []
        self.writes = []
        self.parser = self.parse()
        next(self.parser)
        self.origins = self.available_subprotocols = None
        self.available_extensions = extensions
        self.accept_called = False

    def fail(self, code: int, reason: str = "") -> None:
        with contextlib.suppress(ValueError):  # Not a code of the contract: none that is sent.
            reason = CloseCode(code).reason
        super().fail(code, reason)


class EgressProtocol(WebSocketsSansIOProtocol):
    """``WebSocketsSansIOProtocol`` with the handle, the contract's close codes, and a bound on every wait for a peer."""

    # Naming the base class's attributes too keeps them out of a dictionary: a kilobyte less per connection.
    __slots__ = (
        "_abort_timer", "_accept", "_asgi", "_decoder", "_ping_behind", "_text", "app_state", "asgi_version", "client", "close_sent", "close_timeout",
        "close_timer", "config", "conn", "connections", "curr_msg_data_type", "default_headers", "disconnected", "egress", "frames",
        "handshake_complete", "handshake_initiated", "initial_response", "last_ping_rtt", "logger", "loop", "pending_ping_payload",
        "ping_interval", "ping_sent_at", "ping_timeout", "ping_timer", "pong_timer", "queue", "read_paused", "request", "response",
        "root_path", "scheme", "scope", "server", "tasks", "transport", "writable",
    )  # fmt: skip

    high_water: ClassVar[int] = 262_144
    close_deadline: ClassVar[float] = 5.0
    """Seconds that a peer has to take what is buffered and to answer a close frame."""
    drain_deadline: ClassVar[float] = 10.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        state: State = CONNECTING,
    ) -> None:
        # In place of the base class's, which makes things that every connection would throw away again: a queue and an event
        # of asyncio, a factory of extensions. A test compares the attributes.
        self.config = config
        self.loop = _loop or asyncio.get_running_loop()
        self.logger = _logger
        self.root_path = config.root_path
        self.asgi_version = config.asgi_version
        self.app_state = app_state
        self.connections = server_state.connections
        self.tasks = server_state.tasks
        self.default_headers = server_state.default_headers
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.server = self.client = None
        self.scheme = None  # type: ignore[assignment]
        self.queue = SlimQueue()  # type: ignore[assignment]
        self.handshake_initiated = self.handshake_complete = False
        self.close_sent = self.disconnected = False
        self.close_timer = None
        self.close_timeout = self.close_deadline
        self.initial_response = None
        self.conn = Conversation(
            extensions=_DEFLATE if config.ws_per_message_deflate else None,
            state=state,
            max_size=config.ws_max_size,
        )
        self.read_paused = False
        self.writable = SlimEvent()  # type: ignore[assignment]
        self.ping_interval = config.ws_ping_interval
        self.ping_timeout = config.ws_ping_timeout
        self.ping_timer = self.pong_timer = None
        self.pending_ping_payload = None
        self.ping_sent_at = self.last_ping_rtt = 0.0
        self.frames = []
        self.curr_msg_data_type = "bytes"

        self.request = self.response = None  # type: ignore[assignment]
        self.egress: TransportEgress
        self._asgi = config.loaded_app
        self._accept: bytes | None = None
        self._decoder: codecs.IncrementalDecoder | None = None
        self._text: list[str] | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._ping_behind: Transit | None = None
        """What the newest ping went out behind: what the peer has taken, and how much was held for it."""

    def app(self, scope: Any, receive: Any, send: Any) -> Any:
        """The application, with the handle. Once the scope exists it may be running already: so it is wrapped."""
        scope["extensions"][EXTENSION] = self.egress
        return self._asgi(scope, receive, send)

    def forget_handshake(self) -> None:
        """Let go of the opening request: several kilobytes that nobody reads once the connection is in use."""
        if self.request is not None:
            # The parser's own frame keeps the request alive, so what it holds is emptied.
            self.request.headers.clear()
            self.request = self.response = None  # type: ignore[assignment]
        self.scope["headers"] = []

    # -- the opening handshake, where it has been read already

    @classmethod
    def begin(
        cls,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        transport: asyncio.Transport,
        opening: Opening,
    ) -> None:
        """Take over a connection whose handshake is ``opening``: what the base class does in ``handle_connect``."""
        self = cls(config, server_state, app_state, state=OPEN)
        transport.set_protocol(self)
        self.connection_made(transport)
        self.handshake_initiated = True
        self._accept = (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {opening.accept}\r\n"
        ).encode("ascii")
        self.scope = {
            "type": "websocket",
            "asgi": {"version": self.asgi_version, "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": self.scheme,
            "server": self.server,
            "client": self.client,
            "root_path": self.root_path,
            "path": self.root_path + unquote(opening.path),
            "raw_path": (self.root_path + opening.path).encode("ascii"),
            "query_string": opening.query,
            "headers": opening.headers,
            "subprotocols": opening.subprotocols,
            "state": self.app_state.copy(),
            "extensions": {"websocket.http.response": {}},
        }
        self.queue.put_nowait({"type": "websocket.connect"})
        # As uvicorn starts it: the server owns the task through ``tasks``, awaits it at a stop, and ``on_task_complete`` ends it.
        task = self.loop.create_task(self.run_asgi())
        task.add_done_callback(self.on_task_complete)
        self.tasks.add(task)

    async def send(self, message: ASGISendEvent) -> None:
        if self._accept is None or message["type"] != "websocket.accept":
            await super().send(message)
            return
        if self.disconnected:
            raise ClientDisconnected
        answer, self._accept = self._accept, None
        for name, value in [*self.default_headers, *message.get("headers", ())]:
            answer += name + b": " + value + b"\r\n"
        if subprotocol := message.get("subprotocol"):
            answer += f"Sec-WebSocket-Protocol: {subprotocol}\r\n".encode("ascii")
        if not self.transport.is_closing():
            self.handshake_complete = True
            self.transport.write(answer + b"\r\n")
            self.start_keepalive()

    # -- transport

    def data_received(self, data: bytes) -> None:
        # It may be answered at once (a pong, a close), past the handle.
        self.egress.dirty = True
        super().data_received(data)

    def send_keepalive_ping(self) -> None:
        self.egress.dirty = True
        now = self._transit()
        # Nothing before it, as almost always: nothing to remember either.
        self._ping_behind = now if now is not None and now.held else None
        super().send_keepalive_ping()

    def _transit(self) -> Transit | None:
        sock = self.transport.get_extra_info("socket")
        now = None if sock is None else transit(sock.fileno())
        return None if now is None else Transit(now.taken, now.held + self.transport.get_write_buffer_size())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # As the base class does, with the addresses asked for once.
        transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        self.connections.add(self)
        self.transport = transport
        sock = transport.get_extra_info("socket")
        plain = transport.get_extra_info("sslcontext") is None
        self.server, self.client = _addresses(sock)
        self.scheme = "ws" if plain else "wss"
        transport.set_write_buffer_limits(high=self.high_water)
        self.egress = TransportEgress(self, transport, sock.fileno() if plain and sock is not None else -1)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        self.egress.lost()
        # Handle, protocol and parser name each other: let go of here, they need not wait for the collector of garbage.
        self.conn.parser.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.egress.changed(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.egress.changed(False)

    # -- closing

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake after what is buffered; the peer has ``close_deadline`` seconds for its part."""
        if self.transport.is_closing():
            return
        self.stop_keepalive()
        if self.conn.state is OPEN:
            self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        if self.read_paused:
            # The peer's close frame has to be read.
            self.read_paused = False
            self.transport.resume_reading()
        # Its presence keeps `run_asgi` from closing the transport when the application returns, which is before the answer.
        self.close_timer = self.loop.call_later(self.close_deadline, self._abort)

    def handle_close(self, event: Frame) -> None:
        self.egress.closing = True
        super().handle_close(event)
        self._give_up_later()

    def handle_parser_exception(self) -> None:
        self.egress.closing = True
        super().handle_parser_exception()
        self.stop_keepalive()
        self._give_up_later()

    def keepalive_timeout(self) -> None:
        self.pong_timer = None
        if self.close_sent or self.transport.is_closing():
            return
        if self._ping_is_on_its_way():
            assert self.ping_timeout is not None
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
            return
        self.pending_ping_payload = None
        self._fail(CloseCode.NO_PONG)

    def _ping_is_on_its_way(self) -> bool:
        """Whether the peer may not have come to the ping yet: it stalls, which has a deadline of its own, or it reads slowly."""
        if self.egress.is_watched and self.egress.paused:
            return True
        before, now = self._ping_behind, self._transit()
        self._ping_behind = None
        if before is None or now is None:
            return False
        took = now.taken - before.taken
        if took < before.held:
            self._ping_behind = Transit(now.taken, before.held - took)
        return took > 0  # where it has taken all of it by now, it has once more the time for its answer

    def shutdown(self) -> None:
        """The server stops. The application finishes what is in flight and closes with 4000; a deadline runs."""
        self.stop_keepalive()
        self._give_up_later(self.drain_deadline)
        if self.close_sent or self.transport.is_closing():
            return
        if not self.handshake_complete:
            self.send_500_response()
            self.transport.close()
        elif not self.egress.drain():
            self.egress.close(CloseCode.SHUTDOWN, CloseCode.SHUTDOWN.reason)

    def _fail(self, code: CloseCode) -> None:
        """Close without waiting for the peer's answer."""
        self.egress.closing = True
        self.conn.fail(int(code), code.reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": int(code), "reason": code.reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.stop_keepalive()
        self.transport.close()
        self._give_up_later()

    def _give_up_later(self, seconds: float | None = None) -> None:
        """Closing a transport waits until all is flushed, which a stalled peer never lets happen."""
        if self._abort_timer is None:
            self._abort_timer = self.loop.call_later(self.close_deadline if seconds is None else seconds, self._abort)

    def _abort(self) -> None:
        self.close_timer = None
        self.transport.abort()

    # -- messages

    def handle_ping(self) -> None:
        if self.egress.paused:
            # A peer that pings and does not read must not fill the buffer with pongs.
            self.conn.data_to_send()
            return
        super().handle_ping()

    def handle_text(self, event: Frame) -> None:
        self.curr_msg_data_type = "text"
        if event.fin:
            try:
                text = str(event.data, "utf-8")
            except UnicodeDecodeError:
                if not self.close_sent:
                    self._fail(CloseCode.INVALID_PAYLOAD)
                return
            if not self.close_sent:
                self._deliver(text)
            return
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._take_text(event)

    def handle_cont(self, event: Frame) -> None:
        if self.curr_msg_data_type == "text":
            self._take_text(event)
        else:
            super().handle_cont(event)

    def _take_text(self, event: Frame) -> None:
        """Decode as the fragments come, so that a long message that is not UTF-8 fails at once."""
        if self._decoder is None:
            return
        try:
            part = self._decoder.decode(bytes(event.data), event.fin)
        except UnicodeDecodeError:
            self._decoder = self._text = None
            if not self.close_sent:
                self._fail(CloseCode.INVALID_PAYLOAD)
            return
        if not event.fin:
            self._text = [part] if self._text is None else [*self._text, part]
            return
        text = part if self._text is None else "".join([*self._text, part])
        self._decoder = self._text = None
        if not self.close_sent:
            self._deliver(text)

    def _deliver(self, text: str) -> None:
        self.queue.put_nowait({"type": "websocket.receive", "text": text})
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()


def uvicorn_options(settings: Settings, http: type[BoundedHttpProtocol] = BoundedHttpProtocol) -> dict[str, Any]:
    """Keyword arguments for ``uvicorn.Config``: both protocol classes, limits, keepalive, and the deadline of a stop.

    Args:
        http: What plain requests are served with.
    """
    stream, api = settings.stream, settings.api
    protocol = type(
        "ConfiguredEgressProtocol",
        (EgressProtocol,),
        {
            "high_water": max(16_384, min(EgressProtocol.high_water, stream.outbox_bytes // 4)),
            "close_deadline": min(EgressProtocol.close_deadline, api.shutdown_deadline / 2),
            "drain_deadline": api.shutdown_deadline,
        },
    )
    deadline = {"head_deadline": stream.connect_timeout}
    http = type("ConfiguredHttpProtocol", (http,), deadline)
    return {
        "http": type("ConfiguredReception", (Reception,), {"http": http, "__slots__": (), **deadline}),
        "ws": protocol,
        "ws_max_size": api.max_command_bytes * _OVERSIZE_FACTOR,
        "ws_ping_interval": stream.ping_interval,
        "ws_ping_timeout": stream.pong_timeout,
        "ws_per_message_deflate": stream.compression,
        "timeout_graceful_shutdown": math.ceil(api.shutdown_deadline),
    }
