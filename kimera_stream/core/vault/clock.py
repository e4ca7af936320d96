"""The database's own clock, which all nodes share."""

from typing import Any

from sqlalchemy import BigInteger
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction


class DatabaseClock(GenericFunction[int]):
    """Unix ms by the database, as the statement runs."""

    type = BigInteger()
    inherit_cache = True
    name = "kimera_clock"


@compiles(DatabaseClock, "postgresql")
def _on_postgresql(_element: Any, _compiler: SQLCompiler, **_options: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"


@compiles(DatabaseClock, "sqlite")
def _on_sqlite(_element: Any, _compiler: SQLCompiler, **_options: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
