"""What a session wants done. The session itself touches nothing: no socket, no clock, no service."""

import msgspec

from kimera_stream.core.access import Principal
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.messages import AnyCommand, CursorRef, Error, Filter, Push, Reply
from kimera_stream.protocol.objects import Position


class Send(msgspec.Struct, frozen=True, gc=False):
    """Send this reply or push."""

    message: Reply | Push


class Authenticate(msgspec.Struct, frozen=True, gc=False):
    """Find out whose token this is; answer with ``Session.authenticated``."""

    id: int
    token: str | None


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """A subscription that passed the session's checks."""

    channel: str
    since: Position | CursorRef | None
    rewind: int | None
    filter: Filter | None


class Begin(msgspec.Struct, frozen=True, gc=False):
    """Open the subscriptions and send ``connected``; answer with ``Session.began``. Errors are passed on in their places."""

    id: int
    principal: Principal
    subs: tuple[Wanted | Error, ...] | None


class Open(msgspec.Struct, frozen=True, gc=False):
    """Open a subscription, send the reply, then let the events flow; answer with ``Session.opened``."""

    id: int
    wanted: Wanted


class Leave(msgspec.Struct, frozen=True, gc=False):
    """End a subscription; answer with ``Session.done``."""

    id: int
    channel: str


class Execute(msgspec.Struct, frozen=True, gc=False):
    """Carry out a command of the services; answer with ``Session.done``."""

    command: AnyCommand


class Close(msgspec.Struct, frozen=True, gc=False):
    """Close the connection after what has been sent."""

    code: CloseCode
    reason: str


Effect = Send | Authenticate | Begin | Open | Leave | Execute | Close
