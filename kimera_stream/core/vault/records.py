"""What the vault keeps besides the log and the geoids: watches, cursors, keys, sessions, usage, revocations."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
from sqlalchemy import bindparam, delete, func, select, update

from kimera_stream.core.interfaces import IdempotencyRecord, Vector
from kimera_stream.core.kept import FORGIVEN_MS, Revocation, RevocationKind, UsageRecord
from kimera_stream.core.vault import rows, schema
from kimera_stream.infrastructure.database import Insert, Query, QueryIn, Transaction
from kimera_stream.infrastructure.database.statements import among
from kimera_stream.protocol.objects import Watch

watch, cursor, key = schema.watch, schema.cursor, schema.idempotency_key
session, usage, audit = schema.session, schema.usage, schema.audit_entry
revocation = schema.revocation


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as its publishes left it; times in unix ms."""

    id: str
    principal: str
    statements: int
    created_at: int
    updated_at: int


_WATCH_ID = Query(
    select(watch.c.id).where(watch.c.principal == bindparam("principal"), watch.c.name == bindparam("name"))
)
_DELETE_WATCH = Query(
    delete(watch).where(watch.c.principal == bindparam("principal"), watch.c.name == bindparam("name"))
)
_SAVE_WATCH = Insert.whole(watch)
_WATCHES = Query(select(*rows.WATCH_COLUMNS).order_by(watch.c.created_at, watch.c.id))
_COUNT_WATCHES = Query(select(func.count()).select_from(watch))
_COUNT_WATCHES_OF = Query(select(func.count()).select_from(watch).where(watch.c.principal == bindparam("principal")))


_LOCK = Query(select(schema.log_state.c.head).where(schema.log_state.c.id == 1).with_for_update())
# Whoever commits after a change has to know the watches as they are then; nodes that are alone have no row to touch.
_CHANGED = Query(update(schema.cluster).values(watch_generation=schema.cluster.c.watch_generation + 1))


def save_watch(
    tx: Transaction, saved: Watch, vector: Vector | None, *, most: int, most_per_principal: int
) -> Watch | None:
    """Insert, or replace the principal's watch of that name, whose id it takes; returns it as it is kept.

    None, and everything is left as it is, where there are ``most`` others already, or the principal has ``most_per_principal``. The lock under
    which watches change makes both hold for all nodes together.
    """
    tx.value(_LOCK)
    former = tx.value(_WATCH_ID, principal=saved.principal, name=saved.watch)
    if former is not None:
        saved = msgspec.structs.replace(saved, id=former)
    elif (
        tx.value(_COUNT_WATCHES) >= most or tx.value(_COUNT_WATCHES_OF, principal=saved.principal) >= most_per_principal
    ):
        return None
    tx.run(_CHANGED)
    tx.run(_DELETE_WATCH, principal=saved.principal, name=saved.watch)
    tx.insert(_SAVE_WATCH, [rows.watch_row(saved, vector)])
    return saved


def delete_watch(tx: Transaction, principal: str, name: str) -> bool:
    tx.value(_LOCK)
    tx.run(_CHANGED)
    return tx.run(_DELETE_WATCH, principal=principal, name=name) > 0


def all_watches(tx: Transaction) -> list[tuple[Watch, Vector | None]]:
    return [rows.watch_of(row) for row in tx.rows(_WATCHES)]


_SAVE_CURSOR = Insert.whole(cursor, conflict=("principal", "name", "channel"))
_CURSOR = Query(
    select(cursor.c.offset).where(
        cursor.c.principal == bindparam("principal"),
        cursor.c.name == bindparam("name"),
        cursor.c.channel == bindparam("channel"),
        cursor.c.epoch == bindparam("epoch"),
    )
)


_HAS_CURSOR = Query(
    select(cursor.c.offset).where(
        cursor.c.principal == bindparam("principal"),
        cursor.c.name == bindparam("name"),
        cursor.c.channel == bindparam("channel"),
    )
)
_COUNT_CURSORS = Query(select(func.count()).select_from(cursor).where(cursor.c.principal == bindparam("principal")))


def save_cursor(
    tx: Transaction, principal: str, name: str, channel: str, *, epoch: str, offset: int, now: int, most: int
) -> bool:
    """Insert or move it; returns False, and leaves everything as it is, where the principal has ``most`` others already.

    A new one is counted and made under the log's lock: two nodes that make one each do not both take the last place, and one that
    another node made until then is there.
    """
    saved = partial(tx.value, _HAS_CURSOR, principal=principal, name=name, channel=channel)
    if saved() is None:
        tx.value(_LOCK)
        if saved() is None and tx.value(_COUNT_CURSORS, principal=principal) >= most:
            return False
    tx.insert(_SAVE_CURSOR, [(principal, name, channel, epoch, offset, now)])
    return True


