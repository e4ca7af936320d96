"""The data of the sieve: short codes of all rows in cells, by which a query picks the rows worth reading in full.

A row's coordinates on the first principal axes are kept in 8 bits with one step per axis, and beside them the norm of
all that is left out. A query is multiplied by the steps and quantised itself, so one integer dot gives what the axes contribute
to the cosine.
"""

from dataclasses import dataclass, field

import numpy as np

from kimera_stream.kernels.layout import (
    F32,
    I8,
    I64,
    NAMED_MASK,
    NEGATED_BIT,
    NUMBERS_MASK,
    SAME,
    TEXT_BIT,
    U8,
    U32,
    check,
    check_finite,
)

LANES = 16
"""Rows side by side in packed codes; every cell starts a new group of so many."""
UNUSED = 0xFFFF_FFFF
"""Slot of a row that fills up a group."""
KINDS = 5
"""Kinds of text; this one itself is that of a cell for no row."""


SLACK_OF = 0.35
"""Cosine asked for up to which the slacks hold as they are given; beyond it they grow in proportion."""


def scaled(slack: float, bar: F32) -> F32:
    """The slack where cosines of ``bar`` are asked for."""
    grown: F32 = (slack * np.maximum(1, bar / SLACK_OF)).astype(np.float32)
    return grown


def kinds_of(text: U32) -> U8:
    """Kind of each text signature: 0 without text, else 1, and 1 more if it is negated, and 2 more if it has numbers."""
    kinds = 1 + ((text & np.uint32(NEGATED_BIT)) != 0) + 2 * ((text & np.uint32(NUMBERS_MASK)) != 0)
    return np.where(text & np.uint32(TEXT_BIT), kinds, 0).astype(np.uint8)


def most_level(kind: int, text: int) -> float:
    """The highest level (``reference.levels``) that a row of this kind may have with a query."""
    if kind in (0, KINDS) or not text & TEXT_BIT:
        return 0.0
    if (kind - 1) & 2 and text & NAMED_MASK:
        return SAME + 1.0  # its numbers may differ as well
    differs = bool((kind - 1) & 1) != bool(text & NEGATED_BIT) or bool((kind - 1) & 2 and text & NUMBERS_MASK)
    return float(differs)


def most_lifts(flag: float, text: int) -> F32:
    """The most that a query lifts rows, by their kind: float32 (KINDS + 1,). ``flag``: see ``Weights``."""
    return np.array([flag * most_level(kind, text) for kind in range(KINDS + 1)], np.float32)


def pack(rows: I8) -> I8:
    """int8 (n, dims) to (groups, dims / 4, 16, 4), the last group filled up with zeros."""
    n, dims = rows.shape
    groups = -(-n // LANES)
    full = np.zeros((groups * LANES, dims), np.int8)
    full[:n] = rows
    return np.ascontiguousarray(full.reshape(groups, LANES, dims // 4, 4).transpose(0, 2, 1, 3))


def unpack(packed: I8) -> I8:
    """int8 (groups * 16, dims): what ``pack`` packed."""
    groups, quarters = packed.shape[:2]
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3)).reshape(groups * LANES, quarters * 4)


@dataclass(frozen=True, slots=True, eq=False)
class Sieve:
    """Short codes of rows, sorted into cells. Immutable: rows that changed since are left out by the live bits of a scan.

    Attributes:
        axes: float32 (dim, dims): orthonormal columns.
        steps: float32 (dims,): of the codes, per axis.
        centres: int8 (cells / 16, dims / 4, 16, 4), packed; as codes of the same steps.
        spread: float32 (cells,): root mean square of what a cell's centre leaves out of its rows.
        kinds: uint8 (cells,): kind of the texts of the rows, see ``kinds_of``.
        starts: int64 (cells + 1,): first group of rows of each cell.
        codes: int8 (groups, dims / 4, 16, 4), packed.
        rest: uint8 (groups * 16,): norm of what the codes leave out of the row, in 255ths, rounded up.
        slots: uint32 (groups * 16,): of each row; ``UNUSED`` where it only fills up.
    """

    axes: F32
    steps: F32
    centres: I8
    spread: F32
    kinds: U8
    starts: I64
    codes: I8
    rest: U8
    slots: U32
    end: int = field(init=False)
    """Slot after the last row."""

    def __post_init__(self) -> None:
        dims, cells, groups = len(self.steps), len(self.spread), len(self.codes)
        check("axes", self.axes, np.float32, (None, dims))
        check("steps", self.steps, np.float32, (None,))
        check_finite("axes", self.axes)
        check_finite("steps", self.steps)
        if dims < 4 or dims % 4 or not (self.steps > 0).all():
            raise ValueError("steps: expected a multiple of 4 numbers above 0")
        if cells < LANES or cells % LANES:
            raise ValueError(f"spread: expected a multiple of {LANES} cells")
        check("centres", self.centres, np.int8, (cells // LANES, dims // 4, LANES, 4))
        check("spread", self.spread, np.float32, (None,))
        check("kinds", self.kinds, np.uint8, (cells,))
        check("starts", self.starts, np.int64, (cells + 1,))
        check("codes", self.codes, np.int8, (groups, dims // 4, LANES, 4))
        check("rest", self.rest, np.uint8, (groups * LANES,))
        check("slots", self.slots, np.uint32, (groups * LANES,))
        if self.starts[0] != 0 or self.starts[-1] != groups or (np.diff(self.starts) < 0).any():
            raise ValueError("starts: expected the first group of each cell, ascending from 0 to their number")
        used = self.slots[self.slots != UNUSED]
        object.__setattr__(self, "end", int(used.max()) + 1 if len(used) else 0)
        if self.kinds.max() > KINDS:
            raise ValueError(f"kinds: expected numbers from 0 to {KINDS}")
        if min(self.centres.min(), self.codes.min(initial=0)) < -127:
            raise ValueError("codes: expected numbers from -127 to 127")

    @property
    def cells(self) -> int:
        return len(self.spread)

    @property
    def bytes(self) -> int:
        """Memory of all of it."""
        arrays = (self.axes, self.centres, self.spread, self.starts, self.codes, self.rest, self.slots)
        return sum(array.nbytes for array in arrays)

    def ask(self, vectors: F32) -> tuple[I8, F32, F32]:
        """Queries as they are compared with codes: int8 (m, dims), their steps (m,), and the norms left out of them (m,)."""
        short = vectors @ self.axes
        scaled = short * self.steps
        steps = (np.maximum(np.abs(scaled).max(axis=1), 1e-12) / np.float32(127)).astype(np.float32)
        codes = np.clip(np.rint(scaled / steps[:, None]), -127, 127).astype(np.int8)
        return codes, steps, _left(vectors, short, codes * steps[:, None] / self.steps)

    def encode(self, vectors: F32) -> tuple[I8, U8]:
        """Codes int8 (n, dims) of unit rows, and the norms left out of them, uint8 (n,) in 255ths, rounded up."""
        short = vectors @ self.axes
        codes = np.clip(np.rint(short / self.steps), -127, 127).astype(np.int8)
        return codes, np.minimum(255, np.ceil(_left(vectors, short, codes * self.steps) * 255)).astype(np.uint8)


def _left(vectors: F32, short: F32, kept: F32) -> F32:
    """Norm of each vector less what is kept of it, both given by their coordinates on the axes."""
    squares = np.square(vectors).sum(axis=1) - np.square(short).sum(axis=1)
    left: F32 = np.sqrt(np.maximum(0, squares) + np.square(short - kept).sum(axis=1)).astype(np.float32)
    return left
