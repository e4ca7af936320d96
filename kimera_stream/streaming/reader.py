"""A subscriber that pulls: the same channels, positions and guarantees for doors that write at their own pace (SSE).

A reader holds a position and, while it catches up, one chunk; never a queue. At the live edge it sleeps until its selection
has something new, and then reads on from where it stood, like any laggard.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import anyio

from kimera_stream.protocol import frames
from kimera_stream.protocol.codec import CODECS
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.filters import Filter
from kimera_stream.protocol.messages import Subscribed
from kimera_stream.protocol.objects import Position

if TYPE_CHECKING:
    from kimera_stream.streaming.hub import Hub
    from kimera_stream.streaming.selections import Selection


class ReaderEvent(NamedTuple):
    """``payload`` is the event object as JSON, the same bytes that WebSocket subscribers get."""

    offset: int
    type: str
    payload: bytes


class Reader:
    """See ``Hub.reader``. Events in order; ends when the hub does.

    Raises, as the next event is asked for:
        Disconnect: the log was trimmed beyond the position (4002).
    """

    def __init__(self, hub: "Hub", selection: "Selection", position: int) -> None:
        self._hub = hub
        self._selection = selection
        self._position = position
        self._seen = 0
        self._news = anyio.Event()
        self._asleep = False
        self._ended = False
        self._events = self._read()

    def __aiter__(self) -> "Reader":
        return self

    async def __anext__(self) -> ReaderEvent:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Nothing more is asked for."""
        await self._events.aclose()

    @property
    def reached(self) -> int | None:
        """Everything up to here was given out, or does not pass the filter; None while there may be more to give out now."""
        if not self._asleep or self._ended:  # a defect ends readers that were not woken for what is flushed by then
            return None
        return max(self._position, self._hub.flushed)

    def wake(self, position: int) -> None:
        if self._asleep:
            self._asleep = False
            self._position = max(self._position, position)
            self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    async def _read(self) -> AsyncGenerator[ReaderEvent, None]:
        latest = self._selection.channel.kind == "latest"
        while not self._ended:
            if latest:
                value = self._selection.group.value
                if value is not None and value.number > self._seen:
                    self._seen = value.number
                    frame = self._hub.value_frame(self._selection, value)
                    yield ReaderEvent(value.offset, value.type, frames.payload(frame))
                    continue
            else:
                while self._position < self._hub.flushed and not self._closed():
                    async for event in self._chunk():
                        yield event
            await self._sleep()

    async def _chunk(self) -> AsyncGenerator[ReaderEvent, None]:
        hub = self._hub
        chunk = hub.source.from_tail(self._selection, self._position, hub.flushed)
        if chunk is None:
            try:
                chunk = await hub.source.from_log(self._selection, self._position, hub.flushed)
            except UnavailableError as exc:
                await anyio.sleep(exc.retry_after or 1.0)
                return
        else:
            await anyio.lowlevel.checkpoint()
        for offset, type, payload in chunk.parts():
            self._position = offset
            yield ReaderEvent(offset, type, payload)
        self._position = max(self._position, chunk.upto)

    def _closed(self) -> bool:
        return self._ended

    async def _sleep(self) -> None:
        behind = self._selection.channel.kind == "log" and self._position < self._hub.flushed
        if self._ended or behind:
            return
        self._news = anyio.Event()
        self._asleep = True
        try:
            await self._news.wait()
        finally:
            self._asleep = False


@asynccontextmanager
async def read(
    hub: "Hub",
    channel: str,
    *,
    since: Position | None,
    filter: Filter | None,
    rewind: int | None,
    principal: str,
) -> AsyncIterator[tuple[Subscribed, Reader]]:
    """Open a reader; the first of the pair says where it starts and whether it recovered, the second yields the events.

    Raises:
        BadChannelError, BadPositionError, BadRequestError: as for a subscription.
    """
    start = await hub.resolve(channel, since, rewind)
    position = hub.flushed if start.position is None else start.position
    selection = hub.enter(channel, filter, CODECS["json"], principal)
    reader = Reader(hub, selection, position)
    selection.waiters[reader] = None
    hub.add_reader(reader)
    begun = Subscribed(
        channel=channel,
        epoch=hub.epoch,
        offset=position,
        was_recovering=start.was_recovering,
        recovered=start.recovered,
    )
    try:
        if hub.ended:
            reader.end()
        yield begun, reader
    finally:
        with anyio.CancelScope(shield=True):
            await reader.aclose()
        hub.remove_reader(reader)
        selection.waiters.pop(reader, None)
        hub.exit(selection, principal)
