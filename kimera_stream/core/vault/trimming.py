"""Dropping the oldest entries of the log, a bounded step at a time."""

from sqlalchemy import bindparam, delete, func, select, update

from kimera_stream.core.vault import schema
from kimera_stream.core.vault.entries import read_state
from kimera_stream.infrastructure.database import Query, Transaction

STEP = 500
"""Entries dropped in one transaction: a few milliseconds of the writer."""

entry, channel, state = schema.log_entry, schema.log_channel, schema.log_state

_LOCK = Query(select(state.c.trimmed).where(state.c.id == 1).with_for_update())
_OLDEST = Query(
    select(entry.c.offset, entry.c.channels, func.length(entry.c.data))
    .where(entry.c.offset > bindparam("after"), entry.c.offset <= bindparam("upto"))
    .order_by(entry.c.offset)
)
_DELETE_ENTRIES = Query(delete(entry).where(entry.c.offset <= bindparam("upto")))
_DELETE_CHANNEL = Query(
    delete(channel).where(channel.c.channel == bindparam("name"), channel.c.offset <= bindparam("upto"))
)
_SET_TRIMMED = Query(
    update(state)
    .where(state.c.id == 1)
    .values(trimmed=bindparam("upto"), payload_bytes=state.c.payload_bytes - bindparam("freed"))
)
held = schema.geoid_slice
_SCORED = Query(
    select(func.min(func.coalesce(held.c.unread - 1, held.c.scored))).where(held.c.lease_until > bindparam("since"))
)
_WORKED_ON = 86_400_000
"""Milliseconds after which slices that nobody has leased keep nothing: whoever works on this database is alone by now."""
_TS = Query(select(entry.c.ts).where(entry.c.offset == bindparam("at")))


def trim_step(tx: Transaction, upto: int, *, now: int) -> tuple[int, int]:
    """Drop at most ``STEP`` of the oldest entries at or below ``upto``; returns (how many, where the log now begins after).

    Where several nodes work, what has not been scored, or not been read by the verifier, stays. ``now``: unix ms.
    """
    trimmed: int = tx.value(_LOCK)
    scored: int | None = tx.value(_SCORED, since=now - _WORKED_ON)
    upto = min(upto, trimmed + STEP, read_state(tx).head if scored is None else scored)
    if upto <= trimmed:
        return 0, trimmed
    oldest = tx.rows(_OLDEST, after=trimmed, upto=upto)
    for name in {name for row in oldest for name in row[1].split(" ") if name}:
        tx.run(_DELETE_CHANNEL, name=name, upto=upto)
    tx.run(_DELETE_ENTRIES, upto=upto)
    tx.run(_SET_TRIMMED, upto=upto, freed=sum([row[2] for row in oldest]))
    return upto - trimmed, upto


def offset_before(tx: Transaction, ts: int) -> int:
    """The last kept offset whose entry is older than ``ts`` (unix ms), or where the log begins after.

    Halves the log: entries are taken to be in order of time, which a clock set back bends for as long as it was set back.
    """
    ends = read_state(tx)
    low, high = ends.trimmed, ends.head
    while low < high:
        middle = (low + high + 1) // 2
        at = tx.value(_TS, at=middle)
        if at is not None and at < ts:
            low = middle
        else:
            high = middle - 1
    return low


def offset_to_free(tx: Transaction, excess: int) -> int:
    """The offset up to which the oldest entries hold ``excess`` bytes of payload, but no further than one step."""
    trimmed = read_state(tx).trimmed
    freed, upto = 0, trimmed
    for offset, _, size in tx.rows(_OLDEST, after=trimmed, upto=trimmed + STEP):
        if freed >= excess:
            break
        freed += size
        upto = offset
    return upto
