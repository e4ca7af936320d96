"""The cascade: which of everything said before cannot hold beside what is said now.

    scan (index) ──> prefilter (related enough, ranked with the rules) ──> verify (cross-encoder) ──> scope ──> threshold

Each stage makes the set smaller and the judgement dearer. The symbolic layer goes past all of them: it is exact. Without a
verifier the rules of ``evidence`` decide; with one they rank what it reads and explain what it finds.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from kimera_stream.core.interfaces import Among, Candidate, Detection, IndexService, Judgement, StoredGeoid, Threads
from kimera_stream.engines.composite import components, cosine, relatedness
from kimera_stream.engines.differences import differences
from kimera_stream.engines.evidence import Evidence, Rules, packaged_rules
from kimera_stream.engines.retrying import Faults
from kimera_stream.engines.scope import OTHER_DAY, other_day, supersedes
from kimera_stream.engines.symbolic import SymbolicVerdict, compare_states
from kimera_stream.engines.verifier import Verifier
from kimera_stream.infrastructure.settings import ScoringSettings
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.objects import ScoreResult

log = structlog.get_logger(__name__)

THRESHOLDS: dict[Literal["precise", "balanced", "sensitive"], float] = {
    "precise": 0.85,
    "balanced": 0.65,
    "sensitive": 0.4,
}
EXACT = 0.99
"""Score of a symbolic conflict about one subject."""
RELATED_SYMBOLS = 0.9
"""Score of a symbolic conflict between related statements that name no subject."""
READ_RELATED = 0.3
"""Cosine below which a pair is not worth the verifier's time: 8 % of the contradictions in stories lie below it, 26 % below
0.45, as what contradicts in a feed is often told in other words about another side of the matter."""
LEAST_READ = 4
"""Pairs of one statement that are read however large the batch is: of the contradictions that the verifier flags among 16
pairs, 98 % are among the 4 most promising (development clusters in a pool of 10,000)."""
INLINE_PAIRS = 4
"""So few pairs are compared on the event loop: a hand-over to a thread would cost more."""
ASKS = 0.2
"""Most that a pair with a question in it can score: a question asserts nothing."""


class GeoidLoader(Protocol):
    """Where the engine gets candidates from."""

    async def get_many(self, ids: Sequence[str]) -> Mapping[str, StoredGeoid]: ...


@runtime_checkable
class Calibrated(Protocol):
    """A verifier that knows at which probability each operating point lies for it."""

    @property
    def operating_points(self) -> Mapping[str, float]:
        """By name; empty while it is not loaded."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Which stages run; for measurements and tests. The scan and the symbolic layer always do."""

    prefilter: bool = True
    verify: bool = True
    scope: bool = True


@dataclass(slots=True)
class _Pair:
    """A pair on its way through the cascade."""

    older: StoredGeoid
    newer: StoredGeoid
    verdict: SymbolicVerdict
    cosine: float | None
    related: float
    evidence: Evidence | None = None
    verified: float | None = None
    fallen_back: bool = False
    unreadable: bool = False
    """The verifier met a defect over it: the rules decide, for good."""

    @property
    def has_texts(self) -> bool:
        return self.older.geoid.text is not None and self.newer.geoid.text is not None


