"""Reading on from a position: out of the tail where it reaches back far enough, out of the log where not.

Subscribers that ask for the same stretch share the work: full chunks are cached (bounded in bytes), and a read of the log that
is under way serves everyone who asks for it meanwhile.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import anyio
import msgspec

from kimera_stream.core.interfaces import FrameReader, LogReader
from kimera_stream.protocol import frames
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import EventEncoder
from kimera_stream.protocol.errors import Disconnect
from kimera_stream.protocol.log import LogEntry
from kimera_stream.streaming.records import Record, Tail
from kimera_stream.streaming.selections import Selection

CHUNK_BYTES: Final = 65_536
CHUNK_EVENTS: Final = 256
_PAGE_ENTRIES: Final = 128
_FRAMES_BYTES: Final = 131_072
"""About the bytes of a page from the log: half of what a connection's buffer takes before it says stop."""
_MOST_FRAMES: Final = 1_024
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

    def pieces(self) -> Iterator[tuple[bytes, int]]:
        """What is written at once, joined, and the offset up to which everything is there with it."""
        if sum(map(len, self.frames)) <= 2 * CHUNK_BYTES:
            yield self.joined, self.upto
            return
        piece: list[bytes] = []
        size = 0
        for (offset, _), frame in zip(self.events, self.frames, strict=True):
            piece.append(frame)
            size += len(frame)
            if size >= CHUNK_BYTES:
                yield b"".join(piece), offset
                piece, size = [], 0
        yield b"".join(piece), self.upto

    def parts(self) -> Iterator[tuple[int, str, bytes]]:
        """Offset, type and payload of each event."""
        for (offset, type), frame in zip(self.events, self.frames, strict=True):
            yield offset, type, frames.payload(frame)

    @property
    def weight(self) -> int:
        """Bytes it takes: the frames, once more joined, and the tuples that name them."""
        return 2 * sum(map(len, self.frames)) + 120 * len(self.frames) + 400


@dataclass
class Page:
    """The same as the log gave it: joined, and looked into only for a reader that wants one event at a time."""

    joined: bytes
    upto: int

    def pieces(self) -> Iterator[tuple[bytes, int]]:
        """All of it at once: the log bounds it."""
        yield self.joined, self.upto

    def parts(self) -> Iterator[tuple[int, str, bytes]]:
        """Offset, type and payload of each event."""
        for _, payload in frames.split(self.joined):
            event = _event(payload)
            yield event.offset, event.type, payload

    @property
    def weight(self) -> int:
        """Bytes it takes."""
        return len(self.joined) + 400


class _Event(msgspec.Struct):
    offset: int
    type: str


_event = msgspec.json.Decoder(_Event).decode


@dataclass
class _Flight:
    done: anyio.Event = field(default_factory=anyio.Event)
    chunk: Chunk | Page | None = None


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
        self._cache: OrderedDict[tuple[object, ...], Chunk | Page] = OrderedDict()
        self._cache_bytes = 0
        self._cache_limit = cache_bytes
        self._flights: dict[tuple[object, ...], _Flight] = {}
        self._slots = anyio.CapacityLimiter(concurrency)
        self._framed = log if isinstance(log, FrameReader) else None
        self._frame_bytes = 512
        """Of a frame, about, as those that were read last."""
        self._entry_bytes = 512
        """The same of an entry that was made into events here."""
        self.log_reads = 0

    @property
    def cached_bytes(self) -> int:
        return self._cache_bytes

    def clear(self) -> None:
        """Keep no chunks; reads that are under way go on."""
        self._cache.clear()
        self._cache_bytes = 0

    def from_tail(self, selection: Selection, after: int, until: int) -> Chunk | Page | None:
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

    async def from_log(self, selection: Selection, after: int, until: int) -> Chunk | Page:
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

    async def _fly(self, key: tuple[object, ...], selection: Selection, after: int, until: int) -> Chunk | Page:
        flight = self._flights[key] = _Flight()
        try:
            async with self._slots:
                self.log_reads += 1
                chunk, more = await self._page(selection, after, until)
            if after < self._log.trimmed:
                # Retention passed by while the page was read, so it may have a hole at its start.
                raise Disconnect(CloseCode.POSITION_LOST)
            if more:
                self._keep(key, chunk)
            flight.chunk = chunk
            return chunk
        finally:
            del self._flights[key]
            flight.done.set()

    async def _page(self, selection: Selection, after: int, until: int) -> tuple[Chunk | Page, bool]:
        """The next events, and whether there may be more of them."""
        name = selection.channel.name
        if self._framed is not None and selection.encoding == "json" and selection.group.filter is None:
            limit = max(16, min(_MOST_FRAMES, _FRAMES_BYTES // self._frame_bytes))
            found = await self._framed.read_frames(
                name, head=self._encoder.head(name), after=after, limit=limit, until=until
            )
            if found.count:
                self._frame_bytes = max(1, (self._frame_bytes + len(found.frames) // found.count) // 2)
            return Page(found.frames, found.scanned if found.more else until), found.more
        limit = max(1, min(_PAGE_ENTRIES, _FRAMES_BYTES // self._entry_bytes))
        page = await self._log.read(name, after=after, limit=limit, until=until)
        if page.entries:
            size = sum(memoryview(entry.data).nbytes for entry in page.entries)
            self._entry_bytes = max(1, (self._entry_bytes + size // len(page.entries)) // 2)
        return self._encoded(selection, page.entries, page.scanned if page.more else until), page.more

    def _encoded(self, selection: Selection, entries: list[LogEntry], upto: int) -> Chunk:
        name, encoding, filter = selection.channel.name, selection.encoding, selection.group.filter
        chunk = Chunk([], [], upto)
        for entry in entries:
            record = Record(entry)
            if record.passes(filter, name, self._encoder):
                chunk.frames.append(record.frame(name, encoding, self._encoder))
                chunk.events.append((entry.offset, entry.type))
        return chunk

    def _cached(self, key: tuple[object, ...]) -> Chunk | Page | None:
        chunk = self._cache.get(key)
        if chunk is not None:
            self._cache.move_to_end(key)
        return chunk

    def _keep(self, key: tuple[object, ...], chunk: Chunk | Page) -> None:
        if (old := self._cache.pop(key, None)) is not None:
            self._cache_bytes -= old.weight
        self._cache[key] = chunk
        self._cache_bytes += chunk.weight
        while self._cache_bytes > self._cache_limit and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._cache_bytes -= dropped.weight
