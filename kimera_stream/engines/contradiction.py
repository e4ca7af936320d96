"""The cascade: which of everything said before cannot hold beside what is said now.

    scan (index) ──> prefilter (related enough, ranked by words, then by the rules) ──> verify (cross-encoder) ──> scope ──> threshold

Each stage makes the set smaller and the judgement dearer. The symbolic layer goes past all of them: it is exact. Without a
verifier the rules of ``evidence`` decide; with one they rank what it reads and explain what it finds. Where it has fallen behind or
is away the pair head decides in its place, provisionally.
"""

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from kimera_stream.core.groups import group_of
from kimera_stream.core.interfaces import Among, Candidate, Detection, IndexService, Judgement, StoredGeoid, Threads
from kimera_stream.engines.composite import cosine
from kimera_stream.engines.evidence import Evidence, Rules, packaged_rules
from kimera_stream.engines.explaining import Heard, reports
from kimera_stream.engines.pair_head import PairHead
from kimera_stream.engines.pairs import Pair, Stages, pair_of
from kimera_stream.engines.retrying import Faults
from kimera_stream.engines.scores import Scores
from kimera_stream.engines.verifier import Verifier
from kimera_stream.infrastructure.settings import ScoringSettings
from kimera_stream.kernels import same_names, text_overlaps, text_signatures
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)
T = TypeVar("T")

READ_RELATED = 0.3
"""Cosine below which a pair is not worth the verifier's time: 8 % of the contradictions in stories lie below it, 26 % below
0.45, as what contradicts in a feed is often told in other words about another side of the matter."""
LEAST_READ = 4
"""Pairs of one statement that are read however large the batch is: of the contradictions that the verifier flags among 16
pairs, 98 % are among the 4 most promising (development clusters in a pool of 10,000)."""
SUSPICION_SHARE = 0.25
"""Weight of the rules' probability in the order in which the verifier reads: with twice as much 74.5 % of the contradictions that
``pairs.OVERLAP_SHARE`` was measured on are among the 4 first and 89.1 % among 16, with this 75.9 % and 89.3 %."""
INLINE_PAIRS = 4
"""So few pairs are compared on the event loop: a hand-over to a thread would cost more."""


class GeoidLoader(Protocol):
    """Where the engine gets candidates from."""

    async def get_many(self, ids: Sequence[str]) -> Mapping[str, StoredGeoid]: ...


