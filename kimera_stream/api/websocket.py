"""The WebSocket door, ``GET /v1/stream``: handshake, then messages in and effects out in one task group per connection.

Choices where the contract leaves one: a refused Origin, a full node and a stopping server are told with a close code after the
handshake (4505, 4503, 4000), because a browser shows a page the code of a close but not the status of a refused handshake. A
handshake that offers only unknown subprotocols is refused with 400. Commands above ``api.max_command_bytes`` are answered
with ``too_large``; messages above four times that are not read at all (1009).
"""

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import structlog

from kimera_stream.api.asgi_egress import AsgiEgress
from kimera_stream.api.auth.transport import extract_token, origin_allowed
from kimera_stream.api.egress import EXTENSION
from kimera_stream.core.access import Authenticator
from kimera_stream.core.interfaces import KnowledgeService, VaultService
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.infrastructure.tasks.child import begin_child
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import CODECS
from kimera_stream.protocol.errors import UnauthorizedError
from kimera_stream.protocol.messages import SUBPROTOCOLS, TOKEN_SUBPROTOCOL_PREFIX, Encoding, ServerInfo
from kimera_stream.streaming.commands import Commands, PresenceOfAll
from kimera_stream.streaming.connection import Connection
from kimera_stream.streaming.egress import Egress
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.session import SessionLimits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
SendMessage = Callable[[Message], Awaitable[None]]

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Handshake:
    """What the opening request says.

    Attributes:
        subprotocol: None: none was offered, and none is answered.
        token: An error where it brings something that cannot be a token; ``connect`` is answered with it, unless it brings one.
    """

    encoding: Encoding
    subprotocol: str | None
    token: str | UnauthorizedError | None
    origin: str | None
    host: str | None


class StreamEndpoint:
    """An ASGI application for the WebSocket route.

    Args:
        hub: Where subscriptions live; its ``run`` must be running.
        server: Name, version and node, as told in ``connected``.
        presence: Who listens where, on all nodes; None: there is one.
    """

    def __init__(
        self,
        hub: Hub,
        knowledge: KnowledgeService,
        vault: VaultService,
        authenticator: Authenticator,
        settings: Settings,
        *,
        server: ServerInfo,
        presence: PresenceOfAll | None = None,
    ) -> None:
        self._hub = hub
        self._commands = Commands(hub, knowledge, vault, presence)
        self._authenticator = authenticator
        self._settings = settings
        self._server = server
        self._open = 0
        api, stream = settings.api, settings.stream
        self._limits = SessionLimits(
            connect_timeout=stream.connect_timeout,
            command_bytes=api.max_command_bytes,
            commands_per_second=api.commands_per_second,
            commands_burst=api.commands_burst,
            subscriptions=stream.max_subscriptions,
            connections_per_principal=api.max_connections_per_principal,
        )
        self._welcome: dict[str, int | float] = {
            "command_bytes": api.max_command_bytes,
            "text_chars": api.max_text_chars,
            "state_keys": api.max_state_keys,
            "metadata_bytes": api.max_metadata_bytes,
            "commands_per_second": api.commands_per_second,
            "commands_burst": api.commands_burst,
            "in_flight": self._limits.in_flight,
            "subscriptions": stream.max_subscriptions,
            "channel_bytes": stream.max_channel_bytes,
            "outbox_bytes": stream.outbox_bytes,
            "history": stream.history_page,
            "filter_nodes": stream.filter_nodes,
            "filter_depth": stream.filter_depth,
        }

    @property
    def commands(self) -> Commands:
        """The commands as other doors may use them (history, for one)."""
        return self._commands

    async def __call__(self, scope: Message, receive: Receive, send: SendMessage) -> None:
        message = await receive()
        if message["type"] != "websocket.connect":
            return
        handshake = read_handshake(scope)
        if handshake is None:
            await _refuse(scope, send)
            return
        refusal = self._refusal(handshake)
        self._open += 1
        try:
            await send({"type": "websocket.accept", "subprotocol": handshake.subprotocol})
            await self._converse(scope, receive, send, handshake, refusal)
        except OSError:
            # The peer was gone before it was accepted.
            return
        finally:
            self._open -= 1

    def _refusal(self, handshake: Handshake) -> CloseCode | None:
        if not origin_allowed(handshake.origin, handshake.host, self._settings.security.allowed_origins):
            return CloseCode.ORIGIN_REFUSED
        if self._hub.ended:
            return CloseCode.SHUTDOWN
        if self._open >= self._settings.api.max_connections:
            return CloseCode.CONNECTION_LIMIT
        return None

    async def _converse(
        self, scope: Message, receive: Receive, send: SendMessage, handshake: Handshake, refusal: CloseCode | None
    ) -> None:
        offered: Egress | None = (scope.get("extensions") or {}).get(EXTENSION)
        egress = offered
        try:
            async with anyio.create_task_group() as group:
                if egress is None:
                    adapter = AsgiEgress(send, on_closed=group.cancel_scope.cancel)
                    group.start_soon(adapter.run, name="egress")
                    egress = adapter
                if refusal is not None:
                    self._hub.metrics.closed(refusal)
                    egress.close(refusal, refusal.reason)
                    await _until_disconnected(receive)
                else:
                    connection = self._connection(egress, handshake, group)
                    del handshake
                    try:
                        while (message := await receive())["type"] != "websocket.disconnect":
                            text = message.get("text")
                            connection.receive(message["bytes"] if text is None else text)
                            del message, text
                        if message.get("code") == CloseCode.NO_PONG:
                            # The one close that the server's protocol decides by itself.
                            self._hub.metrics.closed(CloseCode.NO_PONG)
                    finally:
                        connection.lost()
                group.cancel_scope.cancel()
        except Exception:
            # The root of this connection: a defect ends it visibly, and nobody else.
            log.exception("connection failed")
            self._hub.metrics.defect("connection")
            if egress is not None:
                egress.close(CloseCode.INTERNAL, CloseCode.INTERNAL.reason)

    def _connection(self, egress: Egress, handshake: Handshake, group: anyio.abc.TaskGroup) -> Connection:
        return Connection(
            self._hub,
            self._commands,
            self._authenticator,
            egress,
            CODECS[handshake.encoding],
            spawn=partial(begin_child, group),
            limits=self._limits,
            server=self._server,
            welcome=self._welcome,
            handshake_token=handshake.token,
        )


def read_handshake(scope: Message) -> Handshake | None:
    """The opening request, or None if it offers only subprotocols that are not spoken here."""
    offered: list[str] = scope.get("subprotocols") or []
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name in (b"authorization", b"origin", b"host"):
            headers[name.decode("ascii")] = value.decode("latin-1")
    known = next((name for name in offered if name in SUBPROTOCOLS), None)
    if known is None and any(not name.startswith(TOKEN_SUBPROTOCOL_PREFIX) for name in offered):
        return None
    token: str | UnauthorizedError | None
    try:
        token = extract_token(headers, offered)
    except UnauthorizedError as error:
        token = error
    encoding: Encoding = "json" if known is None else SUBPROTOCOLS[known]
    return Handshake(encoding, known, token, headers.get("origin"), headers.get("host"))


async def _refuse(scope: Message, send: SendMessage) -> None:
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": int(CloseCode.POLICY_VIOLATION)})
        return
    body = f"unknown subprotocol; offer one of {', '.join(SUBPROTOCOLS)}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": 400, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "websocket.disconnect":
        pass
