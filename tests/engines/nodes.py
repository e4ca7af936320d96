"""Several engines over one PostgreSQL in one process, and what edges do for them: hand work to whoever owns its lane."""

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
from prometheus_client import CollectorRegistry

from kimera_stream.core.conversation import ConversationMemory
from kimera_stream.core.coverage import Node
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.index import FlatIndex, SlicedIndex
from kimera_stream.core.interfaces import ContradictionEngine, IndexService, PublishResult
from kimera_stream.core.slices import lane_slice
from kimera_stream.core.vault.cluster import SqlCluster
from kimera_stream.core.vault.migrate import migrate
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.engines.backlog import Backlog
from kimera_stream.engines.cluster.keeper import CoverageKeeper
from kimera_stream.engines.cluster.scorer import SliceScorer
from kimera_stream.engines.cluster.sequencer import ClusterSequencer
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
from kimera_stream.engines.verifier import Verifier
from kimera_stream.engines.watches import WatchRegistry
from kimera_stream.engines.work import RequestId
from kimera_stream.infrastructure.settings import DatabaseSettings, Settings
from kimera_stream.protocol.errors import InternalError, OperationalError, UnavailableError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Contradiction, GeoidBody
from tests.engines.world import ANNA, DIMENSION, Encoder, SameThread
from tests.postgres import own_database, run_apart, url_of

SLICES = 8
LEASE = 1.0


def migrated_database() -> Iterator[str]:
    """URL of a migrated database of PostgreSQL; dropped at the end."""
    with own_database() as name:
        run_apart(migrate, url_of(name))
        yield url_of(name)


def database_settings() -> DatabaseSettings:
    return DatabaseSettings.model_validate({"busy_timeout": 5.0, "pool_size": 2})


@dataclass
class Heard:
    """What nodes tell each other: entries as they are announced, in any order; and that slices have changed hands."""

    by_offset: dict[int, LogEntry] = field(default_factory=dict)
    keepers: list[CoverageKeeper] = field(default_factory=list)

    def deliver(self, entries: Any) -> None:
        for entry in entries:
            assert self.by_offset.setdefault(entry.offset, entry) == entry, "one offset, two entries"

    def latest(self, channel: str, type: str, data: bytes, *, offset: int) -> None:
        pass

    def changed(self, by: CoverageKeeper) -> None:
        for keeper in self.keepers:
            if keeper is not by:
                keeper.nudge()


class Engine:
    """One engine. ``running`` runs it; cancelled, it is as good as killed: nothing is given back."""

    def __init__(
        self,
        url: str,
        name: str,
        heard: Heard,
        verifier: Verifier | None = None,
        *,
        head: PairHead | None = None,
        lease: float = LEASE,
    ) -> None:
        self.lease = lease
        self.settings = Settings()
        self.node = Node(f"{name}#{uuid4().hex[:8]}", name, "engine")
        self.vault = SqlVault(url, database_settings(), abandoned_after=2.0)
        self.store = SqlCluster(url, database_settings())
        registry = CollectorRegistry()
        self.index = SlicedIndex(
            DIMENSION,
            SLICES,
            threads=SameThread(),  # type: ignore[arg-type]
            performance=self.settings.performance,
            scoring=self.settings.scoring,
        )
        self.cache = GeoidCache(self.vault, 1_000_000)
        self.engine = CascadeEngine(
            self.index,
            self.cache,
            verifier,
            self.settings.scoring,
            SameThread(),
            registry,  # type: ignore[arg-type]
            head=head,
        )
        self.heard = heard
        self.observed: list[int] = []
        self.metrics = PipelineMetrics(registry)
        self.encoder = Encoder()
        self.moved: list[dict[int, int]] = []
        self.losses: list[tuple[int, ...]] = []

    def refused(self, numbers: Sequence[int]) -> None:
        """A commit of the scorer's was refused."""
        self.losses.append(tuple(numbers))
        self.keeper.lost(numbers)

    async def open(self) -> None:
        await self.vault.start()
        await self.store.open(SLICES)
        self.watches = watches_of(self.vault, self.engine)
        self.scorer = SliceScorer(
            self.vault,
            self.store,
            self.index,
            self.cache,
            self.engine,
            self.heard,
            node_id=self.node.id,
            position=self.vault.head,
            observe=lambda batch: self.observed.extend(entry.offset for entry in batch.entries),
            progress=lambda moved: self.moved.append(dict(moved)),
            lost=self.refused,
            ready=lambda: self.keeper.nudge(),
            sure=THRESHOLDS["precise"],
            poll=0.02,
        )
        self.keeper = CoverageKeeper(
            self.store,
            self.node,
            slices=SLICES,
            lease=self.lease,
            gain=self.scorer.gain,
            lose=self.scorer.lose,
            changed=lambda: self.heard.changed(self.keeper),
        )
        self.heard.keepers.append(self.keeper)
        self.keeper.prepare_with(self.scorer.prepare, lambda: self.scorer.filled)
        self.sequencer = ClusterSequencer(
            self.vault,
            self.index,
            self.cache,
            self.heard,
            self.watches,
            self.metrics,
            node_id=self.node.id,
            leases=lambda: self.keeper.leases,
            committed=lambda offset: self.scorer.nudge(),
            window=300.0,
            sure=THRESHOLDS["precise"],
        )
        self.pipeline = pipeline_of(self)

    @asynccontextmanager
    async def running(self, *, keep: bool = True) -> AsyncIterator["Engine"]:
        """``keep``: with its heartbeat and taking of slices."""
        await self.open()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.scorer.run, name=f"{self.node.name}:scorer")
                group.start_soon(self.pipeline.run, name=f"{self.node.name}:pipeline")
                if keep:
                    group.start_soon(self.keeper.run, name=f"{self.node.name}:keeper")
                try:
                    yield self
                finally:
                    group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self.vault.close()
                await self.store.close()


