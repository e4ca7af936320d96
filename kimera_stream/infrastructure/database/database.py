"""Reads and writes as functions over a transaction."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import anyio
import structlog
from sqlalchemy import literal, select
from sqlalchemy.engine import URL

from kimera_stream.infrastructure.database.commits import CommitWatch
from kimera_stream.infrastructure.database.engines import ABANDONED_AFTER, async_url, make_engine
from kimera_stream.infrastructure.database.failures import Failure, failure_of, unavailable
from kimera_stream.infrastructure.database.pool import Connections
from kimera_stream.infrastructure.database.sessions import PostgresSession, Session, SqliteSession
from kimera_stream.infrastructure.database.statements import Query
from kimera_stream.infrastructure.database.transaction import Transaction
from kimera_stream.infrastructure.settings import DatabaseSettings
from kimera_stream.protocol.errors import BadRequestError, UnavailableError

T = TypeVar("T")
log = structlog.get_logger(__name__)

_PING = Query(select(literal(1)))
_CLOSE_DEADLINE = 5.0


class Steps(Protocol):
    """A transaction of several steps."""

    async def step(self, fn: Callable[[Transaction], T]) -> T:
        """Run ``fn`` within it."""


class Database:
    """One writer and pooled readers over one database.

    Args:
        url: ``sqlite+aiosqlite:///FILE`` or ``postgresql+asyncpg://USER@HOST/NAME``.
        settings: Pool size, timeouts, level of synchronisation. Its own URL is not looked at.
        abandoned_after: Seconds after which PostgreSQL ends a transaction that nobody goes on with.

    Raises:
        BadRequestError: the URL is of no database that is supported.
    """

    def __init__(self, url: str, settings: DatabaseSettings, *, abandoned_after: float = ABANDONED_AFTER) -> None:
        self._url = async_url(url)
        self._settings = settings
        self._writing = make_engine(self._url, settings, write=True, abandoned_after=abandoned_after)
        self._reading = make_engine(self._url, settings, write=False)
        self.commits = CommitWatch(settings.commit_within)
        self._writer = Connections(self._open_writer, size=1, wait=settings.busy_timeout, watch=self.commits)
        self._readers = Connections(self._open_reader, size=settings.pool_size, wait=settings.busy_timeout)

    @property
    def url(self) -> URL:
        return self._url

    @property
    def is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    async def _open_writer(self) -> Session:
        return await (SqliteSession if self.is_sqlite else PostgresSession).open(self._writing)

    async def _open_reader(self) -> Session:
        return await (SqliteSession if self.is_sqlite else PostgresSession).open(self._reading)

    async def read(self, fn: Callable[[Transaction], T]) -> T:
        """Run ``fn`` in one consistent snapshot; tried once more on a new connection if the first one was lost.

        ``fn`` may run in another thread and must touch nothing but its transaction and its own values.

        Raises:
            UnavailableError: no connection, no answer in time, or a damaged file.
        """
        return await self._attempt(self._readers, fn, write=False)

    async def write(self, fn: Callable[[Transaction], T], *, accepted: bool = False) -> T:
        """Run ``fn`` in one transaction that is durable when this returns. One at a time; a cancelled caller waits for it.

        A connection that is lost before the commit was sent is replaced and ``fn`` is run once more.

        Args:
            accepted: Whoever asked for this was let in before: it waits for its turn behind a commit that lasts too long.

        Raises:
            UnavailableError: disk full, locked, read-only, unreachable, or busy with a commit for too long; nothing was written.
            CommitInDoubtError: the connection was lost during the commit.
        """
        if not accepted:
            self.commits.admit()
        return await self._attempt(self._writer, fn, write=True)

    async def _attempt(self, connections: Connections, fn: Callable[[Transaction], T], *, write: bool) -> T:
        what = "write" if write else "read"
        try:
            return await self._run(connections, fn, write=write)
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            if self.is_sqlite or not failure.disconnected:
                raise self._refusal(what, failure, error) from error
        try:
            return await self._run(connections, fn, write=write)
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            raise self._refusal(what, failure, error) from error

    @staticmethod
    def _refusal(what: str, failure: Failure, error: Exception) -> UnavailableError:
        log.warning("database refuses", what=what, reason=failure.message, error=type(error).__name__)
        return unavailable(failure)

    async def _run(self, connections: Connections, fn: Callable[[Transaction], T], *, write: bool) -> T:
        async with connections.borrow() as session:
            # A commit is never torn by its caller. It ends by itself: every wait in it has a timeout of the driver's.
            with anyio.CancelScope(shield=write):
                result = await session.run(fn, write=write)
        return result

    @asynccontextmanager
    async def transaction(self, *, write: bool) -> AsyncIterator["Steps"]:
        """A transaction of several steps, between which the caller may wait for other things (a file, say).

        Commits when the block ends; any error rolls all of it back. For tools: a write keeps every other writer waiting.

        Raises:
            UnavailableError: as for ``read`` and ``write``; nothing was written.
        """
        try:
            async with (self._writer if write else self._readers).borrow() as session:
                await session.begin(write=write)
                done = False
                try:
                    yield session
                    done = True
                finally:
                    with anyio.CancelScope(shield=True):
                        await session.end(commit=done)
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            raise self._refusal("write" if write else "read", failure, error) from error

    async def alone(self) -> bool:
        """Whether no other connection of ours is open to the database, in any process: neither a server nor a command.

        Raises:
            UnavailableError: it cannot be asked.
        """
        try:
            async with self._writer.borrow() as session:
                with anyio.CancelScope(shield=True):
                    alone = await session.alone()
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            raise self._refusal("write", failure, error) from error
        return alone

    async def ping(self, *, deadline: float = 2.0) -> None:
        """Raises UnavailableError if a trivial read does not come back within ``deadline`` seconds."""
        try:
            with anyio.fail_after(deadline):
                await self.read(lambda tx: tx.value(_PING))
        except TimeoutError:
            raise UnavailableError(f"the database did not answer within {deadline:g} s", retry_after=1.0) from None

    async def backup(self, path: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Copy a SQLite database to ``path`` while it is in use.

        Args:
            path: A file that does not exist yet.
            progress: Called with (pages copied, pages in all), from another thread.

        Raises:
            BadRequestError: not SQLite.
            UnavailableError: the disk is full or not writable.
        """
        if not self.is_sqlite:
            raise BadRequestError(
                "backup: copies SQLite files only; use pg_dump, and run `kimera-stream db new-epoch` on the database that it is restored "
                "into before a server is; or `kimera-stream db export` and `db import`, which does both",
                field="database.url",
            )
        try:
            async with self._readers.borrow() as session:
                assert isinstance(session, SqliteSession)
                with anyio.CancelScope(shield=True):
                    await session.backup(path, progress or (lambda _done, _all: None))
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            raise unavailable(failure) from error

    async def close(self, *, deadline: float = _CLOSE_DEADLINE) -> None:
        """Close every connection within ``deadline`` seconds; long statements are broken off."""
        with anyio.CancelScope(shield=True):
            self._readers.interrupt()
            await self._readers.close(deadline=deadline / 3)
            await self._writer.close(deadline=deadline / 3)
            with anyio.move_on_after(deadline / 3):
                await self._writing.dispose()
                await self._reading.dispose()
