"""What a function inside a transaction may do."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from sqlalchemy.engine import Dialect

from kimera_stream.infrastructure.database.statements import Insert, Query, QueryIn, Row, statements_of


class DriverCursor(Protocol):
    @property
    def rowcount(self) -> int: ...

    def execute(self, sql: str, parameters: Sequence[Any], /) -> Any: ...
    def fetchall(self) -> Sequence[Any]: ...


class Transaction:
    """The statements of one transaction. Valid only inside the function it was given to."""

    def __init__(self, dialect: Dialect, cursor: DriverCursor) -> None:
        self._dialect = dialect
        self._cursor = cursor

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._dialect.name

    def rows(self, query: Query, **params: Any) -> Sequence[Any]:
        """All rows, as tuples in the order of the selected columns."""
        sql, values = query.bind(self._dialect, params)
        self._cursor.execute(sql, values)
        return self._cursor.fetchall()

    def row(self, query: Query, **params: Any) -> Any:
        """The first row, None if there is none."""
        rows = self.rows(query, **params)
        return rows[0] if rows else None

    def value(self, query: Query, **params: Any) -> Any:
        """The first column of the first row, None if there is none."""
        rows = self.rows(query, **params)
        return rows[0][0] if rows else None

    def rows_in(self, query: QueryIn, values: Sequence[Any], **params: Any) -> list[Any]:
        """All rows of a query over a list of values of any length."""
        found: list[Any] = []
        for piece, listed in query.pieces(values):
            found.extend(self.rows(piece, **listed, **params))
        return found

    def run(self, query: Query, **params: Any) -> int:
        """Run a change; returns how many rows it touched."""
        sql, values = query.bind(self._dialect, params)
        self._cursor.execute(sql, values)
        return self._cursor.rowcount

    def run_in(self, query: QueryIn, values: Sequence[Any], **params: Any) -> int:
        """Run a change over a list of values of any length; returns how many rows it touched."""
        return sum(self.run(piece, **listed, **params) for piece, listed in query.pieces(values))

    def insert(self, insert: Insert, rows: Sequence[Row]) -> None:
        """Insert all rows, in order."""
        if rows:
            for sql, values in insert.statements(self._dialect, rows):
                self._cursor.execute(sql, values)

    def insert_all(self, inserts: Iterable[tuple[Insert, Sequence[Row]]]) -> None:
        """Insert into several tables, whose rows may refer to each other but must not depend on the order."""
        for sql, values in statements_of(self._dialect, inserts):
            self._cursor.execute(sql, values)
