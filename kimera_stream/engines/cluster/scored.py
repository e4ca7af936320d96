"""How far the slices are scored, as an edge knows it: what an answer waits for.

Engines say so on the bus after each commit; the database knows it anyway, and is asked when somebody waits and the bus is silent.
"""

import heapq
import itertools
from collections.abc import Awaitable, Callable, Mapping

import anyio
import structlog

from kimera_stream.core.coverage import Coverage
from kimera_stream.engines.cluster.patience import Patience
from kimera_stream.engines.cluster.wire import Progress
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)

REST = 4
"""Polls left out while nobody waits."""


class Scored:
    """Belongs to the event loop's thread.

    Args:
        ask: Reads the coverage from the database.
        poll: Seconds between reads while somebody waits.
        patience: For how long an offset is waited for.
    """

    def __init__(self, ask: Callable[[], Awaitable[Coverage]], *, poll: float, patience: Patience) -> None:
        self._ask = ask
        self._poll = poll
        self._patience = patience
        self._moved_at = 0.0
        self._scored: dict[int, int] = {}
        self._waiting: list[tuple[int, int, anyio.Event]] = []
        self._numbers = itertools.count()
        self._wake = anyio.Event()
        self._news = False
        self._uncovered_since: float | None = None
        self.head = 0
        """What was found about everything up to ``upto`` is told in entries at or below this offset."""
        self.newest: Coverage | None = None
        """As the database said last."""

    @property
    def upto(self) -> int:
        """Everything up to here is scored against all slices."""
        return min(self._scored.values(), default=0) if self.newest is not None else 0

    @property
    def uncovered_for(self) -> float:
        """Seconds for which no slice at all has been covered, as far as known."""
        return 0.0 if self._uncovered_since is None else self._patience.clock() - self._uncovered_since

    def heard(self, progress: Progress) -> None:
        """An engine says how far it is."""
        self._take_in(progress.scored, progress.head)

    def _take_in(self, scored: Mapping[int, int], head: int) -> None:
        before = self.upto
        self.head = max(self.head, head)
        for number, offset in scored.items():
            if offset > self._scored.get(number, -1):
                self._scored[number] = offset
        upto = self.upto
        if upto > before:
            self._moved_at = self._patience.clock()
            while self._waiting and self._waiting[0][0] <= upto:
                heapq.heappop(self._waiting)[2].set()

    def lost(self) -> None:
        """Something may not have been told, or slices have changed hands: the database is asked."""
        self._news = True
        self._wake.set()

    async def reached(self, offset: int, *, since: float) -> None:
        """Wait until everything up to ``offset`` is scored.

        Args:
            since: Clock time from which the caller waits.

        Raises:
            TimeoutError: scoring does not get on.
        """
        if offset <= self.upto:
            return
        event = anyio.Event()
        heapq.heappush(self._waiting, (offset, next(self._numbers), event))
        self._wake.set()
        try:
            await self._patience.wait(event, lambda: self._moved_at, since=since)
        finally:
            if not event.is_set():
                self._waiting = [each for each in self._waiting if each[2] is not event]
                heapq.heapify(self._waiting)

    async def look(self) -> Coverage:
        """Ask the database now.

        Raises:
            UnavailableError: it cannot say.
        """
        found = await self._ask()
        self.newest = found
        if any(each.covered for each in found.slices):
            self._uncovered_since = None
        elif self._uncovered_since is None:
            self._uncovered_since = self._patience.clock()
        self._take_in({each.number: each.scored for each in found.slices}, found.head)
        return found

    async def run(self) -> None:
        """Ask the database now and then, until cancelled; more often while somebody waits or slices are not covered."""
        away = False
        while True:
            try:
                await self.look()
                away = False
            except UnavailableError as error:
                if not away:
                    log.warning("the slices' progress cannot be read", error=error.message)
                away = True
            if not self._waiting:
                self._wake = anyio.Event()
                whole = self.newest is not None and self.newest.completeness == 1.0
                with anyio.move_on_after(self._poll * REST if whole else self._poll):
                    await self._wake.wait()
                if self._news:
                    self._news = False
                    continue
            await anyio.sleep(self._poll)