class CascadeEngine:
    """Implements ``ContradictionEngine``.

    Args:
        index: Where candidates come from.
        geoids: Loads candidates by id (``GeoidCache``).
        verifier: None: the rules alone decide.
        settings: ``scoring`` group.
        threads: The rules read in its ``score`` threads.
        registry: Where its metrics go.
        head: Decides in the verifier's place where that has no time; None: the rules do. The index' vectors are of its encoder.
        rules: Other rules than the packaged ones.
        stages: Other stages than the settings name; for measurements.
    """

    def __init__(
        self,
        index: IndexService,
        geoids: GeoidLoader,
        verifier: Verifier | None,
        settings: ScoringSettings,
        threads: Threads,
        registry: CollectorRegistry,
        *,
        head: PairHead | None = None,
        rules: Rules | None = None,
        stages: Stages | None = None,
    ) -> None:
        self._index = index
        self._geoids = geoids
        self._verifier = verifier
        self._settings = settings
        self._threads = threads
        self._rules = rules if rules is not None else packaged_rules()
        self._stages = stages if stages is not None else Stages.of(settings)
        self._head = head
        self._scores = Scores(settings, self._stages, self._rules.name, verifier, head)
        self._seconds = Histogram(
            "kimera_cascade_seconds", "Duration of a stage for one batch", ["stage"], registry=registry
        )
        self._pairs = Counter("kimera_cascade_pairs_total", "Pairs that entered a stage", ["stage"], registry=registry)
        self._fallbacks = Counter(
            "kimera_cascade_fallbacks_total",
            "Batches judged by the pair head or the rules as the verifier was unavailable",
            registry=registry,
        )
        faults = Counter(
            "kimera_cascade_faults_total", "Pairs over which a stage met a defect", ["stage"], registry=registry
        )
        self._faults = Faults("verify", lambda stage: faults.labels(stage).inc())
        self._rules_faults = Faults("rules", lambda stage: faults.labels(stage).inc())
        self._head_faults = Faults("head", lambda stage: faults.labels(stage).inc())

    @property
    def threshold(self) -> float:
        """Score at and above which a pair is reported."""
        return self._scores.threshold

    @property
    def model(self) -> str:
        """What decides about texts at present."""
        return self._scores.model

    @property
    def stand_in(self) -> str:
        """What decides about texts, provisionally, where the verifier falls behind."""
        return self._rules.name if self._head is None else self._head.name

    # -- the questions -----------------------------------------------------------------------------------------

    async def judge_pairs(self, pairs: Sequence[tuple[StoredGeoid, StoredGeoid]]) -> list[Judgement]:
        """(older, newer) pairs judged, batched; no threshold applied."""
        made = [pair_of(older, newer, cosine(older, newer)) for older, newer in pairs]
        await self._judge(made, select=False)
        return [self._scores.judgement(pair) for pair in made]

    async def explain(self, older: StoredGeoid, newer: StoredGeoid) -> Judgement:
        """One pair judged, stage by stage. The verifier reads it also where the prefilter would not have handed it on."""
        spent = [time.perf_counter()]

        def lap() -> None:
            spent.append(time.perf_counter())

        pair = pair_of(older, newer, cosine(older, newer))
        worthy = self._worth_a_look(pair)
        lap()
        await self._compare([pair] if pair.has_texts else [])
        lap()
        chosen = bool(self._prefilter([pair], [0]))
        lap()
        verifier = self._verifier if self._stages.verify else None
        if verifier is not None and pair.has_texts:
            await self._verify(verifier, [pair])
            await self._stand_in([pair])
        lap()
        judgement = self._scores.judgement(pair)
        lap()
        bar = self._scores.bar(pair, self.threshold)
        lap()
        took = [round((after - before) * 1000, 3) for before, after in pairwise(spent)]
        heard = Heard(
            worthy=worthy,
            cosine=pair.cosine,
            least=self._settings.min_relatedness,
            conflicts=len(pair.verdict.conflicts),
            apart=pair.verdict.apart,
            texts=pair.has_texts,
            rules=None if pair.evidence is None else pair.evidence.probability,
            prefilter=self._stages.prefilter,
            chosen=chosen,
            silent=self._scores.silent(pair),
            verified=pair.verified,
            model=self.model,
            scope=self._stages.scope,
            textual=self._scores.textual(pair),
            out_of_scope=self._scores.out_of_scope(pair),
            score=judgement.score,
            bar=bar,
        )
        return replace(judgement, result=msgspec.structs.replace(judgement.result, stages=reports(heard, took)))

    def comparable(self, one: StoredGeoid, other: StoredGeoid) -> bool:
        """Whether the two are compared at all, by setting."""
        within = self._settings.compare_within
        return within == "all" or group_of(one, within) == group_of(other, within)

    async def detect(
        self, fresh: Sequence[StoredGeoid], *, everywhere: bool = False
    ) -> list[list[tuple[StoredGeoid, Judgement]]]:
        """For each new geoid, the stored ones and the earlier ones of ``fresh`` that it contradicts, the surest first.

        The order of ``fresh`` is the order of commit: a stored geoid that an earlier one of ``fresh`` replaces is compared
        in its new version only. ``everywhere``: also among statements that by setting are not compared with each other.
        """
        return (await self.look(fresh, everywhere=everywhere)).hits

    async def look(
        self,
        fresh: Sequence[StoredGeoid],
        *,
        hurried: bool = False,
        among: Among | None = None,
        everywhere: bool = False,
    ) -> Detection:
        """As ``detect``, and whose texts the verifier has not read: it was away, or left out (``hurried``).

        ``among``: what they are compared with, where that is not everything.
        """
        if not fresh:
            return Detection([], [])
        k, least = self._settings.candidates, self._settings.min_relatedness
        with self._seconds.labels("scan").time():
            if among is None:
                scanned = await self._index.scan(fresh, k=k, min_relatedness=least, everywhere=everywhere)
            else:
                scanned = await among.scan(fresh, k=k, min_relatedness=least)
            loaded = await self._geoids.get_many([each.geoid_id for found in scanned for each in found])
        found = self._worthy(fresh, scanned, loaded, among, everywhere)
        began = time.perf_counter()
        if self._stages.prefilter:
            found = [self._promising(newer, mine) for newer, mine in zip(fresh, found, strict=True)]
        ranked = time.perf_counter() - began
        pairs = list(chain.from_iterable(found))
        owner = [number for number, mine in enumerate(found) for _ in mine]
        self._pairs.labels("scan").inc(len(pairs))
        await self._judge(pairs, select=True, owner=owner, hurried=hurried, ranked=ranked)
        results: list[list[tuple[StoredGeoid, Judgement]]] = [[] for _ in fresh]
        with self._seconds.labels("scope").time():
            threshold = self.threshold
            for pair, number in zip(pairs, owner, strict=True):
                if self._scores.score(pair) >= self._scores.bar(pair, threshold):
                    results[number].append((pair.older, self._scores.judgement(pair)))
        for hits in results:
            hits.sort(key=lambda hit: -hit[1].score)
        unread = [False] * len(fresh)
        for pair, number in zip(pairs, owner, strict=True):
            unread[number] = unread[number] or pair.fallen_back
        return Detection(results, unread)

    # -- stages ----------------------------------------------------------------------------------------------------

    def _worthy(
        self,
        fresh: Sequence[StoredGeoid],
        scanned: Sequence[Sequence[Candidate]],
        loaded: Mapping[str, StoredGeoid],
        among: Among | None,
        everywhere: bool,
    ) -> list[list[Pair]]:
        """The pairs of each new statement that are worth a look."""
        worthy: list[list[Pair]] = []
        replaced: set[str] = set()
        cosines = _cosines(fresh)
        near = cosines >= self._settings.min_relatedness
        symbolic = np.array([bool(each.geoid.symbolic_state) for each in fresh])
        signatures = text_signatures([each.geoid.text for each in fresh])
        for number, newer in enumerate(fresh):
            found: list[Pair] = []
            for candidate in scanned[number]:
                older = loaded.get(candidate.geoid_id)
                if older is None or candidate.geoid_id in replaced or candidate.geoid_id == newer.geoid.id:
                    continue
                if among is not None and not among.takes(older, newer):
                    continue
                if not everywhere and not self.comparable(older, newer):
                    continue  # it went elsewhere since the scan
                known = None if older.vector is None or newer.vector is None else candidate.relatedness
                self._consider(older, newer, known, candidate.named, found)
            close = near[:number, number] | (symbolic[:number] & symbolic[number])
            named = same_names(int(signatures[number]), signatures[:number])
            for earlier in np.flatnonzero(close).tolist():
                if among is not None and not among.takes(fresh[earlier], newer):
                    continue
                if not everywhere and not self.comparable(fresh[earlier], newer):
                    continue
                apart = fresh[earlier].vector is None or newer.vector is None
                known = None if apart else float(cosines[earlier, number])
                self._consider(fresh[earlier], newer, known, bool(named[earlier]), found)
            worthy.append(found)
            replaced.add(newer.geoid.id)
        return worthy

    def _consider(
        self, older: StoredGeoid, newer: StoredGeoid, known: float | None, named: bool, found: list[Pair]
    ) -> None:
        no_symbols = not older.geoid.symbolic_state or not newer.geoid.symbolic_state
        if no_symbols and (known is None or known < self._settings.min_relatedness):
            return  # most pairs end here
        pair = pair_of(older, newer, known, named)
        if self._worth_a_look(pair):
            found.append(pair)

    def _promising(self, newer: StoredGeoid, found: list[Pair]) -> list[Pair]:
        """Of the pairs of one new statement those that the rules read: the best by cosine, shared words and names, and what
        clashes by its symbols."""
        readable = [pair for pair in found if pair.has_texts]
        if not readable:
            return found
        overlaps = text_overlaps(newer.geoid.text or "", [pair.older.geoid.text or "" for pair in readable])
        for pair, overlap in zip(readable, overlaps.tolist(), strict=True):
            pair.overlap = overlap
        if len(found) <= self._settings.read_candidates:
            return found
        readable.sort(key=lambda pair: -pair.promise)
        chosen = set(map(id, readable[: self._settings.read_candidates]))
        return [pair for pair in found if pair.verdict.conflicts or id(pair) in chosen]

    def _worth_a_look(self, pair: Pair) -> bool:
        if pair.verdict.apart:
            return False
        if pair.verdict.conflicts and (pair.verdict.same_subject or self._scores.is_related(pair)):
            return True
        return pair.has_texts and self._scores.is_related(pair)

    async def _judge(
        self,
        pairs: list[Pair],
        *,
        select: bool,
        owner: Sequence[int] = (),
        hurried: bool = False,
        ranked: float = 0.0,
    ) -> None:
        """Rules and verifier on the pairs. ``select``: leave out what is not worth reading (``owner``: whose each is).
        ``hurried``: leave the verifier out. ``ranked``: seconds that the first half of the prefilter took."""
        readable = [pair for pair in pairs if pair.has_texts]
        await self._compare(readable)
        chosen, verifies = readable, self._verifier is not None and self._stages.verify
        if select and self._stages.prefilter:
            began = time.perf_counter()
            if verifies:
                chosen = self._prefilter(pairs, owner)
            self._seconds.labels("prefilter").observe(ranked + time.perf_counter() - began)
        if self._verifier is not None and verifies:
            if hurried:
                for pair in chosen:
                    pair.fallen_back = True
            else:
                await self._verify(self._verifier, chosen)
            await self._stand_in(chosen)

    async def _compare(self, pairs: list[Pair]) -> None:
        """Have the rules look at pairs. A pair over which they meet a defect is left without their word."""

        def read(part: list[Pair]) -> list[Evidence]:
            return self._rules.judge(
                [(pair.older.geoid.text or "", pair.newer.geoid.text or "", pair.cosine or 0.0) for pair in part]
            )

        async for part, found in self._halving("rules", self._rules_faults, pairs, read):
            for pair, evidence in zip(part, found, strict=True):
                pair.evidence = evidence

    async def _stand_in(self, pairs: Sequence[Pair]) -> None:
        """Have the pair head look at what the verifier has not read. Pairs whose vectors it does not know, and one over which it
        meets a defect, are left to the rules."""
        head = self._head
        if head is None:
            return
        fallen = [pair for pair in pairs if pair.fallen_back and head.fits(pair)]
        self._pairs.labels("head").inc(len(fallen))
        async for part, found in self._halving("head", self._head_faults, fallen, head.judge):
            for pair, probability in zip(part, found, strict=True):
                pair.quick = probability

    async def _halving(
        self, stage: str, faults: Faults, pairs: list[Pair], judge: Callable[[list[Pair]], list[T]]
    ) -> AsyncIterator[tuple[list[Pair], list[T]]]:
        """What ``judge`` says of pairs: all at once, or, where it meets a defect, by ever smaller parts without the pair at fault."""
        todo = deque([pairs] if pairs else [])
        while todo:
            part = todo.popleft()
            try:
                with self._seconds.labels(stage).time():
                    if len(part) <= INLINE_PAIRS:
                        found = judge(part)
                    else:
                        found = await self._threads.run("score", judge, part)
            except Exception as error:  # noqa: BLE001 - logged by Faults, or raised by it
                if len(part) > 1:
                    todo.extendleft((part[len(part) // 2 :], part[: len(part) // 2]))
                else:
                    faults.blame((part[0].older.geoid.id, part[0].newer.geoid.id), error)
                continue
            faults.passed()
            yield part, found

    def _prefilter(self, pairs: list[Pair], owner: Sequence[int]) -> list[Pair]:
        """The most promising pairs of each new statement, by cosine, words and the rules' suspicion; of a large batch fewer each."""
        by_owner: dict[int, list[Pair]] = {}
        for pair, number in zip(pairs, owner, strict=True):
            if pair.evidence is not None and (pair.related >= READ_RELATED or pair.evidence.plain):
                by_owner.setdefault(number, []).append(pair)
        most = fair_share(
            [len(group) for group in by_owner.values()],
            least=LEAST_READ,
            most=self._settings.verify_candidates,
            total=self._settings.verify_pairs,
        )
        chosen: list[Pair] = []
        for group in by_owner.values():
            group.sort(
                key=lambda pair: (
                    -(pair.promise + SUSPICION_SHARE * (pair.evidence.probability if pair.evidence else 0.0))
                )
            )
            chosen += group[:most]
        return chosen

    async def _verify(self, verifier: Verifier, pairs: list[Pair]) -> None:
        """Have pairs read. A pair over which the verifier meets a defect is left to the rules, and the others are read."""
        if not pairs:
            return
        self._pairs.labels("verify").inc(len(pairs))
        todo = deque([pairs])
        while todo:
            part = todo.popleft()
            try:
                with self._seconds.labels("verify").time():
                    probabilities = await verifier.judge(
                        [(pair.older.geoid.text or "", pair.newer.geoid.text or "") for pair in part]
                    )
            except UnavailableError as error:
                left = [*part, *chain.from_iterable(todo)]
                self._fallbacks.inc()
                log.warning("verifier unavailable", error=error.message, pairs=len(left), decides=self.stand_in)
                for pair in left:
                    pair.fallen_back = True
                return
            except Exception as error:  # noqa: BLE001 - logged by Faults, or raised by it
                if len(part) > 1:
                    todo.extendleft((part[len(part) // 2 :], part[: len(part) // 2]))
                else:
                    self._faults.blame((part[0].older.geoid.id, part[0].newer.geoid.id), error)
                    part[0].unreadable = True
                continue
            self._faults.passed()
            for pair, probability in zip(part, np.asarray(probabilities, dtype=np.float64).tolist(), strict=True):
                pair.verified = probability


def fair_share(sizes: Sequence[int], *, least: int, most: int, total: int) -> int:
    """The largest number of pairs per statement, ``least`` to ``most``, with which all together stay within ``total``."""
    share = most
    while share > least and sum(min(size, share) for size in sizes) > total:
        share -= 1
    return max(share, min(least, most))


def _cosines(fresh: Sequence[StoredGeoid]) -> npt.NDArray[np.float32]:
    """Cosines of the statements of a batch among each other, shape (n, n); 0 where one has no vector."""
    dimension = next((each.vector.shape[0] for each in fresh if each.vector is not None), 1)
    rows = np.zeros((len(fresh), dimension), dtype=np.float32)
    for row, each in zip(rows, fresh, strict=True):
        if each.vector is not None:
            row[:] = each.vector
    cosines: npt.NDArray[np.float32] = np.clip(rows @ rows.T, -1.0, 1.0)
    return cosines
