"""Does the vault hold what was committed? Every checksum, every offset, every index row, every entity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import bindparam, func, select, text

from kimera_stream.core.vault import rows, schema
from kimera_stream.core.vault.checking_keys import check_keys
from kimera_stream.core.vault.entries import LogState, read_page, read_state
from kimera_stream.core.vault.errors import DamagedLogError
from kimera_stream.core.vault.reading import stored_geoids
from kimera_stream.infrastructure.database import Database, Query, QueryIn, Transaction
from kimera_stream.infrastructure.database.statements import among
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Contradiction, Geoid, Scar

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all); may come from another thread."""

_STEP = 1_000
_MAX_REPORTED = 100
_OFFSET = 2
"""Place of the offset among the columns of contradictions and of scars."""

geoid, version, contradiction, scar = schema.geoid, schema.geoid_version, schema.contradiction, schema.scar
channel = schema.log_channel

_CHANNELS = QueryIn(
    lambda values: select(channel.c.channel, channel.c.offset).where(
        among(channel.c.channel, values), channel.c.offset > bindparam("after"), channel.c.offset <= bindparam("upto")
    )
)
_COUNT_CHANNELS = Query(
    select(func.count())
    .select_from(channel)
    .where(channel.c.offset > bindparam("after"), channel.c.offset <= bindparam("upto"))
)
_GEOIDS = QueryIn(lambda values: select(geoid.c.id, geoid.c.offset).where(among(geoid.c.id, values)))
_TOMBSTONES = QueryIn(
    lambda values: (
        select(version.c.geoid_id, func.max(version.c.offset))
        .where(among(version.c.geoid_id, values), version.c.deleted.is_(True))
        .group_by(version.c.geoid_id)
    )
)
_CONTRADICTIONS = QueryIn(lambda values: select(*rows.CONTRADICTION_COLUMNS).where(among(contradiction.c.id, values)))
_SCARS = QueryIn(lambda values: select(*rows.SCAR_COLUMNS).where(among(scar.c.id, values)))
_COUNTS = {
    table.name: Query(select(func.count()).select_from(table))
    for table in (geoid, contradiction, scar, version, schema.watch)
}
_ORPHANS = {
    table.name: Query(
        select(table.c.id)
        .outerjoin(schema.log_entry, schema.log_entry.c.offset == table.c.offset)
        .where(table.c.offset > bindparam("after"), schema.log_entry.c.offset.is_(None))
        .limit(_MAX_REPORTED)
    )
    for table in (geoid, contradiction, scar)
}
_MISCOUNTED = {
    column.name: Query(
        select(geoid.c.id)
        .where(column != select(func.count()).where(feature.c.geoid_id == geoid.c.id).scalar_subquery())
        .limit(_MAX_REPORTED)
    )
    for column, feature in (
        (geoid.c.semantic_features, schema.semantic_feature),
        (geoid.c.symbolic_features, schema.symbolic_feature),
    )
}
_INTEGRITY = Query(text("PRAGMA integrity_check(100)"))
_FOREIGN_KEYS = Query(text("PRAGMA foreign_key_check"))


@dataclass(slots=True)
class CheckReport:
    """What a check found.

    Attributes:
        entries: Log entries verified.
        first_results: First results of keyed requests verified.
        counts: Rows by table.
        problems: In words, the first hundred.
        total_problems: How many there were.
    """

    epoch: str = ""
    head: int = 0
    trimmed: int = 0
    entries: int = 0
    first_results: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    total_problems: int = 0

    @property
    def ok(self) -> bool:
        return self.total_problems == 0

    def add(self, problem: str) -> None:
        self.total_problems += 1
        if len(self.problems) < _MAX_REPORTED:
            self.problems.append(problem)


class _Said(msgspec.Struct):
    """Whom an event is about."""

    id: str


_said = msgspec.json.Decoder(_Said).decode


