"""URLs and engines: every setting that durability and bounded waiting rest on."""

import sqlite3
from functools import partial

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from kimera_stream.infrastructure.database.sessions import SqliteConnection
from kimera_stream.infrastructure.database.wal import refuse_damaged_wal
from kimera_stream.infrastructure.settings import DatabaseSettings
from kimera_stream.protocol.errors import BadRequestError

_COMMAND_TIMEOUT = 30.0
"""Seconds that one statement on PostgreSQL may take: a peer that vanished must not hold a writer for ever."""
ABANDONED_AFTER = 30.0
"""Seconds after which PostgreSQL ends the transaction of a process that stopped, so that others can go on."""
CHECKPOINT_PAGES = 4_000
"""Pages in SQLite's write-ahead log after which a commit copies them into the database. Four times SQLite's own 1,000, which a batch of
512 publishes fills alone: a page that changes in several transactions is copied once, and 4,062 still are found through one hash table."""
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


def make_engine(
    url: URL, settings: DatabaseSettings, *, write: bool, abandoned_after: float = ABANDONED_AFTER
) -> AsyncEngine:
    """An engine whose connections have every setting that durability and bounded waiting rest on."""
    if url.get_backend_name() == "sqlite":
        # The file is opened by us, so the URL names none: SQLAlchemy would ask the file system about it on the event loop.
        return create_async_engine(
            "sqlite+aiosqlite://",
            poolclass=NullPool,
            async_creator=partial(_open_sqlite, str(url.database), settings, write),
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
                "idle_in_transaction_session_timeout": str(int(abandoned_after * 1000)),
                "jit": "off",
            },
        },
    )


async def _open_sqlite(path: str, settings: DatabaseSettings, write: bool) -> SqliteConnection:
    def connect() -> sqlite3.Connection:
        refuse_damaged_wal(path)
        connection: sqlite3.Connection = sqlite3.connect(
            path, timeout=settings.busy_timeout, isolation_level=None, cached_statements=512, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA synchronous = {settings.synchronous}")
            connection.execute(f"PRAGMA cache_size = -{settings.page_cache_bytes // 1024}")
            connection.execute("PRAGMA temp_store = MEMORY")
            if write:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
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
