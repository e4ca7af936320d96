"""What a pair scores once the stages have run, and why; and what a score must reach to be reported."""

from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

from kimera_stream.core.interfaces import Judgement
from kimera_stream.engines.composite import components
from kimera_stream.engines.differences import differences
from kimera_stream.engines.pair_head import PairHead
from kimera_stream.engines.pairs import Pair, Stages
from kimera_stream.engines.scope import ELSEWHERE, OTHER_DAY, supersedes
from kimera_stream.engines.verifier import Verifier
from kimera_stream.infrastructure.settings import ScoringSettings
from kimera_stream.protocol.objects import ScoreResult

THRESHOLDS: dict[Literal["precise", "balanced", "sensitive"], float] = {
    "precise": 0.85,
    "balanced": 0.65,
    "sensitive": 0.4,
}
EXACT = 0.99
"""Score of a symbolic conflict about one subject."""
RELATED_SYMBOLS = 0.9
"""Score of a symbolic conflict between related statements that name no subject."""
ASKS = 0.2
"""Most that a pair with a question in it can score: a question asserts nothing."""
READ = "meaning: read side by side, the two cannot both hold"
NOT_READ = "meaning: by their vectors the two are unlikely to both hold; they have not been read side by side yet"


@runtime_checkable
class Calibrated(Protocol):
    """A verifier that knows at which probability each operating point lies for it."""

    @property
    def operating_points(self) -> Mapping[str, float]:
        """By name; empty while it is not loaded."""