async def check_database(database: Database, progress: Progress) -> CheckReport:
    """Check everything; a server may be running meanwhile. Problems are reported, not raised."""
    report = CheckReport()
    if database.is_sqlite:
        progress("file", 0, 1)
        await _stage(report, database, lambda tx: _check_file(tx, report))
        progress("file", 1, 1)
    try:
        start = await database.read(read_state)
    except (UnavailableError, DamagedLogError) as error:
        report.add(str(error))
        return report
    report.epoch, report.head, report.trimmed = start.epoch, start.head, start.trimmed
    seen = _Seen()
    position = start.trimmed
    while position < start.head:
        upto = min(position + _STEP, start.head)
        step = partial(_check_step, report=report, seen=seen, after=position, upto=upto)
        if not await _stage(report, database, step):
            seen.damaged = True
        position = upto
        progress("log", position - start.trimmed, start.head - start.trimmed)
    try:
        report.first_results = await check_keys(database, report.add, partial(progress, "keys"))
    except UnavailableError as error:
        report.add(str(error))
    progress("entities", 0, 1)
    await _stage(report, database, lambda tx: _check_totals(tx, report, seen, start))
    progress("entities", 1, 1)
    return report


async def _stage(report: CheckReport, database: Database, step: Callable[[Transaction], None]) -> bool:
    try:
        await database.read(step)
    except UnavailableError as error:  # a damaged file answers some questions and not others
        report.add(str(error))
        return False
    return True


def _check_file(tx: Transaction, report: CheckReport) -> None:
    for (line,) in tx.rows(_INTEGRITY):
        if line != "ok":
            report.add(f"SQLite: {line}")
    for row in tx.rows(_FOREIGN_KEYS):
        report.add(f"SQLite: {row[0]} row {row[1]} refers to a missing {row[2]}")


@dataclass(slots=True)
class _Seen:
    payload_bytes: int = 0
    channel_rows: int = 0
    damaged: bool = False


def _check_step(tx: Transaction, *, report: CheckReport, seen: _Seen, after: int, upto: int) -> None:
    """Entries in (after, upto], going on behind each damaged one."""
    trimmed = read_state(tx).trimmed
    position = after
    while position < upto:
        try:
            page = read_page(
                tx, None, after=position, until=upto, limit=upto - position, reverse=False, trimmed=trimmed
            )
            _check_entries(tx, report, seen, page.entries)
            position = page.scanned
        except DamagedLogError as error:
            report.add(str(error))
            seen.damaged = True
            if position + 1 < error.offset <= upto:
                page = read_page(
                    tx,
                    None,
                    after=position,
                    until=error.offset - 1,
                    limit=error.offset - 1 - position,
                    reverse=False,
                    trimmed=trimmed,
                )
                _check_entries(tx, report, seen, page.entries)
            position = max(error.offset, position + 1)


def _check_entries(tx: Transaction, report: CheckReport, seen: _Seen, entries: Sequence[LogEntry]) -> None:
    if not entries:
        return
    report.entries += len(entries)
    seen.payload_bytes += sum([len(bytes(entry.data)) for entry in entries])
    expected = {(name, entry.offset) for entry in entries for name in entry.channels}
    seen.channel_rows += len(expected)
    names = sorted({name for name, _ in expected})
    found = tx.rows_in(_CHANNELS, names, after=entries[0].offset - 1, upto=entries[-1].offset)
    for name, offset in sorted(expected - {(row[0], row[1]) for row in found}):
        report.add(f"log entry {offset} is missing in the index of channel {name}")
    _check_geoids(tx, report, [entry for entry in entries if entry.type.startswith("geoid.")])
    found_ones = [entry for entry in entries if entry.type.startswith("contradiction.")]
    _check_exist(tx, report, found_ones, _CONTRADICTIONS, rows.contradiction_of, Contradiction)
    scars = [entry for entry in entries if entry.type.startswith("scar.")]
    _check_exist(tx, report, scars, _SCARS, rows.scar_of, Scar)


