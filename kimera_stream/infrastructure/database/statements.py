"""SQL prepared once per dialect: bound parameters only, in the driver's own order.

SQLAlchemy builds and compiles; the driver's cursor runs. What is skipped is SQLAlchemy's work per execution, which would
cost more than the statement itself on the write path (see ADR 2).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Table, bindparam
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import ClauseElement

Row = Sequence[Any]

_MAX_IN = 256
"""Values of one IN list; longer ones are split."""
_MAX_PARAMETERS = 32_000
"""Both databases take a little over 32,700 bound parameters in a statement."""
_FEW = 4
"""Rows of one table up to which an insert goes into one statement with its neighbours: more would make statements of too many shapes."""


class Query:
    """One statement with named parameters.

    Args:
        element: A SQLAlchemy statement; its ``bindparam`` names are the keyword arguments when it is run.
    """

    def __init__(self, element: ClauseElement) -> None:
        self._element = element
        self._compiled: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {}

    def bind(self, dialect: Dialect, params: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
        """The SQL text and its positional values.

        Raises:
            KeyError: a parameter is missing.
        """
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            made = self._element.compile(dialect=dialect)
            given = {name: value for name, value in made.params.items() if value is not None}
            order = tuple(getattr(made, "positiontup", None) or ())
            compiled = self._compiled[dialect.name] = (str(made), order, given)
        sql, order, given = compiled
        return sql, tuple([params[name] if name in params else given[name] for name in order])


class QueryIn:
    """A statement over a list of values of any length, run in pieces of a few fixed sizes so that it stays prepared.

    Args:
        build: Makes the statement for the given column values: ``lambda values: select(...).where(t.c.id.in_(values))``.
    """

    def __init__(self, build: Callable[[list[BindParameter[Any]]], ClauseElement]) -> None:
        self._build = build
        self._queries: dict[int, Query] = {}

    def pieces(self, values: Sequence[Any]) -> Iterator[tuple[Query, dict[str, Any]]]:
        """Queries with their list parameters; a short piece repeats its last value."""
        for start in range(0, len(values), _MAX_IN):
            piece = values[start : start + _MAX_IN]
            size = 1 << (len(piece) - 1).bit_length()
            query = self._queries.get(size)
            if query is None:
                query = self._queries[size] = Query(self._build([bindparam(f"value_{i}") for i in range(size)]))
            yield query, {f"value_{i}": piece[min(i, len(piece) - 1)] for i in range(size)}


class Insert:
    """Many rows of one table in few statements of many rows.

    A statement of many rows crosses into the driver once. With a statement per row, SQLite's driver gives the
    interpreter's lock away at every row, and waits for a busy event loop to hand it back (see ADR 2).

    Args:
        table: Where to.
        columns: Names of the columns, in the order of the values in each row.
        conflict: Columns of the key that may exist already; empty refuses an existing row.
        update: Columns to overwrite in an existing row.
        add: Columns to add to in an existing row.
    """

    def __init__(
        self,
        table: Table,
        columns: Sequence[str],
        *,
        conflict: Sequence[str] = (),
        update: Sequence[str] = (),
        add: Sequence[str] = (),
    ) -> None:
        unknown = [name for name in (*columns, *conflict, *update, *add) if name not in table.c]
        if unknown:
            raise ValueError(f"{table.name} has no columns {unknown}")
        self._table = table
        self._columns = tuple(columns)
        self._conflict = tuple(conflict)
        self._update = tuple(update)
        self._add = tuple(add)
        self._sql: dict[tuple[str, int], str] = {}

    @classmethod
    def whole(cls, table: Table, *, conflict: Sequence[str] = ()) -> "Insert":
        """Every column of the table in its order; an existing row is overwritten as a whole."""
        columns = [column.name for column in table.columns]
        update = [name for name in columns if name not in conflict] if conflict else []
        return cls(table, columns, conflict=conflict, update=update)

    def statements(self, dialect: Dialect, rows: Sequence[Row]) -> Iterable[tuple[str, Sequence[Any]]]:
        """SQL texts and their values, covering ``rows`` in order.

        Sizes are powers of two, so that a handful of prepared statements serve every batch.
        """
        if len(rows) == 1:
            return ((self._text(dialect, 1), rows[0]),)
        return self._pieces(dialect, rows)

    def _pieces(self, dialect: Dialect, rows: Sequence[Row]) -> Iterator[tuple[str, Sequence[Any]]]:
        largest = min(64 if dialect.name == "sqlite" else 512, _MAX_PARAMETERS // len(self._columns))
        for part in _parts(rows, 1 << (largest.bit_length() - 1)):
            yield self._text(dialect, len(part)), list(chain.from_iterable(part))

    def _text(self, dialect: Dialect, size: int) -> str:
        key = (dialect.name, size)
        text = self._sql.get(key)
        if text is None:
            text = self._sql[key] = self.render(dialect, size)
        return text

    @property
    def width(self) -> int:
        """Values of one row."""
        return len(self._columns)

    def render(self, dialect: Dialect, size: int, first: int = 1) -> str:
        """The SQL text for ``size`` rows. ``first``: number of its first parameter, where they are numbered."""
        quote = dialect.identifier_preparer.quote
        width = self.width
        if dialect.paramstyle == "qmark":
            row = "(" + ", ".join("?" * width) + ")"
            values = ", ".join([row] * size)
        else:
            values = ", ".join(
                "(" + ", ".join(f"${r * width + c + first}" for c in range(width)) + ")" for r in range(size)
            )
        table = quote(self._table.name)
        # Any error rolls the whole transaction back. OR FAIL tells SQLite so, and spares it a second copy of every page it
        # changes, kept to undo one statement of many rows: without it such a statement takes twice as long.
        verb = "INSERT OR FAIL" if dialect.name == "sqlite" else "INSERT"
        text = f"{verb} INTO {table} ({', '.join(map(quote, self._columns))}) VALUES {values}"
        if self._conflict:
            changes = [f"{quote(name)} = excluded.{quote(name)}" for name in self._update]
            changes += [f"{quote(name)} = {table}.{quote(name)} + excluded.{quote(name)}" for name in self._add]
            action = f"UPDATE SET {', '.join(changes)}" if changes else "NOTHING"
            text += f" ON CONFLICT ({', '.join(map(quote, self._conflict))}) DO {action}"
        return text


def statements_of(
    dialect: Dialect, inserts: Iterable[tuple[Insert, Sequence[Row]]]
) -> Iterator[tuple[str, Sequence[Any]]]:
    """SQL texts and their values for inserts that do not depend on each other's order.

    On PostgreSQL neighbours of few rows are one statement: a commit of one publish goes to the server and back twice, not seven
    times. Foreign keys are checked at the end of a statement, so that its parts may refer to each other.
    """
    parts: list[tuple[Insert, int]] = []
    values: list[Any] = []
    for insert, rows in inserts:
        if dialect.name == "postgresql" and len(rows) <= _FEW:
            for part in _parts(rows, _FEW):
                parts.append((insert, len(part)))
                values += chain.from_iterable(part)
        else:
            if parts:
                yield _joined(dialect, tuple(parts)), values
                parts, values = [], []
            if rows:
                yield from insert.statements(dialect, rows)
    if parts:
        yield _joined(dialect, tuple(parts)), values


def _parts(rows: Sequence[Row], largest: int) -> Iterator[Sequence[Row]]:
    """``rows`` in order, in pieces whose sizes are powers of two, ``largest`` (one itself) at most."""
    start = 0
    while start < len(rows):
        size = min(1 << ((len(rows) - start).bit_length() - 1), largest)
        yield rows[start : start + size]
        start += size


@lru_cache(maxsize=512)
def _joined(dialect: Dialect, parts: tuple[tuple[Insert, int], ...]) -> str:
    """One statement of several inserts, each a row or some of one table."""
    texts: list[str] = []
    first = 1
    for insert, size in parts:
        texts.append(insert.render(dialect, size, first))
        first += size * insert.width
    *before, last = texts
    if not before:
        return last
    return f"WITH {', '.join(f'part_{i} AS ({text})' for i, text in enumerate(before))} {last}"


def among(column: ColumnElement[Any], values: list[BindParameter[Any]]) -> ColumnElement[bool]:
    """``column IN (values)`` with one parameter per value, typed as the column."""
    return column.in_([bindparam(value.key, type_=column.type) for value in values])
