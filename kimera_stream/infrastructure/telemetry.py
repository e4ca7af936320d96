"""What the process tells of itself: structured logs, metrics and traces.

* ``configure_logging`` sends structlog and the standard library's loggers (uvicorn's among them) through one handler.
* ``Metrics`` holds the metrics that several parts share, on an injected registry. A part's own metrics live with the part.
* ``Tracing`` records OpenTelemetry spans; off, it costs one attribute look-up per span.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import IO, TYPE_CHECKING, Any, Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kimera_stream.infrastructure.settings import TelemetrySettings
from kimera_stream.protocol.errors import KimeraError, OperationalError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Tracer

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

# -- logging -----------------------------------------------------------------------------------------------------------

SECRET_KEYS: Final = re.compile(
    r"(?:^|_)(?:token|secret|password|passwd|authorization|cookie|credentials?|jwt|api_?key|private_?key)s?$"
)
"""Names of values that are never written, at any level."""

STATEMENT_KEYS: Final = frozenset(
    {
        "text",
        "a_text",
        "b_text",
        "texts",
        "body",
        "geoid_body",
        "query",
        "statement",
        "semantic_state",
        "symbolic_state",
        "metadata",
        "vector",
        "why",
        "data",
    }
)
"""Names of values that hold what users said. Written at debug level only."""

_MASK: Final = "***"
_SECRETS_IN_TEXT: Final = (
    (re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?P<user>[^\s:/@]*):[^\s/]*@"), r"\g<scheme>\g<user>:***@"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), _MASK),
    (re.compile(r"\bkst_[A-Za-z0-9]+_[\w-]+"), "kst_***"),
    (re.compile(r"(?i)\b(?P<scheme>bearer)\s+[\w.~+/=-]{8,}"), r"\g<scheme> ***"),
)
_MAX_DEPTH: Final = 4

_THEIR_LEVELS: Final = {
    "uvicorn.access": logging.WARNING,  # the request middleware writes what it would, with the request id
    "httpx": logging.WARNING,
    "sqlalchemy.engine": logging.WARNING,  # its info level holds statements with their parameters
    "alembic": logging.WARNING,  # its info level tells of every plug-in
    "aiosqlite": logging.INFO,
    "asyncio": logging.WARNING,
}


def _masked(text: str) -> str:
    for pattern, replacement in _SECRETS_IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


class Redaction:
    """A structlog processor: masks secrets everywhere, and drops what users said from everything above debug."""

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        statements = event.get("level", method) == "debug"
        for key, value in list(event.items()):
            if key.startswith("_"):  # structlog's own
                continue
            if SECRET_KEYS.search(key.lower()):
                event[key] = _MASK
            elif not statements and key in STATEMENT_KEYS:
                event[key] = f"<{len(value)} withheld>" if hasattr(value, "__len__") else "<withheld>"
            else:
                event[key] = self._clean(value, statements, _MAX_DEPTH)
        return event

    def _clean(self, value: Any, statements: bool, depth: int) -> Any:
        if isinstance(value, str):
            return _masked(value)
        if isinstance(value, Mapping):
            if depth == 0:
                return "<nested>"
            return {
                key: _MASK
                if isinstance(key, str) and SECRET_KEYS.search(key.lower())
                else "<withheld>"
                if not statements and key in STATEMENT_KEYS
                else self._clean(item, statements, depth - 1)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._clean(item, statements, depth - 1) for item in value] if depth else "<nested>"
        return value


def _line_safe(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Keep a record on one line of the console: a line break in a value must not fake another record."""
    for key, value in event.items():
        if isinstance(value, str) and key != "exception" and not value.isprintable():
            event[key] = value.encode("unicode_escape").decode()
    return event


def configure_logging(settings: TelemetrySettings, stream: IO[str] | None = None) -> None:
    """Send every log record of the process to ``stream`` (standard error by default), as lines for people or as JSON.

    Call once, before the event loop starts. A second call replaces the first.
    """
    out = stream or sys.stderr
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not out.isatty())
    level = LEVELS[settings.log_level]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Any]
    if as_json:
        last = [
            structlog.processors.format_exc_info,
            Redaction(),
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
    else:
        last = [
            structlog.processors.format_exc_info,
            Redaction(),
            _line_safe,
            structlog.dev.ConsoleRenderer(
                colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
            ),
        ]
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(allow={"request_id"})],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        theirs = logging.getLogger(name)
        theirs.handlers.clear()
        theirs.propagate = True
        theirs.setLevel(logging.NOTSET)  # whatever an earlier configuration of the process had set
    for name, least in _THEIR_LEVELS.items():
        logging.getLogger(name).setLevel(max(level, least))
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


# -- metrics -----------------------------------------------------------------------------------------------------------


