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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import anyio
import msgspec
import numpy as np
import numpy.typing as npt

from kimera_stream.core.columns import GeoidColumns
from kimera_stream.core.interfaces import EventSink, Vector, WriteBatch
from kimera_stream.protocol.objects import Contradiction, FieldState

MOST_CLUSTERS = 64
"""Bound of the clusters kept; a statement far from all of them then joins the nearest."""
SHOWN_CLUSTERS = 16
MOST_OPEN = 100_000
"""Open contradictions that are known one by one, some 250 bytes each, the newest; older ones go on counting in the sums."""
NEAR = 0.45
"""Cosine to a centroid at which a statement belongs to its cluster."""
TAU = 30.0
"""Seconds in which the field's energy falls to 1/e."""
CALM = 50.0
"""Changes that lift a field at rest to an activation of 1 - 1/e."""
_AT_ONCE = 4096
NO_CLUSTER = -1
"""Where statements without a vector are."""


@dataclass(slots=True)
class _Cluster:
    size: int
    exemplar: str
    """Id of the statement that founded it."""


class _Frozen(msgspec.Struct, array_like=True):
    sums: bytes
    """float32 (clusters, dim)."""
    clusters: list[tuple[int, str]]
    cluster_of: list[msgspec.Raw]
    open: list[msgspec.Raw]
    beyond: int
    pulses: float
    tension: dict[int, int]
    involved: list[msgspec.Raw]


class _Thawed(msgspec.Struct, array_like=True):
    sums: bytes
    clusters: list[tuple[int, str]]
    cluster_of: list[dict[str, int]]
    open: list[dict[str, tuple[str, str, float, int]]]
    beyond: int = 0
    pulses: float = 0.0
    """This and the rest: of all that are open, where some are not known one by one."""
    tension: dict[int, int] = {}
    involved: list[dict[str, int]] = []


def _thaw(frozen: bytes) -> _Thawed:
    try:
        return msgspec.msgpack.decode(frozen, type=_Thawed)
    except msgspec.MsgspecError as error:
        raise ValueError("field: not of this version") from error


def _pieces(items: Mapping[str, object]) -> Iterator[msgspec.Raw]:
    """A dictionary encoded in parts: the encoder holds the interpreter's lock, which the event loop waits for."""
    rest = iter(items.items())
    while piece := dict(islice(rest, _AT_ONCE)):
        yield msgspec.Raw(msgspec.msgpack.encode(piece))


