"""Scanning the cells that matter: which segments a query looks at, and how good the answer was. In worker threads."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kimera_stream.core.index.cells import Cells
from kimera_stream.core.index.slots import HOLE, LOOSE
from kimera_stream.kernels import Hits, Kernel, Queries, View, Weights
from kimera_stream.kernels.layout import U8, U64

_BLOCK_GAIN = 5
"""How many times cheaper a query is in a block of 32 over all rows than alone: measured."""
_BLOCK_FROM = 3
_SLACK = 32
"""Further hits taken from the 8-bit scan before the exact cosines decide, besides a quarter of k."""

Kinds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Scope:
    """What a scan sees: the rows as they were when it began."""

    kernel: Kernel
    view: View
    live: U64
    kinds: Kinds
    margin: float
    """Largest norm that a row lost to 8 bits."""


def scan_rows(scope: Scope, block: Queries, weights: Weights, k: int, select: U8 | None = None) -> Hits:
    """All rows, or those of the selected segments.

    More than k are taken from the 8-bit scan, rescored with the float32 rows, and cut off.
    """
    hits = scope.kernel.scan(
        scope.view, scope.live, block, weights, k=k + max(_SLACK, k // 4), margin=scope.margin, rescore=True,
        select=select,
    )  # fmt: skip
    return replace(hits, counts=np.minimum(hits.counts, k))


def probing_pays(cells: Cells | None, queries: int) -> bool:
    """Whether probing reads fewer rows than one pass over all of them for the block."""
    if cells is None:
        return False
    return queries < _BLOCK_FROM or cells.probes * _BLOCK_GAIN < len(cells)


def scan_cells(
    scope: Scope, cells: Cells, block: Queries, weights: Weights, k: int, *, probes: int | None = None
) -> tuple[Hits, list[bool]]:
    """The cells nearest to each query, and of the others the oppositions.

    Returns:
        The hits, and per query whether the bounds of the cells left out prove them exact.
    """
    count = cells.probes if probes is None else probes
    cosines = block.vectors @ cells.centroids.T
    parts, proofs = [], []
    for i in range(len(block)):
        one = _only(block, i)
        probed = np.zeros(len(cells), bool)
        probed[np.argpartition(-cosines[i], min(count, len(cells)) - 1)[:count]] = True
        hits = scan_rows(scope, one, weights, k, _selection(scope.kinds, probed, one))
        parts.append(hits)
        left = cells.bounds(cosines[i])[~probed & (cells.closest <= 1)]
        best = float(left.max(initial=-1.0))
        full = int(hits.counts[0]) >= k
        floor = float(hits.fused[0, k - 1]) if full else float("-inf")
        proofs.append(best < weights.min_related or best + weights.flag + weights.layer < floor)
    return _joined(parts), proofs


def recall_of(found: Hits, exact: Hits, query: int) -> float:
    """Share of a query's exact hits that were found; 1 where there are none."""
    wanted = set(exact.slots[query, : int(exact.counts[query])].tolist())
    got = set(found.slots[query, : int(found.counts[query])].tolist())
    return len(wanted & got) / len(wanted) if wanted else 1.0


def probe_measured(
    scope: Scope, cells: Cells, block: Queries, weights: Weights, k: int, due: list[int]
) -> tuple[Hits, list[bool], list[float]]:
    """Probe for every query; the due ones are scanned exactly besides, to measure."""
    hits, proofs = scan_cells(scope, cells, block, weights, k)
    recalls = []
    if due:
        exact = scan_rows(scope, block, weights, k)
        recalls = [recall_of(hits, exact, i) for i in due]
    return hits, proofs, recalls


def mean_recall(
    scope: Scope,
    cells: Cells,
    block: Queries,
    weights: Weights,
    k: int,
    probes: int,
    exact: Hits,
) -> float:
    hits, _ = scan_cells(scope, cells, block, weights, k, probes=probes)
    return sum(recall_of(hits, exact, i) for i in range(len(block))) / len(block)


def _selection(kinds: Kinds, probed: npt.NDArray[np.bool_], query: Queries) -> U8:
    """1 for segments to scan, 2 for those to look at for oppositions, 0 for the rest."""
    of_cell = np.where(probed, 1, 2 if query.keys[0] else 0)
    select = np.where(kinds == HOLE, 0, 1)
    in_cells = kinds > LOOSE
    if query.has_vector[0]:  # else there is no distance to any cell, and only symbols are looked at anyway
        select[in_cells] = of_cell[kinds[in_cells] - LOOSE - 1]
    chosen: U8 = select.astype(np.uint8)
    return chosen


def _only(block: Queries, i: int) -> Queries:
    at = slice(i, i + 1)
    return Queries(
        block.vectors[at], block.has_vector[at], block.text[at], block.keys[at], block.subjects[at], block.layers[at],
        block.record[at], block.pool, block.exclude[at],
    )  # fmt: skip


def _joined(parts: list[Hits]) -> Hits:
    width = max(part.slots.shape[1] for part in parts)
    joined = Hits.empty(len(parts), width)
    for i, part in enumerate(parts):
        n = part.slots.shape[1]
        joined.slots[i, :n], joined.fused[i, :n] = part.slots[0], part.fused[0]
        joined.cosine[i, :n], joined.opposed[i, :n] = part.cosine[0], part.opposed[0]
        joined.counts[i] = part.counts[0]
    return joined
