"""The data the kernels read: segments of rows, records of symbols, queries, weights and hits.

Everything is checked here, once, so that the kernels can assume it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

CACHE_LINE = 64
ROW_ALIGNMENT = 64
"""Bytes of a row of codes are a multiple of this, and so is the first slot of every segment."""
TEXT_BIT = 0x8000_0000
"""Of a text signature: there is text."""
NEGATED_BIT = 0x4000_0000
"""Of a text signature: it holds an odd number of negations."""
NAMED_MASK = 0x3FFF_8000
"""Of a text signature: hash of the first thing that is named by a number (W7-77, order 48213), 0 for none."""
NUMBERS_MASK = 0x7FFF
"""Of a text signature: order-free hash of the numbers, 0 for none; a text that names something numbered has some."""
SAME = 5.0
"""Part of the level of two texts that name the same numbered thing."""
KEY_BITS = 48
SYMBOLIC_BONUS = 4.0
MAX_ENTRIES = 0xFFFF
"""Symbols, and likewise semantic keys, of one record at most."""

_SUBJECT = 1 << 32
_MOMENT = 1 << 33
_WINDOW = 1 << 34
_WORD = (1 << 64) - 1

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


def stride_of(dim: int) -> int:
    """Bytes of one row of codes."""
    return -(-dim // ROW_ALIGNMENT) * ROW_ALIGNMENT


def check(name: str, array: object, dtype: npt.DTypeLike, shape: tuple[int | None, ...]) -> None:
    """Refuse an array that is not what a kernel assumes. ``None`` in ``shape`` is any length.

    Raises:
        TypeError: not an array, or of another dtype.
        ValueError: of another shape, or not C-contiguous and aligned.
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected a numpy array, got {type(array).__name__}")
    if array.dtype != np.dtype(dtype):
        raise TypeError(f"{name}: expected dtype {np.dtype(dtype)}, got {array.dtype}")
    if array.ndim != len(shape) or any(w is not None and w != h for w, h in zip(shape, array.shape, strict=True)):
        wanted = tuple("any" if n is None else n for n in shape)
        raise ValueError(f"{name}: expected shape {wanted}, got {array.shape}")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise ValueError(f"{name}: expected a C-contiguous, aligned array")


