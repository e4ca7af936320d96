"""Counters of the streaming core, on the registry they are given. Nothing here is touched once per subscriber."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from kimera_stream.protocol.close_codes import CloseCode


class HubMetrics:
    """Args: registry: Where the metrics are registered; None: one of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = CollectorRegistry() if registry is None else registry
        self.connections = Gauge("kimera_stream_connections", "Open WebSocket connections.", registry=registry)
        self._events = Counter("kimera_stream_deliveries", "Events written to live subscribers.", registry=registry)
        self._bytes = Counter("kimera_stream_delivered_bytes", "Bytes of those events.", registry=registry)
        self._closed = Counter(
            "kimera_stream_closes", "Connections closed by the server, by code.", ["code"], registry=registry
        )
        self._commands = Counter(
            "kimera_stream_commands", "Commands received, by name and outcome.", ["op", "outcome"], registry=registry
        )

        self._errors = Counter("kimera_stream_errors", "Error replies, by code.", ["code"], registry=registry)
        self._defects = Counter(
            "kimera_stream_defects", "Commands that failed by a programming error.", ["op"], registry=registry
        )

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def defect(self, op: str) -> None:
        self._defects.labels(op).inc()

    def delivered(self, events: int, size: int, connections: int) -> None:
        """``events`` joined into ``size`` bytes were written to ``connections``."""
        self._events.inc(events * connections)
        self._bytes.inc(size * connections)

    def closed(self, code: CloseCode) -> None:
        self._closed.labels(str(int(code))).inc()

    def command(self, op: str, outcome: str) -> None:
        """``outcome``: ok, or the code of the error."""
        self._commands.labels(op, outcome).inc()
