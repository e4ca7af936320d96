"""Reads of entities: each function runs in one snapshot."""

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import Select, bindparam, func, or_, select
from sqlalchemy.sql.elements import ColumnElement

from kimera_stream.core.interfaces import Page, StoredGeoid
from kimera_stream.core.vault import rows, schema
from kimera_stream.infrastructure.database import Query, QueryIn, Transaction
from kimera_stream.infrastructure.database.statements import among
from kimera_stream.protocol.objects import Contradiction, ContradictionState, Geoid, Scalar, Scar

T = TypeVar("T")

geoid, contradiction, scar = schema.geoid, schema.contradiction, schema.scar
semantic, symbolic = schema.semantic_feature, schema.symbolic_feature

_GEOIDS = QueryIn(lambda values: select(*rows.STORED_GEOID_COLUMNS).where(among(geoid.c.id, values)))
_SEMANTIC = QueryIn(
    lambda values: (
        select(semantic.c.geoid_id, semantic.c.name, semantic.c.weight)
        .where(among(semantic.c.geoid_id, values))
        .order_by(semantic.c.geoid_id, semantic.c.position)
    )
)
_SYMBOLIC = QueryIn(
    lambda values: (
        select(symbolic.c.geoid_id, symbolic.c.name, symbolic.c.value)
        .where(among(symbolic.c.geoid_id, values))
        .order_by(symbolic.c.geoid_id, symbolic.c.position)
    )
)
_GROUPS = {
    within: Query(
        select(geoid.c.id, column, geoid.c.offset)
        .where(geoid.c.offset > bindparam("after"))
        .order_by(geoid.c.offset)
        .limit(bindparam("limit"))
    )
    for within, column in (
        ("session", geoid.c.session_id),
        ("agent", geoid.c.agent_id),
        ("principal", geoid.c.principal),
    )
}
_COUNT_GEOIDS = Query(select(func.count()).select_from(geoid))
_CONTRADICTION = Query(select(*rows.CONTRADICTION_COLUMNS).where(contradiction.c.id == bindparam("contradiction_id")))
_COUNT_CONTRADICTIONS = Query(
    select(func.count()).select_from(contradiction).where(contradiction.c.state == bindparam("wanted_state"))
)
_WEIGHTS = Query(select(scar.c.vault, func.sum(scar.c.weight)).group_by(scar.c.vault))


def _taking_part(column: ColumnElement[str]) -> QueryIn:
    return QueryIn(
        lambda values: select(*rows.CONTRADICTION_COLUMNS).where(
            contradiction.c.state == bindparam("wanted_state"), among(column, values)
        )
    )


_CONTRADICTIONS_A = _taking_part(contradiction.c.a)
_CONTRADICTIONS_B = _taking_part(contradiction.c.b)


def _features(
    tx: Transaction, found: Sequence[rows.Row]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Scalar]]]:
    with_semantic = [row[0] for row in found if row[10]]
    with_symbolic = [row[0] for row in found if row[11]]
    return (
        rows.semantic_states(tx.rows_in(_SEMANTIC, with_semantic)) if with_semantic else {},
        rows.symbolic_states(tx.rows_in(_SYMBOLIC, with_symbolic)) if with_symbolic else {},
    )


def stored_geoids(tx: Transaction, ids: Sequence[str]) -> dict[str, StoredGeoid]:
    """Those of ``ids`` that exist."""
    found = {row[0]: row for row in tx.rows_in(_GEOIDS, ids)}
    semantic_states, symbolic_states = _features(tx, list(found.values()))
    return {id_: rows.stored_geoid_of(row, semantic_states, symbolic_states) for id_, row in found.items()}


_SAYING = Query(
    select(geoid.c.id)
    .where(geoid.c.text == bindparam("said"))
    .order_by(geoid.c.offset.desc())
    .limit(bindparam("limit"))
)


def saying(tx: Transaction, texts: Sequence[str], limit: int) -> dict[str, list[str]]:
    """By text, the ids of the newest geoids that say it. PostgreSQL has an index for it, SQLite looks at all."""
    return {text: [row[0] for row in tx.rows(_SAYING, said=text, limit=limit)] for text in texts}


def groups_after(tx: Transaction, within: str, after: int, limit: int) -> tuple[list[tuple[str, str | None]], int]:
    """The next geoids in offset order, each with its group (see ``core.groups``), and the offset of the last one."""
    found = tx.rows(_GROUPS[within], after=after, limit=limit)
    return [(row[0], row[1]) for row in found], found[-1][2] if found else after


def count_geoids(tx: Transaction) -> int:
    return int(tx.value(_COUNT_GEOIDS))


def _paged(statement: Select[Any], offset: ColumnElement[int]) -> Select[Any]:
    return statement.where(offset > bindparam("after")).order_by(offset).limit(bindparam("limit"))


