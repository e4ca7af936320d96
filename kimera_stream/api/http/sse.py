"""Events of one channel as Server-Sent Events.

Each event is ``id: epoch:offset``, ``event: <type>`` and the event object as ``data``. The first event is ``subscribed``: where
the stream starts and whether it recovered. A client that reconnects with ``Last-Event-ID`` misses nothing and sees nothing twice.

In quiet there are heartbeats: a comment, and the position as an ``id:`` without an event, which moves the client's ``Last-Event-ID``. So
one whose filter drops everything does not stay where its last event was until the log no longer reaches back so far.
"""

import time
from typing import Final

import anyio
import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from kimera_stream.api.http.content import EVENT_STREAM
from kimera_stream.api.http.door import EventHub, HttpDoor, ReaderEvent, ReaderEvents, ReaderStart
from kimera_stream.api.http.outflow import STOP_PATIENCE, Outflow, PeerStalled
from kimera_stream.api.http.protocol import abort
from kimera_stream.core.access import Principal
from kimera_stream.infrastructure.tasks.child import begin_child
from kimera_stream.protocol.errors import BadPositionError, Disconnect
from kimera_stream.protocol.filters import Filter
from kimera_stream.protocol.objects import Position

log = structlog.get_logger(__name__)

HEADERS: Final = [
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy must not hold events back
]
RECONNECT_MS: Final = 1000
HEARTBEAT: Final = b": heartbeat\n"
MAX_OFFSET: Final = 2**63 - 1
MAX_DIGITS: Final = 19


class SubscribedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Data of the first event."""

    channel: str
    epoch: str
    offset: int
    was_recovering: bool
    recovered: bool


def parse_position(text: str, field: str) -> Position:
    """``epoch:offset`` as a position.

    Raises:
        BadPositionError: it is not one.
    """
    epoch, colon, offset = text.strip().rpartition(":")
    number = offset.isascii() and offset.isdecimal() and len(offset) <= MAX_DIGITS
    if not colon or not epoch or not number or int(offset) > MAX_OFFSET:
        raise BadPositionError(f"{field}: expected EPOCH:OFFSET, got {text[:80]!r}", field=field)
    return Position(epoch, int(offset))


def subscribed_event(start: ReaderStart) -> bytes:
    """The first event: its id is where the stream starts, so that a client that got no other can resume."""
    body = SubscribedEvent(
        channel=start.channel,
        epoch=start.epoch,
        offset=start.offset,
        was_recovering=start.was_recovering,
        recovered=start.recovered,
    )
    return b"retry: %d\nid: %b:%d\nevent: subscribed\ndata: %b\n\n" % (
        RECONNECT_MS,
        start.epoch.encode(),
        start.offset,
        msgspec.json.encode(body),
    )


def heartbeat(epoch: bytes, reached: int | None) -> bytes:
    """A sign of life, with the position where nothing is in flight. A browser takes the id and makes no event of it."""
    return HEARTBEAT + (b"\n" if reached is None else b"id: %b:%d\n\n" % (epoch, reached))


def event_bytes(epoch: bytes, event: ReaderEvent) -> bytes:
    """One event. JSON holds no line breaks, so its data is one line."""
    return b"id: %b:%d\nevent: %b\ndata: %b\n\n" % (epoch, event.offset, event.type.encode(), event.payload)


class EventStream:
    """The ASGI application of one such request. ``since_named``: what the position came as, for errors.

    Raises, before anything is sent:
        BadChannelError, BadPositionError: as the reader does.
    """

    def __init__(
        self,
        door: HttpDoor,
        hub: EventHub,
        principal: Principal,
        *,
        channel: str,
        since: Position | None,
        since_named: str,
        filter: Filter | None,
        rewind: int | None,
    ) -> None:
        self._door = door
        self._hub = hub
        self._principal = principal
        self._channel = channel
        self._since = since
        self._since_named = since_named
        self._filter = filter
        self._rewind = rewind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gauge = self._door.metrics.http_streams.labels("sse")
        with self._door.streams.one("sse", self._door.settings.api.max_connections), gauge.track_inprogress():
            reader = self._hub.reader(
                self._channel,
                since=self._since,
                filter=self._filter,
                rewind=self._rewind,
                principal=self._principal.id,
            )
            try:
                async with reader as (start, events):
                    if scope["method"] == "HEAD":
                        # All that can be refused has been looked at: the same answer as to GET, without the events.
                        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                        await send({"type": "http.response.body", "body": b""})
                    else:
                        await self._follow(start, events, scope, receive, send)
            except BadPositionError as error:
                if self._since_named == "since":
                    raise
                words = error.message.partition(": ")[2]
                raise BadPositionError(f"{self._since_named}: {words}", field=self._since_named) from error

    async def _follow(
        self, start: ReaderStart, events: ReaderEvents, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            await self._stream(start, events, receive, send)
        except* PeerStalled:
            log.info("an event stream was given up: its client does not read", channel=self._channel)
            abort(scope)

    async def _stream(self, start: ReaderStart, events: ReaderEvents, receive: Receive, send: Send) -> None:
        settings = self._door.settings.stream
        outflow = Outflow(send, max_bytes=settings.outbox_bytes, patience=settings.outbox_age)
        pumping = anyio.CancelScope()
        sent = self._door.metrics.http_events

        epoch = start.epoch.encode()

        async def pump() -> None:
            with pumping:
                try:
                    async for event in events:
                        await outflow.put(event_bytes(epoch, event))
                        sent.inc()
                except Disconnect as end:
                    # The log no longer holds what comes next. The client asks again and is told `recovered: false`.
                    log.info("an event stream lost its position", channel=self._channel, reason=end.reason)
            outflow.close(within=STOP_PATIENCE if self._door.streams.events_stopping.is_set() else None)

        async def watch_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()

        async def end_at_stop() -> None:
            await self._door.streams.events_stopping.wait()
            pumping.cancel()

        async def end_at_expiry(expires: int) -> None:
            await anyio.sleep(max(0.0, expires - time.time()))
            pumping.cancel()

        async def end_when_revoked() -> None:
            await self._door.authenticator.revoked(self._principal)
            pumping.cancel()

        async def keep_alive() -> None:
            while True:
                quiet_for = anyio.current_time() - outflow.sent_at
                if quiet_for < settings.ping_interval:
                    await anyio.sleep(settings.ping_interval - quiet_for)
                elif outflow.buffered:
                    await anyio.sleep(settings.ping_interval)
                else:
                    await outflow.put(heartbeat(epoch, events.reached))
                    await anyio.sleep(settings.ping_interval)

        await outflow.put(subscribed_event(start))
        async with anyio.create_task_group() as group:
            begin_child(group, watch_client, name="sse:client")
            begin_child(group, pump, name="sse:events")
            begin_child(group, keep_alive, name="sse:heartbeat")
            begin_child(group, end_at_stop, name="sse:stop")
            if self._principal.expires is not None:
                begin_child(group, end_at_expiry, self._principal.expires, name="sse:expiry")
            if self._principal.credential:
                begin_child(group, end_when_revoked, name="sse:revoked")
            await outflow.write_out({"type": "http.response.start", "status": 200, "headers": HEADERS})
            group.cancel_scope.cancel()
