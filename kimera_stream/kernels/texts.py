"""What texts are compared by besides their vectors: a word of 32 bits each.

``reference_signature`` is the definition, the fallback and the tests' oracle; the compiled module does the same for texts that are
plain (ASCII, no number of more than 15 digits) and leaves the others to it.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from kimera_stream.kernels.layout import NEGATED_BIT, NUMBERS_MASK, TEXT_BIT, U32

try:
    import kimera_stream.kernels._kernel as _kernel
except ImportError:
    _compiled: Any = None
else:
    _compiled = _kernel

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


def reference_signature(text: str | None) -> int:
    """``text_signature`` as it is defined, for any text."""
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


def text_signature(text: str | None) -> int:
    """32 bits: whether there is text, the parity of its negations, and a hash of the set of its numbers.

    It ranks, it does not decide: differing signatures lift a candidate that is close anyway.
    """
    return int(text_signatures((text,))[0])


def text_signatures(texts: Sequence[str | None]) -> U32:
    """``text_signature`` of each, uint32 (n,).

    Raises:
        TypeError: one of them is neither a string nor None.
    """
    if _compiled is None:
        return np.array([reference_signature(text) for text in texts], np.uint32)
    signatures = np.empty(len(texts), np.uint32)
    for place in _compiled.text_signatures(list(texts), signatures):
        signatures[place] = reference_signature(texts[place])
    return signatures
