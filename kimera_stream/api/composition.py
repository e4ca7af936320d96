"""The composition root: every service, what it needs, and how it is supervised. Nothing else resolves.

Two steps, because the streaming core starts where the log ends: the ground (``_ground``) is built at once, without waiting for
anything; what stands on the log's position (``_upon_the_log``) is built by the supervised services once the vault is there.
"""

import platform
from functools import partial
from importlib import resources
from importlib.metadata import version

import structlog
from prometheus_client import CollectorRegistry

from kimera_stream import __version__, kernels
from kimera_stream.api.auth import TokenAuthenticator
from kimera_stream.api.auth.revoking import Revoking
from kimera_stream.api.http.door import HttpDoor
from kimera_stream.api.runtime import Runtime
from kimera_stream.api.services import Parts, service_specs
from kimera_stream.api.stats import StatsService
from kimera_stream.api.websocket import StreamEndpoint
from kimera_stream.core.access import Authenticator
from kimera_stream.core.conversation import ConversationMemory
from kimera_stream.core.embedding import BatchingEmbedder, make_provider
from kimera_stream.core.embedding.hashing import FEATURES
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.index import FlatIndex, SnapshotKeeper
from kimera_stream.core.index.records import KEY_HASHES
from kimera_stream.core.index.values import SHORT_VALUES
from kimera_stream.core.interfaces import (
    ContradictionEngine,
    EmbeddingService,
    FieldService,
    IndexService,
    KnowledgeService,
    LogReader,
    Threads,
    VaultService,
)
from kimera_stream.core.vault.retention import Retention
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.engines.backlog import Backlog
from kimera_stream.engines.contradiction import CascadeEngine
from kimera_stream.engines.evidence.lexicon import STEMS
from kimera_stream.engines.evidence.reading import read
from kimera_stream.engines.field import FieldDynamics
from kimera_stream.engines.late import LateReader, LateWord
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.engines.pair_head import PairHead
from kimera_stream.engines.pipeline import Pipeline
from kimera_stream.engines.publishing import Publishing
from kimera_stream.engines.queries import Queries
from kimera_stream.engines.removals import Removals
from kimera_stream.engines.scores import THRESHOLDS
from kimera_stream.engines.sequencer import Sequencer, Sequencing
from kimera_stream.engines.verifier import CrossEncoderVerifier
from kimera_stream.engines.verifier_marks import WORDS
from kimera_stream.engines.watches import WatchRegistry
from kimera_stream.infrastructure.container import Container, Services
from kimera_stream.infrastructure.database import CommitCollector
from kimera_stream.infrastructure.resources import Resources
from kimera_stream.infrastructure.settings import Settings, access_is_open, database_url, node_name
from kimera_stream.infrastructure.telemetry import Metrics, Tracing, configure_tracing
from kimera_stream.protocol.messages import ServerInfo
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.metrics import HubMetrics

log = structlog.get_logger(__name__)

ABANDONED_AFTER = 2.0
"""Seconds after which the transaction of a node that hangs in it is given up by the database."""
ENGINE_REFUSAL = "this node is an engine (KIMERA_ROLE): it takes no requests and no connections; ask an edge"


def build_services(settings: Settings) -> Services:
    """Everything registered by interface; tests override parts of it."""
    services = Services()
    services.add(Settings, instance=settings)
    services.add(CollectorRegistry, instance=CollectorRegistry())
    services.add(ServerInfo, instance=ServerInfo(name="kimera-stream", version=__version__, node=node_name(settings)))
    if has_bus(settings):
        from kimera_stream.api.nodes.composition import add_node  # a single node loads no Redis client

        _base(services, settings)
        if settings.role != "edge":
            _encoding(services, settings)
            _meaning(services, settings)
        add_node(services, settings)
        return services
    _base(services, settings)
    _encoding(services, settings)
    _indexed(services, settings)
    _meaning(services, settings)
    _upon_the_log(services, settings)
    return services


def has_bus(settings: Settings) -> bool:
    """Whether this is one of several nodes."""
    return bool(settings.bus.url.get_secret_value())


