"""Scoring by slices: every engine reads the whole log, and judges each new statement against the geoids of its own slices.

    log ──page──> newest versions (cache) ──> look among own slices ──> findings ──> vault.transact ──> scored moves
                        └──> observe: the field, and whatever else follows the log here

Slices that are equally far in the log go on together. One that has just been taken is filled from the vault with what had been
stated up to where it is scored, and then catches up; when it has, it is one of the others. One that another engine is to hand over,
or that may have died, is filled before it changes hands, and if it does earlier, while it is filled. A step commits what it found and how
far it came in one transaction, and only with every lease it rests on; so a step may fail, or be done twice, at any point.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import msgspec
import structlog

from kimera_stream.core.ahead import ahead
from kimera_stream.core.columns import SlicedColumns
from kimera_stream.core.coverage import ClusterStore, ClusterVault, LockedLog, SliceState
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.index import SlicedIndex
from kimera_stream.core.interfaces import ContradictionEngine, EventSink, StoredGeoid, WriteBatch
from kimera_stream.core.vault.errors import LeaseLostError
from kimera_stream.engines.cluster.findings import Finding, Written, write_findings
from kimera_stream.engines.cluster.late import LateWord
from kimera_stream.engines.cluster.owned import OwnedSlice
from kimera_stream.engines.cluster.pages import EVERYTHING, PageReader, ScoredPage
from kimera_stream.engines.planning import Planner
from kimera_stream.protocol.errors import LimitExceededError, OperationalError
from kimera_stream.protocol.objects import Contradiction

log = structlog.get_logger(__name__)

LOOKED_AT_ONCE = 8_000
"""Geoids looked at in one read while slices are filled; what is loaded of them goes into the index slice by slice."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds before the next try where the database refuses."""
FIRST_LATE_PAUSE, LONGEST_LATE_PAUSE = 0.5, 15.0
"""Seconds before the next try where the verifier is still away."""


_contradiction = msgspec.json.Decoder(Contradiction).decode


@dataclass(frozen=True, slots=True)
class ScorerNumbers:
    """For ``stats``. Totals since the start.

    Attributes:
        slices: Owned; ``filled``: of these, those that take part.
        position: The log has been read up to here.
        behind: Entries between the least scored of the filled slices and ``position``.
        judged: Statements compared, once per step.
        outdated: Findings dropped because either side stated something else by then.
        unindexed: Geoids that their slice had no room for: they are not compared with.
        unread: Offsets still to be read by the verifier, at most; ``put_off`` statements in all, of which it has ``read`` some
            since and ``confirmed`` so many contradictions.
    """

    slices: int
    filled: int
    position: int
    behind: int
    judged: int
    found: int
    dissolved: int
    outdated: int
    unindexed: int
    unread: int
    put_off: int
    read: int
    confirmed: int


@dataclass(slots=True)
class _Totals:
    judged: int = 0
    unindexed: int = 0
    put_off: int = 0
    read: int = 0
    written: Written = field(default_factory=Written)


