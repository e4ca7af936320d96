"""The whole of ``engines`` over a vault in memory and an index that compares everything: small, fast, and told to fail."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio
import msgspec
from prometheus_client import CollectorRegistry

from kimera_stream.core.access import Principal
from kimera_stream.core.conversation import ConversationMemory
from kimera_stream.core.embedding import HashingProvider
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.index.limits import Limits, Room
from kimera_stream.core.interfaces import (
    Candidate,
    IdempotencyRecord,
    LogPage,
    Matrix,
    Page,
    StoredGeoid,
    Vector,
    WriteBatch,
)
from kimera_stream.core.kept import CheckpointRequest, DeadLetter, RequestRef
from kimera_stream.engines.backlog import Backlog
from kimera_stream.engines.contradiction import CascadeEngine
from kimera_stream.engines.field import FieldDynamics
from kimera_stream.engines.late import LateWord
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.engines.pair_head import PairHead
from kimera_stream.engines.pipeline import Pipeline
from kimera_stream.engines.publishing import Publishing
from kimera_stream.engines.queries import Queries
from kimera_stream.engines.removals import Removals
from kimera_stream.engines.scores import THRESHOLDS
from kimera_stream.engines.sequencer import Sequencer
from kimera_stream.engines.symbolic import compare_states
from kimera_stream.engines.verifier import Verifier
from kimera_stream.engines.watches import WatchRegistry
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.protocol.errors import ConflictError, LimitExceededError, OperationalError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Contradiction, Geoid, Scar, Watch

T = TypeVar("T")
DIMENSION = 128
ANNA = Principal("anna", frozenset({"publish", "subscribe", "resolve"}))
BEN = Principal("ben", frozenset({"publish", "subscribe", "resolve"}))


class SameThread:
    """``Threads`` that runs at once."""

    async def run(self, purpose: str, fn: Callable[..., T], *args: Any) -> T:
        return fn(*args)


class MemoryVault:
    """What the engines ask of a vault, in dictionaries. ``faults``: raised by the next commits, one each (None: none)."""

    def __init__(self) -> None:
        self.log: list[LogEntry] = []
        self.stored: dict[str, StoredGeoid] = {}
        self.contradictions: dict[str, Contradiction] = {}
        self.scars: list[Scar] = []
        self.keys: dict[tuple[str, str], IdempotencyRecord] = {}
        self.kept_watches: dict[tuple[str, str], tuple[Watch, Vector | None]] = {}
        self.audit: list[tuple[int, str, str, str]] = []
        self.cursors: dict[tuple[str, str, str], int] = {}
        self.kept: dict[RequestRef, tuple[CheckpointRequest, int]] = {}
        """Requests and when each may be taken up."""
        self._refs = 0
        self.letters: list[DeadLetter] = []
        self.away: Exception | None = None
        """Raised by what writes requests and dead letters."""
        self.faults: list[Exception | None] = []
        self.commits: list[int] = []
        self.gate: anyio.Event | None = None
        """Commits wait for it."""

    @property
    def epoch(self) -> str:
        return "memory"

    @property
    def head(self) -> int:
        return len(self.log)

    @property
    def trimmed(self) -> int:
        return 0

    async def commit(self, batch: WriteBatch) -> None:
        await anyio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.faults:
            fault = self.faults.pop(0)
            if fault is not None:
                raise fault
        assert [entry.offset for entry in batch.entries] == [
            self.head + 1 + place for place in range(len(batch.entries))
        ], "offsets must rise by one"
        offsets = {entry.offset for entry in batch.entries}
        assert all(stored.geoid.offset in offsets for stored in batch.geoids)
        assert all(each.offset in offsets for each in [*batch.contradictions, *batch.scars])
        assert len({stored.geoid.id for stored in batch.geoids}) == len(batch.geoids)
        self.log += batch.entries
        for stored in batch.geoids:
            known = self.stored.get(stored.geoid.id)
            assert stored.geoid.version == (1 if known is None else known.geoid.version + 1)
            self.stored[stored.geoid.id] = stored
        for geoid_id, _ in batch.deleted:
            del self.stored[geoid_id]
        self.contradictions |= {each.id: each for each in batch.contradictions}
        self.scars += batch.scars
        self.keys |= {(record.principal, record.key): record for record in batch.idempotency}
        self.audit += batch.audit
        for ref in batch.settled:
            self.kept.pop(ref, None)
        self.commits.append(len(batch.entries))

    async def commit_elsewhere(self, *stored: StoredGeoid) -> None:
        """Another node was faster: the same, without telling anybody."""
        for each in stored:
            geoid = msgspec.structs.replace(each.geoid, offset=self.head + 1)
            self.log.append(
                LogEntry(
                    self.head + 1,
                    "geoid.created",
                    geoid.updated_at,
                    ("geoids", f"geoid:{geoid.id}"),
                    msgspec.Raw(msgspec.json.encode(geoid)),
                )
            )
            self.stored[geoid.id] = StoredGeoid(geoid, each.vector, each.principal)

    async def read(
        self, channel: str | None, *, after: int, limit: int, until: int | None = None, reverse: bool = False
    ) -> LogPage:
        await anyio.lowlevel.checkpoint()
        found = [entry for entry in self.log[after:] if channel is None or channel in entry.channels][:limit]
        scanned = found[-1].offset if len(found) == limit else self.head
        return LogPage(found, scanned, more=scanned < self.head)

    async def geoid(self, geoid_id: str) -> StoredGeoid | None:
        return (await self.geoids([geoid_id])).get(geoid_id)

    async def geoids(self, ids: Sequence[str]) -> dict[str, StoredGeoid]:
        await anyio.lowlevel.checkpoint()
        return {each: self.stored[each] for each in ids if each in self.stored}

    async def contradiction(self, contradiction_id: str) -> Contradiction | None:
        await anyio.lowlevel.checkpoint()
        return self.contradictions.get(contradiction_id)

    async def contradictions_of(self, geoid_ids: Sequence[str], *, state: str) -> list[Contradiction]:
        await anyio.lowlevel.checkpoint()
        wanted = set(geoid_ids)
        return [each for each in self.contradictions.values() if each.state == state and {each.a, each.b} & wanted]

    async def scar_weights(self) -> tuple[float, float]:
        return (
            sum(scar.weight for scar in self.scars if scar.vault == "a"),
            sum(scar.weight for scar in self.scars if scar.vault == "b"),
        )

    async def idempotent(self, principal: str, key: str, *, not_before: int) -> IdempotencyRecord | None:
        await anyio.lowlevel.checkpoint()
        record = self.keys.get((principal, key))
        return record if record is not None and record.created_at >= not_before else None

    async def save_checkpoint(self, items: Sequence[CheckpointRequest], *, node: str = "") -> None:
        await anyio.lowlevel.checkpoint()
        self._fail()
        for item in items:
            self._refs += 1
            self.kept["memory", self._refs] = (replace(item, ref=("memory", self._refs)), 0)

    @property
    def checkpointed(self) -> list[CheckpointRequest]:
        """What is kept, held or not."""
        return [item for item, _ in self.kept.values()]

    async def release(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._fail()
        self.kept = {ref: (item, 0) for ref, (item, _) in self.kept.items()}

    async def take_up(self, *, due: int, held_until: int, limit: int) -> list[CheckpointRequest]:
        await anyio.lowlevel.checkpoint()
        found = [item for item, not_before in self.kept.values() if not_before <= due][:limit]
        if found:
            self._fail()
        taken = [replace(item, attempts=item.attempts + 1) for item in found]
        self.kept |= {item.ref: (item, held_until) for item in taken if item.ref is not None}
        return taken

    async def put_off(self, refs: Sequence[RequestRef], *, until: int, attempts: int = 0) -> None:
        await anyio.lowlevel.checkpoint()
        self._fail()
        for ref in refs:
            if ref in self.kept:
                item = self.kept[ref][0]
                self.kept[ref] = (replace(item, attempts=item.attempts + attempts), until)

    async def settle(self, refs: Sequence[RequestRef]) -> None:
        await anyio.lowlevel.checkpoint()
        self._fail()
        for ref in refs:
            self.kept.pop(ref, None)

    async def set_aside(self, letters: Sequence[DeadLetter], *, most: int) -> int:
        await anyio.lowlevel.checkpoint()
        self._fail()
        for letter in letters:
            self.kept.pop(letter.request.ref or ("", 0), None)
        self.letters += letters
        dropped = max(0, len(self.letters) - most)
        del self.letters[:dropped]
        return dropped

    async def count_dead_letters(self) -> int:
        await anyio.lowlevel.checkpoint()
        return len(self.letters)

    def _fail(self) -> None:
        if self.away is not None:
            raise self.away

    async def save_cursor(self, principal: str, name: str, channel: str, offset: int) -> None:
        await anyio.lowlevel.checkpoint()
        self.cursors[principal, name, channel] = offset

    async def cursor(self, principal: str, name: str, channel: str) -> int | None:
        await anyio.lowlevel.checkpoint()
        return self.cursors.get((principal, name, channel))

    async def list_geoids(self, *, after: int, limit: int) -> Page[Geoid]:
        await anyio.lowlevel.checkpoint()
        found = sorted(
            (each.geoid for each in self.stored.values() if each.geoid.offset > after), key=lambda g: g.offset
        )
        return Page(found[:limit], found[limit - 1].offset if len(found) > limit else None)

    async def save_watch(
        self, watch: Watch, vector: Vector | None, *, most: int = 100, most_per_principal: int = 100
    ) -> Watch:
        former = self.kept_watches.get((watch.principal, watch.watch))
        if former is not None:
            watch = msgspec.structs.replace(watch, id=former[0].id)
        else:
            theirs = [principal for principal, _ in self.kept_watches if principal == watch.principal]
            if len(self.kept_watches) >= most or len(theirs) >= most_per_principal:
                raise LimitExceededError("watch: too many", field="watch")
        self.kept_watches[watch.principal, watch.watch] = (watch, vector)
        return watch

    async def delete_watch(self, principal: str, name: str) -> bool:
        return self.kept_watches.pop((principal, name), None) is not None

    async def watches(self) -> list[tuple[Watch, Vector | None]]:
        return list(self.kept_watches.values())

    # -- for assertions

    def open_pairs(self) -> set[frozenset[str]]:
        return {frozenset((each.a, each.b)) for each in self.contradictions.values() if each.state == "open"}

    def types(self) -> list[str]:
        return [entry.type for entry in self.log]


class PlainIndex:
    """``IndexService`` that looks at everything, and hands on ``most`` candidates per query."""

    def __init__(self, capacity: int | None = None) -> None:
        self.most: int | None = None
        self.held: dict[str, StoredGeoid] = {}
        self.limits = Limits(10**9 if capacity is None else capacity, 0, "refuse")

    @property
    def size(self) -> int:
        return len(self.held)

    @property
    def bytes(self) -> int:
        return 0

    live_bytes = bytes

    def growth(self, stored: StoredGeoid) -> tuple[int, int]:
        return int(stored.geoid.id not in self.held), 0

    def most_bytes(self, stored: StoredGeoid) -> int:
        return 0

    def room(self) -> Room:
        return Room(self.limits, self)

    def __contains__(self, geoid_id: str) -> bool:
        return geoid_id in self.held

    def put(self, stored: StoredGeoid) -> None:
        self.held[stored.geoid.id] = stored

    def remove(self, geoid_id: str) -> None:
        self.held.pop(geoid_id, None)

    async def scan(
        self,
        queries: Sequence[StoredGeoid],
        *,
        k: int,
        min_relatedness: float,
        exclude_self: bool = True,
        everywhere: bool = False,
    ) -> list[list[Candidate]]:
        await anyio.lowlevel.checkpoint()
        return [
            [
                Candidate(other.geoid.id, _cosine(query, other), _opposed(query, other), 0.0)
                for other in self.held.values()
                if other.geoid.id != query.geoid.id
            ][: self.most]
            for query in queries
        ]

    async def related(self, vectors: Matrix, *, k: int) -> list[list[Candidate]]:
        return [
            sorted(
                (
                    Candidate(each.geoid.id, float(each.vector @ row), 0, 0.0)
                    for each in self.held.values()
                    if each.vector is not None
                ),
                key=lambda candidate: -candidate.relatedness,
            )[:k]
            for row in vectors
        ]


def _cosine(a: StoredGeoid, b: StoredGeoid) -> float:
    return 0.0 if a.vector is None or b.vector is None else float(a.vector @ b.vector)


def _opposed(a: StoredGeoid, b: StoredGeoid) -> int:
    return len(compare_states(a.geoid.symbolic_state, b.geoid.symbolic_state).conflicts)


class Encoder:
    """Hashing, counting its calls; ``fault`` is raised by the next one."""

    def __init__(self) -> None:
        self._provider = HashingProvider(DIMENSION)
        self.calls: list[int] = []
        self.fault: Exception | None = None
        self.gate: anyio.Event | None = None

    @property
    def model(self) -> str:
        return self._provider.model

    @property
    def dimension(self) -> int:
        return DIMENSION

    async def embed(self, texts: Sequence[str]) -> Matrix:
        return (await self.embed_counted(texts))[0]

    async def embed_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        await anyio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        self.calls.append(len(texts))
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        return await HashingProvider(DIMENSION).encode_counted(texts)


@dataclass
class Sink:
    """Where committed entries go: checks that they come in order and once, as the hub would."""

    entries: list[LogEntry] = field(default_factory=list)
    fault: Exception | None = None

    def deliver(self, entries: Sequence[LogEntry]) -> None:
        for entry in entries:
            if self.entries and entry.offset <= self.entries[-1].offset:
                continue
            assert entry.offset == len(self.entries) + 1, "an entry was passed over"
            self.entries.append(entry)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault

    def latest(self, channel: str, type: str, data: bytes, *, offset: int) -> None:
        pass


class World:
    """Everything wired, nothing running. ``changes``: of settings, as ``performance={"queue_items": 2}``; nothing is tried again
    unless they say so."""

    def __init__(
        self,
        *,
        capacity: int | None = None,
        verifier: Verifier | None = None,
        head: PairHead | None = None,
        vault: MemoryVault | None = None,
        **changes: Any,
    ) -> None:
        performance = {"retry_within": 0.0, **changes.pop("performance", {})}
        self.settings = Settings(performance=performance, **changes)
        self.vault = MemoryVault() if vault is None else vault
        self.index = PlainIndex(capacity)
        self.encoder = Encoder()
        self.sink = Sink(list(self.vault.log))
        self.now = 1_700_000_000.0
        registry = CollectorRegistry()
        self.late_by = 0.0
        """Seconds that everything has waited longer than it has."""
        self.backlog = Backlog(self.vault)
        self.cache = GeoidCache(self.vault, 1_000_000)
        self.engine = CascadeEngine(
            self.index, self.cache, verifier, self.settings.scoring, SameThread(), registry, head=head
        )
        self.watches = WatchRegistry(
            self.vault,  # type: ignore[arg-type]
            self.engine,
            min_relatedness=self.settings.scoring.min_relatedness,
            filter_nodes=64,
            filter_depth=8,
        )
        self.field = FieldDynamics(
            DIMENSION, self.sink, interval=1.0, head=lambda: self.vault.head, clock=lambda: self.now
        )
        self.conversation = ConversationMemory(100, 100, 1_000.0)
        self.metrics = PipelineMetrics(registry)
        self.sequencer = Sequencer(
            self.vault,  # type: ignore[arg-type]
            self.index,
            self.cache,
            self.sink,
            self.field,
            self.conversation,
            Publishing(self.vault, self.cache, self.engine, self.watches),  # type: ignore[arg-type]
            Removals(self.vault, self.cache),  # type: ignore[arg-type]
            self.metrics,
            backlog=self.backlog,
            late=LateWord(self.vault, self.cache, self.engine),  # type: ignore[arg-type]
            verify_within=self.settings.scoring.verify_within,
            sure=THRESHOLDS["precise"],
            clock=lambda: self.now,
            monotonic=lambda: time.monotonic() + self.late_by,
        )
        self.queries = Queries(
            self.encoder,
            self.index,
            self.cache,
            self.engine,
            self.watches,
            filter_nodes=64,
            filter_depth=8,
            clock=lambda: self.now,
        )
        self.unwritable: OperationalError | None = None
        """What new writes are refused with."""
        self.pipeline = Pipeline(
            self.vault,  # type: ignore[arg-type]
            self.encoder,
            self.sequencer,
            self.queries,
            self.settings,
            self.metrics,
            admit_write=self._admit_write,
            clock=lambda: self.now,
        )

    def _admit_write(self) -> None:
        if self.unwritable is not None:
            raise self.unwritable

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Pipeline]:
        """The pipeline with its supervised loop, which starts again when it crashes."""
        crashes: list[Exception] = []

        async def run() -> None:
            while True:
                try:
                    await self.pipeline.run()
                except Exception as crash:
                    crashes.append(crash)

        self.crashes = crashes
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            try:
                yield self.pipeline
            finally:
                group.cancel_scope.cancel()


async def outcome(call: Any) -> Any:
    """What a call answers, or the error that it answers with."""
    try:
        return await call
    except OperationalError as error:
        return error


async def together(*calls: Any) -> list[Any]:
    """Outcomes of calls that are under way at the same time, admitted in order."""
    results: list[Any] = [None] * len(calls)

    async def one(place: int, call: Any) -> None:
        results[place] = await outcome(call)

    async with anyio.create_task_group() as group:
        for place, call in enumerate(calls):
            group.start_soon(one, place, call)
    return results


__all__ = ["ANNA", "BEN", "DIMENSION", "ConflictError", "MemoryVault", "World", "outcome", "together"]
