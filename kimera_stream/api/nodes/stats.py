"""The ``stats`` channel of a node that serves connections: its own numbers, and the cluster's as it knows them."""

import time
from dataclasses import asdict
from typing import Any, Final

import anyio
import msgspec

from kimera_stream.api.nodes.field import RemoteField
from kimera_stream.api.nodes.presence import PresenceEverywhere
from kimera_stream.core.coverage import Coverage, Node
from kimera_stream.core.interfaces import VaultService
from kimera_stream.engines.cluster.errands import Errands
from kimera_stream.engines.cluster.scored import Scored
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.infrastructure.bus.interface import Bus
from kimera_stream.infrastructure.resources import Resources
from kimera_stream.protocol.errors import OverloadedError, UnavailableError
from kimera_stream.streaming.following import Following
from kimera_stream.streaming.hub import Hub

ENGINE: Final = "engine"
NUMBERS: Final = "numbers"
"""Space and key under which engines share what they do."""

_decode = msgspec.msgpack.Decoder(dict[str, Any]).decode


def cluster_numbers(coverage: Coverage) -> dict[str, Any]:
    """Nodes, slices and how far they are scored, as one object for ``stats`` and ``/health``."""
    owners: dict[str, int] = {}
    for each in coverage.slices:
        if each.covered and each.owner is not None:
            owners[each.owner] = owners.get(each.owner, 0) + 1
    return {
        "nodes": {node.id: node.role for node in coverage.nodes},
        "slices": {
            "total": len(coverage.slices),
            "covered": sum(each.covered for each in coverage.slices),
            "owners": owners,
        },
        "completeness": round(coverage.completeness, 4),
        "head": coverage.head,
        "scored": coverage.scored,
        "lag": max(0, coverage.head - coverage.scored),
    }


class NodeStats:
    """Args: interval: seconds between two values. Rates are over the time since the value before."""

    def __init__(
        self,
        node: Node,
        bus: Bus,
        vault: VaultService,
        hub: Hub,
        following: Following,
        errands: Errands,
        scored: Scored,
        field: RemoteField,
        presence: PresenceEverywhere,
        metrics: PipelineMetrics,
        resources: Resources,
        *,
        interval: float,
    ) -> None:
        self._node = node
        self._bus = bus
        self._vault = vault
        self._hub = hub
        self._following = following
        self._errands = errands
        self._scored = scored
        self._field = field
        self._presence = presence
        self._metrics = metrics
        self._resources = resources
        self._interval = interval
        self._began = time.monotonic()
        self._before = (self._began, 0, 0, hub.delivered)
        self._engines: dict[str, dict[str, Any]] = {}

    def value(self) -> dict[str, Any]:
        """The numbers as of now; times in milliseconds, rates per second, sizes in bytes."""
        now = time.monotonic()
        numbers = self._metrics.numbers()
        then, published, contradictions, delivered = self._before
        elapsed = max(now - then, 1e-3)
        self._before = (now, numbers.published, numbers.contradictions, self._hub.delivered)
        stream = self._hub.statistics()
        try:
            field = self._field.state()
        except UnavailableError:
            field = None
        return {
            "node": self._node.name,
            "role": self._node.role,
            "uptime": round(now - self._began, 1),
            "geoids": 0 if field is None else field.geoids,
            "open_contradictions": 0 if field is None else field.open_contradictions,
            "rates": {
                "publishes": round((numbers.published - published) / elapsed, 2),
                "contradictions": round((numbers.contradictions - contradictions) / elapsed, 2),
                "events": round((self._hub.delivered - delivered) / elapsed, 2),
            },
            "totals": {
                "published": numbers.published,
                "contradictions": numbers.contradictions,
                "refused": numbers.refused,
            },
            "latency": {"p50": _ms(numbers.p50), "p99": _ms(numbers.p99)},
            "queues": self._resources.queues,
            "connections": stream["connections"],
            "subscribers": stream["subscriptions"],
            "stream": stream,
            "memory": self._resources.sample.memory,
            "memory_limit": self._resources.memory.limit,
            "memory_pressure": self._resources.memory.state,
            "caches": self._resources.memory.caches,
            "alerts": self._resources.alerts,
            "process": {name: getattr(self._resources.sample, name) for name in ("descriptors", "threads", "tasks")},
            "loop_lag": _ms(self._resources.loop_lag),
            "cluster": self._cluster(),
        }

    def _cluster(self) -> dict[str, Any]:
        newest = self._scored.newest
        return {
            **({} if newest is None else cluster_numbers(newest)),
            "engines": self._engines,
            "bus": asdict(self._bus.numbers),
            "following": {
                "position": self._following.position,
                "told": self._following.told,
                "read": self._following.read,
                "away": self._following.away,
            },
            "errands": asdict(self._errands.numbers),
            "presence_complete": self._presence.complete,
        }

    async def _ask_engines(self) -> None:
        """What the engines say of themselves; what they said before, where the bus is away or full."""
        try:
            told = await self._bus.gather(ENGINE, NUMBERS)
        except (UnavailableError, OverloadedError):
            return
        self._engines = {node: _decode(value) for node, value in sorted(told.items())}

    async def run(self) -> None:
        """Send a value each interval until cancelled."""
        encode = msgspec.json.Encoder().encode
        while True:
            await self._ask_engines()
            self._hub.latest("stats", "stats.updated", encode(self.value()), offset=self._hub.delivered)
            await anyio.sleep(self._interval)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