class CascadeEngine:
    """Implements ``ContradictionEngine``.

    Args:
        index: Where candidates come from.
        geoids: Loads candidates by id (``GeoidCache``).
        verifier: None: the rules alone decide.
        settings: ``scoring`` group.
        threads: The rules read in its ``score`` threads.
        registry: Where its metrics go.
        rules: Other rules than the packaged ones.
        stages: Stages to leave out.
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
        rules: Rules | None = None,
        stages: Stages | None = None,
    ) -> None:
        self._index = index
        self._geoids = geoids
        self._verifier = verifier
        # Asked once: this look at a class, for every pair, held the event loop for tenths of a second.
        given: object = verifier
        self._calibrated = given if isinstance(given, Calibrated) else None
        self._settings = settings
        self._threads = threads
        self._rules = rules if rules is not None else packaged_rules()
        self._stages = stages if stages is not None else Stages()
        self._seconds = Histogram(
            "kimera_cascade_seconds", "Duration of a stage for one batch", ["stage"], registry=registry
        )
        self._pairs = Counter("kimera_cascade_pairs_total", "Pairs that entered a stage", ["stage"], registry=registry)
        self._fallbacks = Counter(
            "kimera_cascade_fallbacks_total",
            "Batches judged by the rules as the verifier was unavailable",
            registry=registry,
        )
        faults = Counter(
            "kimera_cascade_faults_total", "Pairs over which a stage met a defect", ["stage"], registry=registry
        )
        self._faults = Faults("verify", lambda stage: faults.labels(stage).inc())

    @property
    def threshold(self) -> float:
        """Score at and above which a pair is reported: the setting, else the verifier's own point, else the default one."""
        if self._settings.threshold is not None:
            return self._settings.threshold
        point = self._settings.operating_point
        if self._calibrated is not None:
            return self._calibrated.operating_points.get(point, THRESHOLDS[point])
        return THRESHOLDS[point]

    @property
    def model(self) -> str:
        """What decides about texts at present."""
        return self._rules.name if self._verifier is None else self._verifier.name

    # -- the two questions -----------------------------------------------------------------------------------------

    async def judge_pairs(self, pairs: Sequence[tuple[StoredGeoid, StoredGeoid]]) -> list[Judgement]:
        """(older, newer) pairs judged, batched; no threshold applied."""
        made = [_pair(older, newer, cosine(older, newer)) for older, newer in pairs]
        await self._judge(made, select=False)
        return [self._judgement(pair) for pair in made]

    async def detect(self, fresh: Sequence[StoredGeoid]) -> list[list[tuple[StoredGeoid, Judgement]]]:
        """For each new geoid, the stored ones and the earlier ones of ``fresh`` that it contradicts, the surest first.

        The order of ``fresh`` is the order of commit: a stored geoid that an earlier one of ``fresh`` replaces is compared
        in its new version only.
        """
        return (await self.look(fresh)).hits

    async def look(
        self, fresh: Sequence[StoredGeoid], *, hurried: bool = False, among: Among | None = None
    ) -> Detection:
        """As ``detect``, and whose texts the verifier has not read: it was away, or left out (``hurried``).

        ``among``: what they are compared with, where that is not everything.
        """
        if not fresh:
            return Detection([], [])
        with self._seconds.labels("scan").time():
            scanned = await (among or self._index).scan(
                fresh, k=self._settings.candidates, min_relatedness=self._settings.min_relatedness
            )
            loaded = await self._geoids.get_many([each.geoid_id for found in scanned for each in found])
        pairs, owner = self._worthy(fresh, scanned, loaded, among)
        self._pairs.labels("scan").inc(len(pairs))
        await self._judge(pairs, select=True, owner=owner, hurried=hurried)
        results: list[list[tuple[StoredGeoid, Judgement]]] = [[] for _ in fresh]
        with self._seconds.labels("scope").time():
            threshold = self.threshold
            for pair, number in zip(pairs, owner, strict=True):
                if self._score(pair) >= self._bar(pair, threshold):
                    results[number].append((pair.older, self._judgement(pair)))
        for found in results:
            found.sort(key=lambda hit: -hit[1].score)
        unread = [False] * len(fresh)
        for pair, number in zip(pairs, owner, strict=True):
            unread[number] = unread[number] or pair.fallen_back
        return Detection(results, unread)

    def _bar(self, pair: _Pair, threshold: float) -> float:
        """Score that this pair needs. The verifier's point holds for its own probabilities; where the rules stand in for
        it, they have to be as sure as they would have to be without it."""
        if pair.fallen_back and not self._symbolic(pair) and self._settings.threshold is None:
            return max(threshold, THRESHOLDS[self._settings.operating_point])
        return threshold

    # -- stages ----------------------------------------------------------------------------------------------------

    def _worthy(
        self,
        fresh: Sequence[StoredGeoid],
        scanned: Sequence[Sequence[Candidate]],
        loaded: Mapping[str, StoredGeoid],
        among: Among | None,
    ) -> tuple[list[_Pair], list[int]]:
        """The pairs that are worth a look, and the number of the new statement of each."""
        pairs: list[_Pair] = []
        owner: list[int] = []
        replaced: set[str] = set()
        cosines = _cosines(fresh)
        near = cosines >= self._settings.min_relatedness
        symbolic = np.array([bool(each.geoid.symbolic_state) for each in fresh])
        for number, newer in enumerate(fresh):
            for candidate in scanned[number]:
                older = loaded.get(candidate.geoid_id)
                if older is None or candidate.geoid_id in replaced or candidate.geoid_id == newer.geoid.id:
                    continue
                if among is not None and not among.takes(older, newer):
                    continue
                known = None if older.vector is None or newer.vector is None else candidate.relatedness
                self._consider(older, newer, known, number, pairs, owner)
            close = near[:number, number] | (symbolic[:number] & symbolic[number])
            for earlier in np.flatnonzero(close).tolist():
                if among is not None and not among.takes(fresh[earlier], newer):
                    continue
                apart = fresh[earlier].vector is None or newer.vector is None
                known = None if apart else float(cosines[earlier, number])
                self._consider(fresh[earlier], newer, known, number, pairs, owner)
            replaced.add(newer.geoid.id)
        return pairs, owner

    def _consider(
        self,
        older: StoredGeoid,
        newer: StoredGeoid,
        known: float | None,
        number: int,
        pairs: list[_Pair],
        owner: list[int],
    ) -> None:
        no_symbols = not older.geoid.symbolic_state or not newer.geoid.symbolic_state
        if no_symbols and (known is None or known < self._settings.min_relatedness):
            return  # most pairs end here
        pair = _pair(older, newer, known)
        if self._worth_a_look(pair):
            pairs.append(pair)
            owner.append(number)

    def _worth_a_look(self, pair: _Pair) -> bool:
        if pair.verdict.apart:
            return False
        if pair.verdict.conflicts and (pair.verdict.same_subject or self._is_related(pair)):
            return True
        return pair.has_texts and self._is_related(pair)

    def _is_related(self, pair: _Pair) -> bool:
        return pair.related >= self._settings.min_relatedness

    async def _judge(
        self, pairs: list[_Pair], *, select: bool, owner: Sequence[int] = (), hurried: bool = False
    ) -> None:
        """Rules and verifier on the pairs. ``select``: leave out what is not worth reading (``owner``: whose each is).
        ``hurried``: leave the verifier out."""
        readable = [pair for pair in pairs if pair.has_texts]
        await self._compare(readable)
        if self._verifier is not None and self._stages.verify:
            chosen = self._prefilter(pairs, owner) if select and self._stages.prefilter else readable
            if hurried:
                for pair in chosen:
                    pair.fallen_back = True
            else:
                await self._verify(self._verifier, chosen)

    async def _compare(self, pairs: list[_Pair]) -> None:
        if not pairs:
            return
        triples = [(pair.older.geoid.text or "", pair.newer.geoid.text or "", pair.cosine or 0.0) for pair in pairs]
        with self._seconds.labels("rules").time():
            if len(triples) <= INLINE_PAIRS:
                found = self._rules.judge(triples)
            else:
                found = await self._threads.run("score", self._rules.judge, triples)
        for pair, evidence in zip(pairs, found, strict=True):
            pair.evidence = evidence

    def _prefilter(self, pairs: list[_Pair], owner: Sequence[int]) -> list[_Pair]:
        """The most promising pairs of each new statement, by cosine and the rules' suspicion; of a large batch fewer each."""
        by_owner: dict[int, list[_Pair]] = {}
        for pair, number in zip(pairs, owner, strict=True):
            if pair.evidence is not None and (pair.related >= READ_RELATED or pair.evidence.plain):
                by_owner.setdefault(number, []).append(pair)
        most = fair_share(
            [len(group) for group in by_owner.values()],
            least=LEAST_READ,
            most=self._settings.verify_candidates,
            total=self._settings.verify_pairs,
        )
        chosen: list[_Pair] = []
        for group in by_owner.values():
            group.sort(key=lambda pair: -(pair.related + 0.5 * (pair.evidence.probability if pair.evidence else 0.0)))
            chosen += group[:most]
        return chosen

    async def _verify(self, verifier: Verifier, pairs: list[_Pair]) -> None:
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
                log.warning("verifier unavailable, the rules decide", error=error.message, pairs=len(left))
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

    # -- the word on a pair ------------------------------------------------------------------------------------------

    def _symbolic(self, pair: _Pair) -> float:
        """Score of the symbolic layer alone."""
        if not pair.verdict.conflicts:
            return 0.0
        if pair.verdict.same_subject:
            return EXACT
        return RELATED_SYMBOLS if self._is_related(pair) else 0.0

    def _score(self, pair: _Pair) -> float:
        if pair.verdict.apart:
            return 0.0
        return round(max(self._textual(pair), self._symbolic(pair)), 4)

    def _judgement(self, pair: _Pair) -> Judgement:
        verdict, textual, symbolic, score = pair.verdict, self._textual(pair), self._symbolic(pair), self._score(pair)
        gradient: Literal["semantic", "symbolic", "composite"] = "semantic"
        if symbolic:
            gradient = "composite" if textual >= self.threshold else "symbolic"
        return Judgement(
            score=score,
            result=ScoreResult(
                score=score,
                components=components(pair.older, pair.newer, verdict, related=pair.related, semantic=textual),
                why=self._why(pair, textual, symbolic),
            ),
            gradient_type=gradient,
            model=self._model_of(pair),
            provisional=pair.fallen_back and symbolic < self.threshold,
        )

    def _why(self, pair: _Pair, textual: float, symbolic: float) -> list[str]:
        if pair.verdict.apart:
            return [f"not compared: {pair.verdict.apart}"]
        why: list[str] = []
        if symbolic:
            why += [f"symbolic: {key}: {one!r} vs {other!r}" for key, one, other in pair.verdict.conflicts[:4]]
        words = pair.evidence.why if pair.evidence is not None else ()
        why += words
        if self._stages.scope and pair.has_texts and (day := _other_day(pair)):
            why.append(f"scope: '{day}' was said on different days")
        if textual >= self.threshold and supersedes(pair.newer.geoid.text or ""):
            why.append("supersession: the newer statement says that it replaces the older one")
        if pair.verified is not None and textual >= self.threshold and not words:
            parts = differences(pair.older.geoid.text or "", pair.newer.geoid.text or "")
            why += [f"differs: {part}" for part in parts]
            why.append("meaning: read side by side, the two cannot both hold")
        return why

    def _model_of(self, pair: _Pair) -> str:
        return self._rules.name if pair.verified is None or self._verifier is None else self._verifier.name

    def _textual(self, pair: _Pair) -> float:
        """Probability of contradiction by the texts alone."""
        evidence = pair.evidence
        if evidence is None:
            return 0.0
        by_verifier = (
            self._verifier is not None and self._stages.verify and not pair.fallen_back and not pair.unreadable
        )
        if by_verifier and pair.verified is None:
            return 0.0  # the prefilter left it out
        probability = evidence.probability if pair.verified is None else pair.verified
        return self._scoped(pair, evidence, probability) if self._stages.scope else probability

    def _scoped(self, pair: _Pair, evidence: Evidence, probability: float) -> float:
        """Less where the two need not agree: unrelated by the vectors, one of them a question, or of different days."""
        value = pair.cosine
        if value is not None and value < self._settings.min_relatedness:
            return min(probability, max(0.0, value))
        if any("question" in each for each in evidence.apart):
            return min(probability, ASKS)
        if _other_day(pair):
            return min(probability, OTHER_DAY)
        return probability


