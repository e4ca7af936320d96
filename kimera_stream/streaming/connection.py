"""One connection: the session decides, the outlet delivers, and tasks of the connection's own group carry out commands."""

import base64
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import msgspec
import structlog

from kimera_stream.core.access import Authenticator, Principal
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import Codec, error_reply
from kimera_stream.protocol.errors import InternalError, LimitExceededError, OperationalError, UnauthorizedError
from kimera_stream.protocol.messages import AnyCommand, Connected, Error, ServerInfo, Subscribed, Unsubscribed
from kimera_stream.streaming.commands import Caller, Commands
from kimera_stream.streaming.deadlines import Deadline
from kimera_stream.streaming.effects import (
    Authenticate,
    Begin,
    Close,
    Effect,
    Execute,
    Leave,
    Open,
    Send,
    Wanted,
)
from kimera_stream.streaming.egress import Egress
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.outlet import Subscription
from kimera_stream.streaming.session import Session, SessionLimits, op_of
from kimera_stream.streaming.starts import Start

log = structlog.get_logger(__name__)


class Spawn(Protocol):
    """``TaskGroup.start_soon`` of the connection's group."""

    def __call__(self, func: Callable[..., Coroutine[Any, Any, Any]], /, *args: Any, name: object = None) -> object: ...


