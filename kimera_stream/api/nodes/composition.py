"""The composition of a node that shares its log with others. Like ``api.composition``, which it is a part of: nothing else resolves.

    edge    connections and fan-out        engine  embed, score, verify        all  both, through the same bus

Imported only where a bus is set: a single node loads no Redis client.
"""

import secrets

import anyio
import structlog
from prometheus_client import CollectorRegistry

from kimera_stream.api.auth import TokenAuthenticator
from kimera_stream.api.nodes.edge import add_edge, edge_services
from kimera_stream.api.nodes.engine import add_engine, engine_services
from kimera_stream.api.runtime import Drain
from kimera_stream.api.services import (
    PATIENT,
    START_BUDGET,
    Parts,
    access_service,
    tell_of_commits,
    vault_service,
)
from kimera_stream.core.coverage import ClusterStore, Node
from kimera_stream.core.vault.cluster import SqlCluster
from kimera_stream.core.vault.retention import Retention
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.engines.contradiction import CascadeEngine
from kimera_stream.infrastructure.bus.interface import Bus
from kimera_stream.infrastructure.bus.metrics import BusCollector
from kimera_stream.infrastructure.bus.redis import RedisBus
from kimera_stream.infrastructure.container import Container, Services
from kimera_stream.infrastructure.database import CommitCollector
from kimera_stream.infrastructure.resources import Resources
from kimera_stream.infrastructure.settings import Settings, database_url, node_name
from kimera_stream.infrastructure.tasks import Service, ServiceSpec, Unrecoverable
from kimera_stream.infrastructure.telemetry import Metrics, Tracing
from kimera_stream.protocol.errors import BadRequestError
from kimera_stream.protocol.messages import ServerInfo

log = structlog.get_logger(__name__)


class ClusterMismatchError(Unrecoverable):
    """This node's settings do not go with the cluster that the database belongs to."""


def add_node(services: Services, settings: Settings) -> None:
    """Register what a node of its role has, besides the ground that every process stands on."""
    name = node_name(settings)

    def node() -> Node:
        return Node(f"{name}~{secrets.token_hex(4)}", name, settings.role)

    def bus(node: Node, registry: CollectorRegistry) -> RedisBus:
        made = RedisBus(settings.bus, node.id)
        BusCollector(made, registry)
        return made

    def store(collector: CommitCollector, resources: Resources) -> SqlCluster:
        made = SqlCluster(database_url(settings), settings.database)
        collector.add("cluster", made.commits)
        resources.watch_trouble(lambda: made.commits.trouble)
        return made

    services.add(Node, factory=node)
    services.add(RedisBus, factory=bus, also=[Bus])
    services.add(SqlCluster, factory=store, also=[ClusterStore], cleanup=SqlCluster.close)
    if settings.role != "engine":
        add_edge(services, settings)
    if settings.role != "edge":
        add_engine(services, settings)


async def start_ground(container: Container, settings: Settings) -> None:
    """Build what waits for nothing."""
    await container.start(Metrics, Resources, TokenAuthenticator, Tracing, ServerInfo, SqlVault, SqlCluster, RedisBus)
    if settings.role != "edge":
        await container.start(CascadeEngine, Retention)


def node_specs(parts: Parts) -> tuple[Parts, list[ServiceSpec], list[Drain]]:
    """The parts, the services of a node, and what a stop drains, in order."""
    container, settings = parts.container, parts.settings
    assembling = anyio.Lock()

    async def assembled(*keys: object) -> None:
        """Build what stands on the log; one service at a time asks the container."""
        async with assembling:
            await container.start(*keys)

    async def store(service: Service) -> None:
        try:
            await container.get(SqlCluster).open(settings.bus.slices)
        except BadRequestError as error:
            raise ClusterMismatchError(f"KIMERA_BUS__SLICES: {error.message}") from error
        service.ready()
        await tell_of_commits(service, container.get(SqlCluster).commits)

    specs = [
        ServiceSpec("resources", container.get(Resources).serve),
        ServiceSpec("access", access_service(container), on_failure="escalate"),
        ServiceSpec("vault", vault_service(container), backoff=PATIENT, budget=START_BUDGET),
        ServiceSpec("bus", container.get(RedisBus).serve, backoff=PATIENT),
        ServiceSpec("store", store, after=("vault",), backoff=PATIENT, budget=START_BUDGET),
    ]
    first: list[Drain] = []
    last: list[Drain] = []
    if settings.role != "engine":
        of_edge, first, last = edge_services(parts, assembled)
        specs += of_edge
    if settings.role != "edge":
        of_engine, drains = engine_services(parts, assembled)
        specs += of_engine
        first += drains
    return parts, specs, [*first, *last]