def watches_of(vault: SqlVault, engine: ContradictionEngine) -> WatchRegistry:
    return WatchRegistry(vault, engine, min_relatedness=0.4, filter_nodes=64, filter_depth=8)


def pipeline_of(made: Engine) -> Pipeline:
    queries = queries_of(made.encoder, made.index, made.cache, made.engine, made.watches)
    return Pipeline(made.vault, made.encoder, made.sequencer, queries, made.settings, made.metrics)


def queries_of(
    encoder: Encoder, index: IndexService, cache: GeoidCache, engine: ContradictionEngine, watches: WatchRegistry
) -> Queries:
    return Queries(encoder, index, cache, engine, watches, filter_nodes=64, filter_depth=8)


class Callers:
    """Hands requests to whoever owns their lane, as often as it takes, each under one request id."""

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self.acked: list[PublishResult] = []
        self.tried_again: Counter[str] = Counter()

    async def call(self, lane: str, command: Callable[[Pipeline, RequestId], Awaitable[Any]]) -> Any:
        request = RequestId(uuid4().hex, lane_slice(ANNA.id, lane, SLICES))
        while True:
            for engine in list(self.engines):
                if request.partition in engine.keeper.owned:
                    with anyio.move_on_after(2.0):
                        try:
                            return await command(engine.pipeline, request)
                        except (UnavailableError, InternalError) as error:  # another owner, or this one has died
                            self.tried_again[type(error).__name__] += 1
            await anyio.sleep(0.02)

    async def publish(self, body: GeoidBody, *, lane: str = "", key: str | None = None, **how: Any) -> PublishResult:
        result: PublishResult = await self.call(
            lane,
            lambda pipeline, request: pipeline.publish(
                body, principal=ANNA, session_id=lane or None, key=key, request=request, **how
            ),
        )
        self.acked.append(result)
        return result

    async def delete(self, geoid_id: str, *, lane: str = "") -> Any:
        return await self.outcome(
            lane,
            lambda pipeline, request: pipeline.delete(
                geoid_id, principal=ANNA, session_id=lane or None, request=request
            ),
        )

    async def resolve(self, contradiction_id: str, *, lane: str = "") -> Any:
        return await self.outcome(
            lane,
            lambda pipeline, request: pipeline.resolve(
                contradiction_id, "collapse", None, principal=ANNA, session_id=lane or None, request=request
            ),
        )

    async def outcome(self, lane: str, command: Callable[[Pipeline, RequestId], Awaitable[Any]]) -> Any:
        try:
            return await self.call(lane, command)
        except OperationalError as error:
            return error


