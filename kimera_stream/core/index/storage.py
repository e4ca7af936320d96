"""Chunks of rows: fixed numbers of slots, column by column. Growing adds a chunk and moves nothing.

A chunk's rows are written only while no scan can see them (see ``FlatIndex``), so nothing here needs a lock.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from kimera_stream.kernels import EMPTY_RECORD, Record, Segment, record_length, stride_of, write_row, write_rows
from kimera_stream.kernels.layout import F32, I64, KEY_BITS, U8, U32, U64
from kimera_stream.protocol.errors import UnavailableError

CHUNK_BITS = 11
CHUNK_ROWS = 1 << CHUNK_BITS
ARENA_CHUNKS = 8
"""Chunks whose rows are allocated together: large enough for huge pages, which scans run a fifth faster on."""
_FIRST_POOL = 256


def anonymous(rows: int, row_bytes: int) -> U8:
    """uint8 (rows, row_bytes) of fresh memory: page-aligned, zero, not resident until touched, huge pages if possible."""
    memory = mmap.mmap(-1, rows * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without huge pages: the memory is as good, only slower to walk
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(rows, row_bytes)


def texts_at(chunks: "Sequence[Chunk]", slots: I64) -> U32:
    """Signatures of the texts in the slots, uint32 (n,)."""
    found = (chunks[slot >> CHUNK_BITS].text[slot & CHUNK_ROWS - 1] for slot in slots.tolist())
    return np.fromiter(found, np.uint32, len(slots))


class RowStore:
    """Where rows are kept: the codes in memory, the float32 rows in unnamed files of a directory, mapped, so that the system may evict them.

    Files are made ahead, by a thread, so that taking one never waits for a disk.

    Args:
        directory: None keeps the float32 rows in memory as well.
        dim: Numbers per row.
    """

    def __init__(self, directory: Path | None, dim: int) -> None:
        self._directory = directory
        self._dim = dim
        self._mapped: list[F32] = []
        self._exact: list[F32] = []
        self._codes: list[U8] = []

    @property
    def in_memory(self) -> bool:
        """Whether there are no files at all."""
        return self._directory is None

    def missing(self, chunks: int) -> int:
        """How many files are still to be made so that rows for ``chunks`` are at hand."""
        return 0 if self._directory is None else max(0, -(-(chunks - len(self._mapped)) // ARENA_CHUNKS))

    def make(self) -> None:
        """Make a file for the next chunks. Blocking: for a worker thread.

        Raises:
            UnavailableError: the disk is full or not writable. The space is reserved here, so that a full disk is an
                error now and not a bus error at the first write.
        """
        assert self._directory is not None
        size = ARENA_CHUNKS * CHUNK_ROWS * self._dim * 4
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory, prefix="rows-") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise UnavailableError(f"index: no space for vectors in the data directory ({error.strerror})") from error
        self._mapped.extend(np.frombuffer(memory, np.float32).reshape(ARENA_CHUNKS, CHUNK_ROWS, self._dim))

    def take(self) -> tuple[U8, F32, bool]:
        """uint8 codes (CHUNK_ROWS, stride), float32 (CHUNK_ROWS, dim), and whether the latter is in a file.

        Where no file is at hand it is in memory.
        """
        if self._mapped:
            return self.take_codes(), self._mapped.pop(0), True
        if not self._exact:
            rows = anonymous(ARENA_CHUNKS * CHUNK_ROWS, self._dim * 4).view(np.float32)
            self._exact.extend(rows.reshape(ARENA_CHUNKS, CHUNK_ROWS, self._dim))
        return self.take_codes(), self._exact.pop(0), False

    def take_codes(self) -> U8:
        """uint8 (CHUNK_ROWS, stride) alone."""
        if not self._codes:
            stride = stride_of(self._dim)
            rows = anonymous(ARENA_CHUNKS * CHUNK_ROWS, stride)
            self._codes.extend(rows.reshape(ARENA_CHUNKS, CHUNK_ROWS, stride))
        return self._codes.pop(0)


class Chunk:
    """``CHUNK_ROWS`` slots from ``base`` on, all with vectors or all without."""

    SMALL_BYTES = 24
    """Of a row without its vector."""

    def __init__(self, base: int, codes: U8 | None = None, exact: F32 | None = None, *, mapped: bool = False) -> None:
        self.base = base
        self.codes = codes
        self.exact = exact
        self.mapped = mapped
        """Whether the float32 rows are in a file."""
        self.grades: U8 | None = None if codes is None else np.zeros(CHUNK_ROWS, np.uint8)
        self.text: U32 = np.zeros(CHUNK_ROWS, np.uint32)
        self.keys: U64 = np.zeros(CHUNK_ROWS, np.uint64)
        self.layers: U64 = np.zeros(CHUNK_ROWS, np.uint64)
        self.record: U32 = np.zeros(CHUNK_ROWS, np.uint32)
        self.pool: U64 = np.zeros(_FIRST_POOL, np.uint64)
        self.used = 1
        """Words of the pool in use; word 0 is "no record"."""
        self.garbage = 0
        """Words of records that no row refers to any more."""
        self.copied_on_write = False
        """Whether a write to a float32 row makes a private copy of its pages: they are those of a snapshot."""
        self.copies = 0
        """Rows written since then."""

    def segment(self) -> Segment:
        """What a kernel scans."""
        return Segment(
            self.base,
            CHUNK_ROWS,
            codes=self.codes,
            grades=self.grades,
            exact=self.exact,
            text=self.text,
            keys=self.keys,
            layers=self.layers,
            record=self.record,
            pool=self.pool,
        )

    @property
    def copied_bytes(self) -> int:
        """Memory that private copies of mapped pages take at most."""
        if self.exact is None or not self.copies:
            return 0
        row_bytes = 4 * int(self.exact.shape[1]) + mmap.PAGESIZE
        return min(self.exact.nbytes, self.copies * row_bytes)

    @property
    def pool_bytes(self) -> int:
        return self.pool.nbytes

    def write(self, row: int, vector: F32 | None, text: int, record: Record) -> tuple[float, bool]:
        """Fill a row that no scan can see. Returns the norm lost to 8 bits, and whether arrays were replaced.

        Raises:
            ValueError: the vector is not finite; nothing visible was written.
        """
        lost = 0.0
        if vector is not None:
            lost = write_row(vector, self.codes, self.grades, self.exact, row)
            self.copies += self.copied_on_write
        replaced = False
        self.text[row] = text
        self.keys[row] = record.keys | record.subject
        self.layers[row] = record.layers
        if record.words:
            replaced = self._room_for(len(record.words))
            self.pool[self.used : self.used + len(record.words)] = record.words
            self.record[row] = self.used
            self.used += len(record.words)
        else:
            self.record[row] = 0
        return lost, replaced

    def write_many(self, row: int, vectors: F32 | None, text: U32, records: Sequence[Record]) -> tuple[float, bool]:
        """As ``write`` of each into the rows from ``row`` on; the largest norm lost, and whether arrays were replaced."""
        count, lost = len(records), 0.0
        if vectors is not None:
            lost = write_rows(vectors, self.codes, self.grades, self.exact, row)
            self.copies += count * self.copied_on_write
        self.text[row : row + count] = text
        self.keys[row : row + count] = [record.keys | record.subject for record in records]
        self.layers[row : row + count] = [record.layers for record in records]
        starts: list[int] = []
        words: list[int] = []
        for record in records:
            starts.append(self.used + len(words) if record.words else 0)
            words += record.words
        replaced = bool(words) and self._room_for(len(words))
        self.record[row : row + count] = starts
        self.pool[self.used : self.used + len(words)] = words
        self.used += len(words)
        return lost, replaced

    def exact_row(self, row: int) -> F32:
        """The float32 vector of a row, a view."""
        assert self.exact is not None
        vector: F32 = self.exact[row]
        return vector

    def record_of(self, row: int) -> Record:
        """The record of a row, to be written elsewhere."""
        at = int(self.record[row])
        if at == 0:
            return EMPTY_RECORD
        words = self.pool[at : at + record_length(int(self.pool[at]))].tolist()
        word = int(self.keys[row])
        keys = word & (1 << KEY_BITS) - 1
        return Record(tuple(words), keys, word - keys, int(self.layers[row]))

    def live_bytes(self, live: U8, row_bytes: int) -> int:
        """Bytes of the live rows (0/1 per row), each with its record."""
        heads = self.pool[self.record[live.astype(bool) & (self.record != 0)]].tolist()
        return int(live.sum()) * row_bytes + 8 * sum(map(record_length, heads))

    def forget(self, row: int) -> None:
        """The row's record is garbage from now on. The row itself stays readable for running scans."""
        at = int(self.record[row])
        if at:
            self.garbage += record_length(int(self.pool[at]))

    def compact(self, live: U8) -> None:
        """New pool and record column with the records of live rows (0/1 per row) only. Scans keep the old ones."""
        record = np.zeros(CHUNK_ROWS, np.uint32)
        parts = [self.pool[:1]]
        used = 1
        for row in np.flatnonzero(live.astype(bool) & (self.record != 0)).tolist():
            at = int(self.record[row])
            words = record_length(int(self.pool[at]))
            parts.append(self.pool[at : at + words])
            record[row] = used
            used += words
        pool = np.zeros(max(_FIRST_POOL, used + used // 2), np.uint64)
        pool[:used] = np.concatenate(parts)
        self.record, self.pool, self.used, self.garbage = record, pool, used, 0

    def _room_for(self, words: int) -> bool:
        if self.used + words <= len(self.pool):
            return False
        pool = np.zeros(max(2 * len(self.pool), self.used + words), np.uint64)
        pool[: self.used] = self.pool[: self.used]
        self.pool = pool
        return True
