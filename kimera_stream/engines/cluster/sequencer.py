"""The writer of an engine among several: work in its lane's order, planned under the log's lock.

    prepared group -> segments -> read and match (awaits) -> vault.transact(write) -> cache, sink -> answers
                                                                  under the lock: lease, records, versions, offsets

It compares nothing, but with watches, and with what says the same as a watch that a statement contradicts (``naming``): what else
it contradicts is found by the scorers, which read the log. So waiting for the lock costs no work, and what has to be done again (somebody else changed the same geoid, or a watch) is cheap.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import msgspec
import structlog

from kimera_stream.core.coverage import ClusterVault, LockedLog
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import (
    EventSink,
    IdempotencyRecord,
    IndexService,
    PublishResult,
    StoredGeoid,
    WriteBatch,
)
from kimera_stream.core.vault.errors import DamagedVaultError, LeaseLostError
from kimera_stream.engines.cluster.naming import Matched, Naming, known_pairs, outdated_hits, write_matches
from kimera_stream.engines.cluster.wire import Refused
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.engines.planning import Planner
from kimera_stream.engines.publishing import Item, read_items
from kimera_stream.engines.removals import parties, write_deletes, write_resolves
from kimera_stream.engines.retrying import Fault, Faults, defect, may_pass
from kimera_stream.engines.sequencer import Stuck, segments
from kimera_stream.engines.watches import WatchRegistry
from kimera_stream.engines.work import DeleteWork, PublishWork, RequestId, RereadWork, ResolveWork, Work
from kimera_stream.protocol.errors import BadRequestError, OperationalError, UnavailableError
from kimera_stream.protocol.messages import Published
from kimera_stream.protocol.objects import Scar

log = structlog.get_logger(__name__)

REPLANS = 8
"""Times work is prepared anew because somebody else changed what it rests on."""
_encode = msgspec.json.Encoder().encode


class _Deleted(msgspec.Struct):
    """First result of a deletion."""

    offset: int


class _Resolved(msgspec.Struct):
    """First result of a resolution."""

    scar: Scar
    offset: int


class _NotDone(msgspec.Struct):
    """First result of what was refused for what is stored."""

    refused: Refused | None = None


class _OutdatedError(Exception):
    """What was prepared rests on something that has changed."""

    def __init__(self, geoid_ids: Sequence[str] = ()) -> None:
        super().__init__()
        self.geoid_ids = list(geoid_ids)


@dataclass(slots=True)
class _Prepared:
    """What can be known of a segment without the lock."""

    now: int
    watch_generation: int
    items: list[Matched] = field(default_factory=list)
    refused: list[tuple[Work, OperationalError]] = field(default_factory=list)


class ClusterSequencer:
    """Implements ``engines.sequencer.Sequencing``. Belongs to one task.

    Args:
        index: For what is left in this engine's own slices.
        sink: Hears of the entries committed here, and of no others.
        node_id: Of this run of this engine.
        leases: The slices that this engine holds, as far as it knows (number -> generation).
        committed: Called with the offset after each commit.
        window: Seconds for which first results are given again.
        sure: Score at which a clash counts as sure, for the advice.
        clock: Unix seconds.
    """

    def __init__(
        self,
        vault: ClusterVault,
        index: IndexService,
        cache: GeoidCache,
        sink: EventSink,
        watches: WatchRegistry,
        metrics: PipelineMetrics,
        *,
        node_id: str,
        leases: Callable[[], Mapping[int, int]],
        committed: Callable[[int], None],
        window: float,
        sure: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._vault = vault
        self._index = index
        self._cache = cache
        self._sink = sink
        self._watches = watches
        self._metrics = metrics
        self._node_id = node_id
        self._leases = leases
        self._committed = committed
        self._window = window
        self._sure = sure
        self._clock = clock
        self._watch_generation = -1
        self._faults = Faults("prepare", metrics.fault)
        self._naming = Naming(vault, cache, watches)

    async def catch_up(self) -> int:
        """Nothing to do: the entries of a commit whose end nobody heard are announced by the leader, and read by everyone."""
        return 0

    async def process(self, group: Sequence[Work]) -> Stuck | None:
        """Carry out a group in order; every ticket is answered when this returns None.

        Else it ended at work that failed by a cause that may pass: that and what comes after it is not answered.
        """
        todo = deque(segments(group))
        while todo:
            segment = todo.popleft()
            try:
                if any(isinstance(work, RereadWork) for work in segment):
                    raise BadRequestError("the scorers read again, not the writer")
                await self._carry_out(segment)
            except OperationalError as error:
                left = [work for work in segment if not work.ticket.finished]
                if may_pass(error):
                    return Stuck(error, left, list(chain.from_iterable(todo)))
                self.refuse(left, error)
            except Fault as fault:
                left = [work for work in segment if not work.ticket.finished]
                if len(left) > 1:
                    todo.extendleft((left[len(left) // 2 :], left[: len(left) // 2]))
                elif left:
                    self._blame(left[0], fault.error)
            else:
                self._faults.passed()
        return None

    def _blame(self, work: Work, error: Exception) -> None:
        """This one alone fails by a defect."""
        self._faults.blame(work.ticket, error)
        if isinstance(work, PublishWork):
            work.at_fault = True
        self.refuse([work], defect())

    def refuse(self, works: Sequence[Work], error: OperationalError) -> None:
        """Answer work that was not done."""
        self._metrics.refused(error.code, len(works))
        for work in works:
            work.ticket.refuse(error)

    async def _carry_out(self, segment: Sequence[Work]) -> None:
        works = list(segment)
        watches_read = self._watch_generation < 0  # then they are read now
        for attempt in range(REPLANS):
            if not works:
                return
            try:
                prepared = await self._prepare(works)
            except OperationalError:
                raise
            except Exception as error:
                raise Fault(error) from error
            leases = dict(self._leases())
            attempted = _Attempt(self, works, prepared, leases, watches_read=watches_read)
            began = time.perf_counter()
            try:
                batch = await self._vault.transact(attempted.write)
            except LeaseLostError as lost:
                works = self._give_up(works, leases, lost)
                continue
            except DamagedVaultError as error:
                if len(works) > 1:
                    raise Fault(error) from error  # of one of them: which, is found by halving
                raise
            except _OutdatedError as outdated:
                log.info("others were faster, preparing again", attempt=attempt + 1)
                watches_read = True  # they are compared before all else: if they had changed, they are read again now
                for geoid_id in outdated.geoid_ids:
                    self._cache.forget(geoid_id)
                self._answer(attempted.repeated)  # it is done: nothing may be prepared to rest on it
                works = [work for work in works if not work.ticket.finished]
                continue
            if batch.entries:
                self._metrics.committed(batch, time.perf_counter() - began)
                self._apply(batch)
            self._answer(attempted.outcomes)
            return
        raise UnavailableError("others changed the same geoids each time; try again", retry_after=0.5)

    def _answer(self, outcomes: Sequence[tuple[Work, Any]]) -> None:
        for work, outcome in outcomes:
            if isinstance(outcome, OperationalError):
                self.refuse([work], outcome)
            else:
                work.ticket.answer(outcome)

    def _give_up(self, works: Sequence[Work], held: Mapping[int, int], lost: LeaseLostError) -> list[Work]:
        """Leave to its new owner what came through a partition that is gone; returns the rest."""
        stale = [work for work in works if _is_stale(_request(work), held)]
        given_up = stale or [work for work in works if (of := _request(work)) and of.partition in lost.numbers]
        for work in given_up:
            work.ticket.refuse(lost)
        log.info("work left to another engine", partitions=lost.numbers, works=len(given_up))
        return [work for work in works if not work.ticket.finished]

    async def _prepare(self, works: Sequence[Work]) -> _Prepared:
        prepared = _Prepared(int(self._clock() * 1000), await self._watches_now())
        publishes = [work for work in works if isinstance(work, PublishWork)]
        if publishes:
            refused: list[tuple[PublishWork, PublishResult | OperationalError]] = []
            items = await read_items(
                publishes, self._cache, self._index.room(), refused, now=prepared.now, head=self._vault.head
            )
            prepared.refused += [(work, error) for work, error in refused if isinstance(error, OperationalError)]
            for item in items:
                matches = await self._watches.matches(item.stored, ()) if item.changed else []
                prepared.items.append(Matched(item, matches))
            await self._naming.look(prepared.items)
        return prepared

    async def _watches_now(self) -> int:
        """The watches' generation that this engine knows, having read them where that was none or an old one."""
        if self._watch_generation < 0:
            generations: list[int] = []

            def look(locked: LockedLog) -> WriteBatch:
                generations.append(locked.watch_generation)
                return WriteBatch()

            await self._vault.transact(look)
            await self._watches.load()  # at least as new as the generation
            self._watch_generation = generations[-1]
        return self._watch_generation

    def forget_watches(self) -> None:
        """They have changed: they are read again before the next commit."""
        self._watch_generation = -1

    def _apply(self, batch: WriteBatch) -> None:
        self._cache.committed(batch.geoids, batch.deleted)
        self._sink.deliver(batch.entries)
        self._committed(batch.entries[-1].offset)

    # -- for an attempt

    @property
    def node_id(self) -> str:
        return self._node_id

    @property
    def sure(self) -> float:
        return self._sure

    @property
    def window_ms(self) -> int:
        """For so long first results are given again."""
        return int(self._window * 1000)


