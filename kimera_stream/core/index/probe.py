"""The exact scan, as it runs in worker threads."""

from dataclasses import dataclass, replace

import numpy as np

from kimera_stream.kernels import Hits, Kernel, Queries, View, Weights
from kimera_stream.kernels.layout import I64, U8, U64

_SLACK = 32
"""Further hits taken from the 8-bit codes before the exact cosines decide, besides a quarter of k."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What a scan sees: the rows as they were when it began."""

    kernel: Kernel
    view: View
    live: U64
    kinds: I64
    """Of each chunk, see ``slots.py``."""
    margin: float
    """Largest norm that a row lost to 8 bits."""


def scan_rows(scope: Scope, block: Queries, weights: Weights, k: int, select: U8 | None = None) -> Hits:
    """All rows, or of the segments that ``select`` names (see ``Kernel.scan``).

    More than k are taken from the 8-bit scan, rescored with the float32 rows, and cut off.
    """
    hits = scope.kernel.scan(
        scope.view, scope.live, block, weights, k=more_than(k), margin=scope.margin, rescore=True, select=select
    )
    return replace(hits, counts=np.minimum(hits.counts, k))


def more_than(k: int) -> int:
    """Hits to take from 8-bit codes for k that are right."""
    return k + max(_SLACK, k // 4)