@cache
def _list_geoids(by_session: bool, by_agent: bool) -> Query:
    statement = select(*rows.GEOID_COLUMNS)
    if by_session:
        statement = statement.where(geoid.c.session_id == bindparam("session_id"))
    if by_agent:
        statement = statement.where(geoid.c.agent_id == bindparam("agent_id"))
    return Query(_paged(statement, geoid.c.offset))


def geoid_page(tx: Transaction, *, after: int, limit: int, session_id: str | None, agent_id: str | None) -> Page[Geoid]:
    """Live geoids in offset order."""
    given = {"session_id": session_id, "agent_id": agent_id}
    query = _list_geoids(session_id is not None, agent_id is not None)
    found = tx.rows(query, after=after, limit=limit + 1, **{k: v for k, v in given.items() if v is not None})
    semantic_states, symbolic_states = _features(tx, found[:limit])
    items = [rows.geoid_of(row, semantic_states, symbolic_states) for row in found[:limit]]
    return Page(items, items[-1].offset if len(found) > limit else None)


def one_contradiction(tx: Transaction, contradiction_id: str) -> Contradiction | None:
    row = tx.row(_CONTRADICTION, contradiction_id=contradiction_id)
    return None if row is None else rows.contradiction_of(row)


@cache
def _list_contradictions(by_state: bool, by_score: bool, by_geoid: bool, tied: bool) -> Query:
    statement = select(*rows.CONTRADICTION_COLUMNS)
    if by_state:
        statement = statement.where(contradiction.c.state == bindparam("state"))
    if by_score:
        statement = statement.where(contradiction.c.score >= bindparam("min_score"))
    if by_geoid:
        party = bindparam("geoid_id", type_=contradiction.c.a.type)
        statement = statement.where(or_(contradiction.c.a == party, contradiction.c.b == party))
    if tied:
        return Query(statement.where(contradiction.c.offset == bindparam("at")))
    return Query(_paged(statement, contradiction.c.offset))


def contradiction_page(
    tx: Transaction,
    *,
    after: int,
    limit: int,
    state: ContradictionState | None,
    min_score: float | None,
    geoid_id: str | None,
) -> Page[Contradiction]:
    """Contradictions in offset order."""
    given = {"state": state, "min_score": min_score, "geoid_id": geoid_id}
    flags = (state is not None, min_score is not None, geoid_id is not None)
    params = {name: value for name, value in given.items() if value is not None}
    found = tx.rows(_list_contradictions(*flags, tied=False), after=after, limit=limit + 1, **params)
    kept, following = _cut(found, limit)
    if following is not None and not kept:
        kept = tx.rows(_list_contradictions(*flags, tied=True), at=following, **params)
    return Page([rows.contradiction_of(row) for row in kept], following)


def _cut(found: Sequence[rows.Row], limit: int) -> tuple[Sequence[rows.Row], int | None]:
    """The rows of a page, and the offset to go on after; rows that share an offset (column 2) stay together.

    No rows and an offset: more than a page of rows share it, and all of them are wanted.
    """
    if len(found) <= limit:
        return found, None
    kept = found[:limit]
    if found[limit][2] == kept[-1][2]:
        kept = [row for row in kept if row[2] != found[limit][2]]
    return kept, kept[-1][2] if kept else found[limit][2]


def contradictions_of(tx: Transaction, geoid_ids: Sequence[str], state: ContradictionState) -> list[Contradiction]:
    """Contradictions in ``state`` in which any of the geoids takes part, in offset order."""
    found = {
        row[0]: row
        for query in (_CONTRADICTIONS_A, _CONTRADICTIONS_B)
        for row in tx.rows_in(query, geoid_ids, wanted_state=state)
    }
    return [rows.contradiction_of(row) for row in sorted(found.values(), key=lambda row: (row[2], row[0]))]


def count_contradictions(tx: Transaction, state: ContradictionState) -> int:
    return int(tx.value(_COUNT_CONTRADICTIONS, wanted_state=state))


_SCARS = Query(_paged(select(*rows.SCAR_COLUMNS), scar.c.offset))
_SCARS_AT = Query(select(*rows.SCAR_COLUMNS).where(scar.c.offset == bindparam("at")))


def scar_page(tx: Transaction, *, after: int, limit: int) -> Page[Scar]:
    """Scars in offset order; those moved by one rebalancing may share an offset."""
    kept, following = _cut(tx.rows(_SCARS, after=after, limit=limit + 1), limit)
    if following is not None and not kept:
        kept = tx.rows(_SCARS_AT, at=following)
    return Page([rows.scar_of(row) for row in kept], following)


def scar_weights(tx: Transaction) -> tuple[float, float]:
    """Summed weight of vault a and of vault b."""
    weights = {row[0]: float(row[1]) for row in tx.rows(_WEIGHTS)}
    return weights.get("a", 0.0), weights.get("b", 0.0)
