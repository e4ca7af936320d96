"""The bus as metrics: read when they are asked for, nothing is counted twice."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kimera_stream.infrastructure.bus.interface import Bus

GAUGES: Final = {
    "outbox_items": "Operations sent to Redis and not yet confirmed",
    "outbox_bytes": "Their bytes",
}
COUNTERS: Final = {
    "sent": "Operations that Redis confirmed",
    "dropped": "Messages to topics that were dropped: no contact, or the outbox full",
    "refused": "Work refused: the partition or the outbox full, or no contact",
    "received": "Messages and work received",
    "lost": "Times a follower was told that messages may be missing",
    "reconnects": "Times the contact was found again",
}


class BusCollector(Collector):
    """Gives ``kimera_bus_*``.

    Args:
        bus: Whose numbers.
        registry: Where it registers itself.
    """

    def __init__(self, bus: Bus, registry: CollectorRegistry) -> None:
        self._bus = bus
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        numbers = asdict(self._bus.numbers)
        yield GaugeMetricFamily("kimera_bus_connected", "1 in contact with Redis, else 0", float(self._bus.connected))
        for name, what in GAUGES.items():
            yield GaugeMetricFamily(f"kimera_bus_{name}", what, numbers[name])
        for name, what in COUNTERS.items():
            yield CounterMetricFamily(f"kimera_bus_{name}", what, numbers[name])
