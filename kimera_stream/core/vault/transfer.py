"""A vault as one file of JSON lines (gzip), and back.

The first line says what it is, one line per row follows, the last line counts them: a file cut short is noticed.
Vectors are base64 of little-endian float32; everything else is plain JSON. Cursors are left out: a restored log has a
new epoch, in which no saved position means anything.
"""

import gzip
import secrets
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import anyio
import msgspec
from anyio import to_thread
from sqlalchemy import Table, bindparam, func, select, tuple_, update

from kimera_stream.core.vault import schema
from kimera_stream.core.vault.checking import Progress
from kimera_stream.core.vault.entries import read_state, verified
from kimera_stream.core.vault.errors import DamagedLogError, VaultFormatError
from kimera_stream.core.vault.migrate import HEAD
from kimera_stream.infrastructure.database import Database, Insert, Query, Steps, Transaction

T = TypeVar("T")

FORMAT = "kimera-stream export"
VERSION = 1

_STEP = 1_000
_NODES = {schema.cluster.name, schema.node.name, schema.geoid_slice.name, schema.lease.name}
"""Who works on a database says nothing about a copy of it."""
_LEFT_OUT = {schema.log_state.name, schema.cursor.name, *_NODES}
_TABLES: dict[str, Table] = {
    str(table.name): table for table in schema.metadata.sorted_tables if table.name not in _LEFT_OUT
}
_OWN_NUMBER = {(schema.audit_entry.name, "id"), (schema.dead_letter.name, "id"), (schema.revocation.name, "id")}
"""Columns that the target numbers itself."""

_SET_STATE = Query(
    update(schema.log_state)
    .where(schema.log_state.c.id == 1)
    .values({name: bindparam(f"new_{name}") for name in ("epoch", "head", "trimmed", "payload_bytes", "encoder")})
)
SET_EPOCH = Query(update(schema.log_state).where(schema.log_state.c.id == 1).values(epoch=bindparam("new_epoch")))


class _Header(msgspec.Struct, kw_only=True):
    format: str
    version: int
    schema: str
    epoch: str
    head: int
    trimmed: int
    payload_bytes: int
    encoder: str | None
    columns: dict[str, list[str]]


class _Line(msgspec.Struct):
    t: str
    r: list[Any]


class _Footer(msgspec.Struct):
    rows: int


def new_epoch() -> str:
    """A fresh identity for a log: 16 URL-safe characters."""
    return secrets.token_urlsafe(12)


def _columns(table: Table) -> list[str]:
    return [str(column.name) for column in table.columns if (table.name, column.name) not in _OWN_NUMBER]


def _writer(table: Table, name: str) -> Callable[[Any], Any]:
    """How a value of the column is written: bytes are base64 if they are a vector, else JSON that is written as it reads."""
    if table.c[name].type.python_type is not bytes:
        return lambda value: value
    if name == "vector":
        return lambda value: None if value is None else b64encode(value).decode()
    return lambda value: None if value is None else bytes(value).decode()


async def export_rows(database: Database, path: Path, progress: Progress) -> int:
    """Write everything in one snapshot to ``path``; returns how many rows.

    Raises:
        DamagedLogError: an entry of the log is not what was committed.
        VaultFormatError: the file cannot be written.
    """
    unfinished = path.with_name(path.name + ".partial")
    try:
        out = await _on_file(path, gzip.open, unfinished, "wb", 5)
        try:
            async with database.transaction(write=False) as steps:
                count = await _write(steps, path, out, progress)
        finally:
            with anyio.CancelScope(shield=True):
                await _on_file(path, out.close)
        await _on_file(path, unfinished.replace, path)
    finally:
        with anyio.CancelScope(shield=True):
            await _on_file(path, unfinished.unlink, True)
    return count


async def _on_file(path: Path, fn: Callable[..., T], *args: Any) -> T:
    """Run ``fn`` in a thread; what goes wrong there is the file's fault, not the database's.

    Raises:
        VaultFormatError: it cannot be read or written.
    """
    try:
        return await to_thread.run_sync(fn, *args)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise VaultFormatError(
            f"{path}: {reason}; check that the file is a whole export, or that its place has enough space"
        ) from error