class SliceScorer:
    """Belongs to the event loop. ``gain`` and ``lose`` say which slices are this engine's; ``nudge`` that the log may have grown.

    Args:
        sink: Hears of the entries committed here, and of no others.
        node_id: Of this run of this engine.
        position: Offset up to which ``observe`` has been told already.
        observe: Told of everything in the log, in order: entries, newest geoids, deletions, contradictions.
        progress: Called with how far slices are scored after each step that moved them.
        lost: Called with slices that turn out to be another engine's.
        ready: Called when slices have been filled, this engine's or those that were to be prepared.
        sure: Score at which a clash counts as sure, for the advice.
        poll: Seconds between looks at the log where nobody nudges.
        verify_within: Seconds that a statement may have been in the log and still be read by the verifier before it counts as
            scored; by the clocks of two nodes, so roughly.
        clock: Unix seconds.
    """

    def __init__(
        self,
        vault: ClusterVault,
        store: ClusterStore,
        index: SlicedIndex,
        cache: GeoidCache,
        engine: ContradictionEngine,
        sink: EventSink,
        *,
        node_id: str,
        position: int,
        observe: Callable[[WriteBatch], None],
        progress: Callable[[Mapping[int, int]], None],
        lost: Callable[[Sequence[int]], None],
        ready: Callable[[], None] = lambda: None,
        sure: float,
        poll: float,
        verify_within: float = float("inf"),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._vault = vault
        self._store = store
        self._index = index
        self._cache = cache
        self._engine = engine
        self._sink = sink
        self._node_id = node_id
        self._observed = position
        self._observe = observe
        self._progress = progress
        self._lost = lost
        self._ready = ready
        self._sure = sure
        self._poll = poll
        self._verify_within = verify_within
        self._clock = clock
        self._pages = PageReader(vault, cache)
        self._late = LateWord(vault, index, cache, engine)
        self._writing = anyio.Lock()
        """What is found at once and what is found late are written one after the other."""
        self._at_rest = anyio.Event()
        """Nothing in the log waits to be scored here."""
        self._slices: dict[int, OwnedSlice] = {}
        self._preparing: dict[int, OwnedSlice] = {}
        """Slices that another engine owns and is to hand over; filled, they follow what is observed."""
        self._grown = anyio.Event()
        self._unfilled = anyio.Event()
        self._left_unread = anyio.Event()
        self._totals = _Totals()

    # -- which slices ------------------------------------------------------------------------------------------------

    async def gain(self, slices: Mapping[int, SliceState]) -> None:
        """These slices are this engine's now."""
        for number, state in slices.items():
            prepared = self._preparing.pop(number, None)
            each = self._slices[number] = OwnedSlice() if prepared is None else prepared
            each.begin(state)
        self._unfilled.set()
        self._grown.set()
        self._left_unread.set()

    async def lose(self, numbers: Sequence[int]) -> None:
        """These slices are to go, or are gone."""
        self._drop({number: self._slices[number] for number in numbers if number in self._slices})

    def prepare(self, numbers: Collection[int]) -> frozenset[int]:
        """Other engines' slices that this one is to be handed, all of them; which of them are filled."""
        wanted = set(numbers) - self._slices.keys()
        dropped = self._preparing.keys() - wanted
        for number in dropped:
            del self._preparing[number]
        self._index.close(dropped)
        for number in wanted - self._preparing.keys():
            self._preparing[number] = OwnedSlice()
            self._unfilled.set()
        return frozenset(number for number, each in self._preparing.items() if each.filled)

    def _drop(self, slices: Mapping[int, OwnedSlice]) -> None:
        """These tenures are over. What is this engine's by another one, or is being prepared again, stays."""
        for number, each in slices.items():
            if self._slices.get(number) is each:
                del self._slices[number]
                self._index.close([number])

    def _are_here(self, group: Mapping[int, OwnedSlice]) -> bool:
        """Whether what was just judged was judged against all that these tenures have. One that ends in the middle takes its geoids
        along at once, and its lease only later."""
        return all(self._slices.get(number) is each for number, each in group.items())

    def _lease_lost(self, error: LeaseLostError, group: Mapping[int, OwnedSlice]) -> None:
        """A step that ``group`` had begun with was refused."""
        log.warning("slices lost", slices=error.numbers)
        self._drop({number: each for number, each in group.items() if number in error.numbers})
        self._lost(error.numbers)

    def nudge(self) -> None:
        """There may be something new in the log."""
        self._grown.set()

    @property
    def filled(self) -> frozenset[int]:
        """Slices whose geoids are all here: what a search in this engine covers."""
        return frozenset(number for number, each in self._slices.items() if each.filled)

    @property
    def position(self) -> int:
        """Up to here the log has been read and observed."""
        return self._observed

    @property
    def numbers(self) -> ScorerNumbers:
        filled = [each.position for each in self._slices.values() if each.filled]
        totals, written = self._totals, self._totals.written
        return ScorerNumbers(
            slices=len(self._slices),
            filled=len(filled),
            position=self._observed,
            behind=max(0, self._observed - min(filled, default=self._observed)),
            judged=totals.judged,
            found=written.found,
            dissolved=written.dissolved,
            outdated=written.outdated,
            unindexed=totals.unindexed,
            unread=max(
                (each.last_unread - each.unread + 1 for each in self._slices.values() if each.unread is not None),
                default=0,
            ),
            put_off=totals.put_off,
            read=totals.read,
            confirmed=written.confirmed,
        )

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Score until cancelled. May be called again after a crash: the slices are filled anew."""
        for each in (*self._slices.values(), *self._preparing.values()):
            each.filled = False
        self._unfilled.set()
        async with anyio.create_task_group() as group:
            group.start_soon(self._fill_always, name="scorer:fill")
            group.start_soon(self._read_late_always, name="scorer:late")
            await self._score_always()

    async def _fill_always(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self._unfilled = anyio.Event()
            wanted = {number: each for number, each in self._slices.items() if not each.filled}
            ahead = {number: each for number, each in self._preparing.items() if not each.filled}
            if not wanted and not ahead:
                await self._unfilled.wait()
                continue
            try:
                if wanted:
                    await self._fill(wanted)
                else:
                    await self._fill_ahead(ahead)
                pause = FIRST_PAUSE
            except OperationalError as error:
                log.warning("slices are filled later", error=error.code, seconds=pause)
                await anyio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    async def _fill(self, wanted: Mapping[int, OwnedSlice]) -> None:
        """Put what had been stated up to where each slice is scored; what came later comes with its entry."""
        upto = {number: each.position for number, each in wanted.items()}
        if await self._scan(wanted, upto, lambda: False):
            self._is_filled(wanted)
            self._grown.set()
            self._left_unread.set()
            self._ready()

    async def _fill_ahead(self, wanted: Mapping[int, OwnedSlice]) -> None:
        """Put what had been stated up to where the log is observed, and go on with it from there. What becomes this engine's
        meanwhile is filled all the same; where none of it does, what is owned comes first."""
        position = self._observed
        upto = dict.fromkeys(wanted, position)

        def others_wait() -> bool:
            none_owned = all(self._slices.get(number) is not each for number, each in wanted.items())
            return none_owned and any(not each.filled for each in self._slices.values())

        if not await self._scan(wanted, upto, others_wait):
            return
        while position < self._observed:
            page = await self._pages.read(position, self._observed)
            self._index_page(page, [number for number, each in wanted.items() if self._here(number) is each])
            position = page.upto
        self._is_filled(wanted)
        self._grown.set()
        self._left_unread.set()
        self._ready()

    def _is_filled(self, wanted: Mapping[int, OwnedSlice]) -> None:
        for number, each in wanted.items():
            if self._here(number) is each and self._index.part(number) is not None:
                each.filled = True

    async def _scan(self, wanted: Mapping[int, OwnedSlice], upto: Mapping[int, int], stop: Callable[[], bool]) -> bool:
        """Fill slices from the vault with what was stated up to an offset of each; False: stopped before the end."""
        began = time.monotonic()
        numbers = sorted(wanted)
        self._index.close(numbers)
        self._index.open(numbers)
        count = 0

        async def take_in(page: SlicedColumns) -> bool:
            nonlocal count
            for number in numbers:
                await anyio.lowlevel.checkpoint()
                each = wanted[number]
                if self._here(number) is each:
                    chosen = page.kept((page.numbers == number) & (page.stated <= upto[number]))
                    self._not_indexed(await self._index.fill(number, chosen))
                    count += len(chosen)
            return not stop()

        pages = self._vault.scan_slices(
            numbers,
            slices=self._index.slices,
            batch=LOOKED_AT_ONCE,
            dimension=self._index.dimension,
            within=self._index.within,
        )
        whole = await ahead(pages, take_in)
        if whole:
            log.info("slices filled", slices=numbers, geoids=count, seconds=round(time.monotonic() - began, 3))
        return whole

    def _here(self, number: int) -> OwnedSlice | None:
        return self._slices.get(number) or self._preparing.get(number)

    async def _score_always(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self._grown = anyio.Event()
            try:
                if await self._step():
                    pause = FIRST_PAUSE
                    continue
            except OperationalError as error:
                log.warning("scoring is put off", error=error.code, reason=error.message, seconds=pause)
                await anyio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            self._at_rest.set()
            with anyio.move_on_after(self._poll):
                await self._grown.wait()
            self._at_rest = anyio.Event()

    async def _read_late_always(self) -> None:
        """Have the verifier read what was decided without it, whenever nothing else is to be done."""
        pause = FIRST_LATE_PAUSE
        while True:
            await self._at_rest.wait()
            try:
                if await self._read_late():
                    pause = FIRST_LATE_PAUSE
                    continue
            except OperationalError as error:
                log.info("reading again is put off", error=error.code, seconds=pause)
                await anyio.sleep(pause)
                pause = min(pause * 2, LONGEST_LATE_PAUSE)
                continue
            self._left_unread = anyio.Event()
            await self._left_unread.wait()

    async def _read_late(self) -> bool:
        """Read a few statements again; whether there were any to read."""
        step = await self._late.step(self._slices)
        if step is None:
            return False
        if not self._are_here(step.group):
            return True
        leases = {number: each.generation for number, each in step.group.items()}
        told = Written()

        def write(locked: LockedLog) -> WriteBatch:
            nonlocal told
            locked.hold(self._node_id, leases)
            planner = Planner(locked.head, locked.now, self._sure)
            told = write_findings(step.findings, locked, planner)
            for number, each in step.group.items():
                locked.put_off([number], each.after_reading(step.upto))
            return planner.batch

        async with self._writing:
            try:
                batch = await self._vault.transact(write)
            except LeaseLostError as error:
                self._lease_lost(error, step.group)
                return True
            for each in step.group.values():
                each.unread = each.after_reading(step.upto)
        self._totals.read += step.read
        self._told(told, batch)
        return True

    # -- a step --------------------------------------------------------------------------------------------------------

    async def _step(self) -> bool:
        """Bring the slices that are furthest back one page further; whether there was one."""
        positions = {each.position for each in self._slices.values() if each.filled} | {self._observed}
        after = min(positions)
        until = min((each for each in positions if each > after), default=EVERYTHING)
        group = {number: each for number, each in self._slices.items() if each.filled and each.position == after}
        page = await self._pages.read(after, until)
        if page.upto == after:
            return False
        findings: list[Finding] = []
        unread: list[int] = []
        if group and page.fresh:
            findings, unread = await self._judge(group, page)
            if not self._are_here(group):
                return True
        try:
            async with self._writing:
                batch = await self._commit(group, page, findings, unread)
        except LeaseLostError as error:
            self._lease_lost(error, group)
            return True
        self._take_in(group, page, batch)
        return True

    async def _judge(self, group: Mapping[int, OwnedSlice], page: ScoredPage) -> tuple[list[Finding], list[int]]:
        """What the new statements contradict in these slices, and which contradictions no longer hold; and offsets of those
        that the verifier has not read."""
        view = self._index.view(group)
        detection = await self._engine.look(page.fresh, hurried=self._hurried(page), among=view)
        self._totals.judged += len(page.fresh)
        findings = [
            Finding(older, newer, judgement)
            for newer, hits in zip(page.fresh, detection.hits, strict=True)
            for older, judgement in hits
        ]
        updated = [each.geoid.id for each in page.fresh if each.geoid.version > 1]
        if updated:
            findings += await self._look_again(updated, page, view.takes, {each.pair for each in findings})
            findings.sort(key=lambda finding: finding.newer.stated)
        return findings, [each.stated for each, unread in zip(page.fresh, detection.unread, strict=True) if unread]

    def _hurried(self, page: ScoredPage) -> bool:
        """Whether what is new has been in the log so long that the verifier's word on it has to come later."""
        made = next(entry.ts for entry in page.entries if entry.offset == page.fresh[0].stated)
        return self._clock() - made / 1000 > self._verify_within

    async def _look_again(
        self,
        updated: Sequence[str],
        page: ScoredPage,
        takes: Callable[[StoredGeoid, StoredGeoid], bool],
        hit: set[frozenset[str]],
    ) -> list[Finding]:
        """The open contradictions of updated statements that the scan did not bring: judged, and over if they do not hold."""
        fresh = {each.geoid.id: each for each in page.fresh}
        known = await self._vault.contradictions_of(updated, state="open")
        others = [party for each in known for party in (each.a, each.b) if party not in fresh]
        stored = {**await self._cache.get_many(others), **fresh}
        findings: list[Finding] = []
        unseen: list[tuple[StoredGeoid, StoredGeoid]] = []
        for each in known:
            if each.a not in stored or each.b not in stored or frozenset((each.a, each.b)) in hit:
                continue
            older, newer = sorted((stored[each.a], stored[each.b]), key=lambda one: one.stated)
            if newer.geoid.id not in fresh or not takes(older, newer):
                continue
            if older.geoid.id in fresh or not self._engine.comparable(older, newer):
                findings.append(Finding(older, newer, None))  # statements of one page are compared without a scan
            else:
                unseen.append((older, newer))
        if unseen:
            for (older, newer), judgement in zip(unseen, await self._engine.judge_pairs(unseen), strict=True):
                findings.append(Finding(older, newer, judgement if judgement.reported else None))
        return findings

    async def _commit(
        self,
        group: Mapping[int, OwnedSlice],
        page: ScoredPage,
        findings: Sequence[Finding],
        unread: Sequence[int],
    ) -> WriteBatch:
        """Write what was found and how far the slices are."""
        leases = {number: each.generation for number, each in group.items()}
        first_unread = [number for number, each in group.items() if unread and each.unread is None]
        if not findings and not first_unread:
            self._put_off(group, unread)
            await self._store.advance(self._node_id, leases, page.upto)
            return WriteBatch()
        told = Written()

        def write(locked: LockedLog) -> WriteBatch:
            nonlocal told
            locked.hold(self._node_id, leases)
            planner = Planner(locked.head, locked.now, self._sure)
            told = write_findings(findings, locked, planner)
            batch = planner.batch
            # Entries that follow the page at once are the page's own: there is nothing to judge in them.
            at_once = bool(batch.entries) and locked.head == page.upto
            locked.advance(list(leases), batch.entries[-1].offset if at_once else page.upto)
            locked.put_off(first_unread, unread[0] if unread else None)
            return batch

        batch = await self._vault.transact(write)
        self._put_off(group, unread)
        self._told(told, batch)
        return batch

    def _put_off(self, group: Mapping[int, OwnedSlice], unread: Sequence[int]) -> None:
        if unread:
            self._totals.put_off += len(unread)
            for each in group.values():
                each.put_off(unread[0], unread[-1])
            self._left_unread.set()

    def _told(self, told: Written, batch: WriteBatch) -> None:
        """What was written: count it, and tell."""
        totals = self._totals.written
        totals.found += told.found
        totals.confirmed += told.confirmed
        totals.dissolved += told.dissolved
        totals.outdated += told.outdated
        if batch.entries:
            self._sink.deliver(batch.entries)
            self._grown.set()

    def _take_in(self, group: Mapping[int, OwnedSlice], page: ScoredPage, batch: WriteBatch) -> None:
        """The page is done: no await in here, so that a step is taken in as a whole."""
        here = {number for number, each in group.items() if self._slices.get(number) is each}
        follow = {number for number, each in self._preparing.items() if each.filled}
        follow |= {number for number, each in self._slices.items() if each.filled and each.position > page.after}
        self._index_page(page, here | follow if self._observed == page.after else here)
        gone = page.gone
        at_once = bool(batch.entries) and batch.entries[0].offset == page.upto + 1
        upto = batch.entries[-1].offset if at_once else page.upto
        for each in group.values():
            each.position = upto
        if self._observed == page.after:
            self._observe(
                WriteBatch(
                    entries=list(page.entries),
                    geoids=[page.newest[geoid_id] for geoid_id in page.touched if geoid_id in page.newest],
                    deleted=[(geoid_id, page.touched[geoid_id]) for geoid_id in gone],
                    contradictions=[
                        _contradiction(entry.data) for entry in page.entries if entry.type.startswith("contradiction.")
                    ],
                )
            )
            self._observed = page.upto
            if at_once:
                self._observe(WriteBatch(entries=batch.entries, contradictions=batch.contradictions))
                self._observed = upto
        if here:
            self._progress(dict.fromkeys(sorted(here), upto))

    def _index_page(self, page: ScoredPage, numbers: Collection[int]) -> None:
        """Bring the index of some slices from before the page to behind it."""
        for stored in page.fresh:
            if self._index.slice_of(stored.geoid.id) in numbers:
                self._put(stored)
        for geoid_id in page.gone:
            if self._index.slice_of(geoid_id) in numbers:
                self._index.remove(geoid_id)

    def _put(self, stored: StoredGeoid) -> None:
        try:
            self._index.put(stored)
        except LimitExceededError:
            self._not_indexed(1)

    def _not_indexed(self, count: int) -> None:
        if count and not self._totals.unindexed:
            log.warning("geoids are not compared with: their slice is full")
        self._totals.unindexed += count
