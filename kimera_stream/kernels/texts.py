"""What texts are compared by besides their vectors: a word of 32 bits each, and the words that two of them share.

``reference_signature`` and ``reference_overlaps`` are the definitions, the fallback and the tests' oracle. The compiled module
computes the same signatures for texts that are plain (ASCII, no number of more than 15 digits) and leaves the others to it.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kimera_stream.kernels.layout import F32, NAMED_MASK, NEGATED_BIT, NUMBERS_MASK, TEXT_BIT, U32, Bools

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
_AMOUNTS = frozenset(
    [
        "a", "about", "above", "after", "an", "and", "are", "as", "at", "be", "before", "below", "between", "by", "for", "from",
        "had", "has", "have", "in", "is", "of", "on", "only", "or", "over", "since", "than", "the", "till", "to", "under",
        "until", "was", "were", "with", "within",
    ]
)  # fmt: skip
"""Words after which a number is an amount, a time or a place in a list, not a name."""
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
        signature |= _named(text)
    return signature


def _named(text: str) -> int:
    """Part of a signature: a hash of the first word of letters and digits that begins with a letter (W7-77, db1); without
    one, of the first number that stands after a word which makes it a name (order 48213, gate 12)."""
    numbered, before = "", ""
    for piece in text.split():
        start = next((i for i, letter in enumerate(piece) if _is_written(letter)), len(piece))
        end = next((i for i in range(len(piece), start, -1) if _is_written(piece[i - 1])), start)
        word = piece[start:end].lower()
        digits = sum(map(str.isdecimal, word))
        if digits and not word[0].isdecimal():
            return _name_hash(word)
        if not numbered and digits and digits == len(word) and before.isalpha() and before not in _AMOUNTS:
            numbered = f"{before} {word}"
        before = word
    return _name_hash(numbered) if numbered else 0


def _is_written(letter: str) -> bool:
    return letter.isalpha() or letter.isdecimal()


def _name_hash(name: str) -> int:
    value = _mix(name.encode("utf-8", "surrogatepass"))
    return (value ^ value >> 15) << 15 & NAMED_MASK or 1 << 15


def _mix(values: Iterable[int]) -> int:
    """FNV-1a, 32 bits."""
    mixed = 2166136261
    for value in values:
        mixed = (mixed ^ value) * 16777619 & 0xFFFF_FFFF
    return mixed


def text_signature(text: str | None) -> int:
    """32 bits: whether there is text, the parity of its negations, a hash of the set of its numbers, and one of the first
    thing that is named by a number.

    It ranks, it does not decide: signatures that differ, or that name the same thing, lift a candidate that is close anyway.
    Without the name, a statement about valve W7 is surrounded by those about all the other valves, which differ in a number.
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


def same_names(signature: int, others: U32) -> Bools:
    """Which of the other signatures are of texts that name the same numbered thing, bool (n,)."""
    names = others & np.uint32(NAMED_MASK)
    same: Bools = (names != 0) & (names == np.uint32(signature & NAMED_MASK))
    return same


OVERLAP_CHARS = 2000
"""Of a text that its overlap with others is computed from."""
_NUMBERED = 2
"""Weight of a word with a digit in it: two statements about V12 have more in common than two about a valve."""
_LIGHT = (
    "a an the of to in on at by for with from as into onto upon about against between through during be is are was were am "
    "been being have has had do does did will would can could shall should may might must it its this that these those there "
    "here and or but so than then if while when where who whom whose which what how i you he she we they them him her his "
    "their our my your me us mine yours hers theirs ours just also too very really quite still already yet again now only "
    "even some any such own same other another each per via ll ve re d s t m not no never up out off over"
)
"""Words that nearly every statement has: they have no weight."""
_WORD = re.compile("[0-9a-zA-Z\u00c0-\u1fff]+|[\u2e80-\U0010ffff]")
_UPPER = (("A", "Z"), ("\u00c0", "\u00de"), ("\u0391", "\u03a9"), ("\u0410", "\u042f"))
_LOWER = {code: code + 0x20 for first, last in _UPPER for code in range(ord(first), ord(last) + 1)}


def _hash(word: str) -> int:
    """32 bits, never 0, of a word in small letters."""
    return _mix(map(ord, word)) or 1


def _weights(text: str) -> dict[int, int]:
    """Weight by hash of each word that has one, without a plural's s."""
    words = (word.translate(_LOWER) for word in _WORD.findall(text[:OVERLAP_CHARS]))
    weights: dict[int, int] = {}
    for word in words:
        key = _hash(word[:-1] if len(word) > 3 and word.endswith("s") else word)
        if key not in _LIGHT_HASHES:
            numbered = any("0" <= letter <= "9" for letter in word)
            weights.setdefault(key, _NUMBERED if numbered else 1)
    return weights


_LIGHT_HASHES: frozenset[int] = frozenset()
_LIGHT_HASHES = frozenset(key for word in _LIGHT.split() for key in _weights(word))


def _open_table(hashes: frozenset[int], slots: int) -> U32:
    """The hashes as the compiled module looks them up: from the slot of the low bits on, until one is 0."""
    table = np.zeros(slots, np.uint32)
    for each in sorted(hashes):
        slot = each % slots
        while table[slot]:
            slot = (slot + 1) % slots
        table[slot] = each
    return table


_LIGHT_TABLE = _open_table(_LIGHT_HASHES, 512)


def reference_overlaps(text: str, others: Sequence[str]) -> F32:
    """``text_overlaps`` as it is defined."""
    mine = _weights(text)
    overlaps = np.zeros(len(others), np.float32)
    for place, other in enumerate(others):
        theirs = _weights(other)
        least = min(sum(mine.values()), sum(theirs.values()))
        shared = sum(weight for key, weight in theirs.items() if key in mine)
        overlaps[place] = np.float32(shared) / np.float32(least) if least else 0.0
    return overlaps


def text_overlaps(text: str, others: Sequence[str]) -> F32:
    """How much of the words of one text others share, float32 (n,), in [0, 1]: the weight of the words in both, divided by the
    smaller of the weights of all words of either; 0 where one has none.

    A word is a run of letters and digits, or one character of a script without spaces; small and capital letters, a plural's s
    and order make no difference. Words of grammar have no weight. Of each text the first ``OVERLAP_CHARS`` are read.

    Raises:
        TypeError: one of them is no string.
    """
    if _compiled is None:
        return reference_overlaps(text, others)
    overlaps = np.empty(len(others), np.float32)
    _compiled.text_overlaps([text, *others], _LIGHT_TABLE, overlaps)
    return overlaps
