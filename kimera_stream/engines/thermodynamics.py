"""Semantic thermodynamics: entropies of statements and of their contradictions, after KIMERA's thermodynamic engine.

KIMERA reads a statement as a distribution over features, a contradiction as a pulse of energy between two of them, and a
resolution as a scar that records how much uncertainty it removed or added. Formulas (all entropies in bits):

* Statement: Shannon entropy ``S = -sum p log2 p`` of the normalised semantic state (``core.geoid``).
* Pair before its resolution: ``S_pre = S((p_a + p_b) / 2) + s``: the entropy of what the two say together, plus ``s`` of the
  one bit of not knowing which of them holds, ``s`` being the contradiction's score.
* Pair after: *collapse* keeps the newer statement, ``S_post = S(p_b)``; *surge* lets both go on, each in a context of its own,
  ``S_post = S((p_a + p_b) / 2) + 1``; *buffer* decides nothing but that it is known, ``S_post = S((p_a + p_b) / 2) + s / 2``.
* Scar: ``delta = S_post - S_pre``, ``weight = s + |delta|``: what the resolution cost, and how much the vault carries for it.
* Pulse: ``strength = s * (0.5 + 0.5 * relatedness)``: a clash of close statements moves the field more than one of distant ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kimera_stream.core.geoid import entropy_bits, normalised
from kimera_stream.protocol.objects import Decision

CALM_GAIN = 0.25
"""Bits by which two statements must differ in entropy before the advice leaves ``collapse`` for ``surge``."""


@dataclass(frozen=True, slots=True)
class ScarThermodynamics:
    """Entropies of a resolution in bits, and the scar's weight."""

    pre_entropy: float
    post_entropy: float
    weight: float

    @property
    def delta_entropy(self) -> float:
        return self.post_entropy - self.pre_entropy


def mixture(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """The even mixture of two states; the other one alone where one is empty."""
    left, right = normalised(a), normalised(b)
    if not left or not right:
        return left or right
    return {key: (left.get(key, 0.0) + right.get(key, 0.0)) / 2 for key in left.keys() | right.keys()}


def scar(a: Mapping[str, float], b: Mapping[str, float], score: float, decision: Decision) -> ScarThermodynamics:
    """What resolving the contradiction of ``a`` (older) and ``b`` (newer semantic state) does to the entropy."""
    together = entropy_bits(mixture(a, b))
    pre = together + score
    post = {"collapse": entropy_bits(b), "surge": together + 1.0, "buffer": together + score / 2}[decision]
    return ScarThermodynamics(pre, post, score + abs(post - pre))


def pulse_strength(score: float, relatedness: float) -> float:
    """Energy of the contradiction's pulse in [0, 1]."""
    return score * (0.5 + 0.5 * min(max(relatedness, 0.0), 1.0))


def advice(a: Mapping[str, float], b: Mapping[str, float], score: float, *, sure: float) -> Decision:
    """What to do with a contradiction: ``buffer`` below ``sure``; ``surge`` where the two say different amounts; else ``collapse``.

    A sure clash of statements of like entropy has one loser (collapse). Where one says clearly more than the other, dropping
    it would lose more than the clash, so both go on in contexts of their own (surge).
    """
    if score < sure:
        return "buffer"
    gap = abs(entropy_bits(a) - entropy_bits(b))
    return "surge" if gap > CALM_GAIN else "collapse"