def on_lines(rows: F32) -> F32:
    """``rows`` beginning on a cache line: a query is read against every stored row, and straddling two lines costs a tenth."""
    if rows.ctypes.data % CACHE_LINE == 0:
        return rows
    memory = np.empty(rows.nbytes + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    aligned: F32 = memory[start : start + rows.nbytes].view(np.float32).reshape(rows.shape)
    aligned[:] = rows
    return aligned


def check_finite(name: str, array: F32) -> None:
    """Refuse NaN and infinities.

    Raises:
        ValueError: there is one.
    """
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers")


# -- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """A geoid's symbolic and semantic state as the kernels compare it.

    Attributes:
        words: The record, see ``ext/symbolic.c``; empty where there is nothing to compare.
        keys: Key word of the symbols: a Bloom word of 48 bits.
        subject: 16 bits above them of the subject's hash; 0 without one. A row's key word is ``keys | subject``.
        layers: Bloom word of the semantic keys.
    """

    words: tuple[int, ...] = ()
    keys: int = 0
    subject: int = 0
    layers: int = 0


EMPTY_RECORD = Record()


def build_record(
    symbols: Iterable[tuple[int, int]],
    *,
    subject: int = 0,
    moment: int = 0,
    window: tuple[int, int] | None = None,
    layers: Iterable[int] = (),
) -> Record:
    """A record from (hash of the key, code of the value) pairs and hashes of semantic keys, all below 2**64.

    Args:
        symbols: Facts. Equal codes mean equal values.
        subject: Code of whom they are about, 0 for none.
        moment: Code of the moment they are of, 0 for none.
        window: First and last unix millisecond they hold, as signed 64-bit integers.
        layers: Hashes of the semantic keys.

    Raises:
        ValueError: more than 65,535 symbols or layers.
    """
    ordered = sorted(symbols)
    levels = sorted(set(layers))
    if len(ordered) > MAX_ENTRIES or len(levels) > MAX_ENTRIES:
        raise ValueError(f"record: expected at most {MAX_ENTRIES} symbols and as many layers")
    if not ordered and not levels:
        return EMPTY_RECORD
    head = len(ordered) | len(levels) << 16
    words = [0]
    subject_bits = 0
    if subject:
        head |= _SUBJECT
        words.append(subject)
        mixed = (subject * 0x9E37_79B9_7F4A_7C15 & _WORD) >> KEY_BITS
        subject_bits = (mixed or 1) << KEY_BITS
    if moment:
        head |= _MOMENT
        words.append(moment)
    if window is not None:
        head |= _WINDOW
        words += (window[0] & _WORD, window[1] & _WORD)
    words[0] = head
    words += [key for key, _ in ordered]
    words += [value for _, value in ordered]
    words += levels
    keys = 0
    for key, _ in ordered:
        keys |= 1 << (key * KEY_BITS >> 64)
    bloom = 0
    for level in levels:
        bloom |= 1 << (level >> 58)
    return Record(tuple(words), keys, subject_bits if ordered else 0, bloom)


def record_codes(pool: U64, at: int) -> list[int]:
    """The codes that the record at word ``at`` holds: of its subject, its moment and its values."""
    head = int(pool[at])
    at += 1
    codes = []
    for bit in (_SUBJECT, _MOMENT):
        if head & bit:
            codes.append(int(pool[at]))
            at += 1
    if head & _WINDOW:
        at += 2
    symbols = head & MAX_ENTRIES
    codes += pool[at + symbols : at + 2 * symbols].tolist()
    return codes


def record_length(head: int) -> int:
    """Words of the record with this first word."""
    given = (head >> 32 & 1) + (head >> 33 & 1) + 2 * (head >> 34 & 1)
    return 1 + given + 2 * (head & MAX_ENTRIES) + (head >> 16 & MAX_ENTRIES)


# -- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive slots of rows, column by column. Rows that the bitmap of live rows leaves out may hold anything.

    Attributes:
        base: Slot of the first row, a multiple of 64.
        rows: Number of rows.
        codes: uint8 (rows, stride): 8-bit rows, or None.
        grades: uint8 (rows,): quantisation step of each row of codes.
        exact: float32 (rows, dim), or None. Scanned where there are no codes; rescores the hits where there are.
        text: uint32 (rows,): text signatures, or None.
        keys: uint64 (rows,): key words, or None (then layers, record and pool are not read either).
        layers: uint64 (rows,): layer words.
        record: uint32 (rows,): first word of the row's record in pool. Read only where a key or layer bit is set.
        pool: uint64 (words,): records; at least one word.
    """

    base: int
    rows: int
    codes: U8 | None = None
    grades: U8 | None = None
    exact: F32 | None = None
    text: U32 | None = None
    keys: U64 | None = None
    layers: U64 | None = None
    record: U32 | None = None
    pool: U64 | None = None

    def __post_init__(self) -> None:
        n = self.rows
        if self.base < 0 or self.base % ROW_ALIGNMENT or n < 0:
            raise ValueError(f"segment: expected a base that is a multiple of {ROW_ALIGNMENT} and rows >= 0")
        if self.codes is not None:
            check("codes", self.codes, np.uint8, (n, None))
            if self.codes.shape[1] % ROW_ALIGNMENT:
                raise ValueError(f"codes: expected rows of a multiple of {ROW_ALIGNMENT} bytes")
            check("grades", self.grades, np.uint8, (n,))
        if self.exact is not None:
            check("exact", self.exact, np.float32, (n, None))
        if self.text is not None:
            check("text", self.text, np.uint32, (n,))
        if self.keys is not None:
            check("keys", self.keys, np.uint64, (n,))
            check("layers", self.layers, np.uint64, (n,))
            check("record", self.record, np.uint32, (n,))
            check("pool", self.pool, np.uint64, (None,))
            if self.pool is None or len(self.pool) == 0:
                raise ValueError("pool: expected at least one word")

    @property
    def dim(self) -> int | None:
        """Length of the vectors, where float32 rows say so."""
        return None if self.exact is None else self.exact.shape[1]

    @property
    def end(self) -> int:
        """Slot after the last row."""
        return self.base + self.rows


@dataclass(frozen=True, slots=True)
class Weights:
    """What makes a candidate.

    Attributes:
        min_related: Cosine from which two statements are about the same thing; below, only exact oppositions count.
        threshold: Fused score below which nothing is returned.
        flag: Times the level of the two texts (``reference.levels``), added: 1 where their negation parity or their
            numbers differ, and ``SAME`` where both name the same numbered thing.
        layer: Times the Jaccard distance of the semantic keys.
        l1: Times the L1 difference of the vectors divided by 2 sqrt(dim).
    """

    min_related: float = -2.0
    threshold: float = float("-inf")
    flag: float = 0.0
    layer: float = 0.0
    l1: float = 0.0

    def __post_init__(self) -> None:
        if not self.layer >= 0:
            raise ValueError("weights.layer: expected a number >= 0")
        if any(np.isnan(x) for x in (self.min_related, self.threshold, self.flag, self.l1)):
            raise ValueError("weights: expected numbers, got NaN")


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """A block of statements to find candidates for.

    Attributes:
        vectors: float32 (m, dim), unit rows; a row of zeros where ``has_vector`` is 0.
        has_vector: uint8 (m,).
        text: uint32 (m,): text signatures.
        keys, subjects, layers: uint64 (m,): see ``Record``.
        record: int64 (m,): first word of the record in pool; -1 without one.
        pool: uint64 (words,): at least one word.
        exclude: int64 (m,): slot that is not returned; -1 for none.
    """

    vectors: F32
    has_vector: U8
    text: U32
    keys: U64
    subjects: U64
    layers: U64
    record: I64
    pool: U64
    exclude: I64

    @classmethod
    def build(
        cls,
        vectors: F32,
        *,
        has_vector: Sequence[bool] | None = None,
        text: Sequence[int] | None = None,
        records: Sequence[Record] | None = None,
        exclude: Sequence[int] | None = None,
    ) -> "Queries":
        """Check and gather. What is left out is empty.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, NaN or infinity.
        """
        check("vectors", vectors, np.float32, (None, None))
        check_finite("vectors", vectors)
        m, dim = vectors.shape
        if dim < 1:
            raise ValueError("vectors: expected at least one column")
        records = [EMPTY_RECORD] * m if records is None else records
        for name, value in (("has_vector", has_vector), ("text", text), ("records", records), ("exclude", exclude)):
            if value is not None and len(value) != m:
                raise ValueError(f"{name}: expected {m} items, one per query, got {len(value)}")
        words: list[int] = [0]
        starts = []
        for record in records:
            starts.append(len(words) if record.words else -1)
            words += record.words
        return cls(
            on_lines(vectors),
            np.ones(m, np.uint8) if has_vector is None else np.array([bool(x) for x in has_vector], np.uint8),
            np.zeros(m, np.uint32) if text is None else np.array(text, np.uint32),
            np.array([r.keys for r in records], np.uint64),
            np.array([r.subject for r in records], np.uint64),
            np.array([r.layers for r in records], np.uint64),
            np.array(starts, np.int64),
            np.array(words, np.uint64),
            np.full(m, -1, np.int64) if exclude is None else np.array(exclude, np.int64),
        )

    def __len__(self) -> int:
        return len(self.vectors)

    def only(self, i: int) -> "Queries":
        """The i-th query alone."""
        return self._some(slice(i, i + 1))

    def first(self, count: int) -> "Queries":
        """The first ``count`` queries."""
        return self._some(slice(count))

    def chosen(self, at: I64) -> "Queries":
        """The queries at these places."""
        return self._some(at)

    def _some(self, at: slice | I64) -> "Queries":
        return Queries(
            self.vectors[at] if isinstance(at, slice) else on_lines(self.vectors[at]), self.has_vector[at], self.text[at], self.keys[at], self.subjects[at], self.layers[at],
            self.record[at], self.pool, self.exclude[at],
        )  # fmt: skip

    def without_records(self) -> "Queries":
        """The same queries, to be compared by vectors and texts alone."""
        none = np.zeros(len(self), np.uint64)
        return replace(self, keys=none, subjects=none, layers=none, record=np.full(len(self), -1, np.int64))

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """The best rows per query, best first; beyond ``counts[i]`` a row of the arrays is slot -1 and zeros.

    Attributes:
        slots: int64 (m, k).
        fused: float32 (m, k): what ranked them.
        cosine: float32 (m, k).
        opposed: int32 (m, k): symbolic keys that both hold with different values.
        counts: int64 (m,).
    """

    slots: I64
    fused: F32
    cosine: F32
    opposed: I32
    counts: I64

    @classmethod
    def empty(cls, m: int, k: int) -> "Hits":
        """No hits for ``m`` queries, room for ``k`` each."""
        return cls(
            np.full((m, k), -1, np.int64),
            np.zeros((m, k), np.float32),
            np.zeros((m, k), np.float32),
            np.zeros((m, k), np.int32),
            np.zeros(m, np.int64),
        )

    def only(self, i: int) -> "Hits":
        """Those of the i-th query alone."""
        at = slice(i, i + 1)
        return Hits(self.slots[at], self.fused[at], self.cosine[at], self.opposed[at], self.counts[at])

    def take(self, i: int, other: "Hits") -> None:
        """Have the hits of another scan's only query for the i-th one; as many as there is room for."""
        n = min(self.slots.shape[1], int(other.counts[0]))
        for mine, its in (
            (self.slots, other.slots), (self.fused, other.fused), (self.cosine, other.cosine),
            (self.opposed, other.opposed),
        ):  # fmt: skip
            mine[i, :n] = its[0, :n]
        self.counts[i] = n


def bitmap(mask: npt.NDArray[np.bool_]) -> U64:
    """A bit per slot, in words of 64, from one bool per slot."""
    padded = np.zeros(-(-len(mask) // 64) * 64, np.uint8)
    padded[: len(mask)] = mask
    return np.packbits(padded, bitorder="little").view(np.uint64)