def fair_share(sizes: Sequence[int], *, least: int, most: int, total: int) -> int:
    """The largest number of pairs per statement, ``least`` to ``most``, with which all together stay within ``total``."""
    share = most
    while share > least and sum(min(size, share) for size in sizes) > total:
        share -= 1
    return max(share, min(least, most))


def _pair(older: StoredGeoid, newer: StoredGeoid, known: float | None) -> _Pair:
    verdict = compare_states(older.geoid.symbolic_state, newer.geoid.symbolic_state)
    return _Pair(older, newer, verdict, known, relatedness(known, verdict))


def _other_day(pair: _Pair) -> str:
    older, newer = pair.older.geoid, pair.newer.geoid
    return other_day(older.text or "", older.updated_at, newer.text or "", newer.updated_at)


def _cosines(fresh: Sequence[StoredGeoid]) -> npt.NDArray[np.float32]:
    """Cosines of the statements of a batch among each other, shape (n, n); 0 where one has no vector."""
    dimension = next((each.vector.shape[0] for each in fresh if each.vector is not None), 1)
    rows = np.zeros((len(fresh), dimension), dtype=np.float32)
    for row, each in zip(rows, fresh, strict=True):
        if each.vector is not None:
            row[:] = each.vector
    cosines: npt.NDArray[np.float32] = np.clip(rows @ rows.T, -1.0, 1.0)
    return cosines
