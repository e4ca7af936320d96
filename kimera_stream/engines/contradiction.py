"""The cascade: which of everything said before cannot hold beside what is said now.

    scan (index) ──> prefilter (related enough, ranked by words, then by the rules) ──> verify (cross-encoder) ──> scope ──> threshold

Each stage makes the set smaller and the judgement dearer. The symbolic layer goes past all of them: it is exact. Without a
verifier the rules of ``evidence`` decide; with one they rank what it reads and explain what it finds.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Literal, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from kimera_stream.core.groups import group_of
from kimera_stream.core.interfaces import Among, Candidate, Detection, IndexService, Judgement, StoredGeoid, Threads
from kimera_stream.engines.composite import components, cosine, relatedness
from kimera_stream.engines.differences import differences
from kimera_stream.engines.evidence import Evidence, Rules, packaged_rules
from kimera_stream.engines.explaining import Heard, reports
from kimera_stream.engines.retrying import Faults
from kimera_stream.engines.scope import OTHER_DAY, other_day, supersedes
from kimera_stream.engines.symbolic import SymbolicVerdict, compare_states
from kimera_stream.engines.verifier import Verifier
from kimera_stream.infrastructure.settings import ScoringSettings
from kimera_stream.kernels import same_names, text_overlaps, text_signatures
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
OVERLAP_SHARE = 0.25
"""Weight of the words shared, beside the cosine, in the order in which candidates are read. Of 1,482 contradictions of stories in
a pool of 16,000 statements (cosine of at least 0.3, in percent)::

    place of the contradicted statement below    4     8    16    24    32    64
    by cosine                                  72.6  80.7  87.2  89.9  91.6  94.9
    by cosine and words                        76.3  83.9  89.3  92.4  93.3  94.9
    the same among 128 candidates              76.2  84.3  89.9  93.0  94.3  97.0
