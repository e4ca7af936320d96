"""A connection's side of the hub: its subscriptions, where each stands, and the bounded way out."""

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
import structlog

from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import Codec
from kimera_stream.protocol.errors import Disconnect, UnavailableError
from kimera_stream.protocol.messages import Heartbeat, Push, Reply, Resync
from kimera_stream.streaming.catchup import Chunk, Page
from kimera_stream.streaming.deadlines import Deadline
from kimera_stream.streaming.egress import Egress
from kimera_stream.streaming.selections import Selection

if TYPE_CHECKING:
    from kimera_stream.streaming.hub import Hub

_CHUNKS_AT_ONCE: Final = 8
_RETRY: Final = (0.1, 0.2, 0.5, 1.0, 2.0)

log = structlog.get_logger(__name__)


class Spawn(Protocol):
    """Starts a child task in the connection's task group."""

    def __call__(self, func: Callable[[], Coroutine[Any, Any, None]], /, *, name: str) -> object: ...


class OutletOwner(Protocol):
    """The connection behind an outlet."""

    def outlet_ended(self) -> None:
        """The outlet was closed, whoever decided it."""

    def outlet_draining(self, code: CloseCode) -> None:
        """The server stops, or has too many connections: end the outlet with ``code`` when what is in flight is done."""

    def outlet_doubted(self) -> None:
        """What lets the connection in may not count any more: look again, and end the outlet if it does not."""


class Subscription:
    """One connection on one channel.

    At the live edge (``live``) its position is the hub's own; behind it, ``position`` is the cursor it reads on from, and for a
    latest channel ``seen`` the number of the value it had last (-1: has not had its first look).
    """

    __slots__ = ("live", "outlet", "position", "seen", "selection")

    def __init__(self, outlet: "Outlet", selection: Selection, position: int) -> None:
        self.outlet = outlet
        self.selection = selection
        self.position = position
        self.seen = -1
        self.live = False