async def _write(steps: Steps, path: Path, out: gzip.GzipFile, progress: Progress) -> int:
    state = await steps.step(read_state)
    columns = {name: _columns(table) for name, table in _TABLES.items()}
    header = _Header(
        format=FORMAT,
        version=VERSION,
        schema=HEAD,
        epoch=state.epoch,
        head=state.head,
        trimmed=state.trimmed,
        payload_bytes=state.payload_bytes,
        encoder=state.encoder,
        columns=columns,
    )
    await _on_file(path, out.write, msgspec.json.encode(header) + b"\n")
    total = await steps.step(_count_rows)
    done = 0
    for table in _TABLES.values():
        pages = _Pages(table, columns[str(table.name)])
        while rows := await steps.step(pages.following):
            await _on_file(path, _write_rows, out, table, columns[str(table.name)], rows)
            done += len(rows)
            progress("export", done, total)
    await _on_file(path, out.write, msgspec.json.encode(_Footer(done)) + b"\n")
    return done


def _count_rows(tx: Transaction) -> int:
    return sum([int(tx.value(Query(select(func.count()).select_from(table)))) for table in _TABLES.values()])


def _write_rows(out: gzip.GzipFile, table: Table, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    encode = msgspec.json.Encoder().encode
    writers = [_writer(table, name) for name in names]
    for row in rows:
        if table is schema.log_entry:
            verified(row)
        values = [write(value) for write, value in zip(writers, row, strict=True)]
        out.write(encode(_Line(str(table.name), values)) + b"\n")


class _Pages:
    """A table in the order of its key, a page at a time."""

    def __init__(self, table: Table, names: Sequence[str]) -> None:
        keys = list(table.primary_key.columns)
        statement = select(*[table.c[name] for name in names], *keys).order_by(*keys).limit(_STEP)
        marks = tuple_(*[bindparam(f"k{i}", type_=column.type) for i, column in enumerate(keys)])
        self._width = len(names)
        self._first = Query(statement)
        self._after = Query(statement.where(tuple_(*keys) > marks))
        self._last: Sequence[Any] | None = None

    def following(self, tx: Transaction) -> list[Sequence[Any]]:
        """The next rows; none at the end."""
        if self._last is None:
            rows = tx.rows(self._first)
        else:
            rows = tx.rows(self._after, **{f"k{i}": value for i, value in enumerate(self._last)})
        if rows:
            self._last = tuple(rows[-1])[self._width :]
        return [tuple(row)[: self._width] for row in rows]


async def import_rows(database: Database, path: Path, progress: Progress) -> int:
    """Read ``path`` into an empty vault, as one transaction, under a new epoch; returns how many rows.

    Raises:
        VaultFormatError: the target is not empty, or the file is not a whole export of a version that is known.
    """
    source = await _on_file(path, gzip.open, path, "rb")
    try:
        async with database.transaction(write=True) as steps:
            await steps.step(_refuse_filled)
            return await _read(steps, path, source, progress)
    finally:
        with anyio.CancelScope(shield=True):
            await _on_file(path, source.close)


def _refuse_filled(tx: Transaction) -> None:
    if read_state(tx).head or tx.value(Query(select(func.count()).select_from(schema.geoid))):
        raise VaultFormatError("the target database is not empty: import into a new one (another KIMERA_DATABASE__URL)")


async def _read(steps: Steps, path: Path, source: gzip.GzipFile, progress: Progress) -> int:
    header = _header(await _on_file(path, source.readline))
    reader = _Reader(source, header)
    while rows := await _on_file(path, reader.following):
        await steps.step(partial(_insert, inserts=reader.inserts, rows=rows))
        progress("import", reader.done, 0)
    await steps.step(partial(_finish, header=header))
    progress("import", reader.done, reader.done)
    return reader.done


def _insert(tx: Transaction, *, inserts: dict[str, Insert], rows: Sequence[tuple[str, list[Any]]]) -> None:
    for table, group in groupby(rows, key=itemgetter(0)):
        tx.insert(inserts[table], [values for _, values in group])


def _finish(tx: Transaction, *, header: _Header) -> None:
    tx.run(
        _SET_STATE,
        new_epoch=new_epoch(),
        new_head=header.head,
        new_trimmed=header.trimmed,
        new_payload_bytes=header.payload_bytes,
        new_encoder=header.encoder,
    )


class _Reader:
    """Rows of an export, a page at a time, each checked."""

    def __init__(self, source: gzip.GzipFile, header: _Header) -> None:
        self._source = source
        self._columns = header.columns
        self._decode = msgspec.json.Decoder(dict[str, Any]).decode
        self.inserts = {name: Insert(_TABLES[name], columns) for name, columns in header.columns.items()}
        self.done = 0
        self._ended = False

    def following(self) -> list[tuple[str, list[Any]]]:
        """The next rows with their tables; none at the end.

        Raises:
            VaultFormatError: the file is damaged or ends early.
        """
        rows: list[tuple[str, list[Any]]] = []
        while len(rows) < _STEP and not self._ended:
            number = self.done + 2
            line = self._source.readline()
            if not line:
                raise VaultFormatError("the file ends early: its last line is missing; export again")
            try:
                item = self._decode(line)
            except msgspec.DecodeError as error:
                raise VaultFormatError(f"line {number}: not JSON ({error}); the file is damaged") from error
            if "rows" in item:
                self._ended = True
                if item["rows"] != self.done:
                    raise VaultFormatError(
                        f"line {number}: expected {item['rows']} rows, found {self.done}; the file is damaged"
                    )
                break
            name, values = item.get("t"), item.get("r")
            if name not in self._columns or not isinstance(values, list):
                raise VaultFormatError(f"line {number}: expected a row of a known table; the file is damaged")
            rows.append((name, _row(_TABLES[name], self._columns[name], values, number)))
            self.done += 1
        return rows


def _header(line: bytes) -> _Header:
    try:
        header = msgspec.json.decode(line, type=_Header)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise VaultFormatError(f"line 1: expected the header of a {FORMAT} ({error})") from error
    if header.format != FORMAT or header.version != VERSION:
        raise VaultFormatError(
            f"line 1: expected {FORMAT} version {VERSION}, got {header.format} version {header.version}: "
            "import it with the version of Kimera Stream that wrote it, or a newer one"
        )
    unknown = [
        f"{t}.{c}" for t, names in header.columns.items() for c in names if t not in _TABLES or c not in _TABLES[t].c
    ]
    if unknown:
        raise VaultFormatError(
            f"line 1: unknown columns {', '.join(unknown[:5])}: upgrade Kimera Stream to import this file"
        )
    return header


def _row(table: Table, names: Sequence[str], values: list[Any], number: int) -> list[Any]:
    if len(values) != len(names):
        raise VaultFormatError(f"line {number}: expected {len(names)} values, got {len(values)}; the file is damaged")
    try:
        row = [_value(table, name, value) for name, value in zip(names, values, strict=True)]
        if table is schema.log_entry:
            verified(row)
    except (ValueError, TypeError, AttributeError, DamagedLogError) as error:
        raise VaultFormatError(f"line {number}: not a row of {table.name} ({error}); the file is damaged") from error
    return row


def _value(table: Table, name: str, value: Any) -> Any:
    if value is None:
        return None
    kind = table.c[name].type.python_type
    if kind is bytes:
        return b64decode(value, validate=True) if name == "vector" else value.encode()
    if kind is bool:
        return bool(value)
    if kind is float:
        return float(value)
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def restamp(tx: Transaction) -> None:
    """Give the log a new epoch: a copy goes its own way from here."""
    tx.run(SET_EPOCH, new_epoch=new_epoch())
