"""Nodes, leases and progress of a cluster, in the database and by its clock.

Rows are locked in the order of their numbers, and never the log's lock after them: whoever needs both takes the log's first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import BigInteger, bindparam, delete, insert, null, or_, select, text, update

from kimera_stream.core.coverage import Coverage, Node, SliceState
from kimera_stream.core.vault import schema
from kimera_stream.core.vault.clock import DatabaseClock
from kimera_stream.core.vault.locked import advance, hold
from kimera_stream.infrastructure.database import CommitWatch, Database, Insert, Query, QueryIn, Transaction
from kimera_stream.infrastructure.database.statements import among
from kimera_stream.infrastructure.settings import DatabaseSettings
from kimera_stream.protocol.errors import BadRequestError

T = TypeVar("T")

FORGOTTEN = 3_600.0
"""Seconds after which a node that was not heard of is dropped from the table."""
_IDLE = 3.0
"""Seconds that a node may stop in the middle of a transaction before the database ends it for the others' sake."""


cluster, node, held, duty = schema.cluster, schema.node, schema.geoid_slice, schema.lease
_BIG = BigInteger()


def _ms(name: str) -> Any:
    return bindparam(name, type_=_BIG)


_LOG = Query(select(schema.log_state.c.head).where(schema.log_state.c.id == 1).with_for_update())
_HEAD = Query(select(schema.log_state.c.head).where(schema.log_state.c.id == 1))
_MADE = Query(select(cluster.c.slices))
_MAKE = Query(
    insert(cluster).from_select(
        ["id", "slices", "watch_generation", "created_at"],
        select(text("1"), bindparam("slices", type_=cluster.c.slices.type), text("0"), DatabaseClock()),
    )
)
_SLICES_INSERT = Insert(held, ("number", "generation", "lease_until", "scored"))
_CLUSTER = Query(select(cluster.c.watch_generation))
_SLICES = Query(
    select(
        held.c.number,
        held.c.owner,
        held.c.generation,
        held.c.lease_until - DatabaseClock(),
        held.c.scored,
        held.c.unread,
        held.c.heir,
    ).order_by(held.c.number)
)
_NODES = Query(
    select(node.c.id, node.c.name, node.c.role, node.c.started_at, node.c.seen_at, node.c.reachable)
    .where(node.c.seen_at >= DatabaseClock() - _ms("within"))
    .order_by(node.c.id)
)
_SEEN = Query(
    update(node)
    .where(node.c.id == bindparam("node_id"))
    .values(seen_at=DatabaseClock(), reachable=bindparam("now_reachable", type_=node.c.reachable.type))
)
_ARRIVE = Query(
    insert(node).from_select(
        ["id", "name", "role", "started_at", "seen_at", "reachable"],
        select(
            bindparam("node_id", type_=node.c.id.type),
            bindparam("name", type_=node.c.name.type),
            bindparam("role", type_=node.c.role.type),
            DatabaseClock(),
            DatabaseClock(),
            bindparam("now_reachable", type_=node.c.reachable.type),
        ),
    )
)
_MINE, _MINE_TO_RENEW = (
    Query(
        select(held.c.number)
        .where(held.c.owner == bindparam("node_id"))
        .order_by(held.c.number)
        .with_for_update(key_share=only_renewed)
    )
    for only_renewed in (False, True)
)
_RENEW = Query(
    update(held).where(held.c.owner == bindparam("node_id")).values(lease_until=DatabaseClock() + _ms("lease"))
)
_FREE = QueryIn(
    lambda values: (
        select(held.c.number)
        .where(among(held.c.number, values), or_(held.c.owner.is_(None), held.c.lease_until < DatabaseClock()))
        .order_by(held.c.number)
        .with_for_update(skip_locked=True)
    )
)
_TAKE = QueryIn(
    lambda values: (
        update(held)
        .where(among(held.c.number, values))
        .values(
            owner=bindparam("node_id", type_=held.c.owner.type),
            generation=held.c.generation + 1,
            lease_until=DatabaseClock() + _ms("lease"),
            heir=bindparam("until_filled", type_=held.c.heir.type),
        )
    )
)
_FILLED = QueryIn(
    lambda values: (
        update(held)
        .where(among(held.c.number, values), held.c.heir == bindparam("node_id"))  # what another waits for stays
        .values(heir=null())
    )
)
_OFFER = QueryIn(
    lambda values: (
        update(held).where(among(held.c.number, values)).values(heir=bindparam("node_id", type_=held.c.heir.type))
    )
)
_LOCKED = QueryIn(
    lambda values: select(held.c.number).where(among(held.c.number, values)).order_by(held.c.number).with_for_update()
)
_RELEASE = QueryIn(
    lambda values: (
        update(held).where(among(held.c.number, values)).values(owner=null(), generation=held.c.generation + 1)
    )
)
_RELEASE_ALL = Query(
    update(held).where(held.c.owner == bindparam("node_id")).values(owner=null(), generation=held.c.generation + 1)
)
_DEPART = Query(delete(node).where(node.c.id == bindparam("node_id")))
_FORGET = Query(delete(node).where(node.c.seen_at < DatabaseClock() - _ms("within")))
_NOT_WAITING = Query(text("SET LOCAL synchronous_commit TO OFF"))

