"""What one engine does for all: it holds a lease in the database, and whoever has it does the duties.

The log's table is the outbox of the bus: what is committed there has to be announced. Its committer does so; what died between its
commit and its announcement is announced here. Whoever hears an entry twice knows it by its offset.
"""

import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio
import structlog

from kimera_stream.core.coverage import ClusterStore, ClusterVault
from kimera_stream.core.interfaces import EventSink
from kimera_stream.protocol.errors import OperationalError, UnavailableError
from kimera_stream.protocol.log import LogEntry

log = structlog.get_logger(__name__)

DUTY = "leader"
BEATS_PER_LEASE = 3
PAGE = 500
MOST_BEYOND = 65_536
"""Offsets remembered as announced behind one that is not, some 6 MB; what is forgotten is read from the log and announced once more."""
MOST_HEADS = 1_024
"""Heads of the log remembered with their times; beyond, those between are looked at with the next one."""
LEAVING = 2.0
"""Seconds that giving the duty back may take."""


class Leader:
    """Takes the lead where nobody has it, and keeps it. ``leads`` is a belief: what is done in it has to bear being done twice.

    Args:
        node_id: Of this run of this node.
        lease: Seconds without a beat after which another node takes over.
        duties: Run while this node leads; cancelled when it does not any more.
    """

    def __init__(
        self,
        store: ClusterStore,
        node_id: str,
        *,
        lease: float,
        duties: Sequence[Callable[[], Coroutine[Any, Any, None]]],
    ) -> None:
        self._store = store
        self._node_id = node_id
        self._lease = lease
        self._duties = duties
        self._leads = False

    @property
    def leads(self) -> bool:
        return self._leads

    async def run(self) -> None:
        """Lead whenever it is this node's turn, until cancelled; then give the duty back."""
        try:
            while True:
                if await self._ask():
                    await self._lead()
                await anyio.sleep(self._lease / BEATS_PER_LEASE)
        finally:
            if self._leads:
                self._leads = False
                with anyio.move_on_after(LEAVING, shield=True):
                    await self._resign()

    async def _resign(self) -> None:
        try:
            await self._store.resign(DUTY, self._node_id)
        except UnavailableError as error:
            log.info("the lead expires by itself: the database refuses", reason=error.message)

    async def _ask(self) -> bool:
        try:
            self._leads = await self._store.lead(DUTY, self._node_id, lease=self._lease)
        except UnavailableError:
            return False  # as before, until the lease is over
        return self._leads

    async def _lead(self) -> None:
        log.info("this node leads")
        async with anyio.create_task_group() as group:
            for duty in self._duties:
                group.start_soon(duty, name="leader:duty")
            asked = time.monotonic()
            while self._leads and time.monotonic() - asked < self._lease:
                await anyio.sleep(self._lease / BEATS_PER_LEASE)
                if await self._ask():
                    asked = time.monotonic()
            self._leads = False
            group.cancel_scope.cancel()
        log.info("another node may lead")


class Relay:
    """Announces what its committer did not, where this node leads; everywhere else it is ready to take that over.

    Args:
        sink: Where entries are announced.
        leads: Whether this node leads.
        lease: Seconds that the lead may be nobody's: for so long nodes that do not lead remember what is missing.
        grace: Seconds that the committer of an entry has to announce it himself.
        poll: Seconds between looks at the log.
        monotonic: Seconds.
    """

    def __init__(
        self,
        vault: ClusterVault,
        sink: EventSink,
        *,
        leads: Callable[[], bool],
        lease: float,
        grace: float = 1.0,
        poll: float = 0.5,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vault = vault
        self._sink = sink
        self._leads = leads
        self._lease = lease
        self._grace = grace
        self._poll = poll
        self._monotonic = monotonic
        self._upto = vault.head
        """Everything up to here has been announced, or is too old for anybody to wait for it."""
        self._beyond: set[int] = set()
        self._heads: deque[tuple[int, float]] = deque()
        self.relayed = 0

    def heard(self, entries: Sequence[LogEntry]) -> None:
        """These entries were announced, by whomever."""
        for entry in entries:
            if entry.offset == self._upto + 1:
                self._upto = entry.offset
                self._beyond.discard(entry.offset)
            elif entry.offset > self._upto and len(self._beyond) < MOST_BEYOND:
                self._beyond.add(entry.offset)
        while self._upto + 1 in self._beyond:
            self._upto += 1
            self._beyond.discard(self._upto)

    async def run(self) -> None:
        """Announce what is missing, until cancelled."""
        while True:
            try:
                await self.step()
            except OperationalError as error:
                log.info("announcing is put off", error=error.code)
            await anyio.sleep(self._poll)

    async def step(self) -> int:
        """Announce what was committed more than ``grace`` ago and has not been; returns how many entries.

        Raises:
            UnavailableError: the log cannot be read.
        """
        now, head = self._monotonic(), await self._vault.refresh()
        if not self._heads or (head > self._heads[-1][0] and len(self._heads) < MOST_HEADS):
            self._heads.append((head, now))
        due, leads = self._upto, self._leads()
        before = now - self._grace - (0.0 if leads else 2 * self._lease)
        while self._heads and self._heads[0][1] <= before:
            due = max(due, self._heads.popleft()[0])
        told = 0
        if not leads:
            self._pass(due)
        while self._upto < due:
            page = await self._vault.read(None, after=self._upto, limit=PAGE, until=due)
            missing = [entry for entry in page.entries if entry.offset not in self._beyond]
            if missing:
                self._sink.deliver(missing)
                told += len(missing)
            self._pass(max(self._upto + 1, page.scanned))
        if told:
            self.relayed += told
            log.info("announced for others", entries=told)
        return told

    def _pass(self, upto: int) -> None:
        """Nobody need look at entries up to here any more."""
        if upto > self._upto:
            self._upto = upto
            self._beyond = {offset for offset in self._beyond if offset > upto}
            self.heard(())
