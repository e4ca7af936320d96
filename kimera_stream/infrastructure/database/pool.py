"""A bounded number of open connections."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import structlog

from kimera_stream.infrastructure.database.commits import CommitWatch
from kimera_stream.infrastructure.database.failures import RETRY_AFTER, failure_of
from kimera_stream.infrastructure.database.sessions import Session, SqliteSession
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)


class Connections:
    """A bounded number of connections, opened when first needed and again after a loss.

    Args:
        open_session: Opens one.
        size: How many at most.
        wait: Seconds to wait for a free one before refusing.
        watch: Told when the only one is taken and when it is free again.
    """

    def __init__(
        self,
        open_session: Callable[[], Awaitable[Session]],
        *,
        size: int,
        wait: float,
        watch: CommitWatch | None = None,
    ) -> None:
        self._open = open_session
        self._wait = wait
        self._watch = watch
        self._size = size
        self._slots = anyio.Semaphore(size)
        self._idle: list[Session] = []
        self._busy: set[Session] = set()
        self._closed = False

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator[Session]:
        """A connection for a while; it is closed, not kept, if the block ends in a way that may have broken it."""
        if self._closed:
            raise UnavailableError("the database is closed")
        try:
            self._slots.acquire_nowait()
        except anyio.WouldBlock:
            await self._wait_for_slot()
        if self._watch is not None:
            self._watch.began()
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
            if self._watch is not None:
                self._watch.ended()
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