_DUTY_HELD = Query(
    update(duty)
    .where(duty.c.duty == bindparam("name"), duty.c.owner == bindparam("node_id"))
    .values(lease_until=DatabaseClock() + _ms("lease"))
)
_DUTY_TAKEN = Query(
    update(duty)
    .where(duty.c.duty == bindparam("name"), or_(duty.c.owner.is_(None), duty.c.lease_until < DatabaseClock()))
    .values(
        owner=bindparam("node_id", type_=duty.c.owner.type),
        generation=duty.c.generation + 1,
        lease_until=DatabaseClock() + _ms("lease"),
    )
)
_DUTY_ROW = Insert(duty, ("duty", "generation", "lease_until"), conflict=("duty",))
_DUTY_FREE = Query(
    update(duty)
    .where(duty.c.duty == bindparam("name"), duty.c.owner == bindparam("node_id"))
    .values(owner=null(), generation=duty.c.generation + 1)
)
_DUTIES_FREE = Query(
    update(duty).where(duty.c.owner == bindparam("node_id")).values(owner=null(), generation=duty.c.generation + 1)
)


class SqlCluster:
    """Implements ``core.coverage.ClusterStore``.

    Args:
        url: The vault's database.
        settings: The database group.
    """

    def __init__(self, url: str, settings: DatabaseSettings) -> None:
        self._database = Database(url, settings.model_copy(update={"pool_size": 2}), abandoned_after=_IDLE)

    @property
    def commits(self) -> CommitWatch:
        """How long the write under way has lasted: for who asks before it accepts anything."""
        return self._database.commits

    async def _write(self, fn: Callable[[Transaction], T]) -> T:
        """What a node has taken on rests on this: it waits for its turn."""
        return await self._database.write(fn, accepted=True)

    async def close(self) -> None:
        """Close the connections."""
        await self._database.close()

    async def open(self, slices: int) -> None:
        """See ``ClusterStore.open``. Everything that is in the log by then was judged by the node that wrote it alone.

        Raises:
            BadRequestError: the database was made with another number.
        """

        def make(tx: Transaction) -> int:
            head: int = tx.value(_LOG)
            made: int | None = tx.value(_MADE)
            if made is None:
                tx.run(_MAKE, slices=slices)
                tx.insert(_SLICES_INSERT, [(number, 0, 0, head) for number in range(slices)])
            return slices if made is None else made

        made = await self._write(make)
        if made != slices:
            raise BadRequestError(
                f"KIMERA_BUS__SLICES: this database was set up with {made} slices, not {slices}", field="bus.slices"
            )

    async def beat(self, node: Node, *, lease: float) -> Coverage:
        """Say that the node is alive and extend the leases that it still has; returns how things stand."""

        def renew(tx: Transaction) -> Coverage:
            if tx.run(_SEEN, node_id=node.id, now_reachable=node.reachable) == 0:
                tx.run(_ARRIVE, node_id=node.id, name=node.name, role=node.role, now_reachable=node.reachable)
            if node.is_engine and tx.rows(_MINE_TO_RENEW, node_id=node.id):
                tx.run(_RENEW, node_id=node.id, lease=_as_ms(lease))
            return _coverage(tx, lease)

        return await self._write(renew)

    async def leave(self, node_id: str) -> None:
        """The node stops: what it holds is free at once."""

        def depart(tx: Transaction) -> None:
            tx.rows(_MINE, node_id=node_id)
            tx.run(_RELEASE_ALL, node_id=node_id)
            tx.run(_DUTIES_FREE, node_id=node_id)
            tx.run(_DEPART, node_id=node_id)

        await self._write(depart)

    async def take(self, node_id: str, numbers: Sequence[int], *, lease: float) -> dict[int, SliceState]:
        """Take those of the slices that are free or expired; returns what was got, which is not filled yet."""

        def take(tx: Transaction) -> dict[int, SliceState]:
            free = [row[0] for row in tx.rows_in(_FREE, sorted(numbers))]
            if not free:
                return {}
            tx.run_in(_TAKE, free, node_id=node_id, until_filled=node_id, lease=_as_ms(lease))
            return {each.number: each for each in _slices(tx) if each.number in free}

        return await self._write(take) if numbers else {}

    async def filled(self, node_id: str, leases: Mapping[int, int]) -> None:
        """The node has the geoids of slices that it owns (number -> generation)."""
        await self._change(_FILLED, node_id, leases, node_id=node_id)

    async def unfilled(self, node_id: str, leases: Mapping[int, int]) -> None:
        """The node no longer has the geoids of slices that it owns (number -> generation)."""
        await self._change(_OFFER, node_id, leases, node_id=node_id)

    async def offer(self, node_id: str, numbers: Sequence[int]) -> None:
        """The node has the geoids of these slices ready."""

        def offer(tx: Transaction) -> None:
            tx.rows_in(_LOCKED, sorted(numbers))
            tx.run_in(_OFFER, sorted(numbers), node_id=node_id)

        if numbers:
            await self._write(offer)

    async def hand_over(self, node_id: str, leases: Mapping[int, int], to: str, *, lease: float) -> None:
        """Make another node the owner of slices (number -> generation)."""
        await self._change(_TAKE, node_id, leases, node_id=to, until_filled=None, lease=_as_ms(lease))

    async def release(self, node_id: str, leases: Mapping[int, int]) -> None:
        """Give slices back (number -> generation)."""
        await self._change(_RELEASE, node_id, leases)

    async def _change(self, query: QueryIn, holder: str, leases: Mapping[int, int], **values: Any) -> None:
        """Run ``query`` on those of the slices that ``holder`` still holds in these generations."""

        def change(tx: Transaction) -> None:
            mine = _mine(tx, holder, leases)
            if mine:
                tx.run_in(query, mine, **values)

        if leases:
            await self._write(change)

    async def advance(self, node_id: str, leases: Mapping[int, int], scored: int) -> None:
        """See ``ClusterStore.advance``. It need not be on the disk: what a crash takes back is judged once more."""

        def move(tx: Transaction) -> None:
            if tx.dialect == "postgresql":
                tx.run(_NOT_WAITING)
            hold(tx, node_id, leases)
            advance(tx, list(leases), scored)

        if leases:
            await self._write(move)

    async def coverage(self, *, lease: float) -> Coverage:
        """How things stand, in one snapshot."""
        return await self._database.read(lambda tx: _coverage(tx, lease))

    async def lead(self, duty: str, node_id: str, *, lease: float) -> bool:
        """Take or keep the lease of a duty; whether the node has it. Whoever has one also forgets nodes long gone."""

        def lead(tx: Transaction) -> bool:
            if not tx.run(_DUTY_HELD, name=duty, node_id=node_id, lease=_as_ms(lease)):
                tx.insert(_DUTY_ROW, [(duty, 0, 0)])
                if not tx.run(_DUTY_TAKEN, name=duty, node_id=node_id, lease=_as_ms(lease)):
                    return False
            tx.run(_FORGET, within=_as_ms(FORGOTTEN))
            return True

        return await self._write(lead)

    async def resign(self, duty: str, node_id: str) -> None:
        """Give a duty back."""
        await self._write(lambda tx: tx.run(_DUTY_FREE, name=duty, node_id=node_id))


def _as_ms(seconds: float) -> int:
    return round(seconds * 1000)


def _slices(tx: Transaction) -> list[SliceState]:
    return [
        SliceState(number, owner, generation, owner is not None and left >= 0, scored, unread, heir, left / 1000)
        for number, owner, generation, left, scored, unread, heir in tx.rows(_SLICES)
    ]


def _mine(tx: Transaction, node_id: str, leases: Mapping[int, int]) -> list[int]:
    """Numbers of the slices that the node still holds in these generations, locked."""
    owned = {row[0] for row in tx.rows(_MINE, node_id=node_id)}
    return [each.number for each in _slices(tx) if each.number in owned and leases.get(each.number) == each.generation]


def _coverage(tx: Transaction, lease: float) -> Coverage:
    slices = _slices(tx)  # before the head: what was found up to ``scored`` lies at or below it
    nodes = [
        Node(id_, name, role, started_at, seen_at, bool(reachable))
        for id_, name, role, started_at, seen_at, reachable in tx.rows(_NODES, within=_as_ms(lease))
    ]
    return Coverage(tx.value(_HEAD), int(tx.value(_CLUSTER) or 0), tuple(slices), tuple(nodes))