def _base(services: Services, settings: Settings) -> None:
    def worker_threads(registry: CollectorRegistry) -> Resources:
        return Resources(settings.performance, registry)

    def authenticator(threads: Threads) -> TokenAuthenticator:
        return TokenAuthenticator(settings.security, open_access=access_is_open(settings), threads=threads)

    def revoking(vault: SqlVault, authenticator: TokenAuthenticator) -> Revoking:
        return Revoking(vault, authenticator.revocations, look=authenticator.look, changed=authenticator.changed)

    def tracing(server: ServerInfo) -> Tracing:
        return configure_tracing(settings.telemetry, node=server.node, version=server.version)

    def commits(registry: CollectorRegistry) -> CommitCollector:
        return CommitCollector(registry)

    def vault(collector: CommitCollector, resources: Resources) -> SqlVault:
        if has_bus(settings):  # a node that hangs in a transaction must not keep the others from the log
            made = SqlVault(database_url(settings), settings.database, abandoned_after=ABANDONED_AFTER)
        else:
            made = SqlVault(database_url(settings), settings.database)
        collector.add("vault", made.commits)
        resources.watch_trouble(lambda: made.commits.trouble)
        return made

    services.add(Metrics, factory=Metrics)
    services.add(Resources, factory=worker_threads, also=[Threads])
    services.add(TokenAuthenticator, factory=authenticator, also=[Authenticator])
    services.add(Revoking, factory=revoking)
    services.add(Tracing, factory=tracing)
    services.add(CommitCollector, factory=commits)
    services.add(SqlVault, factory=vault, also=[VaultService, LogReader], cleanup=SqlVault.close)


def _encoding(services: Services, settings: Settings) -> None:
    def embedder(threads: Threads, registry: CollectorRegistry, resources: Resources) -> BatchingEmbedder:
        made = BatchingEmbedder(make_provider(settings.embedding, threads), settings.embedding, registry)
        resources.memory.watch_cache("texts", lambda: made.cache.bytes, made.cache.clear)
        resources.memory.watch_cache("word_features", lambda: FEATURES.bytes, FEATURES.clear)
        return made

    def retention(vault: SqlVault) -> Retention:
        return Retention(vault, settings.database, idempotency_window=settings.performance.idempotency_window)

    services.add(BatchingEmbedder, factory=embedder, also=[EmbeddingService], cleanup=BatchingEmbedder.close)
    services.add(Retention, factory=retention)


def _indexed(services: Services, settings: Settings) -> None:
    def index(threads: Threads, embedder: EmbeddingService) -> FlatIndex:
        return FlatIndex(
            embedder.dimension,
            threads=threads,
            performance=settings.performance,
            scoring=settings.scoring,
            directory=settings.paths.data_dir,
            memory_fraction=settings.embedding.gpu_memory_fraction,
        )

    services.add(FlatIndex, factory=index, also=[IndexService])


