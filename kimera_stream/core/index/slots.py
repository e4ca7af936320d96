"""Who holds which slot: live bits, free lists, pins, and the order of age. One writer, on the event loop."""

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from kimera_stream.core.index.storage import CHUNK_ROWS
from kimera_stream.kernels.layout import U8, U64

_WORDS = CHUNK_ROWS // 64
_NONE = -1
BARE = 0
"""Kind of a chunk of rows without vectors."""
LOOSE = 1
"""Kind of a chunk of rows with vectors."""


class Slots:
    """Live bits and what may be written.

    A scan *pins* the live bits: it gets a copy of its own, and a slot that is freed while the scan runs is not handed
    out again before it ends. So a row that a scan can see is never written, and scans need no locks.
    """

    def __init__(self) -> None:
        self._bits = np.zeros(0, np.uint64)
        self._words = self._bits.data
        self._clock = 0
        self._pins: set[int] = set()
        self._quarantine: deque[tuple[int, int]] = deque()
        self._free: dict[int, list[int]] = {}
        self._kind: list[int] = []
        self.live = 0
        self.published: deque[int] | None = None
        """Where each slot is noted that is published, if anyone asks for it."""

    @property
    def capacity(self) -> int:
        """Slots in all chunks."""
        return len(self._kind) * CHUNK_ROWS

    @property
    def tombstones(self) -> int:
        """Freed slots that wait for reuse or for the end of a scan."""
        return sum(map(len, self._free.values())) + len(self._quarantine)

    @property
    def bytes(self) -> int:
        return self._bits.nbytes + 8 * self.tombstones

    def add_chunk(self, kind: int) -> int:
        """Bits for one more chunk, all dead; returns its first slot. Slots are reused for their own kind only."""
        base = self.capacity
        self._bits = np.concatenate([self._bits, np.zeros(_WORDS, np.uint64)])
        self._words = self._bits.data
        self._kind.append(kind)
        return base

    def reuse(self, kind: int) -> int | None:
        """A freed slot of this kind, taken off the list."""
        free = self._free.get(kind)
        return free.pop() if free else None

    def give_back(self, slot: int) -> None:
        """A slot that was taken but not published."""
        self._free.setdefault(self._kind[slot // CHUNK_ROWS], []).append(slot)

    @property
    def kinds(self) -> list[int]:
        """Kind of each chunk."""
        return self._kind

    def publish(self, slot: int) -> None:
        """From now on scans see the row."""
        self._words[slot >> 6] |= 1 << (slot & 63)
        self.live += 1
        noted = self.published
        if noted is not None:
            noted.append(slot)

    def publish_many(self, slots: Sequence[int]) -> None:
        """As ``publish`` of each."""
        if not slots:
            return
        places = np.array(slots, np.int64)
        np.bitwise_or.at(self._bits, places >> 6, np.uint64(1) << (places & 63).astype(np.uint64))
        self.live += len(slots)
        if self.published is not None:
            self.published.extend(slots)

    def release(self, slot: int) -> None:
        """From now on new scans do not see the row; it may be written once the running ones have ended."""
        self._words[slot >> 6] &= ~(1 << (slot & 63)) & 0xFFFF_FFFF_FFFF_FFFF
        self.live -= 1
        if self._pins:
            self._quarantine.append((self._clock, slot))
        else:
            self.give_back(slot)

    def is_live(self, slot: int) -> bool:
        return bool(self._words[slot >> 6] >> (slot & 63) & 1)

    def chunk_live(self, base: int) -> U8:
        """0 or 1 per row of the chunk at ``base``."""
        words = self._bits[base // 64 : base // 64 + _WORDS]
        return np.unpackbits(words.view(np.uint8), bitorder="little")

    @classmethod
    def restored(cls, kinds: list[int], bits: U64, used: list[int]) -> "Slots":
        """Slots as a snapshot has them; dead ones below ``used`` rows of their chunk are free."""
        slots = cls()
        slots._kind = list(kinds)
        slots._bits = bits
        slots._words = bits.data
        slots.live = int(np.bitwise_count(bits).sum())
        for i, rows in enumerate(used):
            dead = np.flatnonzero(slots.chunk_live(i * CHUNK_ROWS)[:rows] == 0) + i * CHUNK_ROWS
            slots._free.setdefault(kinds[i], []).extend(dead.tolist())
        return slots

    @contextmanager
    def pin(self) -> Iterator[U64]:
        """A private copy of the live bits. Enter and leave on the writer's thread."""
        self._clock += 1
        token = self._clock
        self._pins.add(token)
        try:
            yield self._bits.copy()
        finally:
            self._pins.remove(token)
            oldest = min(self._pins, default=self._clock + 1)
            while self._quarantine and self._quarantine[0][0] < oldest:
                self.give_back(self._quarantine.popleft()[1])


class Age:
    """Slots in the order they were published: a doubly linked list in two arrays, 8 bytes a slot."""

    def __init__(self) -> None:
        self._before = array("i")
        self._after = array("i")
        self._first = self._last = _NONE

    @property
    def oldest(self) -> int | None:
        return None if self._first == _NONE else self._first

    @property
    def bytes(self) -> int:
        return 8 * len(self._before)

    def __iter__(self) -> Iterator[int]:
        slot = self._first
        while slot != _NONE:
            yield slot
            slot = self._after[slot]

    def copy(self) -> "Age":
        """The order as it is now: two copies of arrays, nothing per slot."""
        copied = Age()
        copied._before, copied._after = self._before[:], self._after[:]
        copied._first, copied._last = self._first, self._last
        return copied

    @classmethod
    def of(cls, order: npt.NDArray[np.int64]) -> "Age":
        """The slots of ``order``, oldest first."""
        age = cls()
        if len(order):
            size = -(-(int(order.max()) + 1) // CHUNK_ROWS) * CHUNK_ROWS
            before, after = np.full(size, _NONE, np.intc), np.full(size, _NONE, np.intc)
            before[order[1:]], after[order[:-1]] = order[:-1], order[1:]
            age._before, age._after = array("i", before.tobytes()), array("i", after.tobytes())
            age._first, age._last = int(order[0]), int(order[-1])
        return age

    def append(self, slot: int) -> None:
        """The slot is the newest."""
        if slot >= len(self._before):
            missing = array("i", [_NONE]) * (slot + 1 - len(self._before) + CHUNK_ROWS - 1)
            self._before += missing
            self._after += missing
        self._before[slot], self._after[slot] = self._last, _NONE
        if self._last == _NONE:
            self._first = slot
        else:
            self._after[self._last] = slot
        self._last = slot

    def remove(self, slot: int) -> None:
        """The slot is not in the order any more."""
        before, after = self._before[slot], self._after[slot]
        if before == _NONE:
            self._first = after
        else:
            self._after[before] = after
        if after == _NONE:
            self._last = before
        else:
            self._before[after] = before
