"""The index in one file, so that a start maps it and replays only the tail of the log.

    magic, length and checksum of the header, header (JSON), then sections, each on a page of its own:
    live bits, ids, interned values, order of age, and the columns of each chunk

and what else follows the same log (``extra:NAME``). Every section has a checksum. The file is written beside its place and
renamed onto it, so there is a whole one or none. Float32 rows are mapped, private and copied on write; everything else is
read into memory, where scans walk it faster.

A snapshot names the entry of the log up to which it reaches, by offset and by digest: after a backup was put in the place of
the database, the same offset of the same epoch may hold something else.
"""

import errno
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kimera_stream.core.index.slots import LOOSE, Age
from kimera_stream.core.index.storage import CHUNK_ROWS, Chunk, RowStore
from kimera_stream.core.index.values import HeldValues
from kimera_stream.core.interfaces import Threads
from kimera_stream.kernels import stride_of
from kimera_stream.kernels.layout import U64
from kimera_stream.protocol.errors import KimeraError, UnavailableError

_MAGIC = b"KIMIDX\x00\x05"
_PREFIX = struct.Struct("<8sII")
_PAGE = 4096
_HEADER_LIMIT = 1 << 28
_SMALL = ("grades", "text", "keys", "layers", "record")
_EXTRA = "extra:"
_VALUES_AT_ONCE = 4096
_SYNC_BYTES = 64 << 20
"""Written between two syncs: one sync of a whole gigabyte would hold up those of the log on the same disk."""
RESERVE = 32 << 20
"""Bytes that a snapshot leaves free on its disk: the log needs them more."""

Extras = dict[str, bytes]
Reason = Literal["missing", "damaged", "foreign", "ahead", "behind", "diverged"]


class SnapshotError(KimeraError):
    """There is no usable snapshot: rebuild the index from the vault.

    ``reason``: ``missing``; ``damaged`` (cut short, or a checksum does not fit); ``foreign`` (another format, encoder,
    dimension or log); ``ahead`` (of the log, which was put back to an earlier state); ``diverged`` (the log holds something
    else at its offset); ``behind`` (what followed has been dropped from the log).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class SnapshotAbandonedError(KimeraError):
    """The writing of a snapshot was given up because the server stops; a former one is still there."""


@dataclass(frozen=True, slots=True)
class LogPoint:
    """An entry of the log: ``digest`` is of its content, empty at offset 0."""

    epoch: str
    offset: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What a snapshot covers: everything up to and including ``point`` of the log."""

    point: LogPoint
    geoids: int
    bytes: int


class _Section(msgspec.Struct, frozen=True):
    name: str
    chunk: int
    dtype: str
    start: int
    bytes: int
    checksum: int


class _Header(msgspec.Struct, frozen=True):
    dimension: int
    model: str
    epoch: str
    offset: int
    digest: str
    geoids: int
    chunk_rows: int
    margin: float
    used: list[int]
    """Rows of each chunk that were ever used."""
    kinds: list[int]
    """Kind of each chunk, see ``slots.py``."""
    garbage: list[int]
    """Words of each chunk's records that no row refers to."""
    sections: list[_Section]


