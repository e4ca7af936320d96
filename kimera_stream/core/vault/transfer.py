"""A vault as one file of JSON lines (gzip), and back.

The first line says what it is, one line per row follows, the last line counts them: a file cut short is noticed.
Vectors are base64 of little-endian float32; everything else is plain JSON. Cursors are left out: a restored log has a
new epoch, in which no saved position means anything.
"""

import gzip
import secrets
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Table, bindparam, func, select, tuple_, update

from kimera_stream.core.vault import schema
from kimera_stream.core.vault.checking import Progress
from kimera_stream.core.vault.entries import LogState, read_state, verified
from kimera_stream.core.vault.errors import DamagedLogError, VaultFormatError
from kimera_stream.core.vault.migrate import HEAD
from kimera_stream.infrastructure.database import Insert, Query, Transaction

FORMAT = "kimera-stream export"
VERSION = 1

_STEP = 1_000
_LEFT_OUT = {schema.log_state.name, schema.cursor.name}
_TABLES: dict[str, Table] = {
    str(table.name): table for table in schema.metadata.sorted_tables if table.name not in _LEFT_OUT
}
_OWN_NUMBER = {(schema.audit_entry.name, "id")}
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


def export_rows(tx: Transaction, path: Path, progress: Progress) -> int:
    """Write everything in the snapshot to ``path``; returns how many rows.

    Raises:
        DamagedLogError: an entry of the log is not what was committed.
        VaultFormatError: the file cannot be written.
    """
    state = read_state(tx)
    partial = path.with_name(path.name + ".partial")
    try:
        with gzip.open(partial, "wb", compresslevel=5) as out:
            count = _write(tx, state, out, progress)
        partial.replace(path)
    except OSError as error:
        raise VaultFormatError(
            f"cannot write {path}: {error.strerror or error}; choose a place with enough space"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write(tx: Transaction, state: LogState, out: gzip.GzipFile, progress: Progress) -> int:
    encode = msgspec.json.Encoder().encode
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
    out.write(encode(header) + b"\n")
    total = sum([int(tx.value(Query(select(func.count()).select_from(table)))) for table in _TABLES.values()])
    done = 0
    for table in _TABLES.values():
        names = columns[table.name]
        writers = [_writer(table, name) for name in names]
        for rows in _pages(tx, table, names):
            for row in rows:
                if table is schema.log_entry:
                    verified(row)
                values = [write(value) for write, value in zip(writers, row, strict=True)]
                out.write(encode(_Line(str(table.name), values)) + b"\n")
            done += len(rows)
            progress("export", done, total)
    out.write(encode(_Footer(done)) + b"\n")
    return done


def _pages(tx: Transaction, table: Table, names: Sequence[str]) -> Iterator[Sequence[Any]]:
    keys = list(table.primary_key.columns)
    statement = select(*[table.c[name] for name in names], *keys).order_by(*keys).limit(_STEP)
    first = Query(statement)
    after = Query(
        statement.where(tuple_(*keys) > tuple_(*[bindparam(f"k{i}", type_=c.type) for i, c in enumerate(keys)]))
    )
    rows = tx.rows(first)
    while rows:
        yield [tuple(row)[: len(names)] for row in rows]
        if len(rows) < _STEP:
            return
        last = tuple(rows[-1])[len(names) :]
        rows = tx.rows(after, **{f"k{i}": value for i, value in enumerate(last)})


def import_rows(tx: Transaction, path: Path, progress: Progress) -> int:
    """Read ``path`` into an empty vault, as one transaction, under a new epoch; returns how many rows.

    Raises:
        VaultFormatError: the target is not empty, or the file is not a whole export of a version that is known.
    """
    if read_state(tx).head or tx.value(Query(select(func.count()).select_from(schema.geoid))):
        raise VaultFormatError("the target database is not empty: import into a new one (another KIMERA_DATABASE__URL)")
    try:
        with gzip.open(path, "rb") as source:
            return _read(tx, iter(source), progress)
    except (OSError, EOFError, zlib.error) as error:
        raise VaultFormatError(f"cannot read {path}: {error}; is it a whole, gzipped export?") from error


def _read(tx: Transaction, lines: Iterator[bytes], progress: Progress) -> int:
    header = _header(next(lines, b""))
    inserts = {name: Insert(_TABLES[name], columns) for name, columns in header.columns.items()}
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    pending: list[list[Any]] = []
    current = ""
    for done, line in enumerate(lines):
        number = done + 2
        try:
            item = decode(line)
        except msgspec.DecodeError as error:
            raise VaultFormatError(f"line {number}: not JSON ({error}); the file is damaged") from error
        if "rows" in item:
            _flush(tx, inserts, current, pending)
            if item["rows"] != done:
                raise VaultFormatError(
                    f"line {number}: expected {item['rows']} rows, found {done}; the file is damaged"
                )
            tx.run(
                _SET_STATE,
                new_epoch=new_epoch(),
                new_head=header.head,
                new_trimmed=header.trimmed,
                new_payload_bytes=header.payload_bytes,
                new_encoder=header.encoder,
            )
            progress("import", done, done)
            return done
        table = _TABLES.get(item.get("t", ""))
        if table is None or not isinstance(item.get("r"), list):
            raise VaultFormatError(f"line {number}: expected a row of a known table; the file is damaged")
        if table.name != current or len(pending) >= _STEP:
            _flush(tx, inserts, current, pending)
            current = table.name
            progress("import", done, 0)
        pending.append(_row(table, header.columns[table.name], item["r"], number))
    raise VaultFormatError("the file ends early: its last line is missing; export again")


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


def _flush(tx: Transaction, inserts: dict[str, Insert], table: str, pending: list[list[Any]]) -> None:
    if pending:
        tx.insert(inserts[table], pending)
        pending.clear()


def restamp(tx: Transaction) -> None:
    """Give the log a new epoch: a copy goes its own way from here."""
    tx.run(SET_EPOCH, new_epoch=new_epoch())
