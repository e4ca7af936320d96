"""The verifier's later word on what was decided without it.

    backlog ──ids──> Pipeline.reread (lowest priority) ──> sequencer ──> LateWord.plan ──> found (newer version), dissolved

It is work like any other, done by the one writer, so it never meets a publish half-way.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio
import structlog
from msgspec.structs import replace

from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import ContradictionEngine, Judgement, StoredGeoid, VaultService
from kimera_stream.engines.backlog import Backlog
from kimera_stream.engines.planning import Planner
from kimera_stream.engines.retrying import DefectError
from kimera_stream.engines.work import RereadWork
from kimera_stream.protocol.errors import OperationalError, UnavailableError
from kimera_stream.protocol.objects import Contradiction, ContradictionState

log = structlog.get_logger(__name__)

TOGETHER = 8
"""Statements read again in one piece of work: what is published meanwhile waits for no more than these."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds before the next try where the verifier is still away."""


@dataclass(frozen=True, slots=True)
class _Change:
    """``judgement``: None: the two can both hold. ``older``: None: it is gone."""

    older: StoredGeoid | None
    newer: StoredGeoid
    before: Contradiction | None
    judgement: Judgement | None


class LateWord:
    """Plans what changes once the verifier has read statements that are stored already."""

    def __init__(self, vault: VaultService, cache: GeoidCache, engine: ContradictionEngine) -> None:
        self._vault = vault
        self._cache = cache
        self._engine = engine

    async def plan(
        self, works: Sequence[RereadWork], planner: Planner
    ) -> list[tuple[RereadWork, int | OperationalError]]:
        """Write what changes into the planner's batch; each work's answer is how many statements were read.

        Raises:
            UnavailableError: the verifier still cannot read.
        """
        outcomes: list[tuple[RereadWork, int | OperationalError]] = []
        for work in works:
            try:
                outcomes.append((work, await self._again(work, planner)))
            except UnavailableError as error:
                outcomes.append((work, error))
        return outcomes

    async def _again(self, work: RereadWork, planner: Planner) -> int:
        existing = await self._cache.get_many(work.geoid_ids)
        fresh = sorted(existing.values(), key=lambda stored: stored.geoid.offset)
        if not fresh:
            return 0
        detection = await self._engine.look(fresh)
        if any(detection.unread):
            raise UnavailableError("verifier: it cannot read yet", retry_after=FIRST_PAUSE)
        ids = [stored.geoid.id for stored in fresh]
        known = await self._by_pair(ids, "open")
        settled = await self._by_pair(ids, "resolved")  # a person has decided; that stands
        changes: list[_Change] = []
        seen: set[frozenset[str]] = set()
        for newer, hits in zip(fresh, detection.hits, strict=True):
            for older, judgement in hits:
                pair = frozenset((older.geoid.id, newer.geoid.id))
                before = known.get(pair)
                if older.geoid.offset > newer.geoid.offset or pair in seen or pair in settled:
                    continue  # what came after it is judged with the later one
                seen.add(pair)
                if before is None or before.provisional:
                    changes.append(_Change(older, newer, before, judgement))
        for pair, before in known.items():
            if before.provisional and before.b in existing and pair not in seen:
                changes.append(await self._judged(before, existing[before.b]))
        for change in changes:
            self._write(change, planner)
        planner.late.read += len(fresh)
        return len(fresh)

    async def _by_pair(self, ids: Sequence[str], state: ContradictionState) -> dict[frozenset[str], Contradiction]:
        return {frozenset((each.a, each.b)): each for each in await self._vault.contradictions_of(ids, state=state)}

    async def _judged(self, before: Contradiction, newer: StoredGeoid) -> _Change:
        """The word on a provisional pair that the scan did not bring, or the verifier did not flag."""
        older = await self._cache.get(before.a)
        if older is None or not self._engine.comparable(older, newer):
            return _Change(older, newer, before, None)
        (judgement,) = await self._engine.judge_pairs([(older, newer)])
        if judgement.provisional:
            raise UnavailableError("verifier: it cannot read yet", retry_after=FIRST_PAUSE)
        return _Change(older, newer, before, judgement if judgement.reported else None)

    def _write(self, change: _Change, planner: Planner) -> None:
        if change.judgement is not None and change.older is not None:
            planner.found(change.older, change.newer, change.judgement, change.before)
            if change.before is None:
                planner.late.found += 1
            else:
                planner.late.confirmed += 1
        elif change.before is not None:
            geoids = [change.newer.geoid] if change.older is None else [change.older.geoid, change.newer.geoid]
            planner.dissolved(replace(change.before, provisional=False), geoids)
            planner.late.dissolved += 1


class LateReader:
    """Asks for the later word, whenever there is something left to read.

    Args:
        reread: Has stored statements read again; returns once that is committed.
    """

    def __init__(
        self, vault: VaultService, backlog: Backlog, reread: Callable[[Sequence[str]], Awaitable[int]]
    ) -> None:
        self._vault = vault
        self._backlog = backlog
        self._reread = reread

    async def run(self) -> None:
        """Read again until cancelled."""
        pause = FIRST_PAUSE
        loaded = False
        while True:
            try:
                if not loaded:
                    await self._backlog.load()
                    loaded = True
                await self._step()
                pause = FIRST_PAUSE
            except OperationalError as error:
                log.info("reading again is put off", error=error.code, seconds=pause)
                await anyio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    async def _step(self) -> None:
        first, last = await self._backlog.first()
        page = await self._vault.list_geoids(after=first - 1, limit=TOGETHER)
        wanted = [geoid for geoid in page.items if geoid.offset <= last]
        if wanted:
            await self._read_again([geoid.id for geoid in wanted])
        complete = page.next is None or len(wanted) < len(page.items)
        await self._backlog.done(last if complete else wanted[-1].offset)

    async def _read_again(self, ids: Sequence[str]) -> None:
        """Have these read again; one that cannot be read is passed over, so that the others are not kept waiting for ever."""
        try:
            await self._reread(ids)
        except DefectError:
            if len(ids) == 1:
                log.warning("a statement that the verifier cannot read keeps what was decided without it", geoid=ids[0])
                return
            for each in ids:
                await self._read_again([each])
