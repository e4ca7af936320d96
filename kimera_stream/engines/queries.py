"""What is asked and not stored: scores, searches, and the keeping of watches."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import msgspec
import numpy as np

from kimera_stream.core.access import Principal
from kimera_stream.core.geoid import built, unit
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import (
    Candidate,
    ContradictionEngine,
    EmbeddingService,
    IndexService,
    StoredGeoid,
    Vector,
)
from kimera_stream.engines.watches import WatchRegistry, new_watch
from kimera_stream.protocol.errors import BadRequestError
from kimera_stream.protocol.filters import Filter, compile_filter
from kimera_stream.protocol.objects import GeoidBody, ScoredGeoid, ScoreResult, Watch, WatchKind

MOST_RESULTS = 100
OVERFETCH = 10
"""Statements looked at per result asked for, where a filter may drop some, and how many times as many in the next scan."""
MOST_LOOKED_AT = 10_000
"""Statements that a search with a filter looks at: it ends with fewer results than asked for where these do not hold enough."""
READ_AT_ONCE = 500
"""Statements read between two turns of the event loop."""


class Queries:
    """Answers from the index, the cache and the engine."""

    def __init__(
        self,
        embedder: EmbeddingService,
        index: IndexService,
        cache: GeoidCache,
        engine: ContradictionEngine,
        watches: WatchRegistry,
        *,
        filter_nodes: int,
        filter_depth: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._embedder = embedder
        self._index = index
        self._cache = cache
        self._engine = engine
        self._watches = watches
        self._filter_nodes = filter_nodes
        self._filter_depth = filter_depth
        self._clock = clock

    async def score(self, a: GeoidBody, b: GeoidBody, *, explain: bool = False) -> ScoreResult:
        """Both bodies must have been validated. They are compared whatever session, agent or principal they are of."""
        pair = (await self._passing(a, "a"), await self._passing(b, "b"))
        if explain:
            return (await self._engine.explain(*pair)).result
        (judgement,) = await self._engine.judge_pairs([pair])
        return judgement.result

    async def search(
        self,
        *,
        text: str | None,
        vector: list[float] | None,
        relation: WatchKind,
        k: int,
        filter: Mapping[str, Any] | None,
    ) -> list[ScoredGeoid]:
        """At most ``k`` hits, the best first.

        With a filter the ``MOST_LOOKED_AT`` most related statements are looked at, as far as needed; of ``contradicts`` what the
        cascade finds.

        Raises:
            BadRequestError: ``k`` is out of range.
            BadFilterError: the filter is not one.
        """
        if not 1 <= k <= MOST_RESULTS:
            raise BadRequestError(f"k: expected 1 to {MOST_RESULTS}", field="k")
        compiled = self._compile(filter)
        query = await self._passing(GeoidBody(text=text, vector=vector), "query")
        if relation == "related":
            return await self._related(query, k, compiled)
        return [hit for hit in await self._contradicting(query) if _passes(hit, compiled)][:k]

    async def _related(self, query: StoredGeoid, k: int, compiled: Filter | None) -> list[ScoredGeoid]:
        assert query.vector is not None
        row = np.ascontiguousarray(query.vector[None, :])
        hits: list[ScoredGeoid] = []
        seen: set[str] = set()
        wanted = k if compiled is None else k * OVERFETCH
        while True:
            (candidates,) = await self._index.related(row, k=wanted)
            fresh = [each for each in candidates if each.geoid_id not in seen]
            for start in range(0, len(fresh), READ_AT_ONCE):
                page = fresh[start : start + READ_AT_ONCE]
                # Past the cache from the second scan on: what one search looks at would push out what all others use.
                hits += await self._passing_among(page, compiled, keep=not seen)
                if len(hits) >= k:
                    break
            seen.update(each.geoid_id for each in fresh)
            # Not by the number of candidates: some may have been deleted during the scan, and there can be more after them.
            if len(hits) >= k or compiled is None or not fresh or wanted >= min(MOST_LOOKED_AT, self._index.size):
                break
            wanted = min(wanted * OVERFETCH, MOST_LOOKED_AT)
        # What was published between two scans can be closer than what was found before.
        return sorted(hits, key=lambda hit: -hit.score)[:k]

    async def _passing_among(
        self, candidates: Sequence[Candidate], compiled: Filter | None, *, keep: bool
    ) -> list[ScoredGeoid]:
        await anyio.lowlevel.checkpoint()
        found = await self._cache.get_many([each.geoid_id for each in candidates], keep=keep)
        hits = (
            ScoredGeoid(geoid=found[each.geoid_id].geoid, score=max(0.0, min(1.0, each.relatedness)))
            for each in candidates
            if each.geoid_id in found
        )
        return [hit for hit in hits if _passes(hit, compiled)]

    async def _contradicting(self, query: StoredGeoid) -> list[ScoredGeoid]:
        (hits,) = await self._engine.detect([query], everywhere=True)
        ordered = sorted(hits, key=lambda hit: -hit[1].score)
        return [ScoredGeoid(geoid=stored.geoid, score=judgement.score) for stored, judgement in ordered]

    # -- watches

    async def watch(
        self,
        name: str,
        *,
        principal: Principal,
        text: str | None,
        vector: list[float] | None,
        kinds: list[WatchKind],
        min_score: float | None,
        filter: Mapping[str, Any] | None,
    ) -> Watch:
        """Keep a watch; an existing one of the same name is replaced."""
        watch = new_watch(
            name,
            principal.id,
            text=text,
            kinds=kinds,
            min_score=min_score,
            filter=None if filter is None else dict(filter),
            now=int(self._clock() * 1000),
        )
        return await self._watches.add(watch, await self._vector(text, vector))

    async def unwatch(self, name: str, *, principal: Principal) -> None:
        await self._watches.remove(principal.id, name)

    def watches(self, principal: Principal) -> list[Watch]:
        return self._watches.of(principal.id)

    def watch_owner(self, watch_id: str) -> str | None:
        return self._watches.owner(watch_id)

    # -- how

    async def _vector(self, text: str | None, vector: list[float] | None) -> Vector | None:
        if vector is not None:
            return unit(vector)
        if text is None:
            return None
        row: Vector = (await self._embedder.embed([text]))[0].copy()
        return row

    async def _passing(self, body: GeoidBody, name: str) -> StoredGeoid:
        """A geoid that is only looked at."""
        geoid = built(
            body,
            geoid_id=body.id or f"~{name}",
            session_id=None,
            now=int(self._clock() * 1000),
            offset=0,
            previous=None,
        )
        return StoredGeoid(geoid, await self._vector(body.text, body.vector), "")

    def _compile(self, filter: Mapping[str, Any] | None) -> Filter | None:
        if filter is None:
            return None
        return compile_filter(dict(filter), max_nodes=self._filter_nodes, max_depth=self._filter_depth)


def _passes(hit: ScoredGeoid, compiled: Filter | None) -> bool:
    return compiled is None or compiled.matches(_event(hit))


def _event(hit: ScoredGeoid) -> dict[str, Any]:
    """The hit as the event object that filters are written against."""
    return {"data": msgspec.to_builtins(hit.geoid), "score": hit.score}