def find_cursor(tx: Transaction, principal: str, name: str, channel: str, *, epoch: str) -> int | None:
    found: int | None = tx.value(_CURSOR, principal=principal, name=name, channel=channel, epoch=epoch)
    return found


_KEY = Query(
    select(*rows.RECORD_COLUMNS).where(
        key.c.principal == bindparam("principal"),
        key.c.key == bindparam("name"),
        key.c.created_at >= bindparam("not_before"),
    )
)
_EXPIRED_KEYS = Query(
    select(key.c.created_at)
    .where(key.c.created_at < bindparam("before"))
    .order_by(key.c.created_at)
    .limit(bindparam("limit"))
)
_DELETE_KEYS = Query(delete(key).where(key.c.created_at <= bindparam("upto")))


def find_key(tx: Transaction, principal: str, name: str, not_before: int) -> IdempotencyRecord | None:
    row = tx.row(_KEY, principal=principal, name=name, not_before=not_before)
    return None if row is None else rows.record_of(row)


def purge_keys(tx: Transaction, before: int, limit: int) -> int:
    """Drop about ``limit`` of the keys made before ``before`` (unix ms), the oldest; returns how many."""
    expired = tx.rows(_EXPIRED_KEYS, before=before, limit=limit)
    return tx.run(_DELETE_KEYS, upto=expired[-1][0]) if expired else 0


_SESSION_COLUMNS = (session.c.id, session.c.principal, session.c.statements, session.c.created_at, session.c.updated_at)
_SESSION = Query(select(*_SESSION_COLUMNS).where(session.c.id == bindparam("session_id")))
_SESSIONS = Query(
    select(*_SESSION_COLUMNS)
    .where(session.c.updated_at >= bindparam("since"))
    .order_by(session.c.updated_at.desc())
    .limit(bindparam("limit"))
)
_OLD_SESSIONS = Query(
    select(session.c.id)
    .where(session.c.updated_at < bindparam("before"))
    .order_by(session.c.updated_at)
    .limit(bindparam("limit"))
)
_DELETE_SESSIONS = QueryIn(lambda values: delete(session).where(among(session.c.id, values)))


_LAST_SAID = Query(
    select(schema.geoid.c.id, schema.geoid.c.agent_id, schema.geoid.c.updated_at)
    .where(schema.geoid.c.session_id == bindparam("session_id"))
    .order_by(schema.geoid.c.offset.desc())
    .limit(bindparam("limit"))
)


def last_said(tx: Transaction, sessions: Sequence[str], limit: int) -> dict[str, list[tuple[str, str | None, int]]]:
    """By session, its newest statements: (geoid id, agent id, unix ms), the newest first, ``limit`` of each at most."""
    return {each: [tuple(row) for row in tx.rows(_LAST_SAID, session_id=each, limit=limit)] for each in sessions}


def find_session(tx: Transaction, session_id: str) -> SessionRecord | None:
    row = tx.row(_SESSION, session_id=session_id)
    return None if row is None else SessionRecord(*row)


def recent_sessions(tx: Transaction, since: int, limit: int) -> list[SessionRecord]:
    return [SessionRecord(*row) for row in tx.rows(_SESSIONS, since=since, limit=limit)]


def purge_sessions(tx: Transaction, before: int, limit: int) -> int:
    old = [row[0] for row in tx.rows(_OLD_SESSIONS, before=before, limit=limit)]
    return tx.run_in(_DELETE_SESSIONS, old)


_USAGE = Query(
    select(usage.c.principal, usage.c.day, usage.c.statements, usage.c.text_bytes, usage.c.tokens, usage.c.bytes)
    .where(usage.c.day >= bindparam("since_day"))
    .order_by(usage.c.principal, usage.c.day)
    .limit(bindparam("limit"))
)
_USAGE_OF = Query(
    select(usage.c.principal, usage.c.day, usage.c.statements, usage.c.text_bytes, usage.c.tokens, usage.c.bytes)
    .where(usage.c.principal == bindparam("name"), usage.c.day >= bindparam("since_day"))
    .order_by(usage.c.day)
    .limit(bindparam("limit"))
)
_AUDIT = Query(
    select(audit.c.ts, audit.c.principal, audit.c.action, audit.c.target)
    .where(audit.c.ts >= bindparam("since"))
    .order_by(audit.c.id)
    .limit(bindparam("limit"))
)


