"""Watches: standing semantic queries, held in memory, kept in the vault, asked of every new statement."""

from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import msgspec
import numpy as np

from kimera_stream import kernels
from kimera_stream.core.geoid import new_id
from kimera_stream.core.interfaces import (
    MOST_WATCHES,
    MOST_WATCHES_PER_PRINCIPAL,
    ContradictionEngine,
    Judgement,
    StoredGeoid,
    VaultService,
    Vector,
)
from kimera_stream.kernels import Queries, Segment, Weights, bitmap
from kimera_stream.protocol.errors import BadRequestError, NotFoundError
from kimera_stream.protocol.filters import Filter, compile_filter
from kimera_stream.protocol.objects import Contradiction, Geoid, Watch, WatchMatch

RELATED = 0.6
"""Cosine at which a ``related`` watch fires if it names no ``min_score``."""
JUDGED = 64
"""Watches judged for a contradiction with one statement at most: the closest ones."""


_FEW = 256
"""Watches that one statement reaches, as a rule, at most."""
_F32 = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_I64 = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(slots=True)
class _Standing:
    watch: Watch
    stored: StoredGeoid
    filter: Filter | None


class _Rows:
    """The vectors of watches as the kernel reads them: 8 bits to find who may be reached, float32 to decide.

    Args:
        vectors: float32 (n, dim), unit rows.
        thresholds: float32 (n,): cosine from which each watch wants to know.
    """

    def __init__(self, vectors: _F32, thresholds: _F32) -> None:
        self._vectors = vectors
        self._thresholds = thresholds
        self._kernel = kernels.load()
        if len(vectors):
            codes, grades, lost = kernels.quantize(vectors)
            self._margin = float(lost.max())
            self._view = self._kernel.view([Segment(0, len(vectors), codes=codes, grades=grades, exact=vectors)])
            self._live = bitmap(np.ones(len(vectors), bool))
            self._weights = Weights(min_related=float(thresholds.min()))

    def reached(self, vector: Vector) -> tuple[_I64, _F32]:
        """Places of the watches that ``vector`` (float32 (dim,), a unit vector) reaches, ascending, and their cosines."""
        count = len(self._vectors)
        if not count:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        hits = self._kernel.scan(
            self._view, self._live, Queries.build(vector[None, :]), self._weights,
            k=_FEW, margin=self._margin, rescore=True,
        )  # fmt: skip
        found = int(hits.counts[0])
        if found == _FEW < count:
            # Something that a crowd waits for: all are looked at.
            return self._kernel.match(vector, self._vectors, self._thresholds)
        places, cosines = hits.slots[0, :found], hits.cosine[0, :found]
        reached = cosines >= self._thresholds[places]
        order = np.argsort(places[reached])
        return places[reached][order], cosines[reached][order]


