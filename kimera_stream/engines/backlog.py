"""Statements that the verifier has not read yet, because it had fallen behind or was away.

Such a statement is decided by the pair head, or the rules, and told at once, marked provisional; the verifier's own word comes later
(``late``). What is still to be read is kept as ranges of the log's offsets, and in the store as the lowest of them: after a
crash everything from there on is read again, which changes nothing where it had been read.
"""

from dataclasses import dataclass
from typing import Protocol

import anyio
import structlog

log = structlog.get_logger(__name__)

OWNER = "~verifier"
CHANNEL = "geoids"
UNREAD_FROM, READ_AGAIN = "unread-from", "read-again"
MOST_RANGES = 1_024
"""Beyond that the newest two are joined: what lies between them is read once more."""


class Cursors(Protocol):
    """Where positions are kept over a restart."""

    @property
    def head(self) -> int: ...

    async def save_cursor(self, principal: str, name: str, channel: str, offset: int) -> None: ...

    async def cursor(self, principal: str, name: str, channel: str) -> int | None: ...


@dataclass(frozen=True, slots=True)
class BacklogNumbers:
    """``pending``: offsets of the log still to be looked at, no fewer than the statements among them. Totals since the start."""

    pending: int
    put_off: int
    read: int
    confirmed: int
    dissolved: int
    found: int


class Backlog:
    """What is still to be read. Belongs to the event loop."""

    def __init__(self, store: Cursors) -> None:
        self._store = store
        self._ranges: list[tuple[int, int]] = []
        self._committed = 0
        """Up to here entries can be read; ranges beyond wait for their commit."""
        self._changed = anyio.Event()
        self.put_off = 0
        """Statements whose texts were decided without the verifier."""
        self.read = 0
        self.confirmed = 0
        self.dissolved = 0
        self.found = 0

    @property
    def numbers(self) -> BacklogNumbers:
        pending = sum(last - first + 1 for first, last in self._ranges)
        return BacklogNumbers(pending, self.put_off, self.read, self.confirmed, self.dissolved, self.found)

    async def load(self) -> None:
        """Take up what an earlier process left.

        Raises:
            UnavailableError: the store cannot be read.
        """
        since = await self._store.cursor(OWNER, UNREAD_FROM, CHANNEL)
        until = await self._store.cursor(OWNER, READ_AGAIN, CHANNEL)
        if since is not None and since != until and since <= self._store.head and not self._ranges:
            self._ranges.append((since, self._store.head))
            self.committed(self._store.head)
            log.info("statements wait for the verifier since before the start", first=since, last=self._store.head)

    async def put_off_entries(self, first: int, last: int) -> None:
        """Entries ``first`` to ``last`` are about to be committed, with unread statements among them.

        Raises:
            UnavailableError: the store cannot be written; nothing is remembered.
        """
        if not self._ranges:  # kept before the entries are: a crash between the two costs a look at nothing
            await self._store.save_cursor(OWNER, READ_AGAIN, CHANNEL, 0)
            await self._store.save_cursor(OWNER, UNREAD_FROM, CHANNEL, first)
        if self._ranges and (first <= self._ranges[-1][1] + 1 or len(self._ranges) >= MOST_RANGES):
            self._ranges[-1] = (self._ranges[-1][0], max(last, self._ranges[-1][1]))
        else:
            self._ranges.append((first, last))

    def committed(self, upto: int, statements: int = 0) -> None:
        """Entries up to ``upto`` are in the log now, ``statements`` unread ones among the newest."""
        self.put_off += statements
        self._committed = max(self._committed, upto)
        self._changed.set()

    def told(self, read: int, confirmed: int, dissolved: int, found: int) -> None:
        """The verifier's later word on ``read`` statements stands, with what it came to."""
        self.read += read
        self.confirmed += confirmed
        self.dissolved += dissolved
        self.found += found

    def withdraw(self, first: int) -> None:
        """Entries from ``first`` on were not committed after all."""
        self._ranges = [(low, min(high, first - 1)) for low, high in self._ranges if low < first]

    async def first(self) -> tuple[int, int]:
        """The lowest range, as far as it is committed; waits until there is one."""
        while not self._ranges or self._ranges[0][0] > self._committed:
            self._changed = anyio.Event()
            await self._changed.wait()
        first, last = self._ranges[0]
        return first, min(last, self._committed)

    async def done(self, upto: int) -> None:
        """Everything up to ``upto`` has been read.

        Raises:
            UnavailableError: the store cannot be written; ask again, or it is read once more after a restart.
        """
        left = [(max(first, upto + 1), last) for first, last in self._ranges if last > upto]
        if left:
            await self._store.save_cursor(OWNER, UNREAD_FROM, CHANNEL, left[0][0])
        else:
            since = await self._store.cursor(OWNER, UNREAD_FROM, CHANNEL)
            await self._store.save_cursor(OWNER, READ_AGAIN, CHANNEL, since or 0)
        # Ranges may have come meanwhile; they lie behind.
        self._ranges = [(max(first, upto + 1), last) for first, last in self._ranges if last > upto]
        if self._ranges and not left:
            await self._store.save_cursor(OWNER, READ_AGAIN, CHANNEL, 0)
            await self._store.save_cursor(OWNER, UNREAD_FROM, CHANNEL, self._ranges[0][0])
