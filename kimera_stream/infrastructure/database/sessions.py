"""One open connection of either database."""

import contextlib
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import aiosqlite
import anyio
from sqlalchemy import Connection, text
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from kimera_stream.infrastructure.database.failures import RETRY_AFTER, CommitInDoubtError, failure_of
from kimera_stream.infrastructure.database.statements import Query
from kimera_stream.infrastructure.database.transaction import Transaction

T = TypeVar("T")

_OTHERS = Query(
    text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = current_setting('application_name') AND pid <> pg_backend_pid()"
    )
)


def _count_others(tx: Transaction) -> int:
    return int(tx.value(_OTHERS))


class SqliteConnection(aiosqlite.Connection):
    """aiosqlite's connection, with a way to run a whole function in its thread: one hop, not one per statement."""

    async def call(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        result: T = await self._execute(fn, self._conn)  # type: ignore[no-untyped-call]
        return result

    def break_off(self) -> None:
        """End the statement that runs in the thread now, if one does; it fails with ``interrupted``."""
        self._conn.interrupt()

    def prepare_thread(self) -> None:
        """A process that dies must not wait for the thread of a connection nobody closed."""
        self._thread.daemon = True


class Session(Protocol):
    """One open connection."""

    async def run(self, fn: Callable[[Transaction], T], *, write: bool) -> T:
        """Run ``fn`` in one transaction. Errors of the driver come through as they are."""

    async def begin(self, *, write: bool) -> None:
        """Begin a transaction of several steps."""

    async def step(self, fn: Callable[[Transaction], T]) -> T:
        """Run ``fn`` within it."""

    async def end(self, *, commit: bool) -> None:
        """End it."""

    async def alone(self) -> bool:
        """Whether no other connection of ours is open to the database, in any process. Not within a transaction."""

    def broken_by(self, error: BaseException) -> bool:
        """Whether the connection must not be used again after ``error``."""

    async def close(self, *, broken: bool) -> None: ...


class SqliteSession:
    def __init__(self, connection: AsyncConnection, driver: SqliteConnection, dialect: Dialect) -> None:
        self._connection = connection
        self._driver = driver
        self._dialect = dialect

    @classmethod
    async def open(cls, engine: AsyncEngine) -> "SqliteSession":
        connection = await engine.connect()
        raw = await connection.get_raw_connection()
        driver = raw.driver_connection
        if not isinstance(driver, SqliteConnection):
            raise TypeError(f"expected our own SQLite connection, got {type(driver)}")
        return cls(connection, driver, engine.dialect)

    async def run(self, fn: Callable[[Transaction], T], *, write: bool) -> T:
        try:
            return await self._driver.call(partial(self._transact, fn, "BEGIN IMMEDIATE" if write else "BEGIN"))
        except anyio.get_cancelled_exc_class():
            # The thread ends its transaction itself; whoever borrows the connection next need not wait for all of it.
            if not write:
                self.interrupt()
            raise

    def _transact(self, fn: Callable[[Transaction], T], begin: str, connection: sqlite3.Connection) -> T:
        connection.execute(begin)
        try:
            result = fn(Transaction(self._dialect, connection.cursor()))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return result

    async def begin(self, *, write: bool) -> None:
        await self._driver.call(lambda connection: connection.execute("BEGIN IMMEDIATE" if write else "BEGIN"))

    async def step(self, fn: Callable[[Transaction], T]) -> T:
        return await self._driver.call(lambda connection: fn(Transaction(self._dialect, connection.cursor())))

    async def end(self, *, commit: bool) -> None:
        def finish(connection: sqlite3.Connection) -> None:
            if connection.in_transaction:
                connection.execute("COMMIT" if commit else "ROLLBACK")

        await self._driver.call(finish)

    async def backup(self, path: str, progress: Callable[[int, int], None]) -> None:
        """Copy the database while it is in use. ``progress`` gets (pages done, pages in all), in another thread."""

        def copy(source: sqlite3.Connection) -> None:
            with contextlib.closing(sqlite3.connect(path)) as target:
                source.backup(target, pages=512, sleep=0.01, progress=lambda _, left, all_: progress(all_ - left, all_))

        await self._driver.call(copy)

    async def alone(self) -> bool:
        return await self._driver.call(self._leave_wal)

    @staticmethod
    def _leave_wal(connection: sqlite3.Connection) -> bool:
        """Whoever has the file open holds a lock on it that lets nobody else leave the write-ahead log."""
        (patience,) = connection.execute("PRAGMA busy_timeout").fetchone()
        connection.execute("PRAGMA busy_timeout = 0")
        try:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            return False
        finally:
            connection.execute(f"PRAGMA busy_timeout = {patience}")
        return True

    def interrupt(self) -> None:
        """Break off what the connection's thread is doing."""
        self._driver.break_off()

    def broken_by(self, error: BaseException) -> bool:
        failure = failure_of(error)
        return failure is not None and failure.disconnected

    async def close(self, *, broken: bool) -> None:
        await self._connection.close()


class PostgresSession:
    def __init__(self, connection: AsyncConnection, dialect: Dialect) -> None:
        self._connection = connection
        self._dialect = dialect

    @classmethod
    async def open(cls, engine: AsyncEngine) -> "PostgresSession":
        return cls(await engine.connect(), engine.dialect)

    async def run(self, fn: Callable[[Transaction], T], *, write: bool) -> T:
        return await self._connection.run_sync(self._transact, fn, write)

    async def begin(self, *, write: bool) -> None:
        """The driver begins with the first statement."""

    async def step(self, fn: Callable[[Transaction], T]) -> T:
        def call(connection: Connection) -> T:
            driver: Any = connection.connection.dbapi_connection
            return fn(Transaction(self._dialect, driver.cursor()))

        return await self._connection.run_sync(call)

    async def end(self, *, commit: bool) -> None:
        def finish(connection: Connection) -> None:
            driver: Any = connection.connection.dbapi_connection
            if commit:
                driver.commit()
            else:
                driver.rollback()

        await self._connection.run_sync(finish)

    async def alone(self) -> bool:
        return await self._connection.run_sync(self._transact, _count_others, False) == 0

    def _transact(self, connection: Connection, fn: Callable[[Transaction], T], write: bool) -> T:
        driver: Any = connection.connection.dbapi_connection
        try:
            result = fn(Transaction(self._dialect, driver.cursor()))
        except BaseException:
            with contextlib.suppress(DBAPIError, OSError, self._dialect.loaded_dbapi.Error):
                driver.rollback()
            raise
        try:
            driver.commit()
        except BaseException as error:
            failure = failure_of(error)
            if write and failure is not None and not failure.answered:
                raise CommitInDoubtError(
                    "the connection to the database was lost during a commit", retry_after=RETRY_AFTER
                ) from error
            raise
        return result

    def broken_by(self, error: BaseException) -> bool:
        if isinstance(error, (CommitInDoubtError, anyio.get_cancelled_exc_class())):
            return True
        failure = failure_of(error)
        return failure is not None and failure.disconnected

    async def close(self, *, broken: bool) -> None:
        if broken:
            await self._connection.invalidate()
        await self._connection.close()