class WatchRegistry:
    """All watches of the log.

    Args:
        vault: Where they are kept.
        engine: Judges the ``contradicts`` kind.
        min_relatedness: Cosine below which two statements are about different things.
        filter_nodes, filter_depth: Limits of a filter.
    """

    def __init__(
        self,
        vault: VaultService,
        engine: ContradictionEngine,
        *,
        min_relatedness: float,
        filter_nodes: int,
        filter_depth: int,
    ) -> None:
        self._changing = anyio.Lock()
        self._vault = vault
        self._engine = engine
        self._min_relatedness = min_relatedness
        self._filter_nodes = filter_nodes
        self._filter_depth = filter_depth
        self._standing: dict[tuple[str, str], _Standing] = {}
        self._owners: dict[str, str] = {}
        self._order: list[_Standing] = []
        self._rows: _Rows | None = None

    def __len__(self) -> int:
        return len(self._standing)

    async def load(self) -> None:
        """Read the watches back from the vault."""
        async with self._changing:  # what was read earlier must not take the place of what was read, or added, since
            self._standing = {
                (watch.principal, watch.watch): self._stand(watch, vector)
                for watch, vector in await self._vault.watches()
            }
            self._owners = {each.watch.id: each.watch.principal for each in self._standing.values()}
            self._rows = None

    async def add(self, watch: Watch, vector: Vector | None) -> Watch:
        """Keep a watch; one of the same name and principal is replaced and keeps its id, and so its channel.

        Raises:
            BadFilterError: the filter is not one.
            LimitExceededError: too many.
        """
        async with self._changing:  # two of one name at once: the later one replaces what the earlier one wrote
            return await self._add(watch, vector)

    async def _add(self, watch: Watch, vector: Vector | None) -> Watch:
        key = (watch.principal, watch.watch)
        standing = self._stand(watch, vector)
        # The vault counts: among several nodes what stands here may lag what there is.
        kept = await self._vault.save_watch(
            watch, vector, most=MOST_WATCHES, most_per_principal=MOST_WATCHES_PER_PRINCIPAL
        )
        # One that was made before, here or by another engine, keeps its id.
        self._standing[key] = standing if kept.id == watch.id else self._stand(kept, vector)
        self._owners[kept.id] = kept.principal
        self._rows = None
        return kept

    async def remove(self, principal: str, name: str) -> None:
        """End a watch.

        Raises:
            NotFoundError: there is none of that name.
        """
        async with self._changing:
            if not await self._vault.delete_watch(principal, name):
                raise NotFoundError(f"watch: {name!r} does not exist", field="watch")
            gone = self._standing.pop((principal, name), None)
            if gone is not None:
                self._owners.pop(gone.watch.id, None)
            self._rows = None

    def of(self, principal: str) -> list[Watch]:
        """The watches of one principal."""
        return [standing.watch for (owner, _), standing in self._standing.items() if owner == principal]

    def owner(self, watch_id: str) -> str | None:
        """The principal whose watch it is."""
        return self._owners.get(watch_id)

    async def matches(self, fresh: StoredGeoid, found: Sequence[Contradiction]) -> list[tuple[str, WatchMatch]]:
        """(watch id, match) for every watch that ``fresh`` concerns.

        ``found``: the contradictions of ``fresh`` itself; the one with the highest score is named in a ``contradicts`` match
        where its other side says the same as the watch.
        """
        if not self._standing or fresh.vector is None:
            return []
        places, cosines = self._asked(len(fresh.vector)).reached(fresh.vector)
        results: list[tuple[str, WatchMatch]] = []
        judged: list[tuple[float, _Standing]] = []
        kind = "geoid.created" if fresh.geoid.version == 1 else "geoid.updated"
        event = {"type": kind, "data": msgspec.to_builtins(fresh.geoid)} if len(places) else {}
        for place, cosine in zip(places.tolist(), cosines.tolist(), strict=True):
            standing = self._order[place]
            watch = standing.watch
            if standing.filter is not None and not standing.filter.matches(event):
                continue
            if "related" in watch.kinds and cosine >= (RELATED if watch.min_score is None else watch.min_score):
                score = min(1.0, cosine)
                results.append(
                    (watch.id, WatchMatch(watch=watch.watch, kind="related", score=score, geoid=fresh.geoid))
                )
            if "contradicts" in watch.kinds and cosine >= self._min_relatedness and watch.text is not None:
                judged.append((cosine, standing))
        if judged:
            judged.sort(key=lambda each: -each[0])
            chosen = [standing for _, standing in judged[:JUDGED]]
            verdicts = await self._engine.judge_pairs([(standing.stored, fresh) for standing in chosen])
            for standing, verdict in zip(chosen, verdicts, strict=True):
                least = standing.watch.min_score
                if verdict.reported if least is None else verdict.score >= least:
                    same = [each for each in found if each.a_text == standing.watch.text]
                    match = WatchMatch(
                        watch=standing.watch.watch,
                        kind="contradicts",
                        score=verdict.score,
                        geoid=fresh.geoid,
                        contradiction=max(same, key=lambda each: each.score, default=None),
                    )
                    results.append((standing.watch.id, match))
        return results

    def text_of(self, watch_id: str, name: str) -> str | None:
        """What a watch says; None: nothing, or there is no such watch."""
        standing = self._standing.get((self._owners.get(watch_id, ""), name))
        return None if standing is None else standing.watch.text

    async def contradicted(
        self, fresh: StoredGeoid, others: Sequence[StoredGeoid]
    ) -> list[tuple[StoredGeoid, Judgement]]:
        """Those of ``others``, which say the same as a watch that ``fresh`` contradicts, that it contradicts as well.

        Not those that the verifier could not read: nobody would have it read them later.
        """
        pairs = [(other, fresh) for other in others if self._engine.comparable(other, fresh)]
        verdicts = await self._engine.judge_pairs(pairs) if pairs else []
        return [
            (older, verdict)
            for (older, _), verdict in zip(pairs, verdicts, strict=True)
            if verdict.reported and not verdict.provisional
        ]

    def _asked(self, dimension: int) -> "_Rows":
        """The watches that have a vector, in ``_order``."""
        if self._rows is None:
            self._order = [standing for standing in self._standing.values() if standing.stored.vector is not None]
            rows = [standing.stored.vector for standing in self._order if standing.stored.vector is not None]
            vectors = np.stack(rows) if rows else np.zeros((0, dimension), np.float32)
            self._rows = _Rows(vectors, np.array([self._threshold(each.watch) for each in self._order], np.float32))
        return self._rows

    def _threshold(self, watch: Watch) -> float:
        related = RELATED if watch.min_score is None else watch.min_score
        return min(
            related if "related" in watch.kinds else 1.0, self._min_relatedness if "contradicts" in watch.kinds else 1.0
        )

    def _stand(self, watch: Watch, vector: Vector | None) -> _Standing:
        compiled = None
        if watch.filter is not None:
            compiled = compile_filter(watch.filter, max_nodes=self._filter_nodes, max_depth=self._filter_depth)
        geoid = Geoid(
            id=watch.id,
            version=1,
            text=watch.text,
            semantic_state={},
            symbolic_state={},
            metadata={},
            entropy=0.0,
            created_at=watch.created_at,
            updated_at=watch.created_at,
            offset=0,
        )
        return _Standing(watch, StoredGeoid(geoid, vector, watch.principal), compiled)


def new_watch(
    name: str,
    principal: str,
    *,
    text: str | None,
    kinds: Sequence[str],
    min_score: float | None,
    filter: dict[str, object] | None,
    now: int,
) -> Watch:
    """A watch as asked for.

    Raises:
        BadRequestError: no kind, an unknown one, one that needs a text, or no usable name.
    """
    if not name or len(name) > 128:
        raise BadRequestError("watch: expected a name of 1-128 characters", field="watch")
    if not kinds or any(kind not in ("contradicts", "related") for kind in kinds):
        raise BadRequestError('kinds: expected one or both of "contradicts", "related"', field="kinds")
    if text is None and "related" not in kinds:
        raise BadRequestError("text: expected one for contradicts, which reads what is said", field="text")
    return Watch(
        id=new_id(now),
        watch=name,
        principal=principal,
        text=text,
        kinds=list(dict.fromkeys(kinds)),  # type: ignore[arg-type]
        min_score=min_score,
        filter=filter,
        created_at=now,
    )
