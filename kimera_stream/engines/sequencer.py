"""The one writer: takes prepared work in order, plans it, commits it, and only then tells anyone.

    prepared group -> segments (one kind each, every id once) -> plan -> vault.commit -> index, cache, field -> sink -> answers

A segment is one transaction. ``applied`` is the offset up to which the index, the cache and the sink have been told; after a
crash between a commit and its end, ``catch_up`` reads the rest back from the log, so nothing committed goes untold.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import msgspec
import structlog

from kimera_stream.core.conversation import ConversationMemory
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import EventSink, IndexService, OutcomeUnknownError, VaultService, WriteBatch
from kimera_stream.engines.backlog import Backlog
from kimera_stream.engines.field import FieldDynamics
from kimera_stream.engines.late import LateWord
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.engines.planning import Planner
from kimera_stream.engines.publishing import Publishing
from kimera_stream.engines.removals import Removals
from kimera_stream.engines.retrying import Fault, Faults, defect, may_pass
from kimera_stream.engines.work import DeleteWork, PublishWork, RereadWork, ResolveWork, Work
from kimera_stream.protocol.errors import ConflictError, OperationalError, UnavailableError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Contradiction

log = structlog.get_logger(__name__)

REPLANS = 5
"""Times a batch is planned anew because another writer was faster."""
PAGE = 1_000


@dataclass(frozen=True, slots=True)
class Stuck:
    """Where a group came to a halt.

    Attributes:
        error: Why; it may pass.
        segment: What failed.
        rest: What comes after it.
    """

    error: OperationalError
    segment: list[Work]
    rest: list[Work]


class Sequencing(Protocol):
    """Carries out prepared work in order: ``Sequencer`` alone, or ``cluster.sequencer`` where other nodes write as well."""

    async def catch_up(self) -> int:
        """Tell what was committed and not told; returns how many entries."""

    async def process(self, group: Sequence[Work]) -> Stuck | None:
        """Carry out a group in order; every ticket is answered when this returns None. Else, where it came to a halt."""

    def refuse(self, works: Sequence[Work], error: OperationalError) -> None:
        """Answer work that was not done."""


class Sequencer:
    """Commits work in order. Belongs to one task.

    Args:
        backlog: Learns of statements that the verifier has not read.
        late: Plans its later word on them.
        verify_within: Seconds that a statement may have waited and still be read by the verifier before it is answered.
        sure: Score at which a clash counts as sure, for the advice.
        clock: Unix seconds.
        monotonic: The clock of ``Ticket.admitted_at``.
    """

    def __init__(
        self,
        vault: VaultService,
        index: IndexService,
        cache: GeoidCache,
        sink: EventSink,
        field: FieldDynamics,
        conversation: ConversationMemory,
        publishing: Publishing,
        removals: Removals,
        metrics: PipelineMetrics,
        *,
        backlog: Backlog,
        late: LateWord,
        verify_within: float,
        sure: float,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vault = vault
        self._index = index
        self._cache = cache
        self._sink = sink
        self._field = field
        self._conversation = conversation
        self._publishing = publishing
        self._removals = removals
        self._metrics = metrics
        self._backlog = backlog
        self._late = late
        self._verify_within = verify_within
        self._monotonic = monotonic
        self._sure = sure
        self._clock = clock
        self._faults = Faults("commit", metrics.fault)
        self._last_ms = 0
        self.applied = vault.head

    async def catch_up(self) -> int:
        """Tell the index, the cache and the sink what was committed but not told; returns how many entries."""
        told = 0
        await self._learn_time()
        while self.applied < self._vault.head:
            page = await self._vault.read(None, after=self.applied, limit=PAGE)
            if not page.entries:
                self.applied = self._vault.head
                break
            self._apply(await self._read_back(page.entries))
            self._backlog.committed(self.applied)
            told += len(page.entries)
        if told:
            log.info("told what was committed before", entries=told)
        return told

    async def process(self, group: Sequence[Work]) -> Stuck | None:
        """Carry out a group in order; every ticket is answered when this returns None.

        Else it ended at work that failed by a cause that may pass: that and what comes after it is not answered.
        """
        todo = deque(segments(group))
        while todo:
            segment = todo.popleft()
            try:
                await self._commit(segment)
            except OperationalError as error:
                if may_pass(error) and not isinstance(segment[0], RereadWork):
                    return Stuck(error, segment, list(chain.from_iterable(todo)))
                self.refuse(segment, error)
            except Fault as fault:
                if len(segment) > 1:
                    half = len(segment) // 2
                    todo.extendleft((segment[half:], segment[:half]))
                else:
                    self._blame(segment[0], fault.error)
            else:
                self._faults.passed()
        return None

    def refuse(self, works: Sequence[Work], error: OperationalError) -> None:
        """Answer work that was not done."""
        self._metrics.refused(error.code, len(works))
        for work in works:
            work.ticket.refuse(error)

    def _blame(self, work: Work, error: Exception) -> None:
        """This one alone fails by a defect."""
        self._faults.blame(work.ticket, error)
        if isinstance(work, PublishWork):
            work.at_fault = True
        self.refuse([work], defect())

    async def _commit(self, segment: Sequence[Work]) -> None:
        for attempt in range(REPLANS):
            if self.applied < self._vault.head:  # an earlier catching up failed half-way: nothing may be passed over
                await self.catch_up()
            planner = Planner(
                head=self._vault.head, now=self._now(), sure=self._sure, hurried=self._late_already(segment)
            )
            outcomes = await self._planned(segment, planner)
            batch = planner.batch
            if planner.unread:
                await self._backlog.put_off_entries(batch.entries[0].offset, batch.entries[-1].offset)
            if batch.entries:
                began = time.perf_counter()
                try:
                    await self._vault.commit(batch)
                except OperationalError as error:
                    if planner.unread and not isinstance(error, OutcomeUnknownError):  # else they may be there
                        self._backlog.withdraw(batch.entries[0].offset)
                    if not isinstance(error, ConflictError):
                        raise
                    log.info("another writer was faster, planning again", attempt=attempt + 1)
                    continue
                except Exception as error:
                    if await self._is_there(batch.entries[0].offset):
                        raise
                    if planner.unread:
                        self._backlog.withdraw(batch.entries[0].offset)
                    raise Fault(error) from error
                self._metrics.committed(batch, time.perf_counter() - began)
                self._apply(batch)
                if planner.unread:
                    self._backlog.committed(batch.entries[-1].offset, planner.unread)
            late = planner.late  # here and not while planning: a batch may be planned more than once
            self._backlog.told(late.read, late.confirmed, late.dissolved, late.found)
            for work, outcome in outcomes:
                if isinstance(outcome, OperationalError):
                    self._metrics.refused(outcome.code, 1)
                    work.ticket.refuse(outcome)
                else:
                    work.ticket.answer(outcome)
            return
        raise UnavailableError("other writers were faster each time; try again", retry_after=0.5)

    async def _planned(self, segment: Sequence[Work], planner: Planner) -> list[tuple[Work, Any]]:
        """Plan; a defect in that has changed nothing but the planner, which is thrown away."""
        try:
            return await self._plan(segment, planner)
        except OperationalError:
            raise
        except Exception as error:
            raise Fault(error) from error

    async def _is_there(self, offset: int) -> bool:
        """Whether the log has this entry, which nobody knows to be committed."""
        return bool((await self._vault.read(None, after=offset - 1, limit=1, until=offset)).entries)

    async def _plan(self, segment: Sequence[Work], planner: Planner) -> list[tuple[Work, Any]]:
        outcomes: list[tuple[Work, Any]] = []
        publishes = [work for work in segment if isinstance(work, PublishWork)]
        if publishes:
            outcomes += await self._publishing.plan(publishes, planner, self._index.room())
        deletes = [work for work in segment if isinstance(work, DeleteWork)]
        if deletes:
            outcomes += await self._removals.delete(deletes, planner)
        resolves = [work for work in segment if isinstance(work, ResolveWork)]
        if resolves:
            outcomes += await self._removals.resolve(resolves, planner)
        rereads = [work for work in segment if isinstance(work, RereadWork)]
        if rereads:
            outcomes += await self._late.plan(rereads, planner)
        return outcomes

    def _late_already(self, segment: Sequence[Work]) -> bool:
        """Whether what is published here has waited so long that the verifier's word on it has to come later."""
        admitted = [work.ticket.admitted_at for work in segment if isinstance(work, PublishWork)]
        return bool(admitted) and self._monotonic() - min(admitted) > self._verify_within

    async def _read_back(self, entries: Sequence[LogEntry]) -> WriteBatch:
        """What was committed with ``entries``: geoids in their newest version, contradictions as they were told."""
        touched: dict[str, int] = {}
        contradictions: list[Contradiction] = []
        for entry in entries:
            if entry.type.startswith("geoid."):
                touched[entry.value()["id"]] = entry.offset
            elif entry.type.startswith("contradiction."):
                contradictions.append(msgspec.json.decode(entry.data, type=Contradiction))
        stored = await self._vault.geoids(list(touched))
        return WriteBatch(
            entries=list(entries),
            geoids=[stored[geoid_id] for geoid_id in touched if geoid_id in stored],
            deleted=[(geoid_id, offset) for geoid_id, offset in touched.items() if geoid_id not in stored],
            contradictions=contradictions,
        )

    def _apply(self, batch: WriteBatch) -> None:
        """Tell what is committed. Doing it again does no harm: a crash in here leads to it."""
        for stored in batch.geoids:
            self._cache.put(stored)
            self._index.put(stored)
            if stored.geoid.session_id is not None:
                self._conversation.remember(
                    stored.geoid.session_id, stored.geoid.id, agent_id=stored.geoid.originator_agent_id
                )
        for geoid_id, offset in batch.deleted:
            self._cache.remove(geoid_id, offset)
            self._index.remove(geoid_id)
        self._field.observe(batch)
        self._sink.deliver(batch.entries)
        self.applied = batch.entries[-1].offset

    async def _learn_time(self) -> None:
        """Nothing may be older than what was committed before this process began, either."""
        if self._last_ms == 0 and self._vault.head > self._vault.trimmed:
            page = await self._vault.read(None, after=self._vault.head - 1, limit=1)
            self._last_ms = max([self._last_ms, *(entry.ts for entry in page.entries)])

    def _now(self) -> int:
        """Unix ms that never go back, whatever the clock does, over restarts too: the log's times are in its order."""
        self._last_ms = max(self._last_ms, int(self._clock() * 1000))
        return self._last_ms


def segments(group: Sequence[Work]) -> Iterator[list[Work]]:
    """Cut a group into runs of one kind in which no id occurs twice, no request of another node, and no key."""
    run: list[Work] = []
    seen: set[str] = set()
    for work in group:
        names = _names(work)
        if run and (type(work) is not type(run[0]) or not seen.isdisjoint(names)):
            yield run
            run, seen = [], set()
        run.append(work)
        seen.update(names)
    if run:
        yield run


def _names(work: Work) -> list[str]:
    """What must be written before the next work with one of these names is looked at."""
    match work:
        case PublishWork():
            target = work.body.id
        case DeleteWork():
            target = work.geoid_id
        case ResolveWork():
            target = work.contradiction_id
        case RereadWork():
            return ["~reread"]  # each in a transaction of its own: what one finds, the next has to know
    names = [] if target is None else [target]
    if work.request is not None:
        names.append(work.request.name)
    if isinstance(work, PublishWork) and work.key is not None:
        names.append(f"~key:{work.principal.id}\0{work.key}")
    return names
