"""One ``WriteBatch`` as one transaction."""

from collections.abc import Sequence

import msgspec
from sqlalchemy import bindparam, delete, insert, literal, null, select, update

from kimera_stream.core.interfaces import StoredGeoid, WriteBatch
from kimera_stream.core.vault import requests, rows, schema
from kimera_stream.core.vault.entries import entry_row
from kimera_stream.infrastructure.database import Insert, Query, QueryIn, Transaction
from kimera_stream.infrastructure.database.statements import among
from kimera_stream.protocol.errors import ConflictError

Inserts = list[tuple[Insert, Sequence[rows.Row]]]

_DAY_MS = 86_400_000
_encode = msgspec.json.Encoder().encode

state, geoid, version = schema.log_state, schema.geoid, schema.geoid_version

_LOCK = Query(select(state.c.head).where(state.c.id == 1).with_for_update())
_ENTRY = Query(select(*schema.log_entry.columns).where(schema.log_entry.c.offset == bindparam("offset")))
_ADVANCE = Query(
    update(state)
    .where(state.c.id == 1, state.c.head == bindparam("expected"))
    .values(head=bindparam("new_head"), payload_bytes=state.c.payload_bytes + bindparam("new_bytes"))
)
_TOMBSTONE = Query(
    insert(version).from_select(
        [column.name for column in version.columns],
        select(
            geoid.c.id,
            bindparam("at", type_=version.c.offset.type),
            geoid.c.version + 1,
            literal(True),
            geoid.c.principal,
            geoid.c.purpose,
            geoid.c.entropy,
            bindparam("when", type_=version.c.recorded_at.type),
            null(),
        ).where(geoid.c.id == bindparam("geoid_id", type_=geoid.c.id.type)),
    )
)
_DELETE_GEOIDS = QueryIn(lambda values: delete(geoid).where(among(geoid.c.id, values)))
_DELETE_SEMANTIC = QueryIn(
    lambda values: delete(schema.semantic_feature).where(among(schema.semantic_feature.c.geoid_id, values))
)
_DELETE_SYMBOLIC = QueryIn(
    lambda values: delete(schema.symbolic_feature).where(among(schema.symbolic_feature.c.geoid_id, values))
)

_ENTRIES = Insert.whole(schema.log_entry)
_CHANNELS = Insert.whole(schema.log_channel)
_GEOIDS = Insert.whole(geoid, conflict=("id",))
_VERSIONS = Insert.whole(version)
_SEMANTIC = Insert.whole(schema.semantic_feature)
_SYMBOLIC = Insert.whole(schema.symbolic_feature)
_CONTRADICTIONS = Insert.whole(schema.contradiction, conflict=("id",))
_SCARS = Insert.whole(schema.scar, conflict=("id",))
_IDEMPOTENCY = Insert.whole(schema.idempotency_key, conflict=("principal", "key"))
_AUDIT = Insert(schema.audit_entry, ("ts", "principal", "action", "target"))
_SESSIONS = Insert(
    schema.session,
    ("id", "principal", "statements", "created_at", "updated_at"),
    conflict=("id",),
    update=("updated_at",),
    add=("statements",),
)
_USAGE = Insert(
    schema.usage,
    ("principal", "day", "statements", "text_bytes", "tokens", "bytes"),
    conflict=("principal", "day"),
    add=("statements", "text_bytes", "tokens", "bytes"),
)


def check_batch(batch: WriteBatch) -> None:
    """Refuse a batch whose entries are not consecutive.

    Raises:
        ValueError: they are not; a defect of the caller.
    """
    for previous, entry in zip(batch.entries, batch.entries[1:], strict=False):
        if entry.offset != previous.offset + 1:
            raise ValueError(f"entries of a batch are consecutive: {entry.offset} follows {previous.offset}")


def write_batch(tx: Transaction, batch: WriteBatch, now: int) -> int:
    """Write everything in ``batch``; returns the new head.

    Raises:
        ConflictError: the first entry is not the one after the head.
    """
    if batch.entries:
        head, log_rows = _advance(tx, batch)
    else:
        head, log_rows = int(tx.value(_LOCK)), []
    geoid_rows = _replace_geoids(tx, batch, now) if batch.geoids or batch.deleted else []
    keyed = [rows.record_row(record) for record in batch.idempotency]
    tx.insert_all(
        [
            *log_rows,
            *geoid_rows,
            (_CONTRADICTIONS, _last_by_key([rows.contradiction_row(found) for found in batch.contradictions], 1)),
            (_SCARS, _last_by_key([rows.scar_row(scar) for scar in batch.scars], 1)),
            (_IDEMPOTENCY, _last_by_key(keyed, 2)),
            (_AUDIT, batch.audit),
        ]
    )
    requests.settle(tx, batch.settled)
    return head