class _Attempt:
    """One attempt at a segment; ``write`` runs under the lock, maybe twice.

    Args:
        watches_read: The watches were read, or found unchanged, since the segment came. Whoever sent any of it had not heard of a
            change after that, which may as well come after the segment: otherwise nothing could be said while watches come and
            go faster than a segment is prepared.
    """

    def __init__(
        self,
        owner: ClusterSequencer,
        works: Sequence[Work],
        prepared: _Prepared,
        leases: Mapping[int, int],
        *,
        watches_read: bool,
    ) -> None:
        self._owner = owner
        self._works = works
        self._prepared = prepared
        self._held = leases
        self._watches_read = watches_read
        self.repeated: list[tuple[Work, Any]] = []
        """First results of what was done before, whatever becomes of this attempt."""
        self.outcomes: list[tuple[Work, Any]] = []

    def write(self, locked: LockedLog) -> WriteBatch:
        """Everything that the segment leads to.

        Raises:
            LeaseLostError: some of it came through partitions that are another engine's by now.
            _OutdatedError: a geoid has changed, or the watches before they were read for this.
        """
        self.repeated = []
        self._check_leases(locked)
        now = locked.now
        left = self._first_results(locked, now)
        self.outcomes = list(self.repeated)
        planner = Planner(locked.head, now, self._owner.sure)
        publishes = {id(work) for work in left if isinstance(work, PublishWork)}
        if publishes:
            self._publish(publishes, planner, locked)
        deletes = [work for work in left if isinstance(work, DeleteWork)]
        if deletes:
            self._delete(deletes, planner, locked)
        resolves = [work for work in left if isinstance(work, ResolveWork)]
        if resolves:
            self._resolve(resolves, planner, locked)
        self._record_refusals(self.outcomes[len(self.repeated) :], planner)
        return planner.batch

    def _check_leases(self, locked: LockedLog) -> None:
        requests = [request for work in self._works if (request := _request(work)) is not None]
        stale = {request.partition for request in requests if _is_stale(request, self._held)}
        if stale:
            raise LeaseLostError.of(sorted(stale))
        wanted = {request.partition for request in requests}
        locked.hold(self._owner.node_id, {number: self._held[number] for number in sorted(wanted)}, shared=True)

    def _first_results(self, locked: LockedLog, now: int) -> list[Work]:
        """Answer what was done before; returns the rest."""
        keys = [name for work in self._works for name in _names(work)]
        recorded = locked.recorded(keys, not_before=now - self._owner.window_ms)
        left: list[Work] = []
        for work in self._works:
            found = [recorded[name] for name in _names(work) if name in recorded]
            if not found:
                left.append(work)
            else:
                # The request's own record comes first: it is the first answer once more. A key's is another request's.
                repeated = found[0].key == _names(work)[0][1] and _request(work) is not None
                self.repeated.append((work, _first_result(work, found[0].result, duplicate=not repeated)))
        return left

    def _publish(self, wanted: set[int], planner: Planner, locked: LockedLog) -> None:
        if locked.watch_generation != self._prepared.watch_generation:
            self._owner.forget_watches()
            if not self._watches_read:
                raise _OutdatedError
        self.outcomes += [(work, error) for work, error in self._prepared.refused if id(work) in wanted]
        items = [each for each in self._prepared.items if id(each.item.work) in wanted]
        self._check_versions([each.item for each in items], locked)
        if outdated := outdated_hits(items, locked):
            raise _OutdatedError(outdated)
        known = known_pairs(items, locked)
        written: dict[str, StoredGeoid] = {}
        for each in items:
            item = each.item
            stored = written[item.stored.geoid.id] = planner.geoid(item.stored)
            write_matches(each, stored, written, known, planner)
            result = PublishResult(stored.geoid, stored.geoid.offset, [], duplicate=False)
            published = Published(geoid=stored.geoid, offset=result.offset, contradictions=[], duplicate=False)
            self._record(item.work, published, planner)
            self.outcomes.append((item.work, result))

    def _check_versions(self, items: Sequence[Item], locked: LockedLog) -> None:
        named = [item for item in items if item.work.body.id is not None]
        refused = [
            work.body.id
            for work, _ in self._prepared.refused
            if isinstance(work, PublishWork) and work.must_exist and work.body.id is not None
        ]
        marks = locked.marks([*(item.stored.geoid.id for item in named), *refused])
        changed = [geoid_id for geoid_id in refused if geoid_id in marks]
        for item in named:
            mark = marks.get(item.stored.geoid.id)
            before = None if item.previous is None else item.previous.geoid.offset
            if (None if mark is None else mark.offset) != before:
                changed.append(item.stored.geoid.id)
        if changed:
            raise _OutdatedError(changed)

    def _delete(self, works: Sequence[DeleteWork], planner: Planner, locked: LockedLog) -> None:
        ids = [work.geoid_id for work in works]
        open_ones = locked.contradictions_of(ids, state="open")
        outcomes = write_deletes(works, planner, open_ones, locked.geoids([*ids, *parties(open_ones)]))
        for work, outcome in outcomes:
            if not isinstance(outcome, OperationalError):
                self._record(work, _Deleted(outcome), planner)
        self.outcomes += outcomes

    def _resolve(self, works: Sequence[ResolveWork], planner: Planner, locked: LockedLog) -> None:
        found = [locked.contradiction(work.contradiction_id) for work in works]
        contradictions = {each.id: each for each in found if each is not None}
        geoids = locked.geoids(parties(list(contradictions.values())))
        outcomes = write_resolves(works, planner, contradictions, geoids, locked.scar_weights())
        for work, outcome in outcomes:
            if not isinstance(outcome, OperationalError):
                self._record(work, _Resolved(*outcome), planner)
        self.outcomes += outcomes

    def _record_refusals(self, outcomes: Sequence[tuple[Work, Any]], planner: Planner) -> None:
        """Whoever was told that a request is not done must not see another copy of it done later, when it could be."""
        for work, outcome in outcomes:
            request = _request(work)
            if request is not None and isinstance(outcome, OperationalError):
                encoded = _encode(_NotDone(Refused.of(request.id, outcome)))
                principal, name = _names(work)[0]
                planner.batch.idempotency.append(IdempotencyRecord(principal, name, encoded, planner.now))

    def _record(self, work: Work, result: msgspec.Struct, planner: Planner) -> None:
        encoded = _encode(result)
        planner.batch.idempotency += [
            IdempotencyRecord(principal, name, encoded, planner.now) for principal, name in _names(work)
        ]
        if isinstance(work, PublishWork) and work.kept is not None and work.kept.ref is not None:
            planner.batch.settled.append(work.kept.ref)