def usage_since(tx: Transaction, day: int, principal: str | None = None, limit: int = 2**31) -> list[UsageRecord]:
    """Of all principals or of one, by principal and day."""
    if principal is None:
        return [UsageRecord(*row) for row in tx.rows(_USAGE, since_day=day, limit=limit)]
    return [UsageRecord(*row) for row in tx.rows(_USAGE_OF, name=principal, since_day=day, limit=limit)]


def audit_since(tx: Transaction, since: int, limit: int) -> list[tuple[int, str, str, str]]:
    """(unix ms, principal, action, target), oldest first."""
    return [(row[0], row[1], row[2], row[3]) for row in tx.rows(_AUDIT, since=since, limit=limit)]


_AUDIT_ENDS = Query(select(func.min(audit.c.id), func.max(audit.c.id)))
_AUDIT_BEYOND = Query(select(audit.c.id).order_by(audit.c.id.desc()).offset(bindparam("keep")).limit(1))
_AUDIT_BEFORE = Query(select(func.max(audit.c.id)).where(audit.c.ts < bindparam("before")))
_AUDIT_OLDEST = Query(
    select(audit.c.id).where(audit.c.id <= bindparam("upto")).order_by(audit.c.id).limit(bindparam("limit"))
)
_DELETE_AUDIT = Query(delete(audit).where(audit.c.id <= bindparam("upto")))


def audit_upto(tx: Transaction, keep: int, before: int) -> int:
    """The id up to which entries are beyond the newest ``keep``, or were made before ``before`` (unix ms); 0 asks for neither,
    and is the answer where there are none."""
    first, last = tx.rows(_AUDIT_ENDS)[0]
    if first is None:
        return 0
    upto = 0
    if keep and last - first >= keep:  # else there are no more than that, whatever gaps there are
        upto = int(tx.value(_AUDIT_BEYOND, keep=keep) or 0)
    if before:
        upto = max(upto, int(tx.value(_AUDIT_BEFORE, before=before) or 0))
    return upto


def purge_audit(tx: Transaction, upto: int, limit: int) -> int:
    """Drop at most ``limit`` of the entries up to an id, the oldest; returns how many."""
    oldest = tx.rows(_AUDIT_OLDEST, upto=upto, limit=limit)
    return tx.run(_DELETE_AUDIT, upto=oldest[-1][0]) if oldest else 0


_SAVE_REVOCATION = Insert(revocation, ("kind", "subject", "revoked_at", "expires_at"))
_SAVE_AUDIT = Insert(audit, ("ts", "principal", "action", "target"))
_COUNT_REVOCATIONS = Query(select(func.count()).select_from(revocation))
_OVER = Query(delete(revocation).where(revocation.c.expires_at < bindparam("before")))
_ABOUT = Query(
    select(revocation.c.id, revocation.c.revoked_at)
    .where(revocation.c.kind == bindparam("kind"), revocation.c.subject == bindparam("subject"))
    .order_by(revocation.c.id.desc())
    .limit(1)
)
_REPLACED = Query(
    delete(revocation).where(
        revocation.c.kind == bindparam("kind"),
        revocation.c.subject == bindparam("subject"),
        revocation.c.id < bindparam("newest"),
    )
)
_REVOCATIONS = Query(
    select(revocation.c.id, revocation.c.kind, revocation.c.subject, revocation.c.revoked_at, revocation.c.expires_at)
    .where(revocation.c.id > bindparam("after"))
    .order_by(revocation.c.id)
    .limit(bindparam("limit"))
)


def revoke(
    tx: Transaction, kind: RevocationKind, subject: str, *, by: str, expires_at: int | None, now: int, most: int
) -> Revocation | None:
    """Record that tokens no longer count; a later word on the same subject takes the place of an earlier one.

    Returns:
        None, with nothing written, where ``most`` others are kept already.
    """
    tx.value(_LOCK)
    tx.run(_OVER, before=now - FORGIVEN_MS)
    if int(tx.value(_COUNT_REVOCATIONS)) >= most and tx.row(_ABOUT, kind=kind, subject=subject) is None:
        return None
    tx.insert(_SAVE_REVOCATION, [(kind, subject, now, expires_at)])
    row = tx.row(_ABOUT, kind=kind, subject=subject)
    assert row is not None
    tx.run(_REPLACED, kind=kind, subject=subject, newest=row[0])
    tx.insert(_SAVE_AUDIT, [(now, by, f"revoke:{kind}", subject)])
    return Revocation(row[0], kind, subject, row[1], expires_at)


def revocations_after(tx: Transaction, after: int, limit: int) -> list[Revocation]:
    """Those with a greater id than ``after``, in its order."""
    return [Revocation(*row) for row in tx.rows(_REVOCATIONS, after=after, limit=limit)]
