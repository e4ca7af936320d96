"""The face of the kernels: checks everything the backends assume, and documents what they compute."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from kimera_stream.kernels.layout import (
    F32,
    I64,
    U8,
    U64,
    Hits,
    Queries,
    Segment,
    Weights,
    check,
    check_finite,
    stride_of,
)
from kimera_stream.kernels.reference import quantize as reference_quantize
from kimera_stream.kernels.sieving import Sieve

try:
    import kimera_stream.kernels._kernel as _kernel
except ImportError:
    _compiled: Any = None
else:
    _compiled = _kernel


class Backend(Protocol):
    """What computes. Assumes that its arguments have been checked."""

    variant: str
    threads: int

    def view(self, segments: Sequence[Segment]) -> Any: ...

    def scan(
        self,
        view: Any,
        live: U64,
        queries: Queries,
        weights: Weights,
        *,
        k: int,
        margin: float,
        rescore: bool,
        select: U8 | None,
    ) -> Hits: ...

    def sift(
        self,
        view: Any,
        live: U64,
        queries: Queries,
        weights: Weights,
        sieve: Sieve,
        *,
        k: int,
        row_slack: float,
        cell_slack: float,
        margin: float,
        rescore: bool,
    ) -> tuple[Hits, I64]: ...

    def pair_head(self, query: F32, rows: F32, extra: F32, w1: F32, b1: F32, w2: F32, b2: float) -> F32: ...

    def match(self, vector: F32, rows: F32, thresholds: F32) -> tuple[I64, F32]: ...


class View:
    """Segments made ready for one kernel. Immutable, and keeps their arrays alive."""

    def __init__(self, backend: Backend, segments: Sequence[Segment]) -> None:
        ordered = list(segments)
        for before, after in pairwise(ordered):
            if after.base < before.end:
                raise ValueError("segments: expected them in order of their slots, without overlap")
        self.count = len(ordered)
        self.end = ordered[-1].end if ordered else 0
        self.dims = {s.dim for s in ordered if s.dim is not None}
        self.strides = {s.codes.shape[1] for s in ordered if s.codes is not None}
        self.handle = backend.view(ordered)


class Kernel:
    """The scoring kernel. Every method may be called from any thread; the compiled one releases the GIL."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def variant(self) -> str:
        """Instruction set in use, or ``numpy``."""
        return self._backend.variant

    @property
    def threads(self) -> int:
        """Threads of one scan."""
        return self._backend.threads

    def view(self, segments: Sequence[Segment]) -> View:
        """Make segments ready to scan: O(segments), no copy of rows.

        Raises:
            ValueError: the segments overlap or are out of order.
        """
        return View(self._backend, segments)

    def scan(
        self,
        view: View,
        live: U64,
        queries: Queries,
        weights: Weights,
        *,
        k: int,
        margin: float = 0.0,
        rescore: bool = False,
        select: U8 | None = None,
    ) -> Hits:
        """The k best rows per query by fused score, in one pass over the rows for up to 32 queries.

        The fused score of a row whose cosine reaches ``min_related`` is ``cosine + flag * (level of the texts) + layer *
        (Jaccard distance of the semantic keys) + l1 * (scaled L1 difference)``; levels are those of ``reference.levels``.
        A symbolic opposition adds 4 and a 64th per opposed key, which puts it before all else, and needs no relatedness
        where both are about the same subject. Where one of the two has no vector and no subject, relatedness cannot be
        told: such an opposition comes after all others, scored below 0. Ties go to the lower slot.

        Args:
            view: Of this kernel.
            live: Bit per slot: rows to look at (deleted, filtered and not yet written ones are 0).
            queries: m statements, of the rows' dimension.
            weights: What makes a candidate.
            k: Hits per query at most; at least 1.
            margin: Largest norm that quantising a row lost. Where given, rows are admitted that much (and what the
                queries lost) below ``min_related``, so that none is missed; with ``rescore`` the exact cosine decides.
            rescore: Replace the cosines of the k hits by those of the float32 rows where a segment has them.

            select: uint8 per segment of the view: 0 leaves it out; 1 scans it; 2 looks only for oppositions in it, and
                reads the vectors only of rows that share a key with the query. None scans them all.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or value; the message names the argument.
        """
        if select is not None:
            check("select", select, np.uint8, (view.count,))
        self._check(view, live, queries, k, margin)
        k = min(k, max(1, view.end))
        return self._backend.scan(
            view.handle, live, queries, weights, k=k, margin=margin, rescore=rescore, select=select
        )

    def sift(
        self,
        view: View,
        live: U64,
        queries: Queries,
        weights: Weights,
        sieve: Sieve,
        *,
        k: int,
        row_slack: float,
        cell_slack: float,
        margin: float = 0.0,
        rescore: bool = False,
    ) -> tuple[Hits, I64]:
        """What ``scan`` finds without symbols, from a part of the rows: those that bounds on their cosine let through.

        The bound of a row is what the short codes give, plus ``row_slack`` times the product of what they leave out of row
        and query; a cell is opened while the bound of its centre, plus ``cell_slack`` times its spread, reaches what is
        asked for. Hits carry the same scores as those of ``scan``; what may be missed depends on the two slacks, and nothing is
        where both are large.

        Args:
            view, live, queries, weights, k, margin, rescore: As for ``scan``; records of queries are not looked at.
            sieve: Of these rows. Rows that ``live`` leaves out may have changed since it was made.
            row_slack, cell_slack: At least 0. Where a cosine above 0.35 is asked for they grow in proportion.

        Returns:
            Hits, and int64 (m,): rows read in full per query.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or value; weights of L1 or layers, or a negative flag weight.
        """
        self._check(view, live, queries, k, margin)
        if len(sieve.axes) != queries.dim:
            raise ValueError(f"sieve: expected one of {queries.dim} numbers, got {len(sieve.axes)}")
        if weights.l1 != 0 or weights.layer != 0 or weights.flag < 0:
            raise ValueError("weights: a sieve knows no L1, no layers and no flag weight below 0")
        if not (row_slack >= 0 and cell_slack >= 0):
            raise ValueError("row_slack, cell_slack: expected numbers >= 0")
        if sieve.end > min(view.end, len(live) * 64):
            raise ValueError("sieve: holds slots that the view lacks")
        return self._backend.sift(
            view.handle, live, queries, weights, sieve, k=min(k, max(1, view.end)), row_slack=row_slack,
            cell_slack=cell_slack, margin=margin, rescore=rescore,
        )  # fmt: skip

    @staticmethod
    def _check(view: View, live: U64, queries: Queries, k: int, margin: float) -> None:
        check("live", live, np.uint64, (None,))
        if len(live) * 64 < view.end:
            raise ValueError(f"live: expected a bit for each of {view.end} slots, got {len(live) * 64}")
        if view.dims - {queries.dim}:
            raise ValueError(f"queries: expected vectors of {view.dims} numbers as the rows have, got {queries.dim}")
        if view.strides - {stride_of(queries.dim)}:
            raise ValueError(f"queries: rows of codes have {view.strides} bytes, vectors of {queries.dim} need "
                             f"{stride_of(queries.dim)}")  # fmt: skip
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        if not margin >= 0:
            raise ValueError(f"margin: expected a number >= 0, got {margin}")

    def pair_head(self, query: F32, rows: F32, extra: F32, w1: F32, b1: F32, w2: F32, b2: float) -> F32:
        """Logits (n,) of the pairs (query, row i) by a two-layer network (``engines/pair_head.py``).

        Args:
            query: float32 (dim,).
            rows: float32 (n, dim).
            extra: float32 (n, extras): further features of each pair.
            w1, b1: float32 (hidden, 2 dim + extras), (hidden,): over ``|query - row|``, ``query * row``, extras; then relu.
            w2, b2: float32 (hidden,), number.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, NaN or infinity.
        """
        check("query", query, np.float32, (None,))
        dim = len(query)
        check("rows", rows, np.float32, (None, dim))
        check("extra", extra, np.float32, (len(rows), None))
        check("w1", w1, np.float32, (None, 2 * dim + extra.shape[1]))
        check("b1", b1, np.float32, (len(w1),))
        check("w2", w2, np.float32, (len(w1),))
        for name, array in (("query", query), ("rows", rows), ("extra", extra), ("w1", w1), ("b1", b1), ("w2", w2)):
            check_finite(name, array)
        if dim < 1 or len(w1) < 1:
            raise ValueError("w1: expected at least one feature and one hidden unit")
        return self._backend.pair_head(query, rows, extra, w1, b1, w2, b2)

    def match(self, vector: F32, rows: F32, thresholds: F32) -> tuple[I64, F32]:
        """The other direction: one new statement against many standing queries.

        Args:
            vector: float32 (dim,).
            rows: float32 (n, dim), a unit row per standing query.
            thresholds: float32 (n,): cosine from which each wants to know.

        Returns:
            Indices of the rows reached, ascending, and their cosines.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, or NaN in the vector or the thresholds.
        """
        check("vector", vector, np.float32, (None,))
        check_finite("vector", vector)
        if len(vector) < 1:
            raise ValueError("vector: expected at least one number")
        check("rows", rows, np.float32, (None, len(vector)))
        check("thresholds", thresholds, np.float32, (len(rows),))
        if np.isnan(thresholds).any():
            raise ValueError("thresholds: expected numbers, got NaN")
        return self._backend.match(vector, rows, thresholds)