def _request(work: Work) -> RequestId | None:
    return work.request if isinstance(work, PublishWork | DeleteWork | ResolveWork) else None


def _is_stale(request: RequestId | None, held: Mapping[int, int]) -> bool:
    """Whether its partition is another engine's by now, or was so since it was taken: what came before it may have been left then."""
    if request is None:
        return False
    generation = held.get(request.partition)
    return generation is None or request.generation not in (None, generation)


def _names(work: Work) -> list[tuple[str, str]]:
    """(principal, key) under which the first result is recorded: of the request, then the client's own key."""
    if not isinstance(work, PublishWork | DeleteWork | ResolveWork):
        return []
    names = [] if work.request is None else [(work.principal.id, work.request.name)]
    if isinstance(work, PublishWork) and work.key is not None:
        names.append((work.principal.id, work.key))
    return names


def _first_result(work: Work, encoded: bytes, *, duplicate: bool) -> Any:
    refused = msgspec.json.decode(encoded, type=_NotDone).refused
    if refused is not None:
        return refused.error()
    if isinstance(work, DeleteWork):
        return msgspec.json.decode(encoded, type=_Deleted).offset
    if isinstance(work, ResolveWork):
        resolved = msgspec.json.decode(encoded, type=_Resolved)
        return resolved.scar, resolved.offset
    published = msgspec.json.decode(encoded, type=Published)
    return PublishResult(published.geoid, published.offset, published.contradictions, duplicate=duplicate)