def held_back(call: Callable[..., Awaitable[Any]]) -> tuple[Callable[..., Awaitable[Any]], anyio.Event, anyio.Event]:
    """What to put in the place of ``call`` so that it waits; whether it has come so far; and what lets it go on."""
    reached, go_on = anyio.Event(), anyio.Event()

    async def later(*args: Any, **how: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await call(*args, **how)

    return later, reached, go_on


async def until(holds: Callable[[], object]) -> None:
    """Wait until it holds."""
    while not holds():  # noqa: ASYNC110 - of several tasks, none of which tells
        await anyio.sleep(0.01)


async def scored(store: SqlCluster, upto: int) -> None:
    """Wait until every slice is scored up to there."""
    while (await store.coverage(lease=LEASE)).scored < upto:  # noqa: ASYNC110 - the database tells nobody
        await anyio.sleep(0.02)


async def open_contradictions(vault: SqlVault) -> dict[tuple[str, str], float]:
    """Score by (older, newer)."""
    found: list[Contradiction] = []
    after: int | None = 0
    while after is not None:
        page = await vault.list_contradictions(after=after, limit=1_000, state="open")
        found += page.items
        after = page.next
    assert len({frozenset((each.a, each.b)) for each in found}) == len(found), "a pair is open twice"
    return {(each.a, each.b): each.score for each in found}


async def whole_log(vault: SqlVault) -> list[LogEntry]:
    await vault.refresh()
    entries: list[LogEntry] = []
    after = 0
    while True:
        page = await vault.read(None, after=after, limit=1_000)
        entries += page.entries
        after = page.scanned
        if not page.more:
            return entries


class Reference:
    """One node alone on SQLite, told one thing at a time: what an engine among several is measured by."""

    def __init__(self, path: Path, verifier: Verifier | None = None) -> None:
        self.vault = SqlVault(f"sqlite+aiosqlite:///{path}", database_settings())
        self._verifier = verifier

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Pipeline]:
        settings = Settings()
        await self.vault.start()
        registry, threads = CollectorRegistry(), SameThread()
        index = FlatIndex(DIMENSION, threads=threads, performance=settings.performance, scoring=settings.scoring)  # type: ignore[arg-type]
        cache = GeoidCache(self.vault, 1_000_000)
        engine = CascadeEngine(index, cache, self._verifier, settings.scoring, threads, registry)  # type: ignore[arg-type]
        watches = watches_of(self.vault, engine)
        metrics, sink, backlog = PipelineMetrics(registry), Heard(), Backlog(self.vault)
        sequencer = Sequencer(
            self.vault,
            index,
            cache,
            sink,
            FieldDynamics(DIMENSION, sink, interval=1.0, head=lambda: self.vault.head),
            ConversationMemory(100, 100, 1_000.0),
            Publishing(self.vault, cache, engine, watches),
            Removals(self.vault, cache),
            metrics,
            backlog=backlog,
            late=LateWord(self.vault, cache, engine),
            verify_within=settings.scoring.verify_within,
            sure=THRESHOLDS["precise"],
        )
        encoder = Encoder()
        pipeline = Pipeline(
            self.vault, encoder, sequencer, queries_of(encoder, index, cache, engine, watches), settings, metrics
        )
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(pipeline.run, name="reference:pipeline")
                try:
                    yield pipeline
                finally:
                    group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self.vault.close()

    async def retell(self, pipeline: Pipeline, entries: list[LogEntry]) -> None:
        """Say again, one after the other, what a log says that callers said."""
        for entry in entries:
            value = entry.value()
            match entry.type:
                case "geoid.created" | "geoid.updated":
                    names = ("text", "semantic_state", "symbolic_state", "metadata", "session_id")
                    said = {name: value[name] for name in names if value.get(name)}
                    await pipeline.publish(GeoidBody(id=value["id"], **said), principal=ANNA)
                case "geoid.deleted":
                    await pipeline.delete(value["id"], principal=ANNA)
                case "contradiction.resolved":
                    for each in await self.vault.contradictions_of([value["a"]], state="open"):
                        if {each.a, each.b} == {value["a"], value["b"]}:
                            await pipeline.resolve(each.id, "collapse", None, principal=ANNA)


VALVES = ["open", "closed"]
PLACES = ["north gate", "south gate", "boiler", "pump house", "control room", "old mill"]


def statement(random: random.Random, geoid_id: str | None = None) -> GeoidBody:
    """Something that contradicts a good part of what else is said."""
    place = random.choice(PLACES)
    state = random.choice(VALVES)
    match random.randrange(3):
        case 0:
            return GeoidBody(id=geoid_id, text=f"The valve at the {place} is {state}.")
        case 1:
            return GeoidBody(
                id=geoid_id, symbolic_state={"subject": place, "valve": state, "shift": random.randrange(3)}
            )
        case _:
            return GeoidBody(
                id=geoid_id,
                text=f"The {place} runs at {random.randrange(2, 5) * 10} degrees.",
                symbolic_state={"subject": place, "mode": random.choice(["auto", "manual"])},
            )