class Outlet:
    """What the hub knows of a connection.

    A connection whose buffer is above its high-water mark (``egress.paused``) takes no events: its subscriptions fall back
    to their position, and once the buffer drains they read on from there until they meet the live edge. So a stalled peer
    costs its transport buffer and nothing else, and is given up on after ``stream.outbox_age`` seconds.
    """

    __slots__ = (
        "_ended", "_heartbeat", "_hub", "_pumping", "_spawn", "_stall", "backlog_mark", "codec", "egress", "identified", "leaving", "live", "owner",
        "principal", "subscriptions", "touched",
    )  # fmt: skip

    def __init__(
        self,
        hub: "Hub",
        egress: Egress,
        codec: Codec,
        *,
        spawn: Spawn,
        owner: "OutletOwner | None" = None,
    ) -> None:
        self._hub = hub
        self._spawn = spawn
        self.owner = owner
        self._pumping = False
        self._ended = False
        self._stall: Deadline | None = None
        self._heartbeat: Deadline | None = None
        self.backlog_mark = 0
        self.egress = egress
        self.codec = codec
        self.principal = ""
        self.identified = False
        self.leaving = False
        """Asked to finish what is in flight and close."""
        self.subscriptions: dict[str, Subscription] = {}
        self.live = 0
        """Subscriptions at the live edge."""
        self.touched = hub.clock()

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def caught_up(self) -> bool:
        return self.live == len(self.subscriptions)

    def send(self, message: Reply | Push) -> None:
        """Queue a reply or push. A connection that lets replies pile up beyond its budget is closed with 4001."""
        if self._ended:
            return
        self.touched = self._hub.clock()
        self.egress.write(self.codec.frame(message))
        if self.egress.buffered > self._hub.settings.outbox_bytes:
            self.end(CloseCode.SLOW_CONSUMER)

    def end(self, code: CloseCode, reason: str | None = None) -> None:
        """Close the connection after what is buffered. Does nothing the second time."""
        if self._ended:
            return
        self.detach()
        self._hub.metrics.closed(code)
        self.egress.close(code, code.reason if reason is None else reason)
        if self.owner is not None:
            self.owner.outlet_ended()

    def detach(self) -> None:
        """Leave the hub: the connection is gone, or about to be."""
        if self._ended:
            return
        self._ended = True
        self.egress.listen(None)
        for deadline in (self._stall, self._heartbeat):
            if deadline is not None:
                deadline.cancel()
        self._hub.forget(self)

    # -- heartbeat

    def start_heartbeat(self) -> None:
        """Say the position whenever the connection has been quiet for the ping interval."""
        self._heartbeat = self._hub.deadlines.at(self.touched + self._hub.settings.ping_interval, self._beat)

    def _beat(self) -> None:
        now = self._hub.clock()
        interval = self._hub.settings.ping_interval
        busy = max((sub.selection.pushed_at for sub in self.subscriptions.values() if sub.live), default=0.0)
        quiet_since = max(self.touched, busy)
        if now - quiet_since >= interval:
            # One that lags would take the position for proof that nothing is missing.
            if self.caught_up and not self.egress.paused:
                self.send(Heartbeat(epoch=self._hub.epoch, offset=self._hub.flushed))
            quiet_since = now
        if not self._ended:
            self._heartbeat = self._hub.deadlines.at(quiet_since + interval, self._beat)

    # -- back-pressure

    def egress_paused(self) -> None:
        if self._ended or self._stall is not None:
            return
        self._stall = self._hub.deadlines.at(self._hub.clock() + self._hub.settings.outbox_age, self._give_up)
        self._hub.stalled(self)

    def egress_resumed(self) -> None:
        if self._ended:
            return
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        self._hub.unstalled(self)
        if not self.caught_up:
            self.catch_up()

    def egress_draining(self, code: CloseCode = CloseCode.SHUTDOWN) -> None:
        if self._ended:
            return
        self.leaving = True
        if self.owner is None:
            self.end(code)
        else:
            self.owner.outlet_draining(code)

    def _give_up(self) -> None:
        self._stall = None
        if self.egress.paused:
            self.end(CloseCode.SLOW_CONSUMER)

    # -- catching up

    def catch_up(self) -> None:
        """Bring every lagging subscription on: at once what the tail holds, in a task of the connection what it does not."""
        if self._ended:
            return
        needs_log = self._advance() is not None
        if not self._pumping and (needs_log or not self._rested()):
            self._pumping = True
            self._spawn(self._pump, name="catch-up")

    def _rested(self) -> bool:
        """Whether nothing is left to do until the buffer drains, the hub moves on, or ever."""
        return (
            self._ended
            or self.egress.paused
            or all(sub.live or sub.position > self._hub.flushed for sub in self.subscriptions.values())
        )

    async def _pump(self) -> None:
        failures = 0
        try:
            while not self._ended:
                lagging = self._advance()
                if lagging is None:
                    if self._rested():
                        return
                    await anyio.lowlevel.checkpoint()
                    continue
                after = lagging.position
                try:
                    chunk = await self._hub.source.from_log(lagging.selection, after, self._hub.flushed)
                except UnavailableError as exc:
                    # Nothing is lost: the position stands, and the log is asked again until it answers.
                    wait = _RETRY[min(failures, len(_RETRY) - 1)]
                    failures += 1
                    log.warning("catch-up waits for the log", reason=exc.message, retry_in=wait)
                    await anyio.sleep(wait)
                    continue
                except Disconnect as exc:
                    self.end(exc.code, exc.reason)
                    return
                failures = 0
                # Time has passed: the subscription may be gone, or its peer may have stopped reading.
                if self._writable() and self._holds(lagging) and lagging.position == after:
                    self._take(lagging, chunk)
        finally:
            self._pumping = False

    def _writable(self) -> bool:
        return not self._ended and not self.egress.paused

    def _holds(self, subscription: Subscription) -> bool:
        return self.subscriptions.get(subscription.selection.channel.name) is subscription

    def _advance(self) -> Subscription | None:
        """Take what the tail holds, a bounded number of chunks; returns a subscription that needs the log, if any.

        One that needs the log holds up none of the others, and a newest value waits for no history.
        """
        hub = self._hub
        chunks = 0
        needs_log: Subscription | None = None
        behind = [sub for sub in self.subscriptions.values() if not sub.live]
        behind.sort(key=lambda sub: sub.selection.channel.kind == "log")
        for sub in behind:
            if not self._writable():
                return None
            if sub.selection.channel.kind == "latest":
                self._take_newest(sub)
                continue
            while sub.position < hub.flushed and self._writable():
                if chunks == _CHUNKS_AT_ONCE:
                    return needs_log
                chunk = hub.source.from_tail(sub.selection, sub.position, hub.flushed)
                if chunk is None:
                    needs_log = needs_log or sub
                    break
                chunks += 1
                self._take(sub, chunk)
            if sub.position == hub.flushed and self._writable():
                hub.go_live(sub)
            elif sub.position > hub.flushed:
                hub.await_position(self)
        return needs_log

    def _take(self, sub: Subscription, chunk: Chunk | Page) -> None:
        """Write what the peer's buffer takes; the rest is read again once it has drained."""
        for piece, upto in chunk.pieces():
            if not self._writable():
                return
            if piece:
                self._write(piece)
            sub.position = upto

    def _take_newest(self, sub: Subscription) -> None:
        value = sub.selection.group.value
        if value is not None and value.number > sub.seen:
            name = sub.selection.channel.name
            missed = value.number - sub.seen - 1
            if missed and sub.seen >= 0:
                self.send(Resync(channel=name, epoch=self._hub.epoch, offset=value.offset, dropped=missed))
            sub.seen = value.number
            self._write(self._hub.value_frame(sub.selection, value))
        sub.seen = max(sub.seen, 0)
        if self._writable():
            self._hub.go_live(sub)

    def _write(self, frames: bytes) -> None:
        self.touched = self._hub.clock()
        self.egress.write(frames)