@dataclass(slots=True)
class IndexState:
    """What is saved and loaded. While it is saved nobody writes the rows that ``bits`` shows."""

    margin: float
    bits: U64
    ids: list[str | None]
    values: HeldValues
    order: Age | None
    """None where the policy needs no order."""
    chunks: list[Chunk]
    used: list[int]
    kinds: list[int]

    def slots_by_id(self) -> dict[str, int]:
        """Where each id is."""
        return {name: slot for slot, name in enumerate(self.ids) if name is not None}

    def live_slots(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(np.unpackbits(self.bits.view(np.uint8), bitorder="little")).astype(np.int64)


def _columns(state: IndexState) -> Iterator[tuple[str, int, npt.NDArray[Any], int]]:
    """(name, chunk, array, elements to keep room for)."""
    slots = state.live_slots()
    names = [(state.ids[slot] or "").encode() for slot in slots.tolist()]
    yield "bits", -1, state.bits, 0
    yield "id_lengths", -1, np.array([len(name) for name in names], np.uint16), 0
    yield "ids", -1, np.frombuffer(b"".join(names), np.uint8), 0
    # In pieces: the encoder holds the interpreter's lock, which the event loop waits for.
    values = [msgspec.json.encode(piece)[1:-1] for piece in state.values.pieces(_VALUES_AT_ONCE)]
    yield "values", -1, np.frombuffer(b"[" + b",".join(values) + b"]", np.uint8), 0
    if state.order is not None:
        yield "order", -1, np.fromiter(state.order, np.int64), 0
    for i, (chunk, used) in enumerate(zip(state.chunks, state.used, strict=True)):
        for name in _SMALL:
            column = getattr(chunk, name)
            if column is not None:
                yield name, i, column[:used], 0
        yield "pool", i, chunk.pool[: chunk.used], 0
        if chunk.codes is not None:
            yield "codes", i, chunk.codes[:used], 0
        if chunk.exact is not None:
            yield "exact", i, chunk.exact[:used], CHUNK_ROWS * chunk.exact.shape[1]


def write_snapshot(
    path: Path,
    state: IndexState,
    *,
    dimension: int,
    model: str,
    point: LogPoint,
    extras: Mapping[str, Callable[[], bytes]],
    keep_going: Callable[[], bool],
) -> SnapshotInfo:
    """Write ``state`` to ``path``, durably. Blocking: for a worker thread.

    Args:
        path: Replaced in one step.
        state: Rows that its bits do not show may be written meanwhile, so each section is copied before it is summed up.
        dimension, model, point: What it is of.
        extras: What else belongs into it, by name; each is called once.
        keep_going: Asked between sections.

    Raises:
        OSError: the disk is full or not writable; the former snapshot is still there.
        SnapshotAbandonedError: ``keep_going`` said no; likewise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(_columns(state))
    columns += [(_EXTRA + name, -1, np.frombuffer(encode(), np.uint8), 0) for name, encode in extras.items()]
    _refuse_full_disk(path.parent, sum(_pages(array, room) for _, _, array, room in columns))
    geoids = int(np.bitwise_count(state.bits).sum())
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            sections = []
            start, synced = _PAGE, 0  # the header goes behind the sections, its place into the first page
            for name, chunk, array, room in columns:
                if not keep_going():
                    raise SnapshotAbandonedError(f"{path.name}: given up")
                raw = array.tobytes()
                sections.append(_Section(name, chunk, array.dtype.str, start, len(raw), zlib.crc32(raw)))
                file.seek(start)
                file.write(raw)
                start += _pages(array, room)
                if start - synced > _SYNC_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    synced = start
            header = msgspec.json.encode(
                _Header(
                    dimension=dimension,
                    model=model,
                    epoch=point.epoch,
                    offset=point.offset,
                    digest=point.digest,
                    geoids=geoids,
                    chunk_rows=CHUNK_ROWS,
                    margin=state.margin,
                    used=state.used,
                    kinds=state.kinds,
                    garbage=[chunk.garbage for chunk in state.chunks],
                    sections=sections,
                )
            )
            file.seek(start)
            file.write(header)
            file.seek(0)
            file.write(_PREFIX.pack(_MAGIC, len(header), zlib.crc32(header)) + struct.pack("<Q", start))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        partial.unlink(missing_ok=True)
    return SnapshotInfo(point, geoids, start + len(header))


async def save(
    path: Path,
    state: IndexState,
    *,
    threads: Threads,
    dimension: int,
    model: str,
    point: LogPoint,
    extras: Mapping[str, Callable[[], bytes]] | None = None,
    keep_going: Callable[[], bool] = lambda: True,
) -> SnapshotInfo:
    """``write_snapshot`` in a worker thread, of what ``FlatIndex.frozen`` gave and while that is held.

    Raises:
        UnavailableError: the disk is full or not writable; a former snapshot is still there.
        SnapshotAbandonedError: ``keep_going`` said no; likewise.
    """
    write = partial(
        write_snapshot,
        dimension=dimension,
        model=model,
        point=point,
        extras=extras or {},
        keep_going=keep_going,
    )
    try:
        return await threads.run("io", write, path, state)
    except OSError as error:
        raise UnavailableError(f"index: the snapshot could not be written ({error.strerror})") from error


def _pages(array: npt.NDArray[Any], room: int) -> int:
    """Bytes that a section takes in the file."""
    return -(-max(array.nbytes, room * array.itemsize) // _PAGE) * _PAGE


def _refuse_full_disk(directory: Path, size: int) -> None:
    if shutil.disk_usage(directory).free < size + RESERVE:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size + RESERVE} bytes are wanted")


def _header_of(memory: mmap.mmap, path: Path) -> _Header:
    if len(memory) < _PAGE:
        raise SnapshotError("damaged", f"{path.name}: cut short")
    magic, length, checksum = _PREFIX.unpack_from(memory)
    if magic != _MAGIC:
        raise SnapshotError("foreign", f"{path.name}: not a snapshot of this version")
    (start,) = struct.unpack_from("<Q", memory, _PREFIX.size)
    if length > _HEADER_LIMIT or start + length > len(memory):
        raise SnapshotError("damaged", f"{path.name}: cut short")
    raw = memory[start : start + length]
    if zlib.crc32(raw) != checksum:
        raise SnapshotError("damaged", f"{path.name}: the header's checksum does not fit")
    try:
        return msgspec.json.decode(raw, type=_Header)
    except msgspec.MsgspecError as error:
        raise SnapshotError("foreign", f"{path.name}: a header of another version") from error


def _open(path: Path, *, dimension: int, model: str, epoch: str | None) -> tuple[mmap.mmap, _Header]:
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise SnapshotError("missing", f"{path.name}: there is none") from error
    except (OSError, ValueError) as error:
        raise SnapshotError("damaged", f"{path.name}: cannot be mapped ({error})") from error
    header = _header_of(memory, path)
    expected = (dimension, model, CHUNK_ROWS)
    if (header.dimension, header.model, header.chunk_rows) != expected:
        raise SnapshotError(
            "foreign", f"{path.name}: of another encoder or layout ({header.model}, {header.dimension})"
        )
    if epoch is not None and header.epoch != epoch:
        raise SnapshotError("foreign", f"{path.name}: of another log")
    return memory, header


def _info(header: _Header, memory: mmap.mmap) -> SnapshotInfo:
    return SnapshotInfo(LogPoint(header.epoch, header.offset, header.digest), header.geoids, len(memory))


def inspect_snapshot(path: Path, *, dimension: int, model: str, epoch: str | None) -> SnapshotInfo:
    """What a snapshot covers, by its header alone. Blocking: for a worker thread.

    Raises:
        SnapshotError: there is none, or its header cannot be used.
    """
    memory, header = _open(path, dimension=dimension, model=model, epoch=epoch)
    with memory:
        return _info(header, memory)


@dataclass(slots=True)
class ReadSnapshot:
    """A snapshot that was read and checked."""

    state: IndexState
    info: SnapshotInfo
    extras: Extras


def read_snapshot(path: Path, *, rows: RowStore, dimension: int, model: str, epoch: str | None) -> ReadSnapshot:
    """Read and check a snapshot. Blocking: for a worker thread.

    Args:
        path: Where ``write_snapshot`` put it.
        dimension, model, epoch: What it must be of; an epoch of None is not checked.
        rows: Gives memory for the codes; where it keeps float32 rows in memory, they are copied, not mapped.

    Raises:
        SnapshotError: there is none, or it cannot be used.
    """
    memory, header = _open(path, dimension=dimension, model=model, epoch=epoch)
    if hasattr(mmap, "MADV_WILLNEED"):
        memory.madvise(mmap.MADV_WILLNEED)
    arrays: dict[tuple[str, int], npt.NDArray[Any]] = {}
    starts: dict[int, int] = {}
    for section in header.sections:
        if section.start + section.bytes > len(memory):
            raise SnapshotError("damaged", f"{path.name}: cut short in {section.name}")
        view = memoryview(memory)[section.start : section.start + section.bytes]
        if zlib.crc32(view) != section.checksum:
            raise SnapshotError("damaged", f"{path.name}: the checksum of {section.name} does not fit")
        arrays[section.name, section.chunk] = np.frombuffer(view, section.dtype)
        if section.name == "exact":
            starts[section.chunk] = section.start
    try:
        state = _assemble(header, arrays, starts, memory, rows)
    except (KeyError, ValueError, IndexError, msgspec.MsgspecError) as error:
        raise SnapshotError("damaged", f"{path.name}: its parts do not fit together") from error
    extras = {name.removeprefix(_EXTRA): a.tobytes() for (name, _), a in arrays.items() if name.startswith(_EXTRA)}
    return ReadSnapshot(state, _info(header, memory), extras)


def _assemble(
    header: _Header,
    arrays: dict[tuple[str, int], npt.NDArray[Any]],
    starts: dict[int, int],
    memory: mmap.mmap,
    rows: RowStore,
) -> IndexState:
    chunks = []
    dim = header.dimension
    for i, (used, kind) in enumerate(zip(header.used, header.kinds, strict=True)):
        if kind >= LOOSE:
            mapped = np.frombuffer(memory, np.float32, CHUNK_ROWS * dim, starts[i]).reshape(CHUNK_ROWS, dim)
            exact = mapped.copy() if rows.in_memory else mapped
            chunk = Chunk(i * CHUNK_ROWS, rows.take_codes(), exact, mapped=not rows.in_memory)
            chunk.copied_on_write = chunk.mapped
        else:
            chunk = Chunk(i * CHUNK_ROWS)
        for name in _SMALL:
            column = getattr(chunk, name)
            if column is not None:
                column[:used] = arrays[name, i]
        if chunk.codes is not None:
            chunk.codes[:used] = arrays["codes", i].reshape(used, stride_of(dim))
        chunk.pool = arrays["pool", i].copy()
        chunk.used = len(chunk.pool)
        chunk.garbage = header.garbage[i]
        chunks.append(chunk)
    bits: U64 = arrays["bits", -1].astype(np.uint64)
    state = IndexState(
        margin=header.margin,
        bits=bits,
        ids=[None] * (len(chunks) * CHUNK_ROWS),
        values=HeldValues.of(
            msgspec.json.decode(arrays["values", -1].tobytes(), type=list[tuple[int, str | int, int]])
        ),
        order=Age.of(arrays["order", -1]) if ("order", -1) in arrays else None,
        chunks=chunks,
        used=header.used,
        kinds=header.kinds,
    )
    slots = state.live_slots()
    lengths = arrays["id_lengths", -1]
    if len(slots) != len(lengths) or len(bits) * 64 != len(state.ids):
        raise ValueError("ids")
    text = arrays["ids", -1].tobytes().decode()
    _name(state.ids, slots.tolist(), lengths, text)
    return state


def _name(ids: list[str | None], slots: Sequence[int], lengths: npt.NDArray[np.uint16], text: str) -> None:
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    start = 0
    for slot, end in zip(slots, ends, strict=True):
        ids[slot] = text[start:end]
        start = end
