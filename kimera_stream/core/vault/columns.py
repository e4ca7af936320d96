"""Geoids column by column, to fill the index from: one value per column and page on SQLite, whose driver gives the
interpreter's lock away at every row (see ADR 2), and as little as the index needs of each geoid on both.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import text

from kimera_stream.core.columns import GeoidColumns, SlicedColumns
from kimera_stream.core.groups import Within
from kimera_stream.core.slices import slice_of
from kimera_stream.core.vault.errors import DamagedVaultError
from kimera_stream.infrastructure.database import Query, Transaction
from kimera_stream.infrastructure.database.statements import Row
from kimera_stream.protocol.objects import Scalar

_ITEM = 4
"""Bytes of a number of a vector."""
_NONE: Mapping[str, Scalar] = {}
_NO_LAYERS: Sequence[str] = ()

# Values are one JSON scalar each, see the schema; a state is put together from them as it is.
_ROWS = (
    "SELECT g.id AS id, g.offset AS n, g.text AS text, g.vector AS vector,"
    " CASE WHEN g.symbolic_features > 0 THEN (SELECT '{{' || {concat}({quote_s} || ':' || s.value, ',') || '}}'"
    " FROM symbolic_feature s WHERE s.geoid_id = g.id) END AS symbols,"
    " CASE WHEN g.semantic_features > 0 THEN (SELECT '[' || {concat}({quote_l}, ',') || ']'"
    " FROM semantic_feature l WHERE l.geoid_id = g.id) END AS layers"
    "{more} FROM geoid g WHERE {chosen}"
)
_PAGE = "g.offset > :after ORDER BY g.offset LIMIT :limit"
_PACKED = (
    "SELECT max(n), json_group_array(id), json_group_array(text), group_concat(vector IS NOT NULL, ''),"
    " CAST(group_concat(vector, '') AS BLOB), min(length(vector)), max(length(vector)),"
    " '[' || group_concat(coalesce(symbols, 'null')) || ']', '[' || group_concat(coalesce(layers, 'null')) || ']'"
    " FROM ({rows})"
)
_WAYS = {
    "sqlite": {"concat": "group_concat", "quote_s": "json_quote(s.name)", "quote_l": "json_quote(l.name)"},
    "postgresql": {"concat": "string_agg", "quote_s": "to_json(s.name)::text", "quote_l": "to_json(l.name)::text"},
}


def _rows(dialect: str, chosen: str, more: str = "") -> str:
    return _ROWS.format(chosen=chosen, more=more, **_WAYS[dialect]).replace(".offset", '."offset"')


_QUERIES = {
    "sqlite": Query(text(_PACKED.format(rows=_rows("sqlite", _PAGE)))),
    "postgresql": Query(text(_rows("postgresql", _PAGE))),
}
_NAMES = Query(text('SELECT id, "offset" FROM geoid WHERE "offset" > :after ORDER BY "offset" LIMIT :limit'))
_GROUPS: Mapping[Within, str] = {
    "all": "NULL",
    "session": "g.session_id",
    "agent": "g.agent_id",
    "principal": "g.principal",
}


_AMONG = {"sqlite": "g.id IN (SELECT value FROM json_each(:ids))", "postgresql": "g.id = ANY(:ids)"}


@cache
def _named(dialect: str, within: Within) -> Query:
    """Rows of a list of ids, each with its ``stated`` and its group. One statement, however long the list is: at every one the
    two processes wait for each other, which takes longest where the processors are wanted most."""
    more = f", g.stated AS stated, {_GROUPS[within]} AS grouped"
    return Query(text(_rows(dialect, _AMONG[dialect], more)))


_ids = msgspec.json.Decoder(list[str]).decode
_texts = msgspec.json.Decoder(list[str | None]).decode
_symbols = msgspec.json.Decoder(list[dict[str, Any] | None]).decode
_layers = msgspec.json.Decoder(list[list[str] | None]).decode


def columns_after(tx: Transaction, *, after: int, limit: int, dimension: int) -> tuple[GeoidColumns, int]:
    """The next geoids in offset order, and the offset of the last one.

    Raises:
        DamagedVaultError: a vector is not of ``dimension`` numbers.
    """
    if tx.dialect == "sqlite":
        row = tx.row(_QUERIES["sqlite"], after=after, limit=limit)
        last, ids, texts, given, packed, least, most, symbols, layers = row
        if last is None:
            return _columns([], [], [], [], b"", b"", dimension), after
        if packed is not None and not least == most == dimension * _ITEM:
            raise _damaged(after, last, dimension)
        return _columns(
            _ids(ids), _texts(texts), _symbols(symbols), _layers(layers), given.encode(), packed or b"", dimension
        ), last
    rows = tx.rows(_QUERIES["postgresql"], after=after, limit=limit)
    return _columns_of(rows, after, dimension), rows[-1][1] if rows else after


def slices_after(
    tx: Transaction, *, after: int, limit: int, dimension: int, numbers: Collection[int], slices: int, within: Within
) -> tuple[SlicedColumns, int, int]:
    """Of the next ``limit`` geoids in offset order those that belong to the slices ``numbers``; the offset to go on after; and
    how many were looked at.

    Raises:
        DamagedVaultError: a vector is not of ``dimension`` numbers.
    """
    looked_at = tx.rows(_NAMES, after=after, limit=limit)
    placed = {id_: number for id_, _ in looked_at if (number := slice_of(id_, slices)) in numbers}
    ids: Any = list(placed) if tx.dialect == "postgresql" else msgspec.json.encode(list(placed)).decode()
    rows = sorted(tx.rows(_named(tx.dialect, within), ids=ids), key=itemgetter(1)) if placed else []
    found = SlicedColumns(
        _columns_of(rows, after, dimension),
        np.array([placed[row[0]] for row in rows], np.int64),
        np.array([row[6] or row[1] for row in rows], np.int64),
        [row[7] for row in rows],
    )
    return found, looked_at[-1][1] if looked_at else after, len(looked_at)


def _columns_of(rows: Sequence[Row], after: int, dimension: int) -> GeoidColumns:
    """Rows as columns; ``after``: the offset that they come after."""
    vectors = [row[3] for row in rows if row[3] is not None]
    if any(len(vector) != dimension * _ITEM for vector in vectors):
        raise _damaged(after, rows[-1][1], dimension)
    return _columns(
        [row[0] for row in rows],
        [row[2] for row in rows],
        _symbols(b"[" + b",".join([(row[4] or "null").encode() for row in rows]) + b"]"),
        _layers(b"[" + b",".join([(row[5] or "null").encode() for row in rows]) + b"]"),
        bytes([ord("0") + (row[3] is not None) for row in rows]),
        b"".join(vectors),
        dimension,
    )


def _damaged(after: int, last: int, dimension: int) -> DamagedVaultError:
    return DamagedVaultError(
        f"a geoid whose last change is between {after + 1} and {last} has a vector that is not of {dimension} numbers"
    )


def _columns(
    ids: list[str],
    texts: list[str | None],
    symbols: list[dict[str, Any] | None],
    layers: list[list[str] | None],
    given: bytes,
    packed: bytes,
    dimension: int,
) -> GeoidColumns:
    vectors = np.frombuffer(bytearray(packed), "<f4").astype(np.float32, copy=False).reshape(-1, dimension)
    return GeoidColumns(
        ids,
        texts,
        [_NONE if state is None else state for state in symbols],
        [_NO_LAYERS if names is None else names for names in layers],
        np.frombuffer(given, np.uint8) == ord("1"),
        vectors,
    )
