"""The session state machine, without I/O: messages, results and the passing of time in, effects out.

WAITING --connect--> AUTHENTICATING --principal--> BEGINNING --began--> CONNECTED --> CLOSING
   (connect timeout: 4504; refused: 4500)            (commands that came early wait)      (drain, expiry, violation)
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

import msgspec

from kimera_stream.core.access import Principal, Role
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import Codec, Malformed, error_reply
from kimera_stream.protocol.errors import (
    AlreadySubscribedError,
    BadRequestError,
    ConflictError,
    Disconnect,
    ForbiddenError,
    LimitExceededError,
    NotSubscribedError,
    OperationalError,
    OverloadedError,
    RateLimitedError,
    UnauthorizedError,
    UnavailableError,
)
from kimera_stream.protocol.explaining import bad_request
from kimera_stream.protocol.messages import (
    AnyCommand,
    Connect,
    Error,
    Expiring,
    Refresh,
    Refreshed,
    Reply,
    Subscribe,
    SubscribeBody,
    Unsubscribe,
    parse_since,
)
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
from kimera_stream.streaming.ratelimit import TokenBucket

_EXPIRY_NOTICE: Final = 30.0
"""Seconds before its token expires that a connection is told."""

_DRAINING: Final = {
    CloseCode.SHUTDOWN: "the server is stopping",
    CloseCode.REBALANCE: "this connection goes to another node: connect again",
}

ROLE_OF_OP: Final[dict[str, Role]] = {
    "publish": "publish",
    "delete": "publish",
    "resolve": "resolve",
    "subscribe": "subscribe",
    "history": "subscribe",
    "presence": "subscribe",
    "ack": "subscribe",
    "watch": "subscribe",
    "unwatch": "subscribe",
}


class State(Enum):
    WAITING = "waiting for connect"
    AUTHENTICATING = "authenticating"
    BEGINNING = "beginning"
    CONNECTED = "connected"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """The limits of one connection. Seconds, bytes, items."""

    connect_timeout: float = 10.0
    command_bytes: int = 65_536
    commands_per_second: float = 100.0
    commands_burst: int = 200
    subscriptions: int = 128
    connections_per_principal: int = 10_000
    in_flight: int = 256
    in_flight_bytes: int = 4_194_304


def op_of(command: AnyCommand) -> str:
    """The name of a command on the wire."""
    return str(command.__struct_config__.tag)


class Session:
    """One connection's conversation.

    Every method returns the effects to carry out, in order. Times are monotonic seconds of one clock, except ``unix``.

    Args:
        codec: The connection's encoding.
        handshake_token: A token that came with the handshake, or what was wrong with it; one in ``connect`` goes before it.
        unix: Wall clock, unix seconds, to place token expiries.
    """

    __slots__ = (
        "_bucket", "_codec", "_connect_by", "_draining", "_early", "_expires_at", "_expiring_at", "_handshake_token", "_in_flight",
        "_in_flight_bytes", "_limits", "_opening", "_refreshing", "_subs", "_unix", "channels", "principal", "state",
    )  # fmt: skip

    def __init__(
        self,
        codec: Codec,
        limits: SessionLimits,
        *,
        now: float,
        unix: Callable[[], float],
        handshake_token: str | UnauthorizedError | None = None,
    ) -> None:
        self._codec = codec
        self._limits = limits
        self._unix = unix
        self._handshake_token = handshake_token
        self._bucket = TokenBucket(limits.commands_per_second, limits.commands_burst, now)
        self._connect_by: float | None = now + limits.connect_timeout
        self._expiring_at: float | None = None
        self._expires_at: float | None = None
        self._subs: list[SubscribeBody] | None = None
        self._early: list[tuple[AnyCommand, int]] = []
        self._in_flight: dict[int, int] = {}
        self._in_flight_bytes = 0
        self._refreshing: dict[int, None] = {}
        self._opening: dict[str, deque[Subscribe | Unsubscribe]] = {}
        self._draining: CloseCode | None = None
        self.channels: dict[str, None] = {}
        """Channels that are open or being opened."""
        self.principal: Principal | None = None
        self.state = State.WAITING

    @property
    def next_deadline(self) -> float | None:
        """When ``timer`` wants to be called next."""
        expiry = self._expires_at if self._expiring_at is None else self._expiring_at  # told before it expires
        if expiry is None or self._connect_by is None:
            return self._connect_by if expiry is None else expiry
        return min(self._connect_by, expiry)

    @property
    def in_flight(self) -> int:
        """Commands that have not been answered."""
        return len(self._in_flight) + len(self._early)

    # -- in: the peer

    def receive(self, data: str | bytes, now: float) -> list[Effect]:
        """One message of the peer: ``str`` from a text frame, ``bytes`` from a binary one."""
        if self.state is State.CLOSING:
            return []
        wait = self._bucket.take(now)
        try:
            if wait:
                id = self._codec.id_of(data)
                error = RateLimitedError(
                    f"commands: at most {self._limits.commands_per_second:g} a second", retry_after=round(wait, 3)
                )
                return [Send(error_reply(error, id))]
            command = self._codec.decode(data, max_bytes=self._limits.command_bytes)
        except Disconnect as exc:
            return self._close(exc.code, exc.reason)
        except Malformed as exc:
            return [Send(error_reply(exc.error, exc.id))]
        return self._command(command, len(data))

    def _command(self, command: AnyCommand, size: int) -> list[Effect]:
        if self.state is State.WAITING:
            return self._first(command)
        if isinstance(command, Connect):
            return self._refuse(command.id, ConflictError("connect: this connection is connected already"))
        early = any(command.id == waiting.id for waiting, _ in self._early)
        if early or command.id in self._in_flight:
            return self._refuse(
                command.id, ConflictError(f"id: command {command.id} has not been answered yet", field="id")
            )
        if self._draining is not None:
            return self._refuse(command.id, UnavailableError(_DRAINING[self._draining], retry_after=1.0))
        if self.in_flight >= self._limits.in_flight or self._in_flight_bytes + size > self._limits.in_flight_bytes:
            error = OverloadedError(
                f"commands: at most {self._limits.in_flight} may wait for their replies", retry_after=0.1
            )
            return self._refuse(command.id, error)
        self._in_flight_bytes += size
        if self.state is not State.CONNECTED:
            self._early.append((command, size))
            return []
        self._in_flight[command.id] = size
        return self._dispatch(command)

    def _first(self, command: AnyCommand) -> list[Effect]:
        if not isinstance(command, Connect):
            error = BadRequestError("op: expected connect as the first command", field="op")
            return [*self._refuse(command.id, error), *self._close(CloseCode.PROTOCOL_VIOLATION)]
        token = command.token if command.token is not None else self._handshake_token
        if isinstance(token, UnauthorizedError):
            return [*self._refuse(command.id, token), *self._close(CloseCode.UNAUTHORIZED)]
        self.state = State.AUTHENTICATING
        self._subs = command.subs
        self._in_flight[command.id] = 0
        return [Authenticate(command.id, token)]

    def _dispatch(self, command: AnyCommand) -> list[Effect]:
        """A command that has its place among those in flight."""
        role = ROLE_OF_OP.get(op_of(command))
        assert self.principal is not None
        if role is not None and not self.principal.may(role):
            return self.done(command.id, ForbiddenError(f"{op_of(command)} needs the role {role}"))
        if isinstance(command, Subscribe | Unsubscribe) and command.channel in self._opening:
            # One thing at a time per channel; its result decides what this one may do.
            self._opening[command.channel].append(command)
            return []
        if isinstance(command, Subscribe):
            wanted = self._want(command)
            if isinstance(wanted, OperationalError):
                return self.done(command.id, wanted)
            self._opening[command.channel] = deque()
            return [Open(command.id, wanted)]
        if isinstance(command, Unsubscribe):
            if command.channel not in self.channels:
                error = NotSubscribedError("channel: not subscribed to that channel", field="channel")
                return self.done(command.id, error)
            self.channels.pop(command.channel, None)
            return [Leave(command.id, command.channel)]
        if isinstance(command, Refresh):
            self._refreshing[command.id] = None
            return [Authenticate(command.id, command.token)]
        return [Execute(command)]

    def _want(self, body: Subscribe | SubscribeBody) -> Wanted | OperationalError:
        """Reserve a channel, or say why not."""
        if body.channel in self.channels:
            return AlreadySubscribedError("channel: already subscribed to that channel", field="channel")
        if len(self.channels) >= self._limits.subscriptions:
            return LimitExceededError(
                f"channel: at most {self._limits.subscriptions} channels per connection", field="channel"
            )
        try:
            since = parse_since(body.since)
        except msgspec.ValidationError as exc:
            problem = bad_request(exc)
            inner = f".{problem.field}" if problem.field else ""
            return BadRequestError(
                f'since{inner}: expected {{"epoch", "offset"}} or {{"cursor"}}', field=f"since{inner}"
            )
        self.channels[body.channel] = None
        return Wanted(body.channel, since, body.rewind, body.filter)

    # -- in: results

    def authenticated(self, id: int, result: Principal | OperationalError, now: float) -> list[Effect]:
        """What became of ``Authenticate``."""
        if self.state is State.CLOSING:
            return []
        if id in self._refreshing:
            self._refreshing.pop(id, None)
            return self._refreshed(id, result, now)
        if isinstance(result, OperationalError):
            effects = self.done(id, result)
            if not self._is_open():
                return effects
            if isinstance(result, UnauthorizedError | ForbiddenError):
                refused = CloseCode.UNAUTHORIZED if isinstance(result, UnauthorizedError) else CloseCode.FORBIDDEN
                return [*effects, *self._close(refused)]
            # Temporary: the client may try again within the connect timeout.
            self.state = State.WAITING
            early, self._early = self._early, []
            for command, size in early:
                self._in_flight_bytes -= size
                effects.extend(self._refuse(command.id, UnavailableError("not connected", retry_after=1.0)))
            return effects if self._draining is None else [*effects, *self._close(self._draining)]
        if not result.roles:
            error = error_reply(ForbiddenError("token: it carries no role"), id)
            return [Send(error), *self._close(CloseCode.FORBIDDEN)]
        self.principal = result
        self.state = State.BEGINNING
        self._connect_by = None
        self._set_expiry(result.expires, now)
        subs: list[Wanted | Error] | None = None
        if self._subs is not None:
            subs = []
            for body in self._subs:
                wanted: Wanted | OperationalError
                wanted = (
                    self._want(body)
                    if result.may("subscribe")
                    else ForbiddenError("subscribe needs the role subscribe")
                )
                subs.append(
                    error_reply(wanted, channel=body.channel) if isinstance(wanted, OperationalError) else wanted
                )
            self._subs = None
        return [Begin(id, result, None if subs is None else tuple(subs))]

    def began(self, id: int, failed: list[str]) -> list[Effect]:
        """``connected`` was sent. ``failed``: channels of ``Begin.subs`` that could not be opened."""
        if self.state is State.CLOSING:
            return []
        self.state = State.CONNECTED
        for channel in failed:
            self.channels.pop(channel, None)
        effects = self._settle(id)
        early, self._early = self._early, []
        self._in_flight.update({command.id: size for command, size in early})
        for command, _ in early:
            effects.extend(self._dispatch(command))
        return effects

    def _is_open(self) -> bool:
        return self.state is not State.CLOSING

    def opened(self, id: int, channel: str, error: OperationalError | None = None) -> list[Effect]:
        """What became of ``Open``. Without an error the reply has been sent with the opening."""
        if self.state is State.CLOSING:
            return []
        if error is not None:
            self.channels.pop(channel, None)
        effects = self._settle(id) if error is None else self.done(id, error)
        waiting = self._opening.pop(channel, deque())
        while waiting:
            effects.extend(self._dispatch(waiting.popleft()))
            if channel in self._opening:
                self._opening[channel].extend(waiting)
                break
        return effects

    def done(self, id: int, result: Reply | OperationalError) -> list[Effect]:
        """The result of a command that was carried out, or why it was not."""
        if self.state is State.CLOSING:
            return []
        message = error_reply(result, id) if isinstance(result, OperationalError) else result
        return [Send(message), *self._settle(id)]

    def _refreshed(self, id: int, result: Principal | OperationalError, now: float) -> list[Effect]:
        if isinstance(result, OperationalError):
            return self.done(id, result)
        assert self.principal is not None
        if result.id != self.principal.id:
            return self.done(
                id, ForbiddenError("token: it belongs to someone else; open a new connection", field="token")
            )
        missing = (
            "a role" if not result.roles else "subscribe" if self.channels and not result.may("subscribe") else None
        )
        if missing is not None:
            # What is open was allowed by the former token, which holds until it expires.
            return self.done(id, ForbiddenError(f"token: this connection needs {missing}", field="token"))
        self.principal = result
        self._set_expiry(result.expires, now)
        return self.done(id, Refreshed(id=id, expires=result.expires))

    def _settle(self, id: int) -> list[Effect]:
        """The command has had its reply."""
        self._in_flight_bytes -= self._in_flight.pop(id, 0)
        if self._draining is not None and not self.in_flight:
            return self._close(self._draining)
        return []

    def _refuse(self, id: int, error: OperationalError) -> list[Effect]:
        return [Send(error_reply(error, id))]

    # -- in: time and the server

    def timer(self, now: float) -> list[Effect]:
        """Time has passed; to be called at ``next_deadline`` or later."""
        if self.state is State.CLOSING:
            return []
        if self._connect_by is not None and now >= self._connect_by:
            return self._close(CloseCode.CONNECT_TIMEOUT)
        if self._expires_at is not None and now >= self._expires_at:
            return self._close(CloseCode.TOKEN_EXPIRED)
        if self._expiring_at is not None and now >= self._expiring_at:
            self._expiring_at = None
            assert self.principal is not None
            assert self.principal.expires is not None
            return [Send(Expiring(expires=self.principal.expires))]
        return []

    def revoked(self) -> list[Effect]:
        """The token does not count any more: close with 4003, for the client may have, or get, one that does."""
        return [] if self.state is State.CLOSING else self._close(CloseCode.TOKEN_EXPIRED, "token_revoked")

    def drain(self, code: CloseCode = CloseCode.SHUTDOWN) -> list[Effect]:
        """No new commands; close with ``code``, 4000 or 4005, when those in flight have been answered."""
        if self.state is State.CLOSING:
            return []
        self._draining = code
        if not self.in_flight:
            return self._close(code)
        return []

    def closed(self) -> None:
        """The connection is gone; results that still come in mean nothing."""
        self.state = State.CLOSING
        self._connect_by = self._expiring_at = self._expires_at = None

    def _set_expiry(self, expires: int | None, now: float) -> None:
        if expires is None:
            self._expires_at = self._expiring_at = None
            return
        left = expires - self._unix()
        self._expires_at = now + left
        self._expiring_at = now + max(left - _EXPIRY_NOTICE, left / 2)

    def _close(self, code: CloseCode, reason: str | None = None) -> list[Effect]:
        self.closed()
        return [Close(code, code.reason if reason is None else reason)]
