"""Opened connections of either database, and what a function inside a transaction may do with one."""

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import aiosqlite
import anyio
import structlog
from sqlalchemy import Connection
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from kimera_stream.infrastructure.database.failures import RETRY_AFTER, CommitInDoubtError, failure_of
from kimera_stream.infrastructure.database.statements import Insert, Query, QueryIn, Row
from kimera_stream.infrastructure.settings import DatabaseSettings
from kimera_stream.protocol.errors import BadRequestError, UnavailableError

T = TypeVar("T")
log = structlog.get_logger(__name__)

_COMMAND_TIMEOUT = 30.0
"""Seconds that one statement on PostgreSQL may take: a peer that vanished must not hold a writer for ever."""
_IDLE_IN_TRANSACTION = 30_000
"""Milliseconds after which PostgreSQL ends the transaction of a node that stopped, so that others can go on."""
_ASYNC_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}


def async_url(url: str) -> URL:
    """The URL with its asynchronous driver.

    Raises:
        BadRequestError: not a URL, or not of a database that is supported.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise BadRequestError(
            "KIMERA_DATABASE__URL: expected sqlite+aiosqlite:///FILE or postgresql+asyncpg://USER@HOST/NAME",
            field="database.url",
        ) from None
    drivername = _ASYNC_DRIVERS.get(parsed.drivername, parsed.drivername)
    if drivername not in _ASYNC_DRIVERS.values():
        raise BadRequestError(
            f"KIMERA_DATABASE__URL: {parsed.drivername} is not supported; expected sqlite+aiosqlite or postgresql+asyncpg",
            field="database.url",
        )
    if drivername.startswith("sqlite") and (parsed.database or ":memory:") == ":memory:":
        raise BadRequestError(
            "KIMERA_DATABASE__URL: SQLite needs a file (sqlite+aiosqlite:///FILE): readers and writer have connections of their own",
            field="database.url",
        )
    return parsed.set(drivername=drivername)


class DriverCursor(Protocol):
    @property
    def rowcount(self) -> int: ...

    def execute(self, sql: str, parameters: Sequence[Any], /) -> Any: ...
    def fetchall(self) -> Sequence[Any]: ...
    def close(self) -> None: ...


class Transaction:
    """The statements of one transaction. Valid only inside the function it was given to."""

    def __init__(self, dialect: Dialect, cursor: Callable[[], DriverCursor]) -> None:
        self._dialect = dialect
        self._cursor = cursor

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._dialect.name

    def rows(self, query: Query, **params: Any) -> Sequence[Any]:
        """All rows, as tuples in the order of the selected columns."""
        sql, values = query.bind(self._dialect, params)
        cursor = self._cursor()
        cursor.execute(sql, values)
        rows = cursor.fetchall()
        cursor.close()
        return rows

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
        cursor = self._cursor()
        cursor.execute(sql, values)
        count = cursor.rowcount
        cursor.close()
        return count

    def run_in(self, query: QueryIn, values: Sequence[Any], **params: Any) -> int:
        """Run a change over a list of values of any length; returns how many rows it touched."""
        return sum(self.run(piece, **listed, **params) for piece, listed in query.pieces(values))

    def insert(self, insert: Insert, rows: Sequence[Row]) -> None:
        """Insert all rows, in order."""
        if not rows:
            return
        cursor = self._cursor()
        for sql, values in insert.statements(self._dialect, rows):
            cursor.execute(sql, values)
        cursor.close()


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
            result = fn(Transaction(self._dialect, partial(connection.cursor, sqlite3.Cursor)))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return result

    async def backup(self, path: str, progress: Callable[[int, int], None]) -> None:
        """Copy the database while it is in use. ``progress`` gets (pages done, pages in all), in another thread."""

        def copy(source: sqlite3.Connection) -> None:
            with contextlib.closing(sqlite3.connect(path)) as target:
                source.backup(target, pages=512, sleep=0.01, progress=lambda _, left, all_: progress(all_ - left, all_))

        await self._driver.call(copy)

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

    def _transact(self, connection: Connection, fn: Callable[[Transaction], T], write: bool) -> T:
        driver: Any = connection.connection.dbapi_connection
        try:
            result = fn(Transaction(self._dialect, driver.cursor))
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


def make_engine(url: URL, settings: DatabaseSettings, *, write: bool) -> AsyncEngine:
    """An engine whose connections have every setting that durability and bounded waiting rest on."""
    if url.get_backend_name() == "sqlite":
        return create_async_engine(
            url, poolclass=NullPool, connect_args={"async_creator_fn": partial(_open_sqlite, settings, write)}
        )
    return create_async_engine(
        url,
        poolclass=NullPool,
        # One snapshot per read, as SQLite has it; the writer takes its order from the lock on the head of the log.
        isolation_level="READ COMMITTED" if write else "REPEATABLE READ",
        connect_args={
            "timeout": settings.busy_timeout,
            "command_timeout": _COMMAND_TIMEOUT,
            "prepared_statement_cache_size": 500,
            "server_settings": {
                "application_name": "kimera-stream",
                "lock_timeout": str(int(settings.busy_timeout * 1000)),
                "idle_in_transaction_session_timeout": str(_IDLE_IN_TRANSACTION),
                "jit": "off",
            },
        },
    )


async def _open_sqlite(settings: DatabaseSettings, write: bool, database: str, **options: Any) -> SqliteConnection:
    options.pop("timeout", None)

    def connect() -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(
            database, timeout=settings.busy_timeout, isolation_level=None, cached_statements=512, **options
        )
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA synchronous = {settings.synchronous}")
            connection.execute("PRAGMA cache_size = -16384")
            if write:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA journal_size_limit = 67108864")
            else:
                connection.execute("PRAGMA query_only = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    driver = SqliteConnection(connect, iter_chunk_size=64)
    driver.prepare_thread()
    await driver
    return driver


class Connections:
    """A bounded number of connections, opened when first needed and again after a loss.

    Args:
        open_session: Opens one.
        size: How many at most.
        wait: Seconds to wait for a free one before refusing.
    """

    def __init__(self, open_session: Callable[[], Awaitable[Session]], *, size: int, wait: float) -> None:
        self._open = open_session
        self._wait = wait
        self._size = size
        self._slots = anyio.Semaphore(size)
        self._idle: list[Session] = []
        self._busy: set[Session] = set()
        self._closed = False

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator[Session]:
        """A connection for a while; it is closed, not kept, if the block ends in a way that may have broken it."""
        try:
            self._slots.acquire_nowait()
        except anyio.WouldBlock:
            await self._wait_for_slot()
        try:
            if self._closed:
                raise UnavailableError("the database is closed")
            session: Session = self._idle.pop() if self._idle else await self._open()
            self._busy.add(session)
            broken = True
            try:
                yield session
                broken = False
            except BaseException as error:
                broken = session.broken_by(error)
                raise
            finally:
                self._busy.discard(session)
                if broken or self._closed:
                    await self._discard(session, broken=broken)
                    if broken:  # what broke one has most likely broken the others: the next use opens new ones
                        await self._discard_idle(broken=True)
                else:
                    self._idle.append(session)
        finally:
            self._slots.release()

    async def _wait_for_slot(self) -> None:
        try:
            with anyio.fail_after(self._wait):
                await self._slots.acquire()
        except TimeoutError:
            raise UnavailableError(
                "every connection to the database is busy; try again shortly", retry_after=RETRY_AFTER
            ) from None

    async def _discard(self, session: Session, *, broken: bool) -> None:
        with anyio.move_on_after(self._wait, shield=True):
            try:
                await session.close(broken=broken)
            except Exception as error:
                if failure_of(error) is None:
                    raise
                log.info("closing a database connection failed", error=type(error).__name__)

    async def close(self, *, deadline: float) -> None:
        """Refuse from here on, wait up to ``deadline`` seconds for those in use, and close all that are idle."""
        self._closed = True
        with anyio.move_on_after(deadline):
            for _ in range(self._size):
                await self._slots.acquire()
        await self._discard_idle(broken=False)

    async def _discard_idle(self, *, broken: bool) -> None:
        idle, self._idle = self._idle, []
        for session in idle:
            await self._discard(session, broken=broken)

    def interrupt(self) -> None:
        """Break off long statements of SQLite connections in use."""
        for session in self._busy:
            if isinstance(session, SqliteSession):
                session.interrupt()
