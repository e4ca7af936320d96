"""Reading on from a position: out of the tail where it reaches back far enough, out of the log where not.

Subscribers that ask for the same stretch share the work: full chunks are cached (bounded in bytes), and a read of the log that
is under way serves everyone who asks for it meanwhile.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import anyio

from kimera_stream.core.interfaces import LogReader
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import EventEncoder
from kimera_stream.protocol.errors import Disconnect
from kimera_stream.protocol.log import LogEntry
from kimera_stream.streaming.records import Record, Tail
from kimera_stream.streaming.selections import Selection

CHUNK_BYTES: Final = 65_536
CHUNK_EVENTS: Final = 256
_PAGE_ENTRIES: Final = 128
_SCAN: Final = 8_192
"""Records of the tail looked through at once for a channel that has no lane of its own."""


@dataclass
class Chunk:
    """Consecutive events of a selection.

    Attributes:
        frames: One per event.
        events: (offset, type) of each.
        upto: Everything of the selection up to here is in this chunk or before it.
    """

    frames: list[bytes]
    events: list[tuple[int, str]]
    upto: int

    @cached_property
    def joined(self) -> bytes:
        return b"".join(self.frames)


@dataclass
class _Flight:
    done: anyio.Event = field(default_factory=anyio.Event)
    chunk: Chunk | None = None


class CatchUp:
    """The source that every lagging subscriber and every reader reads from.

    Args:
        concurrency: Reads of the log under way at once at most.
        cache_bytes: Bytes of chunks kept for others that ask for the same.
    """

    def __init__(
        self, log: LogReader, tail: Tail, encoder: EventEncoder, *, cache_bytes: int, concurrency: int = 16
    ) -> None:
        self._log = log
        self._tail = tail
        self._encoder = encoder
        self._cache: OrderedDict[tuple[object, ...], Chunk] = OrderedDict()
        self._cache_bytes = 0
        self._cache_limit = cache_bytes
        self._flights: dict[tuple[object, ...], _Flight] = {}
        self._slots = anyio.CapacityLimiter(concurrency)
        self.log_reads = 0

    @property
    def cached_bytes(self) -> int:
        return self._cache_bytes

    def clear(self) -> None:
        """Keep no chunks; reads that are under way go on."""
        self._cache.clear()
        self._cache_bytes = 0

    def from_tail(self, selection: Selection, after: int, until: int) -> Chunk | None:
        """The next events after ``after`` and up to ``until``; None where the tail does not reach back so far."""
        if not self._tail.covers(after):
            return None
        key = (*selection.key, after)
        if (cached := self._cached(key)) is not None and cached.upto <= until:
            return cached
        name, encoding, filter = selection.channel.name, selection.encoding, selection.group.filter
        records, upto = self._tail.between(name, after, until, limit=CHUNK_EVENTS, scan=_SCAN)
        chunk = Chunk([], [], upto)
        looked: list[Record] = []
        size = 0
        for record in records:
            looked.append(record)
            if record.passes(filter, name, self._encoder):
                frame = record.frame(name, encoding, self._encoder)
                chunk.frames.append(frame)
                chunk.events.append((record.offset, record.entry.type))
                size += len(frame)
                if size >= CHUNK_BYTES:
                    chunk.upto = record.offset
                    break
        self._tail.settle(looked)
        if chunk.upto < until:
            self._keep(key, chunk)
        return chunk

    async def from_log(self, selection: Selection, after: int, until: int) -> Chunk:
        """The next events after ``after`` and up to ``until``, read from the log.

        Raises:
            Disconnect: entries after ``after`` are gone from the log (4002): going on would skip them silently.
            UnavailableError: the log cannot be read at present.
        """
        key = (*selection.key, after)
        while True:
            if after < self._log.trimmed:
                raise Disconnect(CloseCode.POSITION_LOST)
            if (cached := self._cached(key)) is not None and cached.upto <= until:
                return cached
            flight = self._flights.get(key)
            if flight is None:
                return await self._fly(key, selection, after, until)
            await flight.done.wait()
            if flight.chunk is not None and flight.chunk.upto <= until:
                return flight.chunk

    async def _fly(self, key: tuple[object, ...], selection: Selection, after: int, until: int) -> Chunk:
        flight = self._flights[key] = _Flight()
        try:
            async with self._slots:
                self.log_reads += 1
                page = await self._log.read(selection.channel.name, after=after, limit=_PAGE_ENTRIES, until=until)
            if after < self._log.trimmed:
                # Retention passed by while the page was read, so it may have a hole at its start.
                raise Disconnect(CloseCode.POSITION_LOST)
            chunk = self._encoded(selection, page.entries, page.scanned if page.more else until)
            if page.more:
                self._keep(key, chunk)
            flight.chunk = chunk
            return chunk
        finally:
            del self._flights[key]
            flight.done.set()

    def _encoded(self, selection: Selection, entries: list[LogEntry], upto: int) -> Chunk:
        name, encoding, filter = selection.channel.name, selection.encoding, selection.group.filter
        chunk = Chunk([], [], upto)
        for entry in entries:
            record = Record(entry)
            if record.passes(filter, name, self._encoder):
                chunk.frames.append(record.frame(name, encoding, self._encoder))
                chunk.events.append((entry.offset, entry.type))
        return chunk

    def _cached(self, key: tuple[object, ...]) -> Chunk | None:
        chunk = self._cache.get(key)
        if chunk is not None:
            self._cache.move_to_end(key)
        return chunk

    def _keep(self, key: tuple[object, ...], chunk: Chunk) -> None:
        if (old := self._cache.pop(key, None)) is not None:
            self._cache_bytes -= _weight(old)
        self._cache[key] = chunk
        self._cache_bytes += _weight(chunk)
        while self._cache_bytes > self._cache_limit and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._cache_bytes -= _weight(dropped)


def _weight(chunk: Chunk) -> int:
    # The frames, once more joined, and the tuples that name them.
    return 2 * sum(map(len, chunk.frames)) + 120 * len(chunk.frames) + 400
