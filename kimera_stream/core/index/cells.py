"""A coarse partition of the vectors: cells around centroids, of which a query probes a few.

For a row in a cell the angle to the query is at least the query's angle to the centroid less the cell's radius (the
largest angle of a row to the centroid). So each cell has an upper bound on the cosine of anything in it, and a result is
*proved* exact where no cell left out can hold a row that would belong to it. The bound rarely proves much in hundreds of
dimensions (``docs/performance.md`` has figures), so recall is measured as well, on queries that are scanned both ways.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kimera_stream.kernels.layout import F32

TARGET_RECALL = 0.99
"""Of the exact result, measured; below it more cells are probed."""
_CALIBRATED = 0.995
CHECK_EVERY = 128
"""One query in so many is also scanned exactly."""
_WINDOW = 64


def cell_count(rows: int, per_cell: int) -> int:
    """Cells for this many rows: each fills about half a chunk, or a larger index has up to 1,024 of them."""
    return max(8, min(1024, rows // per_cell))


def train(sample: F32, cells: int, *, rounds: int = 8, seed: int = 0) -> F32:
    """Spherical k-means: unit centroids, float32 (cells, dim). Blocking: for a worker thread."""
    rng = np.random.default_rng(seed)
    centroids = sample[rng.choice(len(sample), cells, replace=len(sample) < cells)].copy()
    for _ in range(rounds):
        nearest = _nearest(sample, centroids)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, sample)
        lengths = np.linalg.norm(sums, axis=1)
        empty = lengths < 1e-6
        sums[empty] = sample[rng.choice(len(sample), int(empty.sum()))]
        lengths[empty] = 1.0
        centroids = (sums / lengths[:, None]).astype(np.float32)
    return centroids


def _nearest(rows: F32, centroids: F32) -> npt.NDArray[np.int64]:
    parts = [(rows[i : i + 4096] @ centroids.T).argmax(axis=1) for i in range(0, len(rows), 4096)]
    return np.concatenate(parts).astype(np.int64)


@dataclass(slots=True, eq=False)
class Cells:
    """Centroids and what is known of the rows around them.

    Attributes:
        centroids: float32 (cells, dim), unit.
        closest: float32 (cells,): smallest cosine of a row to its centroid; 2 in an empty cell. Never grows back.
        probes: Cells that a query probes.
    """

    centroids: F32
    closest: F32
    probes: int
    _recalls: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _since: int = 0
    queries: int = 0
    proved: int = 0

    @classmethod
    def around(cls, centroids: F32, *, probes: int = 1) -> "Cells":
        return cls(centroids, np.full(len(centroids), 2.0, np.float32), probes)

    def __len__(self) -> int:
        return len(self.centroids)

    @property
    def recall(self) -> float | None:
        """Mean over the queries last measured; None before the first."""
        return sum(self._recalls) / len(self._recalls) if self._recalls else None

    def add(self, vector: F32) -> int:
        """The cell of a new row, its radius widened where needed."""
        cosines = self.centroids @ vector
        cell = int(cosines.argmax())
        self.closest[cell] = min(self.closest[cell], cosines[cell])
        return cell

    def bounds(self, cosines: F32) -> F32:
        """Largest cosine that a row of each cell can have with a query, from the query's cosines to the centroids."""
        angle = np.arccos(np.clip(cosines, -1, 1)) - np.arccos(np.clip(self.closest, -1, 1))
        bounds: F32 = (np.cos(np.maximum(angle, 0)) + 1e-5).astype(np.float32)
        return bounds

    def is_due(self) -> bool:
        """Whether the next query is to be measured. Count of one call per query."""
        self.queries += 1
        self._since += 1
        if self._since < CHECK_EVERY:
            return False
        self._since = 0
        return True

    def measured(self, recall: float) -> bool:
        """Note the recall of one query; returns whether more cells are probed from now on."""
        self._recalls.append(recall)
        mean = self.recall
        if mean is None or mean >= TARGET_RECALL or self.probes >= len(self):
            return False
        self.probes = min(len(self), self.probes + max(1, self.probes // 2))
        self._recalls.clear()
        return True


def is_enough(recall_by_probes: dict[int, float]) -> bool:
    """Whether the most probes tried so far reach a recall well above the target."""
    return bool(recall_by_probes) and recall_by_probes[max(recall_by_probes)] >= _CALIBRATED