def _check_geoids(tx: Transaction, report: CheckReport, entries: Sequence[LogEntry]) -> None:
    said = [(entry, _said(entry.data)) for entry in entries]
    ids = sorted({what.id for _, what in said})
    if not ids:
        return
    stored: dict[str, Any] = {row[0]: row for row in tx.rows_in(_GEOIDS, ids)}
    gone = {row[0]: row[1] for row in tx.rows_in(_TOMBSTONES, ids)}
    newest: dict[str, LogEntry] = {}
    for entry, what in said:
        row = stored.get(what.id)
        at = -1 if row is None else row[1]
        if entry.type == "geoid.deleted":
            if row is not None and at <= entry.offset:
                report.add(f"geoid {what.id} is there though log entry {entry.offset} deleted it")
        elif at < entry.offset and gone.get(what.id, -1) < entry.offset:
            report.add(f"geoid {what.id} lacks the version of log entry {entry.offset}")
        elif row is not None and at == entry.offset:
            newest[what.id] = entry
    for geoid_id, kept in _loaded(tx, report, list(newest)).items():
        entry = newest[geoid_id]
        if kept != msgspec.json.decode(entry.data, type=Geoid):
            report.add(f"geoid {geoid_id} differs from log entry {entry.offset}, which made it")


def _loaded(tx: Transaction, report: CheckReport, ids: Sequence[str]) -> dict[str, Geoid]:
    """Geoids as their rows have them; those that cannot be read are reported."""
    try:
        return {id_: stored.geoid for id_, stored in stored_geoids(tx, ids).items()}
    except (ValueError, msgspec.DecodeError) as error:
        if len(ids) == 1:
            report.add(f"geoid {ids[0]} cannot be read ({error})")
            return {}
        return {id_: each for one in ids for id_, each in _loaded(tx, report, [one]).items()}


def _check_exist(
    tx: Transaction,
    report: CheckReport,
    entries: Sequence[LogEntry],
    query: QueryIn,
    read: Callable[[Sequence[Any]], Contradiction | Scar],
    kind: type[Contradiction | Scar],
) -> None:
    said = [(entry, _said(entry.data).id) for entry in entries]
    ids = sorted({id_ for _, id_ in said})
    if not ids:
        return
    stored = {row[0]: row for row in tx.rows_in(query, ids)}
    for entry, id_ in said:
        word, row = entry.type.partition(".")[0], stored.get(id_)
        at = -1 if row is None else row[_OFFSET]
        if at < entry.offset:
            report.add(f"{word} {id_} lacks the state of log entry {entry.offset}")
        elif at == entry.offset and row is not None:
            try:
                same = read(row) == msgspec.json.decode(entry.data, type=kind)
            except (ValueError, msgspec.DecodeError) as error:
                report.add(f"{word} {id_} cannot be read ({error})")
            else:
                if not same:
                    report.add(f"{word} {id_} differs from log entry {entry.offset}, which made it")


def _check_totals(tx: Transaction, report: CheckReport, seen: _Seen, start: LogState) -> None:
    now = read_state(tx)
    report.counts = {name: int(tx.value(query)) for name, query in _COUNTS.items()}
    for name, query in _ORPHANS.items():
        for (id_,) in tx.rows(query, after=now.trimmed):
            report.add(f"{name} {id_} points at a log entry that is not there")
    for name, query in _MISCOUNTED.items():
        for (id_,) in tx.rows(query):
            report.add(f"geoid {id_} has another number of {name.replace('_', ' ')} than it says")
    if seen.damaged or now.trimmed != start.trimmed:
        return
    rows = tx.value(_COUNT_CHANNELS, after=start.trimmed, upto=start.head)
    if rows != seen.channel_rows:
        report.add(f"the channel index has {rows} rows, the log's entries call for {seen.channel_rows}")
    if now.head == start.head and now.payload_bytes != seen.payload_bytes:
        report.add(f"the log holds {seen.payload_bytes} bytes, its state says {now.payload_bytes}")
