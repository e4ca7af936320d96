"""Cognitive field dynamics: what all statements together look like, kept up to date as entries are committed.

After KIMERA's field: statements that mean alike gather in clusters; contradictions heat the field; activity excites it and
decays. Everything is incremental: a commit costs one product with the clusters' centroids per statement.

* ``entropy``: Shannon entropy (bits) of how the statements spread over the clusters.
* ``temperature``: summed pulse strength of the open contradictions per hundred statements; 0 in a field at peace.
* ``activation``: ``1 - exp(-e)`` of an energy ``e`` to which every change adds ``1 / CALM`` and which decays with ``TAU``.
* ``stability``: share of the statements that take part in no open contradiction.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import anyio
import msgspec
import numpy as np
import numpy.typing as npt

from kimera_stream.core.interfaces import EventSink, StoredGeoid, Vector, WriteBatch
from kimera_stream.protocol.objects import Contradiction, FieldState

MOST_CLUSTERS = 64
"""Bound of the clusters kept; a statement far from all of them then joins the nearest."""
SHOWN_CLUSTERS = 16
NEAR = 0.45
"""Cosine to a centroid at which a statement belongs to its cluster."""
TAU = 30.0
"""Seconds in which the field's energy falls to 1/e."""
CALM = 50.0
"""Changes that lift a field at rest to an activation of 1 - 1/e."""
NO_CLUSTER = -1
"""Where statements without a vector are."""


@dataclass(slots=True)
class _Cluster:
    size: int
    exemplar: str
    """Id of the statement that founded it."""