class FieldDynamics:
    """The state of the field. Implements ``core.interfaces.FieldService`` and ``LogFollower``; belongs to the event loop's thread.

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
        self._beyond = 0
        """Open contradictions that are in the sums and not in ``_open``."""
        self._tension: Counter[int] = Counter()
        self._involved: Counter[str] = Counter()
        self._pulses = 0.0
        self._energy = 0.0
        self._energy_at = clock()
        self._changed = True
        self._told_at = 0
        """Of the newest value sent, unix ms."""

    # -- taking in

    def clear(self) -> None:
        """Forget everything."""
        self._sums[:] = 0.0
        self._centroids[:] = 0.0
        self._clusters = []
        self._cluster_of = {}
        self._open = {}
        self._beyond = 0
        self._tension = Counter()
        self._involved = Counter()
        self._pulses = 0.0
        self._changed = True

    def restore(self, geoids: GeoidColumns) -> None:
        """Take in statements that were there before; adds no energy. Again the same ones, when a load starts anew, do no harm.

        Unlike live ones they are placed many at a time, by the centroids as they were before them.
        """
        for geoid_id in geoids.ids:
            self._remove(geoid_id)
        self._cluster_of.update(dict.fromkeys(geoids.ids_without_vector(), NO_CLUSTER))
        ids, rows = geoids.ids_with_vector(), geoids.vectors
        placed = 0
        while placed < len(ids):
            placed += self._place_near(ids[placed:], rows[placed:])
            if placed < len(ids):
                self._place(ids[placed], rows[placed])
                placed += 1

    def _place_near(self, ids: Sequence[str], rows: npt.NDArray[np.float32]) -> int:
        """Place statements up to the first that founds a cluster; returns how many."""
        count = len(self._clusters)
        if not count:
            return 0
        cosines = rows @ self._centroids[:count].T
        nearest = cosines.argmax(axis=1)
        far = np.flatnonzero(cosines.max(axis=1) < NEAR)
        founds = count < MOST_CLUSTERS or any(not cluster.size for cluster in self._clusters)
        end = int(far[0]) if founds and len(far) else len(ids)
        members = np.zeros((count, end), np.float32)
        members[nearest[:end], np.arange(end)] = 1.0
        self._sums[:count] += members @ rows[:end]
        for place, size in enumerate(members.sum(axis=1).astype(int).tolist()):
            self._clusters[place].size += size
            self._direct(place)
        self._cluster_of.update(zip(ids, nearest[:end].tolist(), strict=False))
        return end

    def forget(self, geoid_id: str) -> None:
        """A statement is no longer held; one that is not there is no error. Adds no energy."""
        self._remove(geoid_id)
        self._changed = True

    def freeze(self) -> Callable[[], bytes]:
        """The field as it is now, to be written down by another thread: call what this returns there."""
        sums = self._sums.copy()
        clusters = [(cluster.size, cluster.exemplar) for cluster in self._clusters]
        cluster_of, opened = self._cluster_of.copy(), self._open.copy()
        beyond, pulses, tension = self._beyond, self._pulses, dict(self._tension)
        involved = dict(self._involved) if beyond else {}

        def encode() -> bytes:
            frozen = _Frozen(
                sums.tobytes(),
                clusters,
                list(_pieces(cluster_of)),
                list(_pieces(opened)),
                beyond,
                pulses,
                tension,
                list(_pieces(involved)),
            )
            return msgspec.msgpack.encode(frozen)

        return encode

    def thaw(self, frozen: bytes) -> None:
        """Take over what ``freeze`` gave, in place of everything.

        Raises:
            ValueError: it is not of this version, or of another dimension.
        """
        found = _thaw(frozen)
        sums = np.frombuffer(found.sums, np.float32)
        if sums.size != self._sums.size or len(found.clusters) > MOST_CLUSTERS:
            raise ValueError("field: of another dimension or number of clusters")
        self.clear()
        self._sums[:] = sums.reshape(self._sums.shape)
        self._clusters = [_Cluster(size, exemplar) for size, exemplar in found.clusters]
        for place in range(len(self._clusters)):
            self._direct(place)
        for piece in found.cluster_of:
            self._cluster_of.update(piece)
        for opened in found.open:
            self._open.update(opened)
        if found.beyond:
            self._beyond, self._pulses, self._tension = found.beyond, found.pulses, Counter(found.tension)
            for involved in found.involved:
                dict.update(self._involved, involved)
            return
        for a, b, strength, place in self._open.values():
            self._tension[place] += 1
            self._pulses += strength
            self._involved.update((a, b))

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
        self._direct(nearest)

    def _direct(self, place: int) -> None:
        """The centroid follows the sum."""
        length = float(np.linalg.norm(self._sums[place]))
        if length > 0:
            np.divide(self._sums[place], length, out=self._centroids[place])

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
        told = (
            contradiction.a,
            contradiction.b,
            contradiction.pulse_strength,
            self._cluster_of.get(contradiction.a, NO_CLUSTER),
        )
        before = self._open.pop(contradiction.id, None)
        if before is None and self._beyond and contradiction.state != "open":
            before = told  # one of those that are not known one by one: what its end says of it is what it said then
            self._beyond -= 1
        if before is not None:
            a, b, strength, place = before
            self._pulses -= strength
            self._tension[place] = max(0, self._tension[place] - 1)  # its cluster may be another one by now
            self._involved.subtract((a, b))
            for geoid_id in (a, b):
                if self._involved[geoid_id] <= 0:
                    del self._involved[geoid_id]
        if contradiction.state == "open":
            place = told[3]
            self._open[contradiction.id] = told
            if len(self._open) > MOST_OPEN:
                del self._open[next(iter(self._open))]
                self._beyond += 1
            self._tension[place] += 1
            self._pulses += contradiction.pulse_strength
            self._involved.update((contradiction.a, contradiction.b))
        if not self._open and not self._beyond:
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
            open_contradictions=len(self._open) + self._beyond,
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
        state = self.state()
        # Values of one offset are told apart by it, on other nodes, also where the clock was set back.
        self._told_at = max(state.updated_at, self._told_at + 1)
        told = msgspec.structs.replace(state, updated_at=self._told_at)
        self._sink.latest("field", "field.updated", msgspec.json.encode(told), offset=self._head())
        return True

    async def run(self) -> None:
        """Emit each interval until cancelled, while anything changes: an excited field goes on changing as it calms down."""
        while True:
            self._decay()
            if self._energy > 1.0 / CALM:
                self._changed = True
            self.emit()
            await anyio.sleep(self._interval)
