"""One subscription of a client: a bounded buffer, a position, and the rule that no event is lost or repeated."""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio

from kimera_stream.protocol.channels import channel_kind
from kimera_stream.protocol.messages import Event, Resync, SubscribeBody, Subscribed
from kimera_stream.protocol.objects import Position


@dataclass(frozen=True, slots=True)
class Gap:
    """The server could not replay from where this subscription stood: reload state over HTTP, then go on.

    Attributes:
        channel: The channel concerned.
        asked: The position that could not be recovered; None if a durable cursor was asked for.
        start: Where the subscription goes on: every event after it will come.
    """

    channel: str
    asked: Position | None
    start: Position


Item = Event | Gap | Resync


class Subscription:
    """Async iterator of what a channel carries: ``Event``, ``Gap`` and, on latest channels, ``Resync``.

    The buffer is bounded. A consumer that falls behind on a log channel makes the subscription let go of the live
    edge and come back with its position once the buffer is drained, so neither the connection nor other
    subscriptions wait for it. On a latest channel the oldest values give way.

    Made by ``Client.subscribe``; not constructed directly.
    """

    def __init__(
        self,
        channel: str,
        *,
        since: Position | str | None,
        rewind: int | None,
        filter: dict[str, Any] | None,
        capacity: int,
        catch_up: Callable[["Subscription"], Awaitable[None]],
    ) -> None:
        self.channel = channel
        self.filter = filter
        self.latest = channel_kind(channel) == "latest"
        self.position: Position | None = since if isinstance(since, Position) else None
        """Position of the last event handed to the consumer: what to store to go on later."""
        self.dropped = 0
        """Values of a latest channel that gave way to newer ones here, in the client."""
        self._cursor = since if isinstance(since, str) else None
        self._rewind = rewind
        self._capacity = max(1, capacity)
        self._catch_up = catch_up
        self._items: deque[Item] = deque()
        self._wake = anyio.Event()
        self._seen: Position | None = None
        """Last event taken into the buffer; older ones of the same epoch are repeats."""
        self._resume: Position | None = self.position
        """Where to go on after a reconnect: at least ``_seen``, further if a heartbeat said so."""
        self._behind = False
        self._ended: Exception | None = None
        self._closed = False

    def body(self) -> SubscribeBody:
        """What to ask the server for, now."""
        since: dict[str, Any] | None = None
        rewind = None
        if not self.latest:
            if self._cursor is not None:
                since = {"cursor": self._cursor}
            elif self._resume is not None and (self._rewind is None or self._seen is not None):
                since = {"epoch": self._resume.epoch, "offset": self._resume.offset}
            else:
                rewind = self._rewind
        return SubscribeBody(channel=self.channel, since=since, rewind=rewind, filter=self.filter)

    @property
    def behind(self) -> bool:
        """Whether the subscription has to be asked for again: the buffer overflowed, or the server could not take it up."""
        return self._behind

    @property
    def ended(self) -> bool:
        """Whether no more events will come."""
        return self._closed

    # -- called by the connection's reader, in the order of the wire; none of these wait --

    def started(self, asked: SubscribeBody, reply: Subscribed) -> None:
        """The server accepted ``asked``."""
        self._behind = False
        start = Position(reply.epoch, reply.offset)
        if asked.since is not None and not reply.recovered:
            previous = self._resume
            self._seen = None
            self._resume = start
            self._put(Gap(self.channel, previous, start))
        elif self._cursor is not None or self._resume is None:
            self._resume = start
        self._cursor = None

    def put_off(self) -> None:
        """The server cannot take it up at present: it stands where it is until the consumer wants more."""
        self._behind = True
        self._wake.set()

    def deliver(self, event: Event) -> None:
        """An event of this channel came in."""
        if self._behind or self._closed:
            return
        at = Position(event.epoch, event.offset)
        seen = self._seen
        if not self.latest and seen is not None and seen.epoch == at.epoch and at.offset <= seen.offset:
            return
        if len(self._items) >= self._capacity:
            if not self.latest:
                self._behind = True
                self._resume = seen or self._resume
                self._wake.set()
                return
            self._items.popleft()
            self.dropped += 1
        self._seen = self._resume = at
        self._put(event)

    def conflated(self, resync: Resync) -> None:
        """The server conflated values of this latest channel."""
        if len(self._items) < self._capacity:
            self._put(resync)

    def reached(self, epoch: str, offset: int) -> None:
        """A heartbeat: everything up to ``offset`` was sent, the filter dropped the rest.

        Only the position to resume from moves. ``_seen`` does not, so an event that is still on its way is kept.
        """
        at = self._resume
        if self.latest or self._behind or at is None or at.epoch != epoch or at.offset >= offset:
            return
        if self._rewind is None or self._seen is not None:
            self._resume = Position(epoch, offset)

    def end(self, error: Exception | None) -> None:
        """No more events: the consumer gets what is buffered, then ``error`` or the end of the iteration."""
        self._ended = error
        self._closed = True
        self._wake.set()

    def _put(self, item: Item) -> None:
        self._items.append(item)
        self._wake.set()

    # -- the consumer's side --

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        while not self._items:
            if self._closed:
                if self._ended is not None:
                    raise self._ended
                raise StopAsyncIteration
            if self._behind:
                await self._catch_up(self)
                continue
            self._wake = anyio.Event()
            await self._wake.wait()
        item = self._items.popleft()
        if isinstance(item, Event):
            self.position = Position(item.epoch, item.offset)
        elif isinstance(item, Gap):
            self.position = item.start
        return item

    async def next_event(self) -> Event:
        """The next event, passing over ``Gap`` and ``Resync``.

        Raises:
            EOFError: the subscription ended.
        """
        async for item in self:
            if isinstance(item, Event):
                return item
        raise EOFError(f"the subscription to {self.channel} has ended")
