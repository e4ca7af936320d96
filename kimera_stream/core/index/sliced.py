"""The index of an engine among several: one part per slice that it owns, so that slices come and go whole.

put ──> the part of the geoid's slice, if it is here          scan ──> all parts ──> the best of them
view(slices) ──> a scan of some parts: those that are equally far in the log are asked together
"""

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from kimera_stream import kernels
from kimera_stream.core.columns import SlicedColumns
from kimera_stream.core.groups import Within
from kimera_stream.core.index.flat import FlatIndex
from kimera_stream.core.index.rows import stored_of
from kimera_stream.core.interfaces import Candidate, IndexRoom, Matrix, StoredGeoid, Threads
from kimera_stream.core.slices import slice_of
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.errors import LimitExceededError


class SlicedIndex:
    """Implements ``IndexService`` over the slices that are open. Belongs to the event loop's thread, as its parts do.

    The bounds of the settings are shared evenly by all slices: an engine that is left alone with all of them stays within.

    Args:
        dimension: Length of the vectors.
        slices: How many there are in the cluster.
        directory: As for ``FlatIndex``.
    """

    def __init__(
        self,
        dimension: int,
        slices: int,
        *,
        threads: Threads,
        performance: PerformanceSettings,
        scoring: ScoringSettings,
        directory: Path | None = None,
        memory_fraction: float = 1.0,
    ) -> None:
        self.dimension = dimension
        self.slices = slices
        self._threads = threads
        self._performance = performance.model_copy(
            update={
                "max_geoids": max(1, -(-performance.max_geoids // slices)),
                "max_index_bytes": -(-performance.max_index_bytes // slices),
            }
        )
        self._scoring = scoring
        self.within: Within = scoring.compare_within
        self._directory = directory
        self._memory_fraction = memory_fraction
        scan_threads = performance.scan_threads or len(os.sched_getaffinity(0))
        self._kernel = kernels.load(scoring.kernel, threads=scan_threads)
        self._parts: dict[int, FlatIndex] = {}

    # -- which slices ----------------------------------------------------------------------------------------------

    @property
    def open_slices(self) -> frozenset[int]:
        """Those that are here, filled or being filled."""
        return frozenset(self._parts)

    def slice_of(self, geoid_id: str) -> int:
        """The slice that a geoid belongs to."""
        return slice_of(geoid_id, self.slices)

    def open(self, numbers: Iterable[int]) -> None:
        """Begin with empty parts for these slices."""
        for number in numbers:
            self._parts[number] = FlatIndex(
                self.dimension,
                threads=self._threads,
                performance=self._performance,
                scoring=self._scoring,
                directory=self._directory,
                kernel=self._kernel,
                memory_fraction=self._memory_fraction,
            )

    def close(self, numbers: Iterable[int]) -> None:
        """Forget these slices. A scan that is under way ends with what it began with."""
        for number in numbers:
            self._parts.pop(number, None)

    def part(self, number: int) -> FlatIndex | None:
        """The index of one slice, where it is here."""
        return self._parts.get(number)

    @property
    def parts(self) -> list[FlatIndex]:
        return list(self._parts.values())

    def view(self, numbers: Collection[int]) -> "SliceView":
        """Some of the slices, as what new statements are compared with."""
        return SliceView(self, frozenset(numbers))

    # -- IndexService ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return sum(part.size for part in self._parts.values())

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self._parts.values())

    def __contains__(self, geoid_id: str) -> bool:
        part = self._parts.get(self.slice_of(geoid_id))
        return part is not None and geoid_id in part

    def put(self, stored: StoredGeoid) -> None:
        """Insert or replace, where its slice is here.

        Raises:
            LimitExceededError: its slice is full and the policy is to refuse.
        """
        part = self._parts.get(self.slice_of(stored.geoid.id))
        if part is not None:
            part.put(stored)

    async def fill(self, number: int, found: SlicedColumns) -> int:
        """Put many geoids of one slice, if it is here; returns how many of them it had no room for."""
        part, refused = self._parts.get(number), 0
        if part is None:
            return 0
        await part.reserve(len(found))
        try:
            part.put_many(found.columns)
        except LimitExceededError:  # at one of them: the others one by one, as far as there is room
            for place in range(len(found)):
                try:
                    part.put(stored_of(found.columns, place))
                except LimitExceededError:
                    refused += 1
        if self.within != "all":
            for geoid_id, group in zip(found.columns.ids, found.groups, strict=True):
                part.set_group(geoid_id, group)
        return refused

    def remove(self, geoid_id: str) -> None:
        part = self._parts.get(self.slice_of(geoid_id))
        if part is not None:
            part.remove(geoid_id)

    def room(self) -> IndexRoom:
        """What is left. Of a slice that another engine owns nothing is known: its geoids are not refused here."""
        return _Rooms(self)

    async def scan(
        self,
        queries: Sequence[StoredGeoid],
        *,
        k: int,
        min_relatedness: float,
        exclude_self: bool = True,
        everywhere: bool = False,
    ) -> list[list[Candidate]]:
        """Top-k candidates per query of all open slices: by fused score, symbolic oppositions first."""
        return await self.view(self._parts).scan(
            queries, k=k, min_relatedness=min_relatedness, exclude_self=exclude_self, everywhere=everywhere
        )

    async def related(self, vectors: Matrix, *, k: int) -> list[list[Candidate]]:
        """Top-k by relatedness alone, per row, of all open slices."""
        found = [await part.related(vectors, k=k) for part in self.parts if part.size]
        return [
            sorted((each for part in found for each in part[row]), key=lambda each: -each.relatedness)[:k]
            for row in range(len(vectors))
        ]


class SliceView:
    """Implements ``Among``: pairs whose older statement belongs to one of the slices."""

    def __init__(self, index: SlicedIndex, numbers: frozenset[int]) -> None:
        self._index = index
        self._numbers = numbers

    async def scan(
        self,
        queries: Sequence[StoredGeoid],
        *,
        k: int,
        min_relatedness: float,
        exclude_self: bool = True,
        everywhere: bool = False,
    ) -> list[list[Candidate]]:
        """As ``IndexService.scan``; ranked over all of its slices as one index would rank them."""
        parts = [
            part for number in sorted(self._numbers) if (part := self._index.part(number)) is not None and part.size
        ]
        found = [
            await part.scan(
                queries, k=k, min_relatedness=min_relatedness, exclude_self=exclude_self, everywhere=everywhere
            )
            for part in parts
        ]
        if len(found) == 1:
            return found[0]
        return [
            sorted((each for part in found for each in part[row]), key=lambda each: -each.fused)[:k]
            for row in range(len(queries))
        ]

    def takes(self, older: StoredGeoid, newer: StoredGeoid) -> bool:
        """What was said after ``newer`` is compared with it when its own turn comes, by whoever owns the other."""
        return older.stated < newer.stated and self._index.slice_of(older.geoid.id) in self._numbers


class _Rooms:
    """Implements ``IndexRoom``."""

    def __init__(self, index: SlicedIndex) -> None:
        self._index = index
        self._rooms: dict[int, IndexRoom] = {}

    def refusal(self, stored: StoredGeoid) -> LimitExceededError | None:
        """Why there is no room for it; None keeps it for this one."""
        number = self._index.slice_of(stored.geoid.id)
        part = self._index.part(number)
        if part is None:
            return None
        if number not in self._rooms:
            self._rooms[number] = part.room()
        return self._rooms[number].refusal(stored)