class Metrics:
    """The metrics that several parts share. One per process, on the process's registry.

    The resource service has its own for the event loop's lag, memory, threads and queue depths; the streaming core and the
    pipeline theirs.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.errors = Counter(
            "kimera_errors_total", "Errors answered, by the door they went out of and their code", ["door", "code"],
            registry=registry,
        )  # fmt: skip
        self.defects = Counter(
            "kimera_defects_total", "Programming errors that reached a door", ["door"], registry=registry
        )
        self.http_requests = Counter(
            "kimera_http_requests_total", "HTTP requests ended", ["method", "route", "status"], registry=registry
        )
        self.http_seconds = Histogram(
            "kimera_http_request_seconds", "From the request's head to the end of its response; streams not counted",
            ["method", "route"], buckets=LATENCY_BUCKETS, registry=registry,
        )  # fmt: skip
        self.http_open = Gauge("kimera_http_requests_open", "HTTP requests being answered", registry=registry)
        self.http_streams = Gauge(
            "kimera_http_streams_open", "Streaming HTTP responses open", ["kind"], registry=registry
        )
        self.http_lines = Counter(
            "kimera_http_lines_total", "NDJSON lines answered, by outcome", ["outcome"], registry=registry
        )
        self.http_events = Counter("kimera_http_events_total", "Events sent over Server-Sent Events", registry=registry)
        self.service_failures = Counter(
            "kimera_service_failures_total", "Failures of supervised services, by what the supervisor was told",
            ["service", "kind"], registry=registry,
        )  # fmt: skip

    def error(self, door: str, code: str) -> None:
        """Count one error answered at a door (``http``, ``websocket``)."""
        self.errors.labels(door, code).inc()

    def service_failed(self, name: str, error: BaseException) -> None:
        """Count one failure of a supervised service; fits the supervisor's ``crashed``."""
        expected = isinstance(error, OperationalError | OSError)
        self.service_failures.labels(name, "operational" if expected else "defect").inc()


# -- tracing -----------------------------------------------------------------------------------------------------------

EXPORTERS: Final = "opentelemetry_traces_exporter"
"""Entry point group under which OpenTelemetry's exporters register themselves."""


class TracingError(KimeraError):
    """Tracing is on, but cannot work as configured."""


class Tracing:
    """Records spans. Build with ``configure_tracing``; ``Tracing(None)`` records nothing.

    Args:
        provider: Where spans go, None to record none.
    """

    def __init__(self, provider: "TracerProvider | None") -> None:
        self._provider = provider
        self._tracer: Tracer | None = None if provider is None else provider.get_tracer("kimera_stream")

    @property
    def on(self) -> bool:
        return self._tracer is not None

    @contextmanager
    def span(self, name: str, **attributes: str | int | float | bool) -> Iterator[None]:
        """Record what happens inside as a span, a child of the span around it. Attributes never hold user text."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import Status, StatusCode

        with self._tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except OperationalError as error:
                span.set_attribute("error.type", error.code)
                span.set_status(Status(StatusCode.ERROR, error.code))
                raise
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise

    def close(self) -> None:
        """Export what is left. Blocks for as long as the exporter takes: call it in a worker thread."""
        if self._provider is not None:
            self._provider.shutdown()


def configure_tracing(
    settings: TelemetrySettings,
    *,
    node: str,
    version: str,
    environ: Mapping[str, str] | None = None,
    processor: "SpanProcessor | None" = None,
) -> Tracing:
    """Tracing as the settings say. The exporter is the one that ``OTEL_TRACES_EXPORTER`` names (default ``otlp``).

    Args:
        settings: ``telemetry`` group.
        node: Name of this node.
        version: Version of the server.
        environ: Environment, the process's own by default.
        processor: Takes the spans instead of an exporter.

    Raises:
        TracingError: tracing is on and its exporter is not installed.
    """
    if not settings.tracing:
        return Tracing(None)
    # Loaded where it is used: it would make every start without tracing slower.
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {"service.name": "kimera-stream", "service.instance.id": node, "service.version": version}
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    if processor is not None:
        provider.add_span_processor(processor)
        return Tracing(provider)
    wanted = (os.environ if environ is None else environ).get("OTEL_TRACES_EXPORTER", "otlp")
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        if name == "none":
            continue
        provider.add_span_processor(BatchSpanProcessor(_exporter(name)))
    return Tracing(provider)


def _exporter(name: str) -> Any:
    # OpenTelemetry's own rule: `otlp` means OTLP over gRPC where that is installed, else over HTTP.
    names = ("otlp", "otlp_proto_grpc", "otlp_proto_http") if name == "otlp" else (name,)
    known = entry_points(group=EXPORTERS)
    for candidate in names:
        for point in known:
            if point.name == candidate:
                return point.load()()
    installed = ", ".join(sorted({point.name for point in known})) or "none"
    raise TracingError(
        f"OTEL_TRACES_EXPORTER: no exporter {name!r} is installed (there are: {installed}); "
        "install opentelemetry-exporter-otlp, or set KIMERA_TELEMETRY__TRACING=false"
    )