def quantize(vectors: F32) -> tuple[U8, U8, F32]:
    """Rows to 8 bits.

    Args:
        vectors: float32 (n, dim) with elements in [-1, 1], as unit rows have.

    Returns:
        uint8 codes (n, stride) biased by 128, uint8 grades (n,), and float32 (n,): the norm of what each row lost.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, NaN, infinity, or an element beyond 1.
    """
    check("vectors", vectors, np.float32, (None, None))
    check_finite("vectors", vectors)
    n, dim = vectors.shape
    if dim < 1 or (n and float(np.abs(vectors).max()) > 1.0 + 1e-4):
        raise ValueError("vectors: expected at least one column and elements in [-1, 1]")
    if _compiled is None:
        return reference_quantize(vectors)
    codes, grades = np.empty((n, stride_of(dim)), np.uint8), np.empty(n, np.uint8)
    lost = np.empty(n, np.float32)
    _compiled.quantize(vectors, codes, grades, lost)
    return codes, grades, lost


def write_row(vector: F32, codes: U8 | None, grades: U8 | None, exact: F32 | None, row: int) -> float:
    """Write one unit vector into row ``row`` of a segment's columns; returns the norm that quantising it lost.

    The columns and their row must match (``Segment`` has checked them); only what comes from outside is checked here.

    Raises:
        ValueError: the vector is not finite.
    """
    if _compiled is not None:
        return float(_compiled.write_row(vector, codes, grades, exact, row))
    check_finite("vector", vector)
    if exact is not None:
        exact[row] = vector
    if codes is None or grades is None:
        return 0.0
    new_codes, new_grades, lost = reference_quantize(vector[None, :])
    codes[row], grades[row] = new_codes[0], new_grades[0]
    return float(lost[0])


def write_rows(vectors: F32, codes: U8 | None, grades: U8 | None, exact: F32 | None, row: int) -> float:
    """Write unit vectors (n, dim) into the rows from ``row`` on, as ``write_row`` does; returns the largest norm lost.

    Raises:
        ValueError: one of them is not finite; none is written.
    """
    if _compiled is not None:
        return float(_compiled.write_rows(vectors, codes, grades, exact, row))
    check_finite("vectors", vectors)
    if not len(vectors):
        return 0.0
    if exact is not None:
        exact[row : row + len(vectors)] = vectors
    if codes is None or grades is None:
        return 0.0
    new_codes, new_grades, lost = reference_quantize(vectors)
    codes[row : row + len(vectors)], grades[row : row + len(vectors)] = new_codes, new_grades
    return float(lost.max())