"""
NAMED_SHARE = 0.25
"""What it adds to that order that both name the same numbered thing: among hundreds of valves, "V106-300 is open" is less like
"V106-300 is closed" than "V107-300 is closed" is, by cosine and by words."""
SUSPICION_SHARE = 0.25
"""Weight of the rules' probability in the order in which the verifier reads: with twice as much 74.5 % of those contradictions
are among the 4 first and 89.1 % among 16, with this 75.9 % and 89.3 %."""
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
    """Which stages run. The scan, the rules and the symbolic layer always do."""

    prefilter: bool = True
    verify: bool = True
    scope: bool = True

    @classmethod
    def of(cls, settings: ScoringSettings) -> "Stages":
        """Those that the settings name."""
        return cls(*(name in settings.stages for name in ("prefilter", "verify", "scope")))


@dataclass(slots=True)
class _Pair:
    """A pair on its way through the cascade."""

    older: StoredGeoid
    newer: StoredGeoid
    verdict: SymbolicVerdict
    cosine: float | None
    related: float
    named: bool
    """Both name the same numbered thing."""
    overlap: float = 0.0
    """Words shared, in [0, 1]."""
    evidence: Evidence | None = None
    verified: float | None = None
    fallen_back: bool = False
    unreadable: bool = False
    """The verifier met a defect over it: the rules decide, for good."""
    textual: float | None = None
    """Probability of contradiction by the texts; None before it was asked for, which is after the stages have run."""
    _day: str | None = None

    @property
    def has_texts(self) -> bool:
        return self.older.geoid.text is not None and self.newer.geoid.text is not None

    @property
    def promise(self) -> float:
        """How likely the two are about the same thing, by cosine, shared words and names; it only ranks."""
        return self.related + OVERLAP_SHARE * self.overlap + NAMED_SHARE * self.named

    @property
    def day(self) -> str:
        """The word by which both name their day, said on different days; empty where there is none. Looked for once."""
        if self._day is None:
            older, newer = self.older.geoid, self.newer.geoid
            self._day = other_day(older.text or "", older.updated_at, newer.text or "", newer.updated_at)
        return self._day


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
        self._stages = stages if stages is not None else Stages.of(settings)
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
        self._rules_faults = Faults("rules", lambda stage: faults.labels(stage).inc())

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

    # -- the questions -----------------------------------------------------------------------------------------

    async def judge_pairs(self, pairs: Sequence[tuple[StoredGeoid, StoredGeoid]]) -> list[Judgement]:
        """(older, newer) pairs judged, batched; no threshold applied."""
        made = [_pair(older, newer, cosine(older, newer)) for older, newer in pairs]
        await self._judge(made, select=False)
        return [self._judgement(pair) for pair in made]

    async def explain(self, older: StoredGeoid, newer: StoredGeoid) -> Judgement:
        """One pair judged, stage by stage. The verifier reads it also where the prefilter would not have handed it on."""
        spent = [time.perf_counter()]

        def lap() -> None:
            spent.append(time.perf_counter())

        pair = _pair(older, newer, cosine(older, newer))
        worthy = self._worth_a_look(pair)
        lap()
        await self._compare([pair] if pair.has_texts else [])
        lap()
        chosen = bool(self._prefilter([pair], [0]))
        lap()
        verifier = self._verifier if self._stages.verify else None
        if verifier is not None and pair.has_texts:
            await self._verify(verifier, [pair])
        lap()
        judgement = self._judgement(pair)
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
            silent=self._silent(pair),
            verified=pair.verified,
            model=self.model,
            scope=self._stages.scope,
            textual=self._textual(pair),
            out_of_scope=self._out_of_scope(pair),
            score=judgement.score,
            bar=self._bar(pair, self.threshold),
        )
        return replace(judgement, result=msgspec.structs.replace(judgement.result, stages=reports(heard, took)))

    def _silent(self, pair: _Pair) -> str:
        """Why the verifier has no word on a pair; empty where it has."""
        if pair.verified is not None:
            return ""
        if self._verifier is None:
            return "switched off, or this build carries no weights: the rules decide"
        if not self._stages.verify:
            return "switched off by scoring.stages: the rules decide"
        if not pair.has_texts:
            return "there are not two texts to read"
        return "it met a defect over this pair" if pair.unreadable else "unavailable: the rules decide provisionally"

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
        pairs, owner = self._worthy(fresh, scanned, loaded, among, everywhere)
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
        everywhere: bool,
    ) -> tuple[list[_Pair], list[int]]:
        """The pairs that are worth a look, and the number of the new statement of each."""
        pairs: list[_Pair] = []
        owner: list[int] = []
        replaced: set[str] = set()
        cosines = _cosines(fresh)
        near = cosines >= self._settings.min_relatedness
        symbolic = np.array([bool(each.geoid.symbolic_state) for each in fresh])
        signatures = text_signatures([each.geoid.text for each in fresh])
        for number, newer in enumerate(fresh):
            found: list[_Pair] = []
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
            found = self._promising(newer, found) if self._stages.prefilter else found
            pairs += found
            owner += [number] * len(found)
            replaced.add(newer.geoid.id)
        return pairs, owner

    def _consider(
        self, older: StoredGeoid, newer: StoredGeoid, known: float | None, named: bool, found: list[_Pair]
    ) -> None:
        no_symbols = not older.geoid.symbolic_state or not newer.geoid.symbolic_state
        if no_symbols and (known is None or known < self._settings.min_relatedness):
            return  # most pairs end here
        pair = _pair(older, newer, known, named)
        if self._worth_a_look(pair):
            found.append(pair)

    def _promising(self, newer: StoredGeoid, found: list[_Pair]) -> list[_Pair]:
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
        """Have the rules look at pairs. A pair over which they meet a defect is left without their word."""
        todo = deque([pairs] if pairs else [])
        while todo:
            part = todo.popleft()
            triples = [(pair.older.geoid.text or "", pair.newer.geoid.text or "", pair.cosine or 0.0) for pair in part]
            try:
                with self._seconds.labels("rules").time():
                    if len(triples) <= INLINE_PAIRS:
                        found = self._rules.judge(triples)
                    else:
                        found = await self._threads.run("score", self._rules.judge, triples)
            except Exception as error:  # noqa: BLE001 - logged by Faults, or raised by it
                if len(part) > 1:
                    todo.extendleft((part[len(part) // 2 :], part[: len(part) // 2]))
                else:
                    self._rules_faults.blame((part[0].older.geoid.id, part[0].newer.geoid.id), error)
                continue
            self._rules_faults.passed()
            for pair, evidence in zip(part, found, strict=True):
                pair.evidence = evidence

    def _prefilter(self, pairs: list[_Pair], owner: Sequence[int]) -> list[_Pair]:
        """The most promising pairs of each new statement, by cosine, words and the rules' suspicion; of a large batch fewer each."""
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
            group.sort(
                key=lambda pair: (
                    -(pair.promise + SUSPICION_SHARE * (pair.evidence.probability if pair.evidence else 0.0))
                )
            )
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
        if self._stages.scope and pair.has_texts and (day := pair.day):
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
        if pair.textual is None:
            pair.textual = self._by_texts(pair)
        return pair.textual

    def _by_texts(self, pair: _Pair) -> float:
        evidence = pair.evidence
        if evidence is None:
            return 0.0
        by_verifier = (
            self._verifier is not None and self._stages.verify and not pair.fallen_back and not pair.unreadable
        )
        if by_verifier and pair.verified is None:
            return 0.0  # the prefilter left it out
        probability = evidence.probability if pair.verified is None else pair.verified
        return self._scoped(pair, probability) if self._stages.scope else probability

    def _scoped(self, pair: _Pair, probability: float) -> float:
        """Less where the two need not agree."""
        reason = self._out_of_scope(pair)
        return probability if reason is None else min(probability, reason[0])

    def _out_of_scope(self, pair: _Pair) -> tuple[float, str] | None:
        """Most that a pair can score by its texts, and why: unrelated by the vectors, one a question, of different days."""
        if pair.evidence is None:
            return None
        if pair.cosine is not None and pair.cosine < self._settings.min_relatedness:
            return max(0.0, pair.cosine), "the two are about different things"
        if any("question" in each for each in pair.evidence.apart):
            return ASKS, "a question asserts nothing"
        if pair.day:
            return OTHER_DAY, f"'{pair.day}' was said on different days"
        return None


def fair_share(sizes: Sequence[int], *, least: int, most: int, total: int) -> int:
    """The largest number of pairs per statement, ``least`` to ``most``, with which all together stay within ``total``."""
    share = most
    while share > least and sum(min(size, share) for size in sizes) > total:
        share -= 1
    return max(share, min(least, most))


def _pair(older: StoredGeoid, newer: StoredGeoid, known: float | None, named: bool = False) -> _Pair:
    verdict = compare_states(older.geoid.symbolic_state, newer.geoid.symbolic_state)
    return _Pair(older, newer, verdict, known, relatedness(known, verdict), named)


def _cosines(fresh: Sequence[StoredGeoid]) -> npt.NDArray[np.float32]:
    """Cosines of the statements of a batch among each other, shape (n, n); 0 where one has no vector."""
    dimension = next((each.vector.shape[0] for each in fresh if each.vector is not None), 1)
    rows = np.zeros((len(fresh), dimension), dtype=np.float32)
    for row, each in zip(rows, fresh, strict=True):
        if each.vector is not None:
            row[:] = each.vector
    cosines: npt.NDArray[np.float32] = np.clip(rows @ rows.T, -1.0, 1.0)
    return cosines
