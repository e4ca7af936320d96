"""Two statements that say opposite things, but each of another thing, place or moment that it names: then both can hold.

Only where everything else is the same, word for word. Beside a difference in the moment alone ("the launch is on 3 March", "on 5 March")
nothing is opposite: there the moment is what is claimed, and the two do not go together.
"""

import re

from kimera_stream.engines.evidence.findings import Findings
from kimera_stream.engines.evidence.lexicon import MONTHS, WEEKDAYS
from kimera_stream.engines.evidence.quantities import Quantity
from kimera_stream.engines.evidence.reading import Reading

_OPPOSED = frozenset({"negation", "opposites"})
_HELPING = frozenset({"be", "have", "do"})
_CALENDAR = frozenset({"clock", "date", "weekday", "year", "month"})
_REACHES = re.compile(
    r"\b(?:until|till|since|from|before|after|by|through|throughout|to|between|during|within|past|later|earlier|every|each|all|any|"
    r"no|none|both|always|never|only|first|last|ever|still|already|update|correction)\b",
    re.IGNORECASE,
)
"""Words with which a statement reaches beyond the moment or thing it names: "closed until May" says something of April."""
_PLACE = re.compile(r"\b(?:in|at|near|inside|outside)\s+(?:the\s+)?([A-Z][\w-]*)")
_MOMENTS = MONTHS.keys() | WEEKDAYS.keys()
_DIGITS = re.compile(r"\d+")
_VERSION = re.compile(r"v?\d")


def elsewhere(older: str, newer: str, a: Reading, b: Reading, found: Findings) -> str:
    """What the two name apart, in plain words; empty where they may well speak of the same.

    Args:
        older, newer: The texts of which ``a`` and ``b`` are the readings, and ``found`` what comparing these found.
    """
    if not _parallel(a, b, found) or _REACHES.search(older) or _REACHES.search(newer):
        return ""
    return _things(a, b) or _moments(a, b) or _places(older, newer)


def _parallel(a: Reading, b: Reading, found: Findings) -> bool:
    """One opposition, and otherwise the same words but for names (and "wasn't" has no "was")."""
    values = found.features
    opposed = {kind for kind, _, _ in found.clashes}
    if not opposed & _OPPOSED or opposed & {"roles", "quantifier"}:
        return False
    named = round(2 * max(values["name_only_a"], values["name_only_b"]))
    spared = named + len(_HELPING & (a.words.keys() ^ b.words.keys()))
    return named <= 1 and 6 * max(values["only_a"], values["only_b"]) <= spared + 0.5


def _things(a: Reading, b: Reading) -> str:
    if len(a.ids) != 1 or len(b.ids) != 1 or a.ids == b.ids:
        return ""
    (one,), (other,) = a.ids, b.ids
    if _VERSION.match(one) or _DIGITS.sub("#", one) != _DIGITS.sub("#", other):
        return ""  # what a thing has reached, or another sort of thing
    return f"{one} and {other} are different things"


def _moments(a: Reading, b: Reading) -> str:
    one, other = _moment(a), _moment(b)
    if one is None or other is None or one.dimension != other.dimension or one.agrees(other):
        return ""
    return f"'{one.text}' and '{other.text}' are different times"


def _moment(reading: Reading) -> Quantity | None:
    """The only moment that a statement names."""
    moments = [each for each in reading.quantities if each.dimension in _CALENDAR]
    return moments[0] if len(moments) == 1 else None


def _places(older: str, newer: str) -> str:
    one, other = ({name for name in _PLACE.findall(text) if name.lower() not in _MOMENTS} for text in (older, newer))
    if len(one) != 1 or len(other) != 1 or one == other:
        return ""
    return f"one speaks of {one.pop()}, the other of {other.pop()}"
