"""The index: an exact scan over all rows by the compiled kernel."""

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from pathlib import Path

import anyio
import numpy as np
import structlog

from kimera_stream import kernels
from kimera_stream.core.columns import GeoidColumns
from kimera_stream.core.groups import Within
from kimera_stream.core.index.device import DeviceScan
from kimera_stream.core.index.groups import Groups
from kimera_stream.core.index.limits import ID_BYTES, Limits, Room, most_state_bytes
from kimera_stream.core.index.probe import Scope
from kimera_stream.core.index.records import build_state_record
from kimera_stream.core.index.rows import checked, checked_rows, query_block, stored_of
from kimera_stream.core.index.scanning import Ways, scan_block
from kimera_stream.core.index.sieve_making import sieve_of
from kimera_stream.core.index.sifting import Sifted, sieve_numbers
from kimera_stream.core.index.slots import BARE, LOOSE, Age, Slots
from kimera_stream.core.index.snapshot import (
    Extras,
    IndexState,
    LogPoint,
    SnapshotError,
    SnapshotInfo,
    read_snapshot,
    save,
)
from kimera_stream.core.index.statistics import IndexStatistics
from kimera_stream.core.index.storage import CHUNK_BITS, CHUNK_ROWS, Chunk, RowStore, texts_at
from kimera_stream.core.index.values import ValueCodes
from kimera_stream.core.index.written import Written
from kimera_stream.core.interfaces import Candidate, Matrix, StoredGeoid, Threads
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.kernels import stride_of
from kimera_stream.protocol.errors import LimitExceededError, UnavailableError

FLAG_WEIGHT = 0.1
"""Lift of a candidate whose negations or numbers differ; five times that where both name the same numbered thing. With 0.5 for a
difference a large store is flooded: everything that holds another number or a "not" goes before what is near (ADR 0005)."""
_CHANGES = 8_192
"""Rows written or removed, at least, before a new sieve is made; and at least a thirty-second of the rows."""

log = structlog.get_logger(__name__)


