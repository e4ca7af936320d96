"""A node that embeds, scores and commits: work from the bus, the slices that it owns. It serves no connections."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Protocol

import anyio
import anyio.lowlevel
import msgspec
import structlog
from prometheus_client import CollectorRegistry, Gauge

from kimera_stream.api.nodes.announcing import Announcing
from kimera_stream.api.nodes.stats import ENGINE, NUMBERS
from kimera_stream.api.runtime import Drain
from kimera_stream.api.services import (
    PATIENT,
    RETENTION_INTERVAL,
    Assemble,
    Parts,
    check_encoder,
    encoder_service,
    verifier_service,
)
from kimera_stream.core.coverage import ClusterStore, Node, SliceState
from kimera_stream.core.embedding import BatchingEmbedder
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.index import SlicedIndex
from kimera_stream.core.interfaces import ContradictionEngine, EmbeddingService, IndexService, Threads
from kimera_stream.core.relay import unpack_entries
from kimera_stream.core.vault.retention import Retention
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.engines.cluster.desk import Desk
from kimera_stream.engines.cluster.keeper import CoverageKeeper
from kimera_stream.engines.cluster.leader import Leader, Relay
from kimera_stream.engines.cluster.questions import Answering
from kimera_stream.engines.cluster.scorer import SliceScorer
from kimera_stream.engines.cluster.sequencer import ClusterSequencer
from kimera_stream.engines.cluster.wire import Progress, encode
from kimera_stream.engines.field import FieldDynamics
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.engines.pipeline import Pipeline
from kimera_stream.engines.queries import Queries
from kimera_stream.engines.scores import THRESHOLDS
from kimera_stream.engines.sequencer import Sequencing
from kimera_stream.engines.verifier import CrossEncoderVerifier
from kimera_stream.engines.watches import WatchRegistry
from kimera_stream.infrastructure.bus.interface import LOG, NUDGE, PROGRESS, Bus, Lost
from kimera_stream.infrastructure.container import Container, MissingServiceError, Services
from kimera_stream.infrastructure.resources import Resources
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)

FIELD_PAGE = 1_000
"""Geoids and contradictions taken into the field at once."""


class Leading:
    """Whether this node leads; set once the leader is there, which needs whoever asks."""

    def __init__(self) -> None:
        self.leader: Leader | None = None

    def __call__(self) -> bool:
        return self.leader is not None and self.leader.leads


class Owner(Protocol):
    """What begins and ends with the slices that this engine owns."""

    async def gain(self, slices: Mapping[int, SliceState], /) -> None: ...

    async def lose(self, numbers: Sequence[int], /) -> None: ...


class Ownership:
    """Passes on what the coverage keeper says, to those who are there by then; later ones are told what was gained before."""

    def __init__(self) -> None:
        self._owners: list[Owner] = []
        self._owned: dict[int, SliceState] = {}

    async def add(self, owner: Owner) -> None:
        """From now on ``owner`` is told. Again is nothing: a service that was begun again knows better than what was gained at first
        how far its slices are."""
        if owner in self._owners:
            return
        self._owners.append(owner)
        if self._owned:
            await owner.gain(dict(self._owned))

    async def gain(self, slices: Mapping[int, SliceState]) -> None:
        self._owned |= slices
        for owner in self._owners:
            await owner.gain(slices)

    async def lose(self, numbers: Sequence[int]) -> None:
        """Last come, first told: no work is taken for slices that are not scored."""
        for number in numbers:
            self._owned.pop(number, None)
        for owner in reversed(self._owners):
            await owner.lose(numbers)


def add_engine(services: Services, settings: Settings) -> None:
    """Register what an engine has, besides encoder, cascade and verifier."""
    bus_settings, performance = settings.bus, settings.performance

    def index(threads: Threads, embedder: EmbeddingService) -> SlicedIndex:
        return SlicedIndex(
            embedder.dimension,
            bus_settings.slices,
            threads=threads,
            performance=performance,
            scoring=settings.scoring,
            directory=settings.paths.data_dir,
            memory_fraction=settings.embedding.gpu_memory_fraction,
        )

    def keeper(store: ClusterStore, node: Node, ownership: Ownership, bus: Bus) -> CoverageKeeper:
        return CoverageKeeper(
            store,
            node,
            slices=bus_settings.slices,
            lease=bus_settings.lease,
            gain=ownership.gain,
            lose=ownership.lose,
            changed=lambda: bus.publish(NUDGE, b"coverage"),
            in_contact=lambda: bus.connected,
        )

    def leader(store: ClusterStore, node: Node, retention: Retention, announcing: Announcing) -> Leader:
        return Leader(
            store, node.id, lease=bus_settings.lease, duties=(partial(retain_always, retention), announcing.lead)
        )

    def leading() -> Leading:
        return Leading()

    def announcing(bus: Bus, leading: Leading) -> Announcing:
        return Announcing(bus, leading)

    def relay(vault: SqlVault, announcing: Announcing, leading: Leading) -> Relay:
        return Relay(vault, announcing, leads=leading, lease=bus_settings.lease, poll=bus_settings.poll)

    def field(embedder: EmbeddingService, announcing: Announcing, vault: SqlVault) -> FieldDynamics:
        return FieldDynamics(
            embedder.dimension, announcing, interval=settings.stream.field_interval, head=lambda: vault.head
        )

    def scorer(
        vault: SqlVault,
        store: ClusterStore,
        index: SlicedIndex,
        cache: GeoidCache,
        engine: ContradictionEngine,
        announcing: Announcing,
        node: Node,
        field: FieldDynamics,
        keeper: CoverageKeeper,
        bus: Bus,
        registry: CollectorRegistry,
    ) -> SliceScorer:
        def progress(scored: Mapping[int, int]) -> None:
            head = max(vault.head, *scored.values())
            bus.publish(PROGRESS, encode(Progress(scored=dict(scored), head=head)))

        made = SliceScorer(
            vault,
            store,
            index,
            cache,
            engine,
            announcing,
            node_id=node.id,
            position=vault.head,
            observe=field.observe,
            progress=progress,
            lost=keeper.lost,
            ready=keeper.nudge,
            sure=THRESHOLDS["precise"],
            poll=bus_settings.poll,
            verify_within=settings.scoring.verify_within,
        )
        keeper.prepare_with(made.prepare, lambda: made.filled)
        Gauge("kimera_slices_owned", "Slices that this engine owns", registry=registry).set_function(
            lambda: made.numbers.slices
        )
        Gauge("kimera_scoring_behind", "Log entries read and not yet scored", registry=registry).set_function(
            lambda: made.numbers.behind
        )
        return made

    def sequencer(
        vault: SqlVault,
        index: SlicedIndex,
        cache: GeoidCache,
        announcing: Announcing,
        watches: WatchRegistry,
        metrics: PipelineMetrics,
        node: Node,
        keeper: CoverageKeeper,
        scorer: SliceScorer,
    ) -> ClusterSequencer:
        return ClusterSequencer(
            vault,
            index,
            cache,
            announcing,
            watches,
            metrics,
            node_id=node.id,
            leases=lambda: keeper.leases,
            committed=lambda _offset: scorer.nudge(),
            window=performance.idempotency_window,
            sure=THRESHOLDS["precise"],
        )

    def desk(bus: Bus, pipeline: Pipeline, vault: SqlVault) -> Desk:
        # Of what the intake holds at most: it refuses nothing that was taken from the bus.
        most = max(1, performance.queue_items // 2)
        return Desk(
            bus,
            pipeline,
            most=most,
            forget_after=performance.idempotency_window / 2,
            admit_write=vault.commits.admit,
        )

    def answering(bus: Bus, queries: Queries, scorer: SliceScorer, watches: WatchRegistry) -> Answering:
        return Answering(bus, queries, owned=lambda: scorer.filled, reload=watches.load)

    def metrics(registry: CollectorRegistry) -> PipelineMetrics:
        return PipelineMetrics(registry)

    services.add(Ownership, factory=Ownership)
    services.add(Leading, factory=leading)
    services.add(SlicedIndex, factory=index, also=[IndexService])
    services.add(CoverageKeeper, factory=keeper)
    services.add(Announcing, factory=announcing)
    services.add(Relay, factory=relay)
    services.add(Leader, factory=leader)
    services.add(FieldDynamics, factory=field)
    services.add(SliceScorer, factory=scorer)
    services.add(PipelineMetrics, factory=metrics)
    services.add(ClusterSequencer, factory=sequencer, also=[Sequencing])
    services.add(Desk, factory=desk)
    services.add(Answering, factory=answering)


def engine_services(parts: Parts, assembled: Assemble) -> tuple[list[ServiceSpec], list[Drain]]:
    """The services of an engine, besides those that every node has; and what a stop has to finish: the slices go to others as
    these are ready for them, then the work that was taken; what is still here after that, others take at once."""
    container = parts.container
    working = False

    async def field(service: Service) -> None:
        """Filled before the scorer is made, which takes up where the field ends."""
        await assembled(FieldDynamics)
        vault = container.get(SqlVault)
        await check_encoder(container)
        await vault.refresh()
        await assembled(SliceScorer)
        dimension = container.get(BatchingEmbedder).dimension
        await fill_field(container.get(FieldDynamics), vault, dimension, service.progress)
        service.ready()
        await container.get(FieldDynamics).run()

    async def scorer(service: Service) -> None:
        await container.get(Ownership).add(container.get(SliceScorer))
        service.ready()
        await container.get(SliceScorer).run()

    async def pipeline(service: Service) -> None:
        await assembled(Pipeline, Desk, Answering)
        await container.get(Pipeline).run(service.ready)

    async def desk(service: Service) -> None:
        await container.get(Ownership).add(container.get(Desk))
        container.get(Answering).begin()
        service.ready()
        await container.get(Desk).run()

    async def coverage(service: Service) -> None:
        nonlocal working
        working = True
        await container.get(CoverageKeeper).step()
        service.ready()
        await container.get(CoverageKeeper).run()

    async def told(service: Service) -> None:
        """What the other nodes say."""
        await assembled(Leader, Relay, PipelineMetrics)
        container.get(Leading).leader = container.get(Leader)
        service.ready()
        async with anyio.create_task_group() as group:
            group.start_soon(partial(listen, container), name="told:bus")
            group.start_soon(container.get(Leader).run, name="told:leader")
            group.start_soon(container.get(Relay).run, name="told:relay")
            group.start_soon(share_numbers, container, parts.settings.stream.stats_interval, name="told:numbers")

    specs = [
        ServiceSpec("encoder", encoder_service(container), backoff=PATIENT),
        ServiceSpec("field", field, after=("store", "encoder", "bus"), backoff=PATIENT),
        ServiceSpec("scorer", scorer, after=("field",), backoff=PATIENT),
        ServiceSpec("told", told, after=("scorer",), backoff=PATIENT),
        ServiceSpec("desk", desk, after=("pipeline",), backoff=PATIENT),
        ServiceSpec("coverage", coverage, after=("desk", "told"), backoff=PATIENT),
    ]
    before_work = ["access", "scorer"]
    try:
        container.get(CrossEncoderVerifier)
    except MissingServiceError:
        pass  # switched off, or this build carries no weights: the rules decide
    else:
        specs.append(ServiceSpec("verifier", verifier_service(container), backoff=PATIENT))
        before_work.append("verifier")
    specs.append(ServiceSpec("pipeline", pipeline, after=tuple(before_work)))

    async def hand_slices_over(_seconds: float) -> None:
        if working:
            await container.get(CoverageKeeper).retire()

    async def drain_work(_seconds: float) -> None:
        if working:
            await container.get(Desk).drain()
            await container.get(Pipeline).drain()

    async def leave(_seconds: float) -> None:
        if working:
            await container.get(CoverageKeeper).leave()

    return specs, [("slices", hand_slices_over), ("work", drain_work), ("leases", leave)]


async def fill_field(field: FieldDynamics, vault: SqlVault, dimension: int, progress: Callable[[str], None]) -> None:
    """Take in every geoid and every open contradiction of the vault.

    Raises:
        UnavailableError: the vault cannot be read.
    """
    field.clear()
    done = 0
    async for batch in vault.scan_columns(batch=FIELD_PAGE, dimension=dimension):
        field.restore(batch)
        done += len(batch)
        progress(f"{done:,} geoids in the field")
        await anyio.lowlevel.checkpoint()
    after: int | None = 0
    while after is not None:
        page = await vault.list_contradictions(after=after, limit=FIELD_PAGE, state="open")
        field.restore_contradictions(page.items)
        after = page.next


async def listen(container: Container) -> None:
    """Hear what other nodes say, until cancelled: that the log has grown, that watches or the coverage have changed."""
    scorer, keeper, relay = container.get(SliceScorer), container.get(CoverageKeeper), container.get(Relay)
    async with container.get(Bus).follow(LOG, NUDGE) as follower:
        while True:
            for each in await follower.receive():
                if each.topic == NUDGE:
                    keeper.nudge()
                    continue
                scorer.nudge()
                if isinstance(each, Lost):
                    continue
                try:
                    relay.heard(unpack_entries(each.payload))
                except msgspec.MsgspecError as error:
                    log.error("a message on the bus cannot be read", topic=each.topic, error=str(error))  # noqa: TRY400


async def share_numbers(container: Container, interval: float) -> None:
    """Tell the edges now and then what this engine does, until cancelled."""
    bus, scorer, index = container.get(Bus), container.get(SliceScorer), container.get(SlicedIndex)
    metrics, resources = container.get(PipelineMetrics), container.get(Resources)
    while True:
        numbers = metrics.numbers()
        told = {
            **asdict(scorer.numbers),
            "geoids": index.size,
            "index_bytes": index.bytes,
            "published": numbers.published,
            "contradictions": numbers.contradictions,
            "queues": resources.queues,
            "memory": resources.sample.memory,
        }
        bus.share(ENGINE, NUMBERS, encode(told))
        await anyio.sleep(interval)


async def retain_always(retention: Retention) -> None:
    """Drop what settings let go, now and then, until cancelled."""
    while True:
        try:
            await retention.run_once()
        except UnavailableError as error:
            log.warning("retention put off", error=str(error))
        await anyio.sleep(RETENTION_INTERVAL)
