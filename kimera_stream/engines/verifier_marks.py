"""What a word of one statement is to the words of the other: the mark that its tokens carry into the verifier's network.

A network of six layers knows few opposites and cannot compare numbers: it is told which word returns, in another form or another word
for the same, which has its opposite in the other statement, and which number is the greater. Opposites and words that mean the same
are those of WordNet 3.0 (``weights/lexicon.txt.gz``, made by ``training.verifier.lexicon``) and of the rules' lists.
"""

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Final

from kimera_stream.engines.evidence.lexicon import ANTONYMS, COHORTS, MONTHS, stem
from kimera_stream.engines.verifier_text import BASES
from kimera_stream.infrastructure.caching import KeptResults

NONE, UNMATCHED, MATCHED, FORM, SYNONYM, OPPOSITE, ALTERNATIVE, GREATER, LESS = range(9)
"""No word (CLS, SEP); found nowhere in the other statement; as it stands; in another form; another word for it; its opposite; another
value of the same kind (two colours, two weekdays); a number, where the other statement has a smaller or a greater one of the same unit."""
MARKS = 9

_NUMBER: Final = re.compile(
    r"(?<![\w.])(?P<sign>[$€£]?)(?P<value>\d+(?::\d\d)?(?:\.\d+)?)(?![\w])(?:\s*(?P<unit>%|°[CF]|[A-Za-z]+))?"
)
_IGNORED: Final = frozenset(
    {"and", "or", "to", "of", "in", "on", "at", "for", "with", "from", "is", "are", "was", "were", "the", "a"}
)
"""Words after a number that are no unit."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a normal form: its place in characters, its value, and what it counts (a stem; empty where nothing is said)."""

    start: int
    end: int
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Word:
    """What is compared of one whole word: its stem, and the groups that it belongs to, as small numbers; those of opposites are signed."""

    stem: str
    same: frozenset[int]
    opposite: frozenset[int]
    kinds: frozenset[str]


@cache
def _groups() -> tuple[dict[str, frozenset[int]], dict[str, frozenset[int]]]:
    """Stems to the groups of words that mean the same, and to the signed groups of opposites: g on one side, -g on the other."""
    same: dict[str, set[int]] = {}
    opposite: dict[str, set[int]] = {}
    number = 0
    packed = (resources.files("kimera_stream.engines") / "weights" / "lexicon.txt.gz").read_bytes()
    for line in gzip.decompress(packed).decode().splitlines():
        number += 1
        sign, _, rest = line.partition(" ")
        if sign == "=":
            for word in rest.split():
                same.setdefault(stem(word), set()).add(number)
        else:
            one, other = (stem(word) for word in rest.split(" | "))
            if one != other:
                opposite.setdefault(one, set()).add(number)
                opposite.setdefault(other, set()).add(-number)
    for one, others in ANTONYMS.items():
        for other in others:
            if one < other and "_" not in one and "_" not in other:
                number += 1
                opposite.setdefault(one, set()).add(number)
                opposite.setdefault(other, set()).add(-number)
    return {key: frozenset(ids) for key, ids in same.items()}, {key: frozenset(ids) for key, ids in opposite.items()}


_KEPT_CHARS: Final = 32
NOTHING: Final = Word("", frozenset(), frozenset(), frozenset())
_NO_GROUPS: Final[frozenset[int]] = frozenset()
_NO_KINDS: Final[frozenset[str]] = frozenset()


def word_of(text: str) -> Word:
    """What is compared of a whole word as it is written."""
    if not text.isalpha():
        return NOTHING
    return _kept_word(text) if len(text) <= _KEPT_CHARS else _word(text)


def _word(text: str) -> Word:
    same, opposite = _groups()
    key = stem(text)
    return Word(key, same.get(key, _NO_GROUPS), opposite.get(key, _NO_GROUPS), COHORTS.get(key, _NO_KINDS))


_kept_word = lru_cache(maxsize=8_192)(_word)
WORDS: Final = KeptResults(_kept_word, each=300)
"""What is remembered of words."""


def numbers_of(text: str) -> tuple[Number, ...]:
    """The numbers of a normal form, each with what it counts; clock times in minutes, days of a month by their place in the year."""
    found = []
    for match in _NUMBER.finditer(text):
        written, unit = match["value"], (match["unit"] or match["sign"]).lower()
        if ":" in written:
            hours, _, minutes = written.partition(":")
            value, unit = int(hours) * 60 + float(minutes), "clock"
        elif unit in MONTHS:
            value, unit = MONTHS[unit] * 31 + float(written), "date"
        elif unit in BASES:
            unit, factor = BASES[unit]
            value = float(written) * factor
        else:
            value = float(written)
            unit = match["sign"] or ("" if unit in _IGNORED else stem(unit))
        found.append(Number(match.start("value"), match.end("value"), value, unit))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Compared:
    """Of a statement, what its marks against another rest on.

    Attributes:
        words: For each token the tokens of the whole word that it belongs to.
        about: For each token what is compared of that word.
        numbers: (token, number) for each token of a number.
    """

    words: tuple[tuple[int, ...], ...]
    about: tuple[Word, ...]
    numbers: tuple[tuple[int, Number], ...]
    known: frozenset[tuple[int, ...]]
    stems: frozenset[str]
    same: frozenset[int]
    opposite: frozenset[int]
    kinds: frozenset[str]

    @classmethod
    def of(
        cls, words: tuple[tuple[int, ...], ...], about: tuple[Word, ...], numbers: tuple[tuple[int, Number], ...]
    ) -> "Compared":
        """Put together what is looked up in the other statement."""
        distinct = set(about)
        return cls(
            words, about, numbers, frozenset(words),
            frozenset(word.stem for word in distinct if word.stem),
            _NO_GROUPS.union(*(word.same for word in distinct)),
            _NO_GROUPS.union(*(word.opposite for word in distinct)),
            _NO_KINDS.union(*(word.kinds for word in distinct)),
        )  # fmt: skip

    def marks(self, other: "Compared", size: int) -> list[int]:
        """The marks of the first ``size`` tokens against another statement."""
        result = [
            MATCHED if key in other.known else _mark(word, other)
            for key, word in zip(self.words[:size], self.about, strict=False)
        ]
        for token, number in self.numbers:
            if token < size:
                result[token] = _compared(number, other.numbers)
        return result


def _mark(word: Word, other: Compared) -> int:
    if word.stem in other.stems:
        return FORM
    if any(-group in other.opposite for group in word.opposite):
        return OPPOSITE
    if not word.same.isdisjoint(other.same):
        return SYNONYM
    return UNMATCHED if word.kinds.isdisjoint(other.kinds) else ALTERNATIVE


def _compared(number: Number, others: Sequence[tuple[int, Number]]) -> int:
    if any(number.value == other.value for _, other in others):
        return MATCHED
    for _, other in others:
        if other.unit == number.unit or not (other.unit and number.unit):
            return GREATER if number.value > other.value else LESS
    return UNMATCHED
