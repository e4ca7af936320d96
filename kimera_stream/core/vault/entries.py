"""Log entries as rows: checksums, and pages of a channel read in one statement.

The checksum covers offset, type, time, channels and data, and is verified on every read. On SQLite a page comes as one
value (records joined by control characters, which JSON and names cannot hold), because the driver gives the
interpreter's lock away at every row: under a busy event loop a page of 1,000 rows took 27 times as long as one
value of the same size (see ADR 2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import msgspec
from sqlalchemy import text

from kimera_stream.core.interfaces import FramePage, LogPage
from kimera_stream.core.vault.errors import DamagedLogError
from kimera_stream.infrastructure.database import Query, Transaction
from kimera_stream.kernels.framing import BrokenRecordError, frame_records
from kimera_stream.protocol.log import LogEntry

PAGE_BYTES = 8 * 1024 * 1024
"""Payload after which a page ends early, with ``more`` set."""
FRAME_BYTES = 256 * 1024
"""Bytes of entries at which a page of frames ends: it is written to a connection whole."""
_STEP = 256
"""Entries fetched by one statement."""

_FIELD = b"\x1f"
_RECORD = b"\x1e"

# A record is never null, which group_concat would leave out: a missing entry packs as "-" and its offset.
_PACKED = (
    "SELECT CAST(group_concat(coalesce(checksum || char(31) || n || char(31) || type || char(31) || ts || char(31)"
    " || channels || char(31) || data, '-' || char(31) || n), char(30)) AS BLOB) FROM ({rows})"
)
_COLUMNS = "e.type AS type, e.ts AS ts, e.channels AS channels, e.checksum AS checksum, e.data AS data"
_SIZE = "length(e.data) AS size"
_ALL = (
    "SELECT e.offset AS n, {columns} FROM log_entry e"
    " WHERE e.offset > :after AND e.offset <= :until ORDER BY e.offset {order} LIMIT :limit"
)
# The outer join lets a missing entry show, instead of skipping it.
_CHANNEL = (
    "SELECT c.offset AS n, {columns} FROM log_channel c LEFT JOIN log_entry e ON e.offset = c.offset"
    " WHERE c.channel = :channel AND c.offset > :after AND c.offset <= :until ORDER BY c.offset {order} LIMIT :limit"
)


def _quoted(sql: str) -> str:
    """``offset`` is a reserved word of PostgreSQL."""
    return sql.replace(".offset", '."offset"')


def _rows(*, channel: bool, reverse: bool, columns: str = _COLUMNS) -> str:
    return _quoted((_CHANNEL if channel else _ALL).format(columns=columns, order="DESC" if reverse else "ASC"))


def _query(*, channel: bool, reverse: bool, packed: bool) -> Query:
    sql = _rows(channel=channel, reverse=reverse)
    return Query(text(_PACKED.format(rows=sql) if packed else sql))


_QUERIES = {
    (dialect, channel, reverse): _query(channel=channel, reverse=reverse, packed=dialect == "sqlite")
    for dialect in ("sqlite", "postgresql")
    for channel in (False, True)
    for reverse in (False, True)
}
_SUM = "SELECT coalesce(sum(size), 0) FROM ({rows}) AS page"
_SIZES = {
    (channel, reverse): Query(text(_SUM.format(rows=_rows(channel=channel, reverse=reverse, columns=_SIZE))))
    for channel in (False, True)
    for reverse in (False, True)
}
"""Neither database reads the data for its length, as long as no more of it than that leaves the inner statement."""
_PACKED_BYTES = (
    "SELECT string_agg(CASE WHEN checksum IS NULL THEN convert_to('-' || chr(31) || n, 'UTF8') ELSE"
    " convert_to(concat_ws(chr(31), checksum, n, type, ts, channels, ''), 'UTF8') || data END,"
    " convert_to(chr(30), 'UTF8') ORDER BY n) FROM ({rows}) AS page"
)
_PACKED_QUERIES = {
    "sqlite": _QUERIES["sqlite", True, False],
    "postgresql": Query(text(_PACKED_BYTES.format(rows=_rows(channel=True, reverse=False)))),
}
_STATE = Query(text("SELECT epoch, head, trimmed, payload_bytes, encoder FROM log_state WHERE id = 1"))
_MORE = Query(
    text(
        _quoted(
            "SELECT 1 FROM log_channel c WHERE c.channel = :channel AND c.offset > :after AND c.offset <= :until LIMIT 1"
        )
    )
)


@dataclass(frozen=True, slots=True)
class LogState:
    """The ends of the log. ``payload_bytes`` counts the data of the entries that are kept."""

    epoch: str
    head: int
    trimmed: int
    payload_bytes: int
    encoder: str | None


def read_state(tx: Transaction) -> LogState:
    """The one row of ``log_state``."""
    row = tx.row(_STATE)
    if row is None:
        raise DamagedLogError(0, "the row that names its epoch and ends is missing")
    return LogState(*row)


def _checksum(offset: int, type_: str, ts: int, channels: str, data: bytes) -> int:
    return crc32(data, crc32(f"{offset}\x1f{type_}\x1f{ts}\x1f{channels}\x1f".encode()))


def entry_row(entry: LogEntry) -> tuple[int, str, int, str, int, bytes]:
    """A row of ``log_entry`` in the order of its columns.

    Raises:
        ValueError: a channel's name holds white space, which no channel of the contract does.
    """
    channels = " ".join(entry.channels)
    if len(channels.split()) != len(entry.channels):  # also catches an empty name
        raise ValueError(f"entry {entry.offset}: channel names hold no white space: {entry.channels}")
    data = bytes(entry.data)
    checksum = _checksum(entry.offset, entry.type, entry.ts, channels, data)
    return entry.offset, entry.type, entry.ts, channels, checksum, data


def verified(row: Sequence[Any]) -> LogEntry:
    """The entry of a row ``(offset, type, ts, channels, checksum, data)``.

    Raises:
        DamagedLogError: it is not what was committed.
    """
    offset, type_, ts, channels, checksum, data = row
    if data is None:
        raise DamagedLogError(offset, "it is missing")
    if _checksum(offset, type_, ts, channels, data) != checksum:
        raise DamagedLogError(offset, "checksum mismatch")
    return LogEntry(offset, type_, ts, tuple(channels.split(" ")) if channels else (), msgspec.Raw(data))


def _unpacked(packed: bytes) -> Iterator[LogEntry]:
    for record in packed.split(_RECORD):
        checksum, _, body = record.partition(_FIELD)
        if not checksum.isdigit() or crc32(body) != int(checksum):
            number = body.partition(_FIELD)[0]
            raise DamagedLogError(
                int(number) if number.isdigit() else 0, "it is missing" if checksum == b"-" else "checksum mismatch"
            )
        offset, type_, ts, channels, data = body.split(_FIELD, 4)
        names = tuple(channels.decode().split(" ")) if channels else ()
        yield LogEntry(int(offset), type_.decode(), int(ts), names, msgspec.Raw(data))


def _fitting(
    tx: Transaction, channel: str | None, *, after: int, until: int, limit: int, reverse: bool, most: int
) -> int:
    """How many of the next ``limit`` entries to read, so that they hold ``most`` bytes; one, however large it is."""
    named = {} if channel is None else {"channel": channel}
    while limit > 1:
        size = int(tx.value(_SIZES[channel is not None, reverse], after=after, until=until, limit=limit, **named))
        if size <= most:
            break
        limit = max(1, min(limit // 2, limit * most // size))
    return limit


def _step(
    tx: Transaction, channel: str | None, *, after: int, until: int, limit: int, reverse: bool
) -> tuple[list[LogEntry], int]:
    """Up to ``limit`` entries of the range, and their size in bytes."""
    query = _QUERIES[tx.dialect, channel is not None, reverse]
    named = {} if channel is None else {"channel": channel}
    if tx.dialect == "sqlite":
        packed = tx.value(query, after=after, until=until, limit=limit, **named)
        return ([], 0) if packed is None else (list(_unpacked(packed)), len(packed))
    rows = tx.rows(query, after=after, until=until, limit=limit, **named)
    return [verified(row) for row in rows], sum([len(row[5]) for row in rows])


def read_page(
    tx: Transaction, channel: str | None, *, after: int, until: int, limit: int, reverse: bool, trimmed: int
) -> LogPage:
    """One page, as ``LogReader.read`` has it; ``until`` is a committed offset.

    Going on: forward with ``after=page.scanned``, in reverse with ``until=page.scanned - 1``, while ``page.more``. At the
    end ``scanned`` is ``until``, in reverse ``after``.

    Raises:
        DamagedLogError: an entry is not what was committed, or missing.
    """
    entries: list[LogEntry] = []
    low, high, size = max(after, trimmed), until, 0
    exhausted = high <= low
    while not exhausted and len(entries) < limit and size < PAGE_BYTES:
        wanted = min(_STEP, limit - len(entries))
        wanted = _fitting(tx, channel, after=low, until=high, limit=wanted, reverse=reverse, most=PAGE_BYTES - size)
        found, found_size = _step(tx, channel, after=low, until=high, limit=wanted, reverse=reverse)
        if channel is None:
            _refuse_holes(found, low=low, high=high, wanted=wanted, reverse=reverse)
        entries += found
        size += found_size
        if found and reverse:
            high = found[-1].offset - 1
        elif found:
            low = found[-1].offset
        exhausted = len(found) < wanted or high <= low
    if exhausted or (channel is not None and tx.row(_MORE, channel=channel, after=low, until=high) is None):
        return LogPage(entries, after if reverse else max(after, until), more=False)
    return LogPage(entries, high + 1 if reverse else low, more=True)


def read_frames(
    tx: Transaction, channel: str, *, head: bytes, after: int, until: int, limit: int, trimmed: int
) -> FramePage:
    """One page of a channel, as ``FrameReader.read_frames`` has it; ``until`` is a committed offset. It ends early, with ``more``
    set, where it holds about 256 KiB.

    Raises:
        DamagedLogError: an entry is not what was committed, or missing.
    """
    low = max(after, trimmed)
    packed = None
    if low < until:
        limit = _fitting(tx, channel, after=low, until=until, limit=limit, reverse=False, most=FRAME_BYTES)
        query = _PACKED_QUERIES[tx.dialect]
        packed = tx.value(query, channel=channel, after=low, until=until, limit=limit)
    if packed is None:
        return FramePage(b"", 0, max(after, until), more=False)
    try:
        framed = frame_records(packed, head)
    except BrokenRecordError as broken:
        what = "it is missing" if broken.missing else "checksum mismatch"
        raise DamagedLogError(broken.offset, what) from None
    if framed.count < limit:
        return FramePage(framed.frames, framed.count, until, more=False)
    return FramePage(framed.frames, framed.count, framed.last, more=framed.last < until)


def _refuse_holes(found: list[LogEntry], *, low: int, high: int, wanted: int, reverse: bool) -> None:
    """Offsets of the whole log have no holes above what was trimmed."""
    size = min(wanted, high - low)
    expected = range(high, high - size, -1) if reverse else range(low + 1, low + 1 + size)
    for entry, offset in zip(found, expected, strict=False):
        if entry.offset != offset:
            raise DamagedLogError(offset, "it is missing")
    if len(found) < size:
        raise DamagedLogError(expected[len(found)], "it is missing")