class FlatIndex:
    """All live geoids, scanned exactly; implements ``IndexService``.

    ``put``, ``remove`` and the start and end of scans belong on one thread (the event loop); the scans themselves run in
    worker threads without the GIL and see the geoids as they were when they started. An update takes a new slot and
    frees the old one, so a row never changes under a reader.

    Args:
        dimension: Length of the vectors.
        threads: Where scans run.
        performance: ``max_geoids``, ``max_index_bytes``, ``index_full`` and ``scan_threads``.
        scoring: ``kernel``.
        directory: Where float32 rows are kept in unnamed mapped files; None keeps them in memory.
        on_evict: Called with the id of a geoid that the policy ``evict_oldest`` drops.
        variant: Instruction set of the kernel, for tests.
        kernel: Scans with this one and its threads, instead of one of its own.
        memory_fraction: Of a CUDA device's memory that the process may take, where the device scans.
    """

    def __init__(
        self,
        dimension: int,
        *,
        threads: Threads,
        performance: PerformanceSettings,
        scoring: ScoringSettings,
        directory: Path | None = None,
        on_evict: Callable[[str], None] | None = None,
        variant: str | None = None,
        kernel: kernels.Kernel | None = None,
        memory_fraction: float = 1.0,
    ) -> None:
        if dimension < 1:
            raise ValueError(f"dimension: expected at least 1, got {dimension}")
        self.dimension = dimension
        self._threads = threads
        self._limits = Limits(performance.max_geoids, performance.max_index_bytes, performance.index_full)
        self.on_evict = on_evict
        if kernel is None:
            scan_threads = performance.scan_threads or len(os.sched_getaffinity(0))
            kernel = kernels.load(scoring.kernel, variant=variant, threads=scan_threads)
        self._kernel = kernel
        self._rows = RowStore(directory, dimension)
        self._codes = ValueCodes()
        row = stride_of(dimension) + 1 + (4 * dimension if directory is None else 0)
        self._row_bytes = (Chunk.SMALL_BYTES, Chunk.SMALL_BYTES + row)
        self._device: DeviceScan | None = None
        if scoring.scan_device != "kernel":
            self._device = DeviceScan(
                scoring.scan_device, dimension, most_bytes=scoring.device_bytes, memory_fraction=memory_fraction
            )
        self._sieve_from = performance.sieve_from if self._device is None else 0
        self._min_related = scoring.min_relatedness
        self._within: Within = scoring.compare_within
        self._wanted = anyio.Event()
        self._reset()

    def _reset(self) -> None:
        self._slots = Slots()
        self._groups = Groups(self._within)
        self._age = Age() if self._limits.policy == "evict_oldest" else None
        self._chunks: list[Chunk] = []
        self._sifted: Sifted | None = None
        self._written: Written | None = None
        """Since the sieve in use was begun."""
        self._making: Written | None = None
        """Since the one that is being made was begun."""
        self._removed = 0
        self._fresh: dict[int, tuple[int, int]] = {}
        """Per kind, the slots of the newest chunk that were never used: from, to."""
        self._by_id: dict[str, int] = {}
        self._ids: list[str | None] = []
        self._id_chars = 0
        self._rows_and_records = 0
        """Bytes of the live geoids' rows and records."""
        self._view: kernels.View | None = None
        self._margin = 0.0
        if self._device is not None:
            self._device.attach(self._slots, self._chunks)

    # -- what is in it ---------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Live geoids."""
        return len(self._by_id)

    def __contains__(self, geoid_id: str) -> bool:
        return geoid_id in self._by_id

    @property
    def bytes(self) -> int:
        """Memory of what is held: rows in use, signatures, ids. Mapped float32 rows are not counted."""
        total = self._slots.bytes + self._codes.bytes + (self._age.bytes if self._age else 0)
        total += len(self._by_id) * ID_BYTES + self._id_chars
        total += self._groups.bytes + (self._sifted.sieve.bytes if self._sifted else 0)
        for chunk, rows in zip(self._chunks, self._used(), strict=True):
            row = Chunk.SMALL_BYTES + (0 if chunk.codes is None else chunk.codes.shape[1] + 1)
            if chunk.exact is not None and not chunk.mapped:
                row += 4 * self.dimension
            total += rows * row + chunk.pool_bytes + chunk.copied_bytes
        return total

    @property
    def live_bytes(self) -> int:
        """Of ``bytes``, those that the live geoids take."""
        return self._rows_and_records + len(self._by_id) * ID_BYTES + self._id_chars + self._codes.bytes

    @property
    def mapped_bytes(self) -> int:
        """Float32 rows in mapped files."""
        return sum(chunk.exact.nbytes for chunk in self._chunks if chunk.exact is not None and chunk.mapped)

    @property
    def statistics(self) -> IndexStatistics:
        sifted, device = self._sifted, self._device
        return IndexStatistics(
            geoids=self.size,
            capacity=self._limits.geoids,
            bytes=self.bytes,
            mapped_bytes=self.mapped_bytes,
            tombstones=self._slots.tombstones,
            evicted=self._limits.evicted,
            refused=self._limits.refused,
            policy=self._limits.policy,
            full=self._limits.lack(self.size + 1, self.live_bytes + self._limits.short) is not None,
            live_bytes=self.live_bytes,
            max_bytes=self._limits.bytes,
            kernel=self._kernel.variant,
            threads=self._kernel.threads,
            device="kernel" if device is None else device.kind,
            device_bytes=0 if device is None else device.bytes,
            device_trouble=None if device is None else device.trouble,
            **sieve_numbers(sifted),
        )

    # -- writing ---------------------------------------------------------------------------------------------------

    def put(self, stored: StoredGeoid) -> None:
        """Insert or replace.

        Raises:
            BadRequestError: the vector has another dimension or is not finite; nothing has changed.
            LimitExceededError: the index is full and its policy is to refuse.
        """
        geoid, vector = stored.geoid, stored.vector
        if vector is not None:
            vector = checked(vector, self.dimension)
        if self._limits.may_lack(len(self._by_id), self.live_bytes):
            self._make_room_for(stored)
        old = self._by_id.get(geoid.id)
        slot = self._take(BARE if vector is None else LOOSE)
        chunk, row = self._chunks[slot >> CHUNK_BITS], slot & (CHUNK_ROWS - 1)
        record = build_state_record(geoid.symbolic_state, geoid.semantic_state, self._codes, store=True)
        lost, replaced = chunk.write(row, vector, kernels.text_signature(geoid.text), record)
        self._margin = max(self._margin, lost)
        if replaced:
            self._view = None
        self._groups.put(slot, stored)
        self._ids[slot] = geoid.id
        self._by_id[geoid.id] = slot
        self._id_chars += len(geoid.id) if old is None else 0
        if vector is not None:
            self._note(slot)
        self._slots.publish(slot)
        self._rows_and_records += self._slot_bytes(chunk, row)
        if self._age is not None:
            self._age.append(slot)
        if old is not None:
            self._free(old)

    def remove(self, geoid_id: str) -> None:
        """Forget a geoid; one that is not there is no error."""
        slot = self._by_id.pop(geoid_id, None)
        if slot is not None:
            self._id_chars -= len(geoid_id)
            self._free(slot)

    def put_many(self, columns: GeoidColumns) -> None:
        """As ``put`` of each in turn, a hundred times as fast: rows are written many at a time.

        Raises:
            BadRequestError: a vector has another dimension or is not finite; nothing has changed.
            LimitExceededError: the index is full and its policy is to refuse; those before are in it.
        """
        vectors = checked_rows(columns.vectors, self.dimension)
        if self._limits.may_lack(len(self._by_id) + len(columns), self.live_bytes + self._most_bytes_of(columns)):
            for place in range(len(columns)):
                self.put(stored_of(columns, place))
            return
        old = [slot for each in columns.ids if (slot := self._by_id.get(each)) is not None]
        text = kernels.text_signatures(columns.texts)
        records = [
            build_state_record(state, layers, self._codes, store=True) if state or layers else kernels.EMPTY_RECORD
            for state, layers in zip(columns.symbols, columns.layers, strict=True)
        ]
        slots = np.empty(len(columns), np.int64)
        for kind, places in ((LOOSE, np.flatnonzero(columns.has_vector)), (BARE, np.flatnonzero(~columns.has_vector))):
            done = 0
            while done < len(places):
                slot, count = self._take_run(kind, len(places) - done)
                part = places[done : done + count]
                rows = None if kind == BARE else vectors[done : done + count]
                chunk, row = self._chunks[slot >> CHUNK_BITS], slot & (CHUNK_ROWS - 1)
                lost, replaced = chunk.write_many(row, rows, text[part], [records[place] for place in part.tolist()])
                self._margin = max(self._margin, lost)
                self._view = None if replaced else self._view
                self._rows_and_records += count * self._row_bytes[kind != BARE]
                slots[part] = np.arange(slot, slot + count)
                done += count
        self._rows_and_records += 8 * sum(len(record.words) for record in records)
        self._id_chars += sum(map(len, columns.ids)) - sum(len(self._ids[slot] or "") for slot in old)
        self._publish_many(columns, slots.tolist())
        for slot in old:
            self._free(slot)

    def _publish_many(self, columns: GeoidColumns, slots: list[int]) -> None:
        for geoid_id, slot in zip(columns.ids, slots, strict=True):
            self._ids[slot] = geoid_id
        self._by_id.update(zip(columns.ids, slots, strict=True))
        for slot in compress(slots, columns.has_vector.tolist()):
            self._note(slot)
        self._slots.publish_many(slots)
        if self._age is not None:
            for slot in slots:
                self._age.append(slot)

    def clear(self) -> None:
        """Forget everything. No scan or snapshot may be running."""
        self._codes = ValueCodes()
        self._reset()

    async def prepare(self) -> None:
        """Have what is held where it is scanned: on the device, if there is one. A scan would do it as well."""
        if self._device is not None:
            await self._threads.run("score", self._device.prepare)

    async def reserve(self, geoids: int = 1) -> None:
        """Have files for the vectors of so many further geoids at hand; scans do this for the next ones by themselves.

        Without a file at hand a put keeps its vectors in memory instead: it never waits for a disk.
        """
        for _ in range(self._rows.missing(1 + geoids // CHUNK_ROWS)):
            try:
                await self._threads.run("io", self._rows.make)
            except UnavailableError as error:
                log.warning("vectors go into memory instead of files", reason=error.message)
                return

    def room(self) -> Room:
        """What is left for geoids that are put later."""
        return Room(self._limits, self)

    def _make_room_for(self, stored: StoredGeoid) -> None:
        met = False
        while True:
            geoids, growth = self.growth(stored)
            lack = self._limits.lack(self.size + geoids, self.live_bytes + growth)
            if lack is None:
                break
            met = True
            self._limits.met(self.size, self.live_bytes, growth)
            if self._age is None or self._age.oldest is None:
                self._limits.refused += 1
                raise LimitExceededError(lack)
            oldest = self._ids[self._age.oldest]
            assert oldest is not None
            self.remove(oldest)
            self._limits.evicted += 1
            if self.on_evict is not None:
                self.on_evict(oldest)
        if not met:
            self._limits.eased()

    def growth(self, stored: StoredGeoid) -> tuple[int, int]:
        """By how many geoids, and bytes at most, the index grows when this one is put."""
        most = self.most_bytes(stored)
        old = self._by_id.get(stored.geoid.id)
        if old is None:
            return 1, most
        chunk, row = self._chunks[old >> CHUNK_BITS], old & (CHUNK_ROWS - 1)
        return 0, most - self._slot_bytes(chunk, row) - ID_BYTES - len(stored.geoid.id)

    def most_bytes(self, stored: StoredGeoid) -> int:
        """Bytes that a geoid takes at most."""
        geoid = stored.geoid
        states = most_state_bytes(geoid.symbolic_state, geoid.semantic_state)
        return self._row_bytes[stored.vector is not None] + ID_BYTES + len(geoid.id) + states

    def _most_bytes_of(self, columns: GeoidColumns) -> int:
        """Bytes that they take at most."""
        states = zip(columns.symbols, columns.layers, strict=True)
        return (
            len(columns) * (self._row_bytes[True] + ID_BYTES)
            + sum(map(len, columns.ids))
            + sum(most_state_bytes(state, layers) for state, layers in states if state or layers)
        )

    def _slot_bytes(self, chunk: Chunk, row: int) -> int:
        at = int(chunk.record[row])
        words = kernels.record_length(int(chunk.pool[at])) if at else 0
        return self._row_bytes[chunk.codes is not None] + 8 * words

    def _take(self, kind: int) -> int:
        slot = self._slots.reuse(kind)
        return self._take_run(kind, 1)[0] if slot is None else slot

    def _take_run(self, kind: int, most: int) -> tuple[int, int]:
        """Consecutive slots of one chunk that were never used: the first, and how many, ``most`` at most."""
        start, end = self._fresh.get(kind, (0, 0))
        if start == end:
            codes, exact, mapped = (None, None, False) if kind == BARE else self._rows.take()
            start = self._slots.add_chunk(kind)
            end = start + CHUNK_ROWS
            self._chunks.append(Chunk(start, codes, exact, mapped=mapped))
            self._ids += [None] * CHUNK_ROWS
            self._view = None
        count = min(most, end - start)
        self._fresh[kind] = (start + count, end)
        return start, count

    def _free(self, slot: int) -> None:
        chunk, row = self._chunks[slot >> CHUNK_BITS], slot & (CHUNK_ROWS - 1)
        self._rows_and_records -= self._slot_bytes(chunk, row)
        at = int(chunk.record[row])
        if at:
            for code in kernels.record_codes(chunk.pool, at):
                self._codes.drop(code)
            chunk.forget(row)
        if self._age is not None:
            self._age.remove(slot)
        self._removed += 1
        self._slots.release(slot)
        if chunk.garbage > 4096 and chunk.garbage > chunk.used // 2:
            chunk.compact(self._slots.chunk_live(chunk.base))
            self._view = None

    def _used(self) -> list[int]:
        """Rows of each chunk that were ever used."""
        used = [CHUNK_ROWS] * len(self._chunks)
        for start, end in self._fresh.values():
            used[end - 1 >> CHUNK_BITS] -= end - start
        return used

    # -- snapshots -------------------------------------------------------------------------------------------------

    @contextmanager
    def frozen(self) -> Iterator[IndexState]:
        """The index as it is now, while scans and puts go on; whoever holds it keeps freed slots from being used again."""
        with self._slots.pin() as bits:
            yield IndexState(
                margin=self._margin,
                bits=bits,
                ids=self._ids.copy(),
                values=self._codes.copy(),
                order=None if self._age is None else self._age.copy(),
                chunks=[copy.copy(chunk) for chunk in self._chunks],
                used=self._used(),
                kinds=list(self._slots.kinds),
            )

    async def save(self, path: Path, *, model: str, point: LogPoint) -> SnapshotInfo:
        """Write what is there now, while scans and puts go on; see ``snapshot.save``."""
        with self.frozen() as state:
            return await save(path, state, threads=self._threads, dimension=self.dimension, model=model, point=point)

    async def load(self, path: Path, *, model: str, epoch: str | None) -> tuple[SnapshotInfo, Extras]:
        """Take over a snapshot; returns what it covers, and its extras. Then put what the log holds after its offset.

        Raises:
            SnapshotError: there is none, or it is damaged, or foreign: rebuild from the vault. The index is unchanged.
            RuntimeError: the index is not empty.
            LimitExceededError: the snapshot holds more than the index may.
        """
        if self._chunks:
            raise RuntimeError("load: expected an empty index")
        read = partial(read_snapshot, rows=self._rows, dimension=self.dimension, model=model, epoch=epoch)
        found = await self._threads.run("io", read, path)
        lack = self._limits.lack(found.info.geoids, 0)
        if lack is not None:
            raise LimitExceededError(lack)
        if self._age is not None and found.state.order is None:
            raise SnapshotError(
                "foreign", f"{path.name}: written under another policy, it does not say which is oldest"
            )
        by_id = await self._threads.run("io", found.state.slots_by_id)
        self._adopt(found.state, by_id)
        return found.info, found.extras

    def _adopt(self, state: IndexState, by_id: dict[str, int]) -> None:
        self._slots = Slots.restored(state.kinds, state.bits, state.used)
        self._chunks = state.chunks
        self._ids = state.ids
        self._by_id = by_id
        self._id_chars = sum(map(len, by_id))
        self._margin = state.margin
        self._codes.restore(state.values)
        self._rows_and_records = sum(
            chunk.live_bytes(self._slots.chunk_live(chunk.base), self._row_bytes[chunk.codes is not None])
            for chunk in state.chunks
        )
        for i, (kind, used) in enumerate(zip(state.kinds, state.used, strict=True)):
            if used < CHUNK_ROWS:
                self._fresh[kind] = (i * CHUNK_ROWS + used, (i + 1) * CHUNK_ROWS)
        if self._age is not None:
            assert state.order is not None
            self._age = state.order
        self._view = None
        if self._device is not None:
            self._device.attach(self._slots, self._chunks)

    # -- the sieve -------------------------------------------------------------------------------------------------

    def _note(self, slot: int) -> None:
        is_small = self._sieve_from == 0 or len(self._by_id) < self._sieve_from
        if is_small and self._written is None and self._making is None:
            return  # most puts of most indexes end here
        for written in (self._written, self._making):
            if written is not None:
                written.mark(slot)
        if not self._wanted.is_set() and self._sieve_is_due():
            self._wanted.set()

    def _sieve_is_due(self) -> bool:
        if self._sieve_from == 0 or self._making is not None or self.size < self._sieve_from:
            return False
        if self._sifted is None or self._written is None:
            return True
        return self._written.marks + self._removed > max(_CHANGES, self._sifted.rows // 32)

    async def keep_sieve(self) -> None:
        """Make a sieve once the index is large enough for it, and again as it changes; runs until cancelled."""
        while True:
            if self._sieve_is_due():
                await self.make_sieve()
            if self._sifted is None or not self._sieve_is_due():
                self._wanted = anyio.Event()
                await self._wanted.wait()

    async def make_sieve(self, *, k: int = 64) -> IndexStatistics:
        """Have scans go through a sieve of all rows there are now, while scans and puts go on.

        Rows that the last sieve has go into the new one as they are, unless there are twice as many as it was made for.

        Args:
            k: Hits to calibrate with.
        """
        began, making, removed = time.monotonic(), Written(), self._removed
        self._making = making
        try:
            with self._pinned() as scope:
                written = self._written
                made = await sieve_of(
                    scope, [chunk for chunk in self._chunks if chunk.exact is not None], self.size,
                    former=self._sifted, fresh=None if written is None else written.copy(len(scope.live)),
                    threads=self._threads, weights=kernels.Weights(min_related=self._min_related, flag=FLAG_WEIGHT), k=k,
                )  # fmt: skip
        except BaseException:
            self._making = None
            raise
        if self._making is not making:
            return self.statistics  # cleared meanwhile
        self._sifted, self._written, self._making = made, making, None
        self._removed -= removed
        if made is not None:
            log.info(
                "sieve made", rows=made.rows, cells=made.sieve.cells, row_slack=round(made.row_slack, 3),
                cell_slack=round(made.cell_slack, 3), seconds=round(time.monotonic() - began, 1),
            )  # fmt: skip
            if not made.is_trusted:
                log.warning("the sieve lets through too much: scans stay exact")
        return self.statistics

    # -- reading ---------------------------------------------------------------------------------------------------

    def set_group(self, geoid_id: str, group: str | None) -> None:
        """The group of a geoid that was not put by ``put``: snapshots and columns do not tell it."""
        slot = self._by_id.get(geoid_id)
        if slot is not None:
            self._groups.note(slot, group)

    async def scan(
        self,
        queries: Sequence[StoredGeoid],
        *,
        k: int,
        min_relatedness: float,
        exclude_self: bool = True,
        everywhere: bool = False,
    ) -> list[list[Candidate]]:
        """Top-k candidates for a contradiction per query: by fused score, symbolic oppositions first. By setting they are of
        the query's own group (``core.groups``), unless they are asked for ``everywhere``; such a scan is always exact.

        An opposition about the same subject needs no relatedness. Where it cannot be told whether two states are about
        the same thing (no subject on one side, no vector on one side), an opposition comes last, scored below 0.

        Raises:
            BadRequestError: a query's vector has another dimension or is not finite.
        """
        if not queries:
            return []
        await self.reserve()  # before codes are looked up: from there to the pin nothing may be put
        block = query_block(queries, self.dimension, self._codes, self._by_id if exclude_self else {})
        groups = None if everywhere else self._groups.wanted(queries)
        return await self._run(block, kernels.Weights(min_related=min_relatedness, flag=FLAG_WEIGHT), k, groups)

    async def related(self, vectors: Matrix, *, k: int) -> list[list[Candidate]]:
        """Top-k by relatedness alone, per row.

        Raises:
            BadRequestError: the vectors have another dimension or are not finite.
        """
        if len(vectors) == 0:
            return []
        await self.reserve()
        return await self._run(kernels.Queries.build(checked_rows(vectors, self.dimension)), kernels.Weights(), k)

    @contextmanager
    def _pinned(self) -> Iterator[Scope]:
        with self._slots.pin() as live:
            if self._view is None:
                self._view = self._kernel.view([chunk.segment() for chunk in self._chunks])
            yield Scope(self._kernel, self._view, live, np.array(self._slots.kinds, np.int64), self._margin)

    async def _run(
        self, block: kernels.Queries, weights: kernels.Weights, k: int, groups: Sequence[int] | None = None
    ) -> list[list[Candidate]]:
        """``groups``: of each query; None: all rows are looked at."""
        ways = Ways(self._device, self._sifted, self._written, self._groups.numbers)
        with self._pinned() as scope:
            hits = await scan_block(self._threads, scope, ways, groups, block, weights, k)
            return [self._candidates(hits, i, int(block.text[i])) for i in range(len(block))]

    def _candidates(self, hits: kernels.Hits, query: int, text: int) -> list[Candidate]:
        """Names for slots. Slots keep their id and text until they are written again, which the pin holds off."""
        slots = hits.slots[query, : int(hits.counts[query])]
        n, named = len(slots), [False] * len(slots)
        if text & kernels.NAMED_MASK:  # few texts name anything
            named = kernels.same_names(text, texts_at(self._chunks, slots)).tolist()
        candidates = []
        rows = zip(slots.tolist(), hits.cosine[query, :n].tolist(), hits.opposed[query, :n].tolist(),
                   hits.fused[query, :n].tolist(), named, strict=True)  # fmt: skip
        for slot, cosine, opposed, fused, same in rows:
            geoid_id = self._ids[slot]
            if geoid_id is not None and geoid_id in self._by_id:  # else deleted since the scan began
                candidates.append(Candidate(geoid_id, max(-1.0, min(1.0, cosine)), opposed, fused, same))
        return candidates
