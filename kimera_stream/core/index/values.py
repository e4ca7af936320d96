"""Codes for symbolic values: 64-bit numbers that are equal exactly when the values are.

A hash alone would not do: two different values with one hash would hide a contradiction. So numbers, short strings and
the constants are written out in their code, and longer strings are interned, with the hash only as a first guess.

    top 12 bits not all ones   a number, as a float64 (zero as -0.0, since code 0 means "none")
    0xFFF, kind 0              None, True, False
    0xFFF, kinds 1-7           a string of 0-6 bytes, written out
    0xFFF, kinds 8-15          interned: 51 bits, from the hash, the next free one on a collision
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Final

from kimera_stream.infrastructure.caching import KeptResults
from kimera_stream.protocol.objects import Scalar

_TAG = 0xFFF << 52
_CONSTANTS: dict[bool | None, int] = {None: _TAG | 1, True: _TAG | 2, False: _TAG | 3}
_ZERO = 1 << 63
_INTERNED = _TAG | 1 << 51
_INTERNED_MASK = (1 << 51) - 1
INLINE_BYTES = 6
ENTRY_BYTES = 240
"""Three dictionary entries, two integers and a string's head."""


def hash64(text: str) -> int:
    """64-bit hash of a string, the same in every process."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def is_interned(code: int) -> bool:
    """Whether the code stands for a long value, which the table has to keep."""
    return code & _INTERNED == _INTERNED


def _written_out(value: Scalar) -> int | None:
    """The code of a value that fits into one."""
    if type(value) is str and len(value) > INLINE_BYTES:
        return None
    if type(value) is int and value.bit_length() > _KEPT_BITS:
        return _short(value)
    return _kept_short(value)


def _short(value: Scalar) -> int | None:
    """Kept for the values that come again and again: numbers and strings of a few characters, so of a few bytes each."""
    if value is None or isinstance(value, bool):
        return _CONSTANTS[value]
    if isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        if len(raw) > INLINE_BYTES:
            return None
        return _TAG | len(raw) + 1 << 48 | int.from_bytes(raw, "little")
    try:
        number = float(value)
    except OverflowError:
        return None
    if number != value:
        return None
    return int(struct.unpack("<Q", struct.pack("<d", number))[0]) if number else _ZERO


_KEPT_BITS = 64
"""Size of a whole number whose code is remembered."""
_kept_short = lru_cache(maxsize=4_096, typed=True)(_short)
SHORT_VALUES: Final = KeptResults(_kept_short, each=250)
"""What is remembered of values."""


@dataclass(frozen=True, slots=True)
class HeldValues:
    """Interned values by code, and how often each is referred to."""

    held: dict[int, str | int]
    references: dict[int, int]

    def pieces(self, size: int) -> Iterator[list[tuple[int, str | int, int]]]:
        """(code, value, references), ``size`` at a time."""
        items = iter(self.held.items())
        while piece := [(code, value, self.references[code]) for code, value in islice(items, size)]:
            yield piece

    @classmethod
    def of(cls, table: list[tuple[int, str | int, int]]) -> "HeldValues":
        return cls({code: value for code, value, _ in table}, {code: count for code, _, count in table})


class ValueCodes:
    """The codes in use. Not thread-safe: one writer."""

    def __init__(self) -> None:
        self._codes: dict[str | int, int] = {}
        self._held: dict[int, str | int] = {}
        self._references: dict[int, int] = {}
        self._text = 0

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def bytes(self) -> int:
        """Memory that the interned values take."""
        return len(self._codes) * ENTRY_BYTES + self._text

    def look(self, value: Scalar) -> int:
        """The code to compare with: that of no stored value if this one is not stored."""
        code = _written_out(value)
        if code is not None:
            return code
        assert isinstance(value, str | int)
        return self._codes.get(value) or self._free_code(value)

    def hold(self, value: Scalar) -> int:
        """The code to store; ``drop`` it as often."""
        code = _written_out(value)
        if code is not None:
            return code
        assert isinstance(value, str | int)
        code = self._codes.get(value)
        if code is None:
            code = self._codes[value] = self._free_code(value)
            self._held[code] = value
            self._references[code] = 0
            self._text += len(str(value))
        self._references[code] += 1
        return code

    def drop(self, code: int) -> None:
        """Give back a code that ``hold`` gave."""
        if not is_interned(code):
            return
        self._references[code] -= 1
        if self._references[code] == 0:
            del self._references[code]
            value = self._held.pop(code)
            del self._codes[value]
            self._text -= len(str(value))

    def copy(self) -> "HeldValues":
        """The interned values as they are now, for a snapshot: two copies of dictionaries, nothing per value."""
        return HeldValues(self._held.copy(), self._references.copy())

    def restore(self, values: "HeldValues") -> None:
        """Take over the values of a snapshot, in place of what is held."""
        self._codes = {value: code for code, value in values.held.items()}
        self._held = values.held
        self._references = values.references
        self._text = sum(len(str(value)) for value in values.held.values())

    def _free_code(self, value: str | int) -> int:
        guess = hash64(str(value)) & _INTERNED_MASK
        while _INTERNED | guess in self._held:
            guess = guess + 1 & _INTERNED_MASK
        return _INTERNED | guess
