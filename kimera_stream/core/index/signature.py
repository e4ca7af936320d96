"""What the kernel compares besides vectors: signatures of texts, records of states."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

from kimera_stream.core.index.values import ValueCodes, hash64
from kimera_stream.kernels import NEGATED_BIT, NUMBERS_MASK, TEXT_BIT, Record, build_record
from kimera_stream.protocol.objects import RESERVED_SYMBOLS, Geoid, Scalar

_NUMBER_WORDS = {
    word: float(value)
    for value, word in enumerate(
        [
            "zero",
            "-",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
    if word != "-"
} | {"thirty": 30.0, "forty": 40.0, "fifty": 50.0, "sixty": 60.0, "seventy": 70.0, "eighty": 80.0, "ninety": 90.0}
"""Without "one", which is a pronoun more often than a number."""

_NEGATIONS = frozenset(
    [
        "no",
        "not",
        "never",
        "none",
        "nobody",
        "nothing",
        "nowhere",
        "neither",
        "nor",
        "cannot",
        "without",
        "hardly",
        "barely",
        "scarcely",
    ]
)
_TOKEN = re.compile(r"\d[\d,]*(?:\.\d+)?|[^\W\d_]+(?:['’]t\b)?")
_CONTRACTED = ("n't", "n’t")
_FROM, _TO = -(1 << 63), (1 << 63) - 1


def text_signature(text: str | None) -> int:
    """32 bits: whether there is text, the parity of its negations, and a hash of the set of its numbers.

    It ranks, it does not decide: differing signatures lift a candidate that is close anyway.
    """
    if not text:
        return 0
    negated = False
    numbers: set[float] = set()
    for token in _TOKEN.findall(text.lower()):
        if token in _NEGATIONS or token.endswith(_CONTRACTED):
            negated = not negated
        elif token in _NUMBER_WORDS:
            numbers.add(_NUMBER_WORDS[token])
        elif token[0].isdecimal():
            numbers.add(float(token.replace(",", "")))
    signature = TEXT_BIT | (NEGATED_BIT if negated else 0)
    if numbers:
        mixed = sum(hash(number) * 0x9E37_79B9_7F4A_7C15 >> 17 for number in numbers) & NUMBERS_MASK
        signature |= mixed or 1
    return signature


@lru_cache(maxsize=16_384)
def _key_hash(key: str) -> int:
    return hash64(key)


def _limit(value: Scalar, default: int, rounded: Callable[[float], int]) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return max(_FROM, min(_TO, rounded(value)))


def _window(state: Mapping[str, Scalar]) -> tuple[int, int] | None:
    if "valid_from" not in state and "valid_to" not in state:
        return None
    return _limit(state.get("valid_from"), _FROM, math.floor), _limit(state.get("valid_to"), _TO, math.ceil)


def _facts(state: Mapping[str, Scalar], code: Callable[[Scalar], int]) -> Iterator[tuple[int, int]]:
    for key, value in state.items():
        if key not in RESERVED_SYMBOLS:
            yield _key_hash(key), code(value)


def build_geoid_record(geoid: Geoid, codes: ValueCodes, *, store: bool) -> Record:
    """The record of a geoid's states.

    ``store`` holds its interned values in ``codes`` (``drop_record`` lets go of them); otherwise they are only looked up.
    A ``subject`` or ``as_of`` of null counts as not given.
    """
    state = geoid.symbolic_state
    code = codes.hold if store else codes.look
    facts = list(_facts(state, code))
    subject, moment = state.get("subject"), state.get("as_of")
    return build_record(
        facts,
        subject=code(subject) if facts and subject is not None else 0,
        moment=code(moment) if facts and moment is not None else 0,
        window=_window(state) if facts else None,
        layers=[_key_hash(key) for key in geoid.semantic_state],
    )
