"""Findings to a probability and to words: what the engine goes by when no verifier is there, and what explains it when one is."""

import json
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
import numpy.typing as npt

from kimera_stream.engines.evidence.elsewhere import elsewhere
from kimera_stream.engines.evidence.findings import FEATURES, Findings, compare
from kimera_stream.engines.evidence.reading import read

PLAIN = 0.93
"""Probability of a plain case: the same words, one clash, and nothing that sets the statements apart."""
UNEXPLAINED = 0.3
"""Most that the rules give to a pair in which they can name no clash."""

_APART = ("question", "command", "hypothetical", "plan_differs", "past_differs", "reported", "id_differ", "supersedes")
_SURE = frozenset({"negation", "opposites", "number", "time", "date", "weekday", "year", "month", "quantifier"})


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the words of a pair say.

    Attributes:
        probability: Of contradiction, by the rules alone, in [0, 1].
        why: Clashes in plain words.
        plain: A clear clash between otherwise equal statements.
        apart: Words on what sets the statements apart; empty if nothing does.
        elsewhere: The things, times or places that an otherwise equal pair names apart, in plain words; empty if none.
        features: Values of ``FEATURES``, shape (len(FEATURES),).
    """

    probability: float
    why: tuple[str, ...]
    plain: bool
    apart: tuple[str, ...]
    elsewhere: str = ""
    features: npt.NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(len(FEATURES), np.float32), compare=False, repr=False
    )


class Rules:
    """The fitted rules. Weights come from ``python -m bench.fit_rules``.

    Args:
        weights: As in ``data/rules.json``.
    """

    def __init__(self, weights: dict[str, object]) -> None:
        if weights["features"] != list(FEATURES):
            raise ValueError("rules.json was fitted for other features; run python -m bench.fit_rules --write")

        def array(name: str) -> npt.NDArray[np.float32]:
            return np.asarray(weights[name], dtype=np.float32)

        self.name = str(weights["name"])
        self._mean, self._scale = array("mean"), array("scale")
        self._hidden, self._hidden_bias = array("hidden"), array("hidden_bias")
        self._out, self._out_bias = array("out"), np.float32(array("out_bias"))

    def judge(self, pairs: list[tuple[str, str, float]]) -> list[Evidence]:
        """Evidence on (older text, newer text, cosine) triples. Pure computation; batch it off the event loop."""
        found = [compare(read(a), read(b)) for a, b, _ in pairs]
        for findings, (_, _, cosine) in zip(found, pairs, strict=True):
            findings.features["cosine"] = cosine
        if not found:
            return []
        raw = np.array([list(each.features.values()) for each in found], dtype=np.float32)
        hidden = np.maximum(0, ((raw - self._mean) / self._scale) @ self._hidden + self._hidden_bias)
        probabilities = 1 / (1 + np.exp(-(hidden @ self._out + self._out_bias)))
        return [
            _evidence(each, float(value), elsewhere(a, b, read(a), read(b), each), row)
            for each, value, row, (a, b, _) in zip(found, probabilities, raw, pairs, strict=True)
        ]


def _evidence(found: Findings, probability: float, apart: str, row: npt.NDArray[np.float32]) -> Evidence:
    values = found.features
    plain = _is_plain(found)
    if plain:
        probability = max(probability, PLAIN)
    elif (
        not found.clashes
        or found.differences
        or values["contained"] < 0.34
        or (values["name_only_a"] and values["name_only_b"])
    ):
        probability = min(probability, UNEXPLAINED)
    return Evidence(probability, tuple(explain(found)), plain, tuple(found.differences), apart, row)


def _is_plain(found: Findings) -> bool:
    """The same words but for one sure clash, about the same things, in the same mood."""
    values = found.features
    if found.differences or any(values[name] for name in _APART) or values["name_only_a"] or values["name_only_b"]:
        return False
    sure = [kind for kind, _, _ in found.clashes if kind in _SURE]
    if not sure or values["antonym_agree"]:
        return False
    flips = (values["polarity_clash"] > 0) + round(values["antonym_clash"] * 2)
    if flips and flips % 2 == 0:
        return False  # "not down" and "up"
    loose = round((values["only_a"] + values["only_b"]) * 6)
    if "negation" in sure and len(sure) == 1 and not values["negations_differ"]:
        return False
    return loose == 0 or (loose == 1 and values["contained"] >= 0.75)


def explain(found: Findings) -> list[str]:
    """The clashes in words a person understands, the surest first, at most four."""
    ranked = sorted(found.clashes, key=lambda clash: clash[0] not in _SURE)
    return list(dict.fromkeys(f"{kind}: '{one}' vs '{other}'" for kind, one, other in ranked))[:4]


_PACKAGED: dict[str, object] = json.loads(
    (resources.files(__package__) / "data" / "rules.json").read_text(encoding="utf-8")
)
"""Read with the module: read at first use it would block the event loop."""


def packaged_rules() -> Rules:
    """The rules that ship with the package."""
    return Rules(_PACKAGED)