def _meaning(services: Services, settings: Settings) -> None:
    performance = settings.performance

    def cache(vault: VaultService, resources: Resources) -> GeoidCache:
        made = GeoidCache(vault, performance.geoid_cache_bytes)
        resources.memory.watch_cache("geoids", lambda: made.bytes, made.clear)
        return made

    def conversation(resources: Resources) -> ConversationMemory:
        made = ConversationMemory(
            performance.sessions, performance.session_history, performance.session_ttl, performance.session_bytes
        )
        resources.memory.watch_cache("conversations", lambda: made.statistics().bytes)
        return made

    def verifier(threads: Threads) -> CrossEncoderVerifier:
        return CrossEncoderVerifier(
            threads,
            device=settings.embedding.device,
            precision=settings.embedding.precision,
            memory_fraction=settings.embedding.gpu_memory_fraction,
        )

    def engine(
        index: IndexService,
        cache: GeoidCache,
        threads: Threads,
        registry: CollectorRegistry,
        resources: Resources,
        embedder: EmbeddingService,
        verifier: CrossEncoderVerifier | None = None,
    ) -> CascadeEngine:
        read.cache.max_bytes = settings.scoring.reading_cache_bytes
        resources.memory.watch_cache("readings", lambda: read.cache.bytes, read.cache.clear)
        for name, kept in (
            ("stems", STEMS),
            ("marked_words", WORDS),
            ("key_hashes", KEY_HASHES),
            ("short_values", SHORT_VALUES),
        ):
            resources.memory.watch_cache(name, partial(getattr, kept, "bytes"), kept.clear)
        # Vectors of another encoder say nothing to the head.
        fits = head is not None and head.encoder == embedder.model
        return CascadeEngine(index, cache, verifier, settings.scoring, threads, registry, head=head if fits else None)

    def watches(vault: VaultService, engine: ContradictionEngine) -> WatchRegistry:
        return WatchRegistry(
            vault,
            engine,
            min_relatedness=settings.scoring.min_relatedness,
            filter_nodes=settings.stream.filter_nodes,
            filter_depth=settings.stream.filter_depth,
        )

    def queries(
        embedder: EmbeddingService,
        index: IndexService,
        cache: GeoidCache,
        engine: ContradictionEngine,
        watches: WatchRegistry,
    ) -> Queries:
        return Queries(
            embedder,
            index,
            cache,
            engine,
            watches,
            filter_nodes=settings.stream.filter_nodes,
            filter_depth=settings.stream.filter_depth,
        )

    def pipeline(
        vault: SqlVault,
        embedder: EmbeddingService,
        sequencer: Sequencing,
        queries: Queries,
        metrics: PipelineMetrics,
        resources: Resources,
    ) -> Pipeline:
        made = Pipeline(
            vault,
            embedder,
            sequencer,
            queries,
            settings,
            metrics,
            admit=resources.memory.admit,
            admit_write=vault.commits.admit,
        )
        resources.watch_queue("intake", lambda: made.waiting)
        return made

    services.add(GeoidCache, factory=cache)
    services.add(ConversationMemory, factory=conversation)
    head: PairHead | None = None
    if settings.scoring.verifier == "auto" and "verify" in settings.scoring.stages:
        head = _pair_head()
        if (resources.files("kimera_stream.engines") / "weights" / "verifier.safetensors").is_file():
            services.add(CrossEncoderVerifier, factory=verifier)
        else:
            log.warning("this build carries no verifier weights: the evidence rules alone decide")
    services.add(CascadeEngine, factory=engine, also=[ContradictionEngine])
    services.add(WatchRegistry, factory=watches)
    services.add(Queries, factory=queries)
    # Among several nodes an edge is asked, and hands the work over.
    services.add(Pipeline, factory=pipeline, also=[] if has_bus(settings) else [KnowledgeService])


def _pair_head() -> PairHead | None:
    """What decides where the verifier has no time; None where this build has none that works: then the rules do."""
    try:
        return PairHead.load()
    except (OSError, ValueError) as error:
        log.warning("no pair head: the rules decide where the verifier falls behind", error=str(error))
        return None