class FieldDynamics:
    """The state of the field. Implements ``core.interfaces.FieldService``; belongs to the event loop's thread.

    Args:
        dimension: Length of the vectors.
        sink: Where ``field.updated`` goes.
        interval: Seconds between two values, if anything changed.
        head: The log's newest offset, which a value reflects.
        clock: Unix seconds.
    """

    def __init__(
        self,
        dimension: int,
        sink: EventSink,
        *,
        interval: float,
        head: Callable[[], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sink = sink
        self._interval = interval
        self._head = head
        self._clock = clock
        self._sums: npt.NDArray[np.float32] = np.zeros((MOST_CLUSTERS, dimension), np.float32)
        self._centroids: npt.NDArray[np.float32] = np.zeros((MOST_CLUSTERS, dimension), np.float32)
        self._clusters: list[_Cluster] = []
        self._cluster_of: dict[str, int] = {}
        self._open: dict[str, tuple[str, str, float, int]] = {}
        """By contradiction: the pair, the pulse's strength, the cluster in which it was found."""
        self._tension: Counter[int] = Counter()
        self._involved: Counter[str] = Counter()
        self._pulses = 0.0
        self._energy = 0.0
        self._energy_at = clock()
        self._changed = True

    # -- taking in

    def restore(self, geoids: Iterable[StoredGeoid]) -> None:
        """Take in statements that were there before; adds no energy. Again the same ones, when a load starts anew, do no harm."""
        for stored in geoids:
            self._remove(stored.geoid.id)
            self._place(stored.geoid.id, stored.vector)

    def restore_contradictions(self, contradictions: Iterable[Contradiction]) -> None:
        """Take in open contradictions that were there before."""
        for contradiction in contradictions:
            self._set_contradiction(contradiction)

    def observe(self, batch: WriteBatch) -> None:
        """Take in what has just been committed."""
        for stored in batch.geoids:
            self._remove(stored.geoid.id)
            self._place(stored.geoid.id, stored.vector)
        for geoid_id, _ in batch.deleted:
            self._remove(geoid_id)
        for contradiction in batch.contradictions:
            self._set_contradiction(contradiction)
        self._decay()
        self._energy += len(batch.entries) / CALM
        self._changed = True

    def _place(self, geoid_id: str, vector: Vector | None) -> None:
        if vector is None:
            self._cluster_of[geoid_id] = NO_CLUSTER
            return
        count = len(self._clusters)
        nearest, cosine = NO_CLUSTER, -1.0
        if count:
            cosines = self._centroids[:count] @ vector
            nearest = int(cosines.argmax())
            cosine = float(cosines[nearest])
        if cosine < NEAR and (place := self._vacancy()) is not None:
            nearest = place
            self._sums[nearest] = 0.0
            self._clusters[nearest] = _Cluster(0, geoid_id)
        self._clusters[nearest].size += 1
        self._cluster_of[geoid_id] = nearest
        self._sums[nearest] += vector
        length = float(np.linalg.norm(self._sums[nearest]))
        if length > 0:
            np.divide(self._sums[nearest], length, out=self._centroids[nearest])

    def _vacancy(self) -> int | None:
        if len(self._clusters) < MOST_CLUSTERS:
            self._clusters.append(_Cluster(0, ""))
            return len(self._clusters) - 1
        return next((place for place, cluster in enumerate(self._clusters) if not cluster.size), None)

    def _remove(self, geoid_id: str) -> None:
        place = self._cluster_of.pop(geoid_id, None)
        if place is None or place == NO_CLUSTER:
            return
        # The centroid keeps the direction it has: without the vector at hand it is shortened, not turned.
        cluster = self._clusters[place]
        self._sums[place] *= (cluster.size - 1) / cluster.size
        cluster.size -= 1

    def _set_contradiction(self, contradiction: Contradiction) -> None:
        before = self._open.pop(contradiction.id, None)
        if before is not None:
            a, b, strength, place = before
            self._pulses -= strength
            self._tension[place] -= 1
            self._involved.subtract((a, b))
            for geoid_id in (a, b):
                if self._involved[geoid_id] <= 0:
                    del self._involved[geoid_id]
        if contradiction.state == "open":
            place = self._cluster_of.get(contradiction.a, NO_CLUSTER)
            self._open[contradiction.id] = (contradiction.a, contradiction.b, contradiction.pulse_strength, place)
            self._tension[place] += 1
            self._pulses += contradiction.pulse_strength
            self._involved.update((contradiction.a, contradiction.b))
        if not self._open:
            self._pulses = 0.0  # no rounding is carried on from a field at peace

    def _decay(self) -> None:
        now = self._clock()
        self._energy *= math.exp(-max(0.0, now - self._energy_at) / TAU)
        self._energy_at = now

    # -- giving out

    def state(self) -> FieldState:
        """The field as of now."""
        self._decay()
        count = len(self._cluster_of)
        sizes = [cluster.size for cluster in self._clusters if cluster.size]
        total = sum(sizes)
        entropy = -sum(size / total * math.log2(size / total) for size in sizes) if total else 0.0
        largest = sorted(range(len(self._clusters)), key=lambda place: -self._clusters[place].size)[:SHOWN_CLUSTERS]
        return FieldState(
            geoids=count,
            open_contradictions=len(self._open),
            entropy=max(0.0, entropy),
            temperature=100.0 * max(0.0, self._pulses) / count if count else 0.0,
            activation=1.0 - math.exp(-self._energy),
            stability=1.0 - min(1.0, len(self._involved) / count) if count else 1.0,
            clusters=[
                {
                    "id": place,
                    "size": self._clusters[place].size,
                    "exemplar": self._clusters[place].exemplar,
                    "open_contradictions": self._tension[place],
                }
                for place in largest
                if self._clusters[place].size
            ],
            updated_at=int(self._clock() * 1000),
        )

    def emit(self) -> bool:
        """Send ``field.updated`` if anything has changed since the last one; whether it did."""
        if not self._changed:
            return False
        self._changed = False
        self._sink.latest("field", "field.updated", msgspec.json.encode(self.state()), offset=self._head())
        return True

    async def run(self) -> None:
        """Emit each interval until cancelled, while anything changes: an excited field goes on changing as it calms down."""
        while True:
            self._decay()
            if self._energy > 1.0 / CALM:
                self._changed = True
            self.emit()
            await anyio.sleep(self._interval)
