"""What goes through the cascade: pairs of statements, and which stages they pass."""

from dataclasses import dataclass

from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.engines.composite import relatedness
from kimera_stream.engines.evidence import Evidence
from kimera_stream.engines.scope import other_day
from kimera_stream.engines.symbolic import SymbolicVerdict, compare_states
from kimera_stream.infrastructure.settings import ScoringSettings

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
class Pair:
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
    quick: float | None = None
    """Probability by the pair head, which was asked in the verifier's place."""
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


def pair_of(older: StoredGeoid, newer: StoredGeoid, known: float | None, named: bool = False) -> Pair:
    """A pair whose states are compared. ``known``: its cosine; None where one has no vector."""
    verdict = compare_states(older.geoid.symbolic_state, newer.geoid.symbolic_state)
    return Pair(older, newer, verdict, known, relatedness(known, verdict), named)
