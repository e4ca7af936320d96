"""A node that serves connections: door, hub, the log followed, and what is asked given to engines. No encoder, no index."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import structlog
from prometheus_client import CollectorRegistry

from kimera_stream.api.auth.revoking import Revoking
from kimera_stream.api.http.door import DoorServices
from kimera_stream.api.nodes.field import RemoteField
from kimera_stream.api.nodes.hearing import Hearing, keep_watches
from kimera_stream.api.nodes.presence import ConnectionsElsewhere, PresenceEverywhere
from kimera_stream.api.nodes.rebalancing import Rebalancing
from kimera_stream.api.nodes.stats import NodeStats, cluster_numbers
from kimera_stream.api.runtime import Drain
from kimera_stream.api.services import PATIENT, Assemble, Parts, revoking_service
from kimera_stream.api.websocket import StreamEndpoint
from kimera_stream.core.access import Authenticator
from kimera_stream.core.coverage import ClusterStore, Node
from kimera_stream.core.interfaces import FieldService, KnowledgeService
from kimera_stream.core.validation import BodyLimits
from kimera_stream.core.vault.cluster import SqlCluster
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.engines.cluster.errands import Errands
from kimera_stream.engines.cluster.patience import Patience
from kimera_stream.engines.cluster.remote import RemoteKnowledge
from kimera_stream.engines.cluster.scored import Scored
from kimera_stream.engines.cluster.watchlist import WatchList
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.infrastructure.bus.interface import Bus
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.resources import Resources
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.messages import ServerInfo
from kimera_stream.streaming.following import Following
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.metrics import HubMetrics
from kimera_stream.streaming.recent import Recent

log = structlog.get_logger(__name__)

BEATS = 3
"""Heartbeats within a lease."""


class EdgeMetrics(PipelineMetrics):
    """What an edge counts of the publishes it answers."""


def add_edge(services: Services, settings: Settings) -> None:
    """Register what an edge has."""
    bus_settings, performance = settings.bus, settings.performance
    # No longer than engines begin work that has waited: see ``Desk``.
    patience = Patience(bus_settings.answer_within, performance.idempotency_window / 2)

    def metrics(registry: CollectorRegistry) -> EdgeMetrics:
        # A node that is an engine too counts under these names what it commits.
        return EdgeMetrics(registry if settings.role == "edge" else CollectorRegistry())

    def elsewhere(bus: Bus) -> ConnectionsElsewhere:
        return ConnectionsElsewhere(bus)

    def rebalancing(bus: Bus, hub: Hub) -> Rebalancing:
        return Rebalancing(
            bus,
            count=lambda: None if hub.ended else hub.connections,
            move=hub.send_away,
            above=bus_settings.rebalance_above,
        )

    def hub(vault: SqlVault, registry: CollectorRegistry, elsewhere: ConnectionsElsewhere, resources: Resources) -> Hub:
        made = Hub(vault, settings.stream, metrics=HubMetrics(registry), refresh=vault.refresh, elsewhere=elsewhere)
        resources.memory.watch_cache("tail", lambda: made.tail.bytes)
        resources.memory.watch_cache("catch_up", lambda: made.source.cached_bytes, made.source.clear)
        return made

    def following(vault: SqlVault, hub: Hub) -> Following:
        return Following(vault, hub.deliver, position=hub.delivered, poll=bus_settings.poll)

    def errands(bus: Bus, resources: Resources) -> Errands:
        made = Errands(
            bus,
            bus_settings,
            max_items=performance.queue_items,
            max_bytes=performance.queue_bytes,
            at_most=patience.at_most,
        )
        resources.watch_queue("errands", lambda: made.numbers.waiting)
        return made

    def scored(store: ClusterStore) -> Scored:
        return Scored(lambda: store.coverage(lease=bus_settings.lease), poll=bus_settings.poll, patience=patience)

    def watches(vault: SqlVault) -> WatchList:
        return WatchList(vault.watches)

    def field(bus: Bus, hub: Hub) -> RemoteField:
        return RemoteField(bus, hub)

    def presence(bus: Bus, hub: Hub, scored: Scored) -> PresenceEverywhere:
        return PresenceEverywhere(bus, hub, lambda: _edges(scored))

    def knowledge(
        bus: Bus,
        vault: SqlVault,
        store: SqlCluster,
        hub: Hub,
        errands: Errands,
        scored: Scored,
        watches: WatchList,
        resources: Resources,
        metrics: EdgeMetrics,
    ) -> RemoteKnowledge:
        def admit() -> None:
            store.commits.admit()  # by it the node says that it lives: where that hangs, so do the engines' commits
            resources.memory.admit()

        return RemoteKnowledge(
            bus,
            Recent(hub, vault),
            errands,
            scored,
            watches,
            bus_settings,
            BodyLimits.from_settings(settings.api, settings.embedding.dimension),
            metrics,
            admit=admit,
        )

    def hearing(
        bus: Bus, following: Following, errands: Errands, scored: Scored, watches: WatchList, field: RemoteField
    ) -> Hearing:
        return Hearing(bus, following, errands, scored, watches, field)

    def endpoint(
        hub: Hub,
        knowledge: KnowledgeService,
        vault: SqlVault,
        authenticator: Authenticator,
        server: ServerInfo,
        presence: PresenceEverywhere,
    ) -> StreamEndpoint:
        return StreamEndpoint(hub, knowledge, vault, authenticator, settings, server=server, presence=presence.of)

    def stats(
        node: Node,
        bus: Bus,
        vault: SqlVault,
        hub: Hub,
        following: Following,
        errands: Errands,
        scored: Scored,
        field: RemoteField,
        presence: PresenceEverywhere,
        metrics: EdgeMetrics,
        resources: Resources,
    ) -> NodeStats:
        return NodeStats(
            node,
            bus,
            vault,
            hub,
            following,
            errands,
            scored,
            field,
            presence,
            metrics,
            resources,
            interval=settings.stream.stats_interval,
        )

    services.add(EdgeMetrics, factory=metrics)
    services.add(ConnectionsElsewhere, factory=elsewhere)
    services.add(Hub, factory=hub)
    services.add(Rebalancing, factory=rebalancing)
    services.add(Following, factory=following)
    services.add(Errands, factory=errands)
    services.add(Scored, factory=scored)
    services.add(WatchList, factory=watches)
    services.add(RemoteField, factory=field, also=[FieldService])
    services.add(PresenceEverywhere, factory=presence)
    services.add(RemoteKnowledge, factory=knowledge, also=[KnowledgeService])
    services.add(Hearing, factory=hearing)
    services.add(StreamEndpoint, factory=endpoint)
    services.add(NodeStats, factory=stats)


def _edges(scored: Scored) -> Sequence[str]:
    newest = scored.newest
    return () if newest is None else [node.id for node in newest.nodes if node.role != "engine"]


def _cluster(scored: Scored) -> Mapping[str, Any]:
    return {} if scored.newest is None else cluster_numbers(scored.newest)


def edge_services(parts: Parts, assembled: Assemble) -> tuple[list[ServiceSpec], list[Drain], list[Drain]]:
    """The services of an edge, besides those that every node has; and what a stop has to finish, before an engine's work is
    drained and after it."""
    container, settings, streams = parts.container, parts.settings, parts.door.streams

    async def hub(service: Service) -> None:
        await assembled(Hub, Revoking)
        service.ready()
        await container.get(Hub).run()

    async def following(service: Service) -> None:
        await assembled(Hearing, Following, RemoteField)
        await container.get(RemoteField).load()
        service.ready()
        async with anyio.create_task_group() as group:
            group.start_soon(container.get(Following).run, name="following:log")
            group.start_soon(container.get(Hearing).run, name="following:bus")
            group.start_soon(container.get(RemoteField).run, name="following:field")

    async def errands(service: Service) -> None:
        await assembled(Errands, Scored, WatchList, ConnectionsElsewhere, PresenceEverywhere)
        await container.get(Scored).look()
        await container.get(WatchList).load()
        container.get(PresenceEverywhere).begin()
        container.get(ConnectionsElsewhere).begin(container.get(Hub).principals)
        service.ready()
        async with anyio.create_task_group() as group:
            group.start_soon(container.get(Errands).run, name="errands:again")
            group.start_soon(container.get(Scored).run, name="errands:scored")
            group.start_soon(keep_watches, container.get(WatchList), name="errands:watches")
            group.start_soon(container.get(ConnectionsElsewhere).run, name="errands:counts")

    async def membership(service: Service) -> None:
        """An engine's coverage keeper says that the node is alive; an edge that is none says so here."""
        node, store, lease = container.get(Node), container.get(ClusterStore), settings.bus.lease
        service.on_cleanup("leave the cluster", lambda: store.leave(node.id))
        await store.beat(node, lease=lease)
        service.ready()
        while True:
            await anyio.sleep(lease / BEATS)
            try:
                await store.beat(node, lease=lease)
            except UnavailableError as error:
                log.warning("the other nodes cannot be told that this one is alive", error=error.message)

    async def door(service: Service) -> None:
        await assembled(RemoteKnowledge, StreamEndpoint)
        parts.stream = container.get(StreamEndpoint)
        parts.door.cluster = partial(_cluster, container.get(Scored))
        parts.door.services = DoorServices(
            knowledge=container.get(RemoteKnowledge),
            vault=container.get(SqlVault),
            hub=container.get(Hub),
            field=container.get(RemoteField),
            commands=parts.stream.commands,
            revoker=container.get(Revoking),
        )
        service.ready()
        await anyio.sleep_forever()

    async def balance(service: Service) -> None:
        """After the door: no other edge sends connections to one that is not open yet."""
        await assembled(Rebalancing)
        service.ready()
        await container.get(Rebalancing).run()

    async def stats(service: Service) -> None:
        await assembled(NodeStats)
        service.ready()
        await container.get(NodeStats).run()

    specs = [
        ServiceSpec("hub", hub, after=("vault",)),
        ServiceSpec("revoking", revoking_service(container), after=("access", "hub"), backoff=PATIENT),
        ServiceSpec("following", following, after=("hub", "bus"), backoff=PATIENT),
        ServiceSpec("errands", errands, after=("hub", "bus", "store"), backoff=PATIENT),
        ServiceSpec("door", door, after=("revoking", "following", "errands")),
        ServiceSpec("balance", balance, after=("door",), backoff=PATIENT),
        ServiceSpec("stats", stats, after=("door",)),
    ]
    if settings.role == "edge":
        specs.append(ServiceSpec("membership", membership, after=("store",), backoff=PATIENT))

    async def drain_errands(_seconds: float) -> None:
        if parts.door.services is not None:
            await container.get(RemoteKnowledge).drain()

    async def drain_hub(seconds: float) -> None:
        if parts.stream is not None:
            await container.get(Hub).shutdown(seconds)

    before: list[Drain] = [("lines", streams.drain_lines), ("errands", drain_errands)]
    after: list[Drain] = [("streams", streams.drain), ("hub", drain_hub)]
    return specs, before, after