def _advance(tx: Transaction, batch: WriteBatch) -> tuple[int, Inserts]:
    """Move the head; returns the new one, and the rows of the log."""
    entry_rows = [entry_row(entry) for entry in batch.entries]
    before, head = entry_rows[0][0] - 1, entry_rows[-1][0]
    size = sum([len(row[5]) for row in entry_rows])
    # The first statement takes the lock that orders writers, and finds out whether this one is late.
    if tx.run(_ADVANCE, expected=before, new_head=head, new_bytes=size) != 1:
        at = tx.value(_LOCK)
        raise ConflictError(
            f"the log is at offset {at}: expected the batch to start at {at + 1}, it starts at {before + 1}"
        )
    channels = [(name, entry.offset) for entry in batch.entries for name in dict.fromkeys(entry.channels)]
    return head, [(_ENTRIES, entry_rows), (_CHANNELS, channels)]


def _last_by_key(found: list[rows.Row], width: int) -> list[rows.Row]:
    """One row per key (the first ``width`` columns), the last one: a statement may name a row only once."""
    if len(found) < 2:
        return found
    return list({tuple(row[:width]): row for row in found}.values())


def _replace_geoids(tx: Transaction, batch: WriteBatch, now: int) -> Inserts:
    """Remove what is deleted or said anew; returns the rows that take its place."""
    versions = [rows.version_row(stored) for stored in batch.geoids]
    said = sorted(batch.geoids, key=_offset) if batch.deleted else batch.geoids
    live = {stored.geoid.id: stored for stored in said}
    for geoid_id, offset in batch.deleted:
        stored = live.get(geoid_id)
        if stored is not None and stored.geoid.offset < offset:  # said and deleted in one batch
            versions.append(rows.tombstone_row(live.pop(geoid_id), offset, now))
        else:
            tx.run(_TOMBSTONE, geoid_id=geoid_id, at=offset, when=now)
    if batch.deleted:
        tx.run_in(_DELETE_GEOIDS, [geoid_id for geoid_id, _ in batch.deleted])
    updated = [stored.geoid.id for stored in live.values() if stored.geoid.version > 1]
    if updated:
        tx.run_in(_DELETE_SEMANTIC, updated)
        tx.run_in(_DELETE_SYMBOLIC, updated)
    said_of = [stored.geoid for stored in live.values()]
    return [
        (_GEOIDS, [rows.geoid_row(stored) for stored in live.values()]),
        (_SEMANTIC, [row for each in said_of if each.semantic_state for row in rows.semantic_rows(each)]),
        (_SYMBOLIC, [row for each in said_of if each.symbolic_state for row in rows.symbolic_rows(each)]),
        (_VERSIONS, versions),
        *_use(batch, now),
    ]


def _offset(stored: StoredGeoid) -> int:
    return stored.geoid.offset


def _use(batch: WriteBatch, now: int) -> Inserts:
    """What sessions and principals have said."""
    sessions: dict[str, tuple[str, int]] = {}
    principals: dict[str, tuple[int, int, int, int]] = {}
    for stored in batch.geoids:
        session_id = stored.geoid.session_id
        if session_id is not None:
            principal, count = sessions.get(session_id, (stored.principal, 0))
            sessions[session_id] = (principal, count + 1)
        count, texts, tokens, size = principals.get(stored.principal, (0, 0, 0, 0))
        text = len((stored.geoid.text or "").encode())
        size += text + _beside_text(stored)
        principals[stored.principal] = (count + 1, texts + text, tokens + stored.tokens, size)
    day = now // _DAY_MS
    return [
        (_SESSIONS, [(id_, principal, count, now, now) for id_, (principal, count) in sessions.items()]),
        (_USAGE, [(principal, day, *counted) for principal, counted in principals.items()]),
    ]


def _beside_text(stored: StoredGeoid) -> int:
    """Bytes of what was said besides the text."""
    geoid = stored.geoid
    size = 4 * stored.vector.size if stored.vector is not None and stored.own_vector else 0
    for part in (geoid.semantic_state, geoid.symbolic_state, geoid.metadata):
        if part:
            size += len(_encode(part))
    return size


def is_written(tx: Transaction, batch: WriteBatch) -> bool:
    """Whether a commit whose outcome nobody heard has happened. Waits for the lock that the lost connection may still hold."""
    head: int = tx.value(_LOCK)
    last = entry_row(batch.entries[-1])
    if head < last[0]:
        return False
    stored = tx.row(_ENTRY, offset=last[0])
    return stored is not None and tuple(stored) == last