class Connection:
    """Feeds a session and carries out its effects.

    Args:
        spawn: Starts children in the connection's task group; all of them end with it.
        welcome: ``limits`` of the ``connected`` reply.
        handshake_token: A token that came with the handshake, or what was wrong with it.
    """

    __slots__ = (
        "_applying", "_authenticator", "_commands", "_deadline", "_deadline_at", "_encoding", "_hub", "_most_per_principal", "_outlet", "_server", "_session", "_spawn",
        "_welcome", "id",
    )  # fmt: skip

    def __init__(
        self,
        hub: Hub,
        commands: Commands,
        authenticator: Authenticator,
        egress: Egress,
        codec: Codec,
        *,
        spawn: Spawn,
        limits: SessionLimits,
        server: ServerInfo,
        welcome: dict[str, int | float],
        handshake_token: str | UnauthorizedError | None = None,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self.id = base64.urlsafe_b64encode(os.urandom(12)).decode("ascii")
        self._hub = hub
        self._commands = commands
        self._authenticator = authenticator
        self._spawn = spawn
        self._server = server
        self._welcome = welcome
        self._encoding = codec.encoding
        self._most_per_principal = limits.connections_per_principal
        self._session = Session(codec, limits, now=hub.clock(), unix=unix, handshake_token=handshake_token)
        self._outlet = hub.connect(egress, codec, spawn=spawn, owner=self)
        self._applying: list[Effect] | None = None
        self._deadline: Deadline | None = None
        self._deadline_at: float | None = None
        self._keep_time()

    @property
    def ended(self) -> bool:
        """Whether the server's side has been closed."""
        return self._outlet.ended

    def receive(self, data: str | bytes) -> None:
        """A message of the peer."""
        self._apply(self._session.receive(data, self._hub.clock()))

    def lost(self) -> None:
        """The peer is gone."""
        self._session.closed()
        self._outlet.detach()
        self._outlet.owner = None  # each names the other
        if self._deadline is not None:
            self._deadline.cancel()

    def outlet_ended(self) -> None:
        """The server's side was closed, here or by the hub."""
        self._session.closed()

    def outlet_draining(self, code: CloseCode) -> None:
        """Finish what is in flight, then close."""
        self._apply(self._session.drain(code))

    def outlet_doubted(self) -> None:
        """Tokens may have been revoked."""
        principal = self._session.principal
        if principal is not None and not self._authenticator.holds(principal):
            self._apply(self._session.revoked())

    def _timer(self) -> None:
        self._deadline = self._deadline_at = None
        self._apply(self._session.timer(self._hub.clock()))

    def _keep_time(self) -> None:
        when = self._session.next_deadline
        if when == self._deadline_at:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline_at = when
        self._deadline = None if when is None else self._hub.deadlines.at(when, self._timer)

    # -- effects

    def _apply(self, effects: list[Effect]) -> None:
        """Carry out effects in order. What comes of one goes after those that are waiting: a close must not overtake a reply."""
        if self._applying is not None:
            self._applying.extend(effects)
            return
        self._applying = effects
        try:
            for effect in effects:  # which grows meanwhile
                self._carry_out(effect)
        finally:
            self._applying = None
        self._keep_time()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(message):
                if isinstance(message, Error):
                    self._hub.metrics.error(message.code)
                self._outlet.send(message)
            case Close(code, reason):
                self._outlet.end(code, reason)
            case Leave(id, channel):
                self._leave(id, channel)
            case Open(id, wanted) if self._at_once(wanted):
                # Nothing to look up: begun before the next command of the same connection is looked at.
                self._open(id, wanted, self._start_now(wanted))
            case Open():
                self._spawn(self._open_later, effect, name="subscribe")
            case Authenticate(id, token):
                known = self._authenticator.known(token)
                if known is None:
                    self._spawn(self._authenticate, effect, name="authenticate")
                else:
                    self._apply(self._session.authenticated(id, known, self._hub.clock()))
            case Begin(id, principal, _):
                most = self._most_per_principal
                if self._hub.identify(self._outlet, principal.id, limit=most):
                    self._identified(effect)
                elif self._hub.full(principal.id, limit=most):
                    self._one_too_many(id)
                else:
                    self._spawn(self._identify, effect, name="connect")
            case Execute(command):
                self._spawn(self._execute, command, name=op_of(command))

    async def _guarded(self, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """The result of a call, or the error to answer with. A defect is logged once and answered as ``internal``."""
        try:
            return await call()
        except OperationalError as exc:
            return exc
        except Exception:
            # The peer must not wait for ever, and the other commands of the connection have done nothing wrong.
            log.exception("command failed", command=what, session=self.id)
            self._hub.metrics.defect(what)
            return InternalError("the server failed to carry out the command; it has been logged", retry_after=1.0)

    async def _execute(self, command: AnyCommand) -> None:
        principal = self._session.principal
        assert principal is not None
        caller = Caller(principal, self.id, self._encoding)
        result = await self._guarded(op_of(command), lambda: self._commands.execute(command, caller))
        self._hub.metrics.command(op_of(command), result.code if isinstance(result, OperationalError) else "ok")
        self._apply(self._session.done(command.id, result))

    async def _authenticate(self, effect: Authenticate) -> None:
        result = await self._guarded("connect", lambda: self._authenticator.authenticate(effect.token))
        self._apply(self._session.authenticated(effect.id, result, self._hub.clock()))

    def _at_once(self, wanted: Wanted) -> bool:
        return self._commands.starts_at_once(wanted.channel, wanted.since, wanted.rewind)

    def _start_now(self, wanted: Wanted) -> Start | OperationalError:
        try:
            return self._commands.start_live(wanted.channel)
        except OperationalError as exc:
            return exc

    async def _open_later(self, effect: Open) -> None:
        start = await self._look_up(effect.wanted)
        self._open(effect.id, effect.wanted, start)

    async def _look_up(self, wanted: Wanted) -> Start | OperationalError:
        principal = self._session.principal
        assert principal is not None
        result: Start | OperationalError = await self._guarded(
            "subscribe", lambda: self._commands.start(wanted.channel, wanted.since, wanted.rewind, principal)
        )
        return result

    def _open(self, id: int, wanted: Wanted, start: Start | OperationalError) -> None:
        if self.ended:
            return
        opened = self._add(wanted, start)
        if isinstance(opened, OperationalError):
            self._hub.metrics.command("subscribe", opened.code)
            self._apply(self._session.opened(id, wanted.channel, opened))
            return
        subscription, reply = opened
        self._hub.metrics.command("subscribe", "ok")
        self._outlet.send(msgspec.structs.replace(reply, id=id))
        self._hub.begin(subscription)
        self._apply(self._session.opened(id, wanted.channel))

    def _add(
        self, wanted: Wanted, start: Start | OperationalError
    ) -> tuple[Subscription, Subscribed] | OperationalError:
        if isinstance(start, OperationalError):
            return start
        try:
            return self._hub.open(self._outlet, wanted.channel, start, self._hub.compile(wanted.filter))
        except OperationalError as exc:
            return exc

    def _leave(self, id: int, channel: str) -> None:
        if self.ended:
            return  # and has left every channel
        self._hub.close(self._outlet, channel)
        self._apply(self._session.done(id, Unsubscribed(id=id, channel=channel)))

    async def _identify(self, effect: Begin) -> None:
        principal = effect.principal.id
        if await self._hub.identify_counted(self._outlet, principal, limit=self._most_per_principal):
            self._identified(effect)
        else:
            self._one_too_many(effect.id)

    def _one_too_many(self, id: int) -> None:
        error = LimitExceededError(f"connections: at most {self._most_per_principal} per principal")
        self._hub.metrics.error(error.code)
        self._outlet.send(error_reply(error, id))
        self._outlet.end(CloseCode.CONNECTION_LIMIT)

    def _identified(self, effect: Begin) -> None:
        subs = effect.subs or ()
        if all(isinstance(sub, Error) or self._at_once(sub) for sub in subs):
            self._begin(effect, [self._start_now(sub) if isinstance(sub, Wanted) else None for sub in subs])
        else:
            self._spawn(self._begin_later, effect, name="connect")

    async def _begin_later(self, effect: Begin) -> None:
        starts = [await self._look_up(sub) if isinstance(sub, Wanted) else None for sub in effect.subs or ()]
        if not self.ended:
            self._begin(effect, starts)

    def _begin(self, effect: Begin, starts: list[Start | OperationalError | None]) -> None:
        # From here to the reply nothing is awaited: positions, reply and first events belong together.
        failed: list[str] = []
        begun: list[Subscription] = []
        subs: list[Subscribed | Error] | None = None if effect.subs is None else []
        for sub, start in zip(effect.subs or (), starts, strict=True):
            assert subs is not None
            if isinstance(sub, Error) or start is None:
                assert isinstance(sub, Error)
                subs.append(sub)
                continue
            opened = self._add(sub, start)
            if isinstance(opened, OperationalError):
                failed.append(sub.channel)
                subs.append(error_reply(opened, channel=sub.channel))
            else:
                begun.append(opened[0])
                subs.append(opened[1])
        self._outlet.send(self._connected(effect.id, effect.principal, subs))
        for subscription in begun:
            self._hub.begin(subscription)
        self._outlet.start_heartbeat()
        self._apply(self._session.began(effect.id, failed))

    def _connected(self, id: int, principal: Principal, subs: list[Subscribed | Error] | None) -> Connected:
        return Connected(
            id=id,
            session=self.id,
            epoch=self._hub.epoch,
            offset=self._hub.flushed,
            server=self._server,
            ping=self._hub.settings.ping_interval,
            expires=principal.expires,
            limits=self._welcome,
            subs=subs,
        )
