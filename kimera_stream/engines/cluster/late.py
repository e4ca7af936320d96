"""The verifier's later word, by slices: what its owner decided without it is read again when there is time.

slice.unread ──> a few entries ──> statements that still stand ──> look among the slices that wait from there on ──> findings, final ──> unread moves
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from kimera_stream.core.coverage import ClusterVault
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.index import SlicedIndex
from kimera_stream.core.interfaces import ContradictionEngine, StoredGeoid
from kimera_stream.engines.cluster.findings import Finding
from kimera_stream.engines.cluster.owned import OwnedSlice
from kimera_stream.protocol.errors import UnavailableError

TOGETHER = 8
"""Entries read again in one step: what is published meanwhile waits for no more than these."""
STATEMENTS = "geoids"
"""Channel of the log."""
RETRY_AFTER = 0.5


class _Named(msgspec.Struct):
    id: str


_named = msgspec.json.Decoder(_Named).decode


@dataclass(frozen=True, slots=True)
class LateStep:
    """What reading again has come to.

    Attributes:
        group: The slices that it was done for.
        upto: Everything up to here has been read.
        read: Statements read.
    """

    group: Mapping[int, OwnedSlice]
    upto: int
    findings: Sequence[Finding]
    read: int


class LateWord:
    """Reads again, a step at a time; what comes of it is written by the scorer."""

    def __init__(self, vault: ClusterVault, index: SlicedIndex, cache: GeoidCache, engine: ContradictionEngine) -> None:
        self._vault = vault
        self._index = index
        self._cache = cache
        self._engine = engine

    async def step(self, slices: Mapping[int, OwnedSlice]) -> LateStep | None:
        """Read the next few statements that some of the slices wait for; None where none does.

        Raises:
            UnavailableError: the verifier still cannot read, or the vault.
        """
        waiting = {number: each for number, each in slices.items() if each.filled and each.unread is not None}
        if not waiting:
            return None
        first = min(each.unread for each in waiting.values() if each.unread is not None)
        group = {number: each for number, each in waiting.items() if each.unread == first}
        last = min(min(each.last_unread, each.position) for each in group.values())
        page = await self._vault.read(STATEMENTS, after=first - 1, limit=TOGETHER, until=last)
        said = {_named(entry.data).id: entry.offset for entry in page.entries}
        for geoid_id, offset in said.items():
            self._cache.expect(geoid_id, offset)
        stored = await self._cache.get_many(list(said)) if said else {}
        # Whoever states something else by now has been, or will be, judged by its later entry. A label is no other statement.
        offsets = range(first, page.scanned + 1)
        fresh = sorted((each for each in stored.values() if each.stated in offsets), key=lambda each: each.stated)
        return LateStep(group, page.scanned, await self._findings(fresh, group), len(fresh))

    async def _findings(self, fresh: Sequence[StoredGeoid], group: Mapping[int, OwnedSlice]) -> list[Finding]:
        if not fresh:
            return []
        view = self._index.view(group)
        detection = await self._engine.look(fresh, among=view)
        if any(detection.unread):
            raise UnavailableError("verifier: it cannot read yet", retry_after=RETRY_AFTER)
        findings = [
            Finding(older, newer, judgement, final=True)
            for newer, hits in zip(fresh, detection.hits, strict=True)
            for older, judgement in hits
        ]
        hit = {finding.pair for finding in findings}
        newest = {each.geoid.id: each for each in fresh}
        doubtful = [
            each
            for each in await self._vault.contradictions_of(list(newest), state="open")
            if each.provisional and each.b in newest and frozenset((each.a, each.b)) not in hit
        ]
        others = await self._cache.get_many([each.a for each in doubtful])
        pairs = [
            (others[each.a], newest[each.b])
            for each in doubtful
            if each.a in others and view.takes(others[each.a], newest[each.b])
        ]
        apart = [pair for pair in pairs if not self._engine.comparable(*pair)]
        findings += [Finding(older, newer, None, final=True) for older, newer in apart]
        pairs = [pair for pair in pairs if self._engine.comparable(*pair)]
        if pairs:
            for (older, newer), judgement in zip(pairs, await self._engine.judge_pairs(pairs), strict=True):
                if judgement.provisional:
                    raise UnavailableError("verifier: it cannot read yet", retry_after=RETRY_AFTER)
                findings.append(Finding(older, newer, judgement if judgement.reported else None, final=True))
        return findings