class Scores:
    """The word on pairs.

    Args:
        settings: ``scoring`` group.
        stages: Which of them run.
        rules: Name of the rules.
        verifier: None: the rules alone decide.
        head: What stands in for the verifier; None: the rules do.
    """

    def __init__(
        self,
        settings: ScoringSettings,
        stages: Stages,
        rules: str,
        verifier: Verifier | None,
        head: PairHead | None = None,
    ) -> None:
        self._settings = settings
        self._stages = stages
        self._rules = rules
        self._verifier = verifier
        self._head = head
        # Asked once: this look at a class, for every pair, held the event loop for tenths of a second.
        given: object = verifier
        self._calibrated = given if isinstance(given, Calibrated) else None

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
        return self._rules if self._verifier is None else self._verifier.name

    def bar(self, pair: Pair, threshold: float) -> float:
        """Score that this pair needs. The verifier's point holds for its own probabilities; where the pair head stands in for
        it, the head's own point does, and where the rules do, they have to be as sure as they would have to be without it."""
        if not pair.fallen_back or self._symbolic(pair) or self._settings.threshold is not None:
            return threshold
        if pair.quick is not None and self._head is not None:
            return self._head.operating_points[self._settings.operating_point]
        return max(threshold, THRESHOLDS[self._settings.operating_point])

    def is_related(self, pair: Pair) -> bool:
        """Whether the two are about the same, as far as that can be told without reading them."""
        return pair.related >= self._settings.min_relatedness

    def score(self, pair: Pair) -> float:
        """The higher of what the texts and the symbols say, in [0, 1]; 0 where the states rule the pair out."""
        if pair.verdict.apart:
            return 0.0
        return round(max(self.textual(pair), self._symbolic(pair)), 4)

    def judgement(self, pair: Pair) -> Judgement:
        """The score with its components, and why."""
        verdict, textual, symbolic, score = pair.verdict, self.textual(pair), self._symbolic(pair), self.score(pair)
        bar = self.bar(pair, self.threshold)
        gradient: Literal["semantic", "symbolic", "composite"] = "semantic"
        if symbolic:
            gradient = "composite" if textual >= bar else "symbolic"
        return Judgement(
            score=score,
            result=ScoreResult(
                score=score,
                components=components(pair.older, pair.newer, verdict, related=pair.related, semantic=textual),
                why=self._why(pair, textual, symbolic, bar),
            ),
            gradient_type=gradient,
            model=self._model_of(pair),
            provisional=pair.fallen_back and symbolic < self.threshold,
            reported=score >= bar,
        )

    def textual(self, pair: Pair) -> float:
        """Probability of contradiction by the texts alone."""
        if pair.textual is None:
            pair.textual = self._by_texts(pair)
        return pair.textual

    def out_of_scope(self, pair: Pair) -> tuple[float, str] | None:
        """Most that a pair can score by its texts, and why: unrelated by the vectors, one a question, of different
        days, or of other things, times or places by name."""
        if pair.evidence is None:
            return None
        if pair.cosine is not None and pair.cosine < self._settings.min_relatedness:
            return max(0.0, pair.cosine), "the two are about different things"
        if any("question" in each for each in pair.evidence.apart):
            return ASKS, "a question asserts nothing"
        if pair.day:
            return OTHER_DAY, f"'{pair.day}' was said on different days"
        if pair.evidence.elsewhere:
            return ELSEWHERE, pair.evidence.elsewhere
        return None

    def silent(self, pair: Pair) -> str:
        """Why the verifier has no word on a pair; empty where it has."""
        if pair.verified is not None:
            return ""
        if self._verifier is None:
            return "switched off, or this build carries no weights: the rules decide"
        if not self._stages.verify:
            return "switched off by scoring.stages: the rules decide"
        if not pair.has_texts:
            return "there are not two texts to read"
        if pair.unreadable:
            return "it met a defect over this pair"
        if pair.quick is None:
            return "unavailable: the rules decide provisionally"
        return f"unavailable: {self._model_of(pair)} decides provisionally, {pair.quick:.4f}"

    def _symbolic(self, pair: Pair) -> float:
        """Score of the symbolic layer alone."""
        if not pair.verdict.conflicts:
            return 0.0
        if pair.verdict.same_subject:
            return EXACT
        return RELATED_SYMBOLS if self.is_related(pair) else 0.0

    def _by_texts(self, pair: Pair) -> float:
        evidence = pair.evidence
        if evidence is None:
            return 0.0
        by_verifier = (
            self._verifier is not None and self._stages.verify and not pair.fallen_back and not pair.unreadable
        )
        if by_verifier and pair.verified is None:
            return 0.0  # the prefilter left it out
        probability = next(said for said in (pair.verified, pair.quick, evidence.probability) if said is not None)
        return self._scoped(pair, probability) if self._stages.scope else probability

    def _scoped(self, pair: Pair, probability: float) -> float:
        """Less where the two need not agree."""
        reason = self.out_of_scope(pair)
        return probability if reason is None else min(probability, reason[0])

    def _why(self, pair: Pair, textual: float, symbolic: float, bar: float) -> list[str]:
        if pair.verdict.apart:
            return [f"not compared: {pair.verdict.apart}"]
        why: list[str] = []
        if symbolic:
            why += [f"symbolic: {key}: {one!r} vs {other!r}" for key, one, other in pair.verdict.conflicts[:4]]
        words = pair.evidence.why if pair.evidence is not None else ()
        why += words
        if self._stages.scope and pair.has_texts and (day := pair.day):
            why.append(f"scope: '{day}' was said on different days")
        if self._stages.scope and pair.evidence is not None and pair.evidence.elsewhere:
            why.append(f"scope: {pair.evidence.elsewhere}")
        if textual >= bar and supersedes(pair.newer.geoid.text or ""):
            why.append("supersession: the newer statement says that it replaces the older one")
        if (pair.verified is not None or pair.quick is not None) and textual >= bar and not words:
            parts = differences(pair.older.geoid.text or "", pair.newer.geoid.text or "")
            why += [f"differs: {part}" for part in parts]
            why.append(READ if pair.verified is not None else NOT_READ)
        return why

    def _model_of(self, pair: Pair) -> str:
        if pair.verified is not None and self._verifier is not None:
            return self._verifier.name
        return self._head.name if pair.quick is not None and self._head is not None else self._rules
