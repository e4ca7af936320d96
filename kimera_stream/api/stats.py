"""The ``stats`` channel: what the server does, as one value a second."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import anyio
import msgspec

from kimera_stream.core.conversation import ConversationMemory
from kimera_stream.core.index import FlatIndex, SnapshotKeeper
from kimera_stream.core.interfaces import FieldService, VaultService
from kimera_stream.engines.backlog import Backlog
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.infrastructure.failover import WayNumbers
from kimera_stream.infrastructure.resources import Resources
from kimera_stream.streaming.hub import Hub


class StatsService:
    """Gathers rates, depths, latencies and counts. Rates are over the time since the value before.

    Args:
        devices: Health and use of what encodes and verifies.
        interval: Seconds between two values.
    """

    def __init__(
        self,
        vault: VaultService,
        index: FlatIndex,
        snapshots: SnapshotKeeper,
        hub: Hub,
        field: FieldService,
        metrics: PipelineMetrics,
        resources: Resources,
        conversation: ConversationMemory,
        backlog: Backlog,
        devices: Callable[[], dict[str, dict[str, WayNumbers]]],
        exact: Callable[[], bool],
        *,
        node: str,
        interval: float,
    ) -> None:
        self._vault = vault
        self._index = index
        self._snapshots = snapshots
        self._hub = hub
        self._field = field
        self._metrics = metrics
        self._resources = resources
        self._conversation = conversation
        self._backlog = backlog
        self._devices = devices
        self._exact = exact
        self._node = node
        self._interval = interval
        self._began = time.monotonic()
        self._before = (self._began, 0, 0, vault.head)

    def value(self) -> dict[str, Any]:
        """The numbers as of now; times in milliseconds, rates per second, sizes in bytes."""
        now = time.monotonic()
        numbers = self._metrics.numbers()
        then, published, contradictions, head = self._before
        elapsed = max(now - then, 1e-3)
        self._before = (now, numbers.published, numbers.contradictions, self._vault.head)
        stream = self._hub.statistics()
        return {
            "node": self._node,
            "uptime": round(now - self._began, 1),
            "geoids": self._index.size,
            "open_contradictions": self._field.state().open_contradictions,
            "rates": {
                "publishes": round((numbers.published - published) / elapsed, 2),
                "contradictions": round((numbers.contradictions - contradictions) / elapsed, 2),
                "events": round((self._vault.head - head) / elapsed, 2),
            },
            "totals": {
                "published": numbers.published,
                "contradictions": numbers.contradictions,
                "refused": numbers.refused,
                "text_bytes": numbers.text_bytes,
                "tokens": numbers.tokens,
                "tokens_exact": self._exact(),
            },
            "latency": {"p50": _ms(numbers.p50), "p99": _ms(numbers.p99)},
            "queues": self._resources.queues,
            "work": {
                "retries": numbers.retries,
                "faults": numbers.faults,
                "dead_letters": numbers.dead_letters,
                "dead_letters_dropped": numbers.dead_letters_dropped,
            },
            "verification": asdict(self._backlog.numbers),
            "devices": {
                what: {name: asdict(numbers) for name, numbers in ways.items()}
                for what, ways in self._devices().items()
            },
            "sessions": asdict(self._conversation.statistics()),
            "connections": stream["connections"],
            "subscribers": stream["subscriptions"],
            "stream": stream,
            "index": {**asdict(self._index.statistics), "snapshot": asdict(self._snapshots.statistics)},
            "memory": self._resources.sample.memory,
            "memory_limit": self._resources.memory.limit,
            "memory_pressure": self._resources.memory.state,
            "caches": self._resources.memory.caches,
            "alerts": self._resources.alerts,
            "process": {name: getattr(self._resources.sample, name) for name in ("descriptors", "threads", "tasks")},
            "loop_lag": _ms(self._resources.loop_lag),
        }

    async def run(self) -> None:
        """Send a value each interval until cancelled."""
        encode = msgspec.json.Encoder().encode
        while True:
            self._hub.latest("stats", "stats.updated", encode(self.value()), offset=self._vault.head)
            await anyio.sleep(self._interval)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