def _upon_the_log(services: Services, settings: Settings) -> None:
    def hub(reader: LogReader, registry: CollectorRegistry, resources: Resources) -> Hub:
        made = Hub(reader, settings.stream, metrics=HubMetrics(registry))
        resources.memory.watch_cache("tail", lambda: made.tail.bytes)
        resources.memory.watch_cache("catch_up", lambda: made.source.cached_bytes, made.source.clear)
        return made

    def field(embedder: EmbeddingService, hub: Hub, vault: VaultService) -> FieldDynamics:
        return FieldDynamics(embedder.dimension, hub, interval=settings.stream.field_interval, head=lambda: vault.head)

    def pipeline_metrics(registry: CollectorRegistry) -> PipelineMetrics:
        return PipelineMetrics(registry)

    def backlog(vault: VaultService) -> Backlog:
        return Backlog(vault)

    def late_reader(vault: VaultService, backlog: Backlog, pipeline: Pipeline) -> LateReader:
        return LateReader(vault, backlog, pipeline.reread)

    def sequencer(
        vault: VaultService,
        index: IndexService,
        cache: GeoidCache,
        hub: Hub,
        field: FieldDynamics,
        conversation: ConversationMemory,
        engine: ContradictionEngine,
        watches: WatchRegistry,
        metrics: PipelineMetrics,
        backlog: Backlog,
    ) -> Sequencer:
        return Sequencer(
            vault,
            index,
            cache,
            hub,
            field,
            conversation,
            Publishing(vault, cache, engine, watches),
            Removals(vault, cache),
            metrics,
            backlog=backlog,
            late=LateWord(vault, cache, engine),
            verify_within=settings.scoring.verify_within,
            sure=THRESHOLDS["precise"],
        )

    def endpoint(
        hub: Hub, knowledge: KnowledgeService, vault: VaultService, authenticator: Authenticator, server: ServerInfo
    ) -> StreamEndpoint:
        return StreamEndpoint(hub, knowledge, vault, authenticator, settings, server=server)

    def stats(
        vault: VaultService,
        index: FlatIndex,
        hub: Hub,
        field: FieldDynamics,
        metrics: PipelineMetrics,
        resources: Resources,
        conversation: ConversationMemory,
        snapshots: SnapshotKeeper,
        backlog: Backlog,
        embedder: BatchingEmbedder,
        server: ServerInfo,
        verifier: CrossEncoderVerifier | None = None,
    ) -> StatsService:
        return StatsService(
            vault,
            index,
            snapshots,
            hub,
            field,
            metrics,
            resources,
            conversation,
            backlog,
            lambda: {"embedding": embedder.providers, "verifier": {} if verifier is None else verifier.devices},
            lambda: embedder.counts_exactly,
            node=server.node,
            interval=settings.stream.stats_interval,
        )

    def snapshots(
        index: FlatIndex,
        field: FieldDynamics,
        vault: VaultService,
        threads: Threads,
        embedder: EmbeddingService,
        registry: CollectorRegistry,
    ) -> SnapshotKeeper:
        return SnapshotKeeper(
            index,
            field,
            vault,
            threads,
            settings.paths.data_dir,
            settings.performance,
            model=embedder.model,
            registry=registry,
        )

    services.add(SnapshotKeeper, factory=snapshots)
    services.add(Hub, factory=hub)
    services.add(FieldDynamics, factory=field, also=[FieldService])
    services.add(PipelineMetrics, factory=pipeline_metrics)
    services.add(Backlog, factory=backlog)
    services.add(Sequencer, factory=sequencer, also=[Sequencing])
    services.add(LateReader, factory=late_reader)
    services.add(StreamEndpoint, factory=endpoint)
    services.add(StatsService, factory=stats)


async def build_runtime(settings: Settings, services: Services | None = None) -> Runtime:
    """The runtime of one server process, its ground built, nothing of it started.

    Args:
        settings: Checked settings.
        services: Registrations with parts of their own, for tests.
    """
    services = build_services(settings) if services is None else services
    container = services.build()
    if has_bus(settings):
        from kimera_stream.api.nodes.composition import node_specs, start_ground  # a single node loads no Redis client

        await start_ground(container, settings)
        return Runtime(
            settings,
            container,
            lambda runtime: node_specs(Parts(settings, container, runtime, _door(settings, container, runtime))),
        )
    await container.start(
        Metrics, Resources, TokenAuthenticator, Tracing, ServerInfo, Retention, CascadeEngine, ConversationMemory
    )
    return Runtime(
        settings,
        container,
        lambda runtime: service_specs(Parts(settings, container, runtime, _door(settings, container, runtime))),
    )


def _door(settings: Settings, container: Container, runtime: Runtime) -> HttpDoor:
    server = container.get(ServerInfo)
    return HttpDoor(
        authenticator=container.get(TokenAuthenticator),
        settings=settings,
        metrics=container.get(Metrics),
        threads=container.get(Resources),
        readiness=runtime.readiness,
        health=container.health,
        node=server.node,
        version=server.version,
        versions=_versions(),
        refusal=ENGINE_REFUSAL if settings.role == "engine" else "",
    )


def _versions() -> dict[str, str]:
    names = ["torch", "numpy", "msgspec", "uvicorn", "websockets", "sqlalchemy"]
    found = {name: version(name) for name in names}
    return {"python": platform.python_version(), "kernel": kernels.IMPLEMENTATION, **found}
