"""The vault under the log's lock: what a transaction of several nodes decides on, read where nobody can change it.

The lock is the row ``log_state``, taken first. On PostgreSQL (READ COMMITTED) each later statement sees everything committed
before the lock was had; on SQLite there is one writer anyway.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import bindparam, select, update

from kimera_stream.core.coverage import Mark
from kimera_stream.core.interfaces import IdempotencyRecord
from kimera_stream.core.vault import reading, schema
from kimera_stream.core.vault.clock import DatabaseClock
from kimera_stream.core.vault.errors import LeaseLostError
from kimera_stream.core.vault.rows import RECORD_COLUMNS, record_of
from kimera_stream.infrastructure.database import Query, QueryIn, Transaction
from kimera_stream.infrastructure.database.statements import among
from kimera_stream.protocol.objects import Contradiction, ContradictionState, Geoid

state, geoid, key, held = schema.log_state, schema.geoid, schema.idempotency_key, schema.geoid_slice

_LOCK = Query(select(state.c.head).where(state.c.id == 1).with_for_update())
_NOW = Query(
    select(
        select(schema.log_entry.c.ts).where(schema.log_entry.c.offset == bindparam("at")).scalar_subquery(),
        DatabaseClock(),
    )
)
_WATCHES = Query(select(schema.cluster.c.watch_generation))
# A slice changes hands under the strongest lock of its row (FOR UPDATE), which waits for either of these. Work that is committed
# does not keep progress from moving, nor the other way round.
_HELD = {
    shared: QueryIn(
        lambda values, shared=shared: (  # type: ignore[misc]
            select(held.c.number, held.c.generation)
            .where(among(held.c.number, values), held.c.owner == bindparam("node_id"))
            .order_by(held.c.number)
            .with_for_update(read=shared, key_share=True)
        )
    )
    for shared in (False, True)
}
_ADVANCE = QueryIn(
    lambda values: (
        update(held)
        .where(among(held.c.number, values), held.c.scored < bindparam("upto"))
        .values(scored=bindparam("upto", type_=held.c.scored.type))
    )
)
_PUT_OFF = QueryIn(
    lambda values: (
        update(held).where(among(held.c.number, values)).values(unread=bindparam("since", type_=held.c.unread.type))
    )
)
_MARKS = QueryIn(
    lambda values: select(geoid.c.id, geoid.c.version, geoid.c.offset, geoid.c.stated).where(among(geoid.c.id, values))
)
_RECORDS = QueryIn(
    lambda values: select(*RECORD_COLUMNS).where(among(key.c.key, values), key.c.created_at >= bindparam("not_before"))
)


def hold(tx: Transaction, node_id: str, leases: Mapping[int, int], *, shared: bool = False) -> None:
    """Keep the slices of ``leases`` (number -> generation) the node's own until the transaction ends.

    Args:
        shared: They are not going to be changed here.

    Raises:
        LeaseLostError: they are not, or in another generation.
    """
    found = {row[0]: row[1] for row in tx.rows_in(_HELD[shared], sorted(leases), node_id=node_id)}
    lost = [number for number, generation in leases.items() if found.get(number) != generation]
    if lost:
        raise LeaseLostError.of(sorted(lost))


def advance(tx: Transaction, numbers: Sequence[int], scored: int) -> None:
    """Move ``scored`` of slices; never back."""
    if numbers:
        tx.run_in(_ADVANCE, sorted(numbers), upto=scored)


class SqlLockedLog:
    """Implements ``core.coverage.LockedLog`` on one transaction."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        self.head: int = tx.value(_LOCK)

    @property
    def now(self) -> int:
        """Unix ms by the database's clock, and never before the newest entry: the log's times are in its order."""
        last, now = self._tx.row(_NOW, at=self.head)
        return max(int(last or 0), int(now))

    @property
    def watch_generation(self) -> int:
        """Grows with every change of a watch on any node."""
        return int(self._tx.value(_WATCHES) or 0)

    def hold(self, node_id: str, leases: Mapping[int, int], *, shared: bool = False) -> None:
        """See ``hold``."""
        if leases:
            hold(self._tx, node_id, leases, shared=shared)

    def advance(self, numbers: Sequence[int], scored: int) -> None:
        """See ``advance``."""
        advance(self._tx, numbers, scored)

    def put_off(self, numbers: Sequence[int], since: int | None) -> None:
        """Record from where on slices wait for the verifier."""
        if numbers:
            self._tx.run_in(_PUT_OFF, sorted(numbers), since=since)

    def marks(self, ids: Sequence[str]) -> Mapping[str, Mark]:
        """Of those geoids that exist."""
        rows = self._tx.rows_in(_MARKS, ids) if ids else []
        return {row[0]: Mark(row[1], row[2], row[3] or row[2]) for row in rows}

    def geoids(self, ids: Sequence[str]) -> Mapping[str, Geoid]:
        """Those of ``ids`` that exist."""
        wanted = list(dict.fromkeys(ids))
        return {id_: each.geoid for id_, each in reading.stored_geoids(self._tx, wanted).items()} if wanted else {}

    def contradiction(self, contradiction_id: str) -> Contradiction | None:
        return reading.one_contradiction(self._tx, contradiction_id)

    def contradictions_of(self, geoid_ids: Sequence[str], *, state: ContradictionState) -> list[Contradiction]:
        """In which any of the geoids takes part, in offset order."""
        return reading.contradictions_of(self._tx, geoid_ids=geoid_ids, state=state) if geoid_ids else []

    def scar_weights(self) -> tuple[float, float]:
        """Summed weight of vault a and of vault b."""
        return reading.scar_weights(self._tx)

    def recorded(
        self, keys: Sequence[tuple[str, str]], *, not_before: int
    ) -> Mapping[tuple[str, str], IdempotencyRecord]:
        """Records by (principal, key), made at or after ``not_before`` (unix ms).

        Raises:
            DamagedVaultError: one is not what was committed.
        """
        if not keys:
            return {}
        wanted = set(keys)
        rows = self._tx.rows_in(_RECORDS, sorted({name for _, name in keys}), not_before=not_before)
        return {(row[0], row[1]): record_of(row) for row in rows if (row[0], row[1]) in wanted}
