"""What a session wants done. The session itself touches nothing: no socket, no clock, no service."""

from dataclasses import dataclass

from kimera_stream.core.interfaces import Principal
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.messages import AnyCommand, CursorRef, Error, Filter, Push, Reply
from kimera_stream.protocol.objects import Position


@dataclass(frozen=True, slots=True)
class Send:
    """Send this reply or push."""

    message: Reply | Push


@dataclass(frozen=True, slots=True)
class Authenticate:
    """Find out whose token this is; answer with ``Session.authenticated``."""

    id: int
    token: str | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A subscription that passed the session's checks."""

    channel: str
    since: Position | CursorRef | None
    rewind: int | None
    filter: Filter | None


@dataclass(frozen=True, slots=True)
class Begin:
    """Open the subscriptions and send ``connected``; answer with ``Session.began``. Errors are passed on in their places."""

    id: int
    principal: Principal
    subs: tuple[Wanted | Error, ...] | None


@dataclass(frozen=True, slots=True)
class Open:
    """Open a subscription, send the reply, then let the events flow; answer with ``Session.opened``."""

    id: int
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Leave:
    """End a subscription; answer with ``Session.done``."""

    id: int
    channel: str


@dataclass(frozen=True, slots=True)
class Execute:
    """Carry out a command of the services; answer with ``Session.done``."""

    command: AnyCommand


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection after what has been sent."""

    code: CloseCode
    reason: str


Effect = Send | Authenticate | Begin | Open | Leave | Execute | Close
