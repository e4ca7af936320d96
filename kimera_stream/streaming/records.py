"""Recent entries of the log in memory, with their encodings: the tail that the live edge leaves behind.

A subscriber that fell behind by less than the tail catches up by copying frames, without a query.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from kimera_stream.protocol.codec import EventEncoder
from kimera_stream.protocol.filters import Filter
from kimera_stream.protocol.log import LOG_CHANNELS, LogEntry
from kimera_stream.protocol.messages import Encoding

_ENTRY_OVERHEAD: Final = 400
"""Estimated bytes of one record beyond its payload."""


class Record:
    """One entry and the frames made of it so far."""

    __slots__ = ("_frames", "_value", "entry", "held", "offset", "size")

    def __init__(self, entry: LogEntry) -> None:
        self.entry = entry
        self.offset = entry.offset
        self.size = memoryview(entry.data).nbytes + _ENTRY_OVERHEAD
        self.held = True
        """Whether the tail still counts it."""
        self._frames: dict[tuple[str, Encoding], bytes] = {}
        self._value: Any = msgspec.UNSET

    def frame(self, channel: str, encoding: Encoding, encoder: EventEncoder) -> bytes:
        """The entry's frame on a channel, made at the first call."""
        key = (channel, encoding)
        frame = self._frames.get(key)
        if frame is None:
            frame = self._frames[key] = encoder.frame(self.entry, channel, encoding)
        return frame

    def view(self, channel: str, encoder: EventEncoder) -> dict[str, Any]:
        """The event object as filters see it. Decodes the payload at the first call."""
        if self._value is msgspec.UNSET:
            self._value = self.entry.value()
        entry = self.entry
        return encoder.view(channel, offset=entry.offset, type=entry.type, ts=entry.ts, data=self._value)

    def passes(self, filter: Filter | None, channel: str, encoder: EventEncoder) -> bool:
        """Whether the entry's event on ``channel`` passes the filter."""
        return filter is None or filter.matches(self.view(channel, encoder))

    def settle(self) -> int:
        """Let go of what only live delivery needed; returns the bytes the record holds now."""
        self._value = msgspec.UNSET
        self.size = memoryview(self.entry.data).nbytes + _ENTRY_OVERHEAD + sum(map(len, self._frames.values()))
        return self.size


class _Lane:
    """Records of one main channel in order."""

    __slots__ = ("offsets", "records")

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.records: list[Record] = []


class Tail:
    """The newest records, bounded in bytes.

    Holds every entry with ``floor < offset <= last``, without a hole.
    """

    def __init__(self, max_bytes: int, *, last: int) -> None:
        self._max_bytes = max_bytes
        self._records: list[Record] = []
        self._start = 0  # records before it are gone; the list is cut now and then, not at every drop
        self._lanes = {channel: _Lane() for channel in LOG_CHANNELS}
        self._bytes = 0
        self.floor = last
        self.last = last

    @property
    def bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._records) - self._start

    def append(self, entry: LogEntry) -> Record:
        """Add the next entry. Its offset must be ``last + 1``."""
        record = Record(entry)
        self._records.append(record)
        for channel in entry.channels:
            lane = self._lanes.get(channel)
            if lane is not None:
                lane.offsets.append(record.offset)
                lane.records.append(record)
        self._bytes += record.size
        self.last = record.offset
        return record

    def settle(self, records: Iterable[Record]) -> None:
        """Account for frames made of ``records`` since they were appended, then drop the oldest beyond the bound."""
        for record in records:
            before = record.size
            after = record.settle()
            if record.held:
                self._bytes += after - before
        while self._bytes > self._max_bytes and self._start < len(self._records):
            record = self._records[self._start]
            self._start += 1
            record.held = False
            self._bytes -= record.size
            self.floor = record.offset
        # Dropped records stay referenced until the lists are cut, so that is done before they add up to much.
        if self._start * 8 > len(self._records):
            self._cut()

    def clear(self, *, last: int) -> None:
        """Forget everything and go on after ``last``: entries in between were not seen."""
        self._records.clear()
        self._start = 0
        self._bytes = 0
        for lane in self._lanes.values():
            lane.offsets.clear()
            lane.records.clear()
        self.floor = self.last = last

    def covers(self, after: int) -> bool:
        """Whether every entry later than ``after`` is here."""
        return after >= self.floor

    def between(self, channel: str, after: int, until: int, *, limit: int, scan: int) -> tuple[Sequence[Record], int]:
        """Records of ``channel`` with ``after < offset <= until``, at most ``limit`` of them.

        For a channel without a lane of its own at most ``scan`` records are looked through.

        Returns:
            The records, and the offset up to which the channel has been searched.
        """
        lane = self._lanes.get(channel)
        if lane is not None:
            start = bisect_right(lane.offsets, after)
            end = bisect_right(lane.offsets, until)
            if end - start > limit:
                end = start + limit
                return lane.records[start:end], lane.offsets[end - 1]
            return lane.records[start:end], until
        first = self._start + (after - self.floor)
        stop = min(self._start + (until - self.floor), first + scan)
        found: list[Record] = []
        for record in self._records[first:stop]:
            if channel in record.entry.channels:
                found.append(record)
                if len(found) == limit:
                    return found, record.offset
        return found, min(until, self.floor + (stop - self._start))

    def _cut(self) -> None:
        del self._records[: self._start]
        self._start = 0
        for lane in self._lanes.values():
            gone = bisect_right(lane.offsets, self.floor)
            del lane.offsets[:gone]
            del lane.records[:gone]
