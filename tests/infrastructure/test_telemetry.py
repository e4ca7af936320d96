"""Logs, metrics and traces."""

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry

from kimera_stream.infrastructure.settings import TelemetrySettings
from kimera_stream.infrastructure.telemetry import (
    Metrics,
    Redaction,
    Tracing,
    TracingError,
    configure_logging,
    configure_tracing,
)
from kimera_stream.protocol.errors import NotFoundError, UnavailableError


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {
        name: logging.getLogger(name).level for name in ("uvicorn.access", "httpx", "sqlalchemy.engine", "asyncio")
    }
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def configured(level: str = "info", format: str = "json") -> io.StringIO:
    stream = io.StringIO()
    configure_logging(TelemetrySettings(log_level=level, log_format=format), stream)
    return stream


def records(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_json_object_with_its_context():
    stream = configured()
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        structlog.get_logger("kimera_stream.part").info("loaded", geoids=3)
    (record,) = records(stream)
    assert record.pop("timestamp").endswith("Z")
    assert record == {
        "event": "loaded", "geoids": 3, "level": "info", "logger": "kimera_stream.part", "request_id": "r-1",
    }  # fmt: skip


def test_the_standard_librarys_records_go_the_same_way():
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # as another configuration of uvicorn leaves it
    stream = configured()
    with structlog.contextvars.bound_contextvars(request_id="r-2"):
        logging.getLogger("uvicorn.error").warning("worker %s is odd", "w1")
    logging.getLogger("uvicorn.access").info("GET /")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("something old", DeprecationWarning, stacklevel=1)
    first, second = records(stream)
    assert (first["event"], first["logger"], first["level"]) == ("worker w1 is odd", "uvicorn.error", "warning")
    assert first["request_id"] == "r-2"
    assert "something old" in second["event"]


def test_levels():
    stream = configured("warning")
    log = structlog.get_logger("kimera_stream.part")
    log.info("quiet")
    log.warning("loud")
    assert [record["event"] for record in records(stream)] == ["loud"]


def test_what_users_said_is_only_written_at_debug_level():
    stream = configured("debug")
    log = structlog.get_logger("kimera_stream.part")
    log.debug("publish", text="the door is open")
    log.info("publish", text="the door is open", geoid={"id": "g1", "text": "the door is open"})
    debug, info = records(stream)
    assert debug["text"] == "the door is open"
    assert info["text"] == "<16 withheld>"
    assert info["geoid"] == {"id": "g1", "text": "<withheld>"}


@pytest.mark.parametrize("level", ["debug", "info", "error"])
@pytest.mark.parametrize("format", ["json", "console"])
def test_secrets_are_never_written(level, format):
    stream = configured("debug", format)
    log = structlog.get_logger("kimera_stream.part")
    secrets = [
        "s3cr3t-value",
        "hunter2",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",
        "kst_abc123_TOPSECRETPART",
    ]
    getattr(log, level)(
        "connected",
        token=secrets[0],
        api_key=secrets[0],
        headers={"Authorization": secrets[0], "x": [f"Bearer {secrets[2]}"]},
        url=f"postgresql://kimera:{secrets[1]}@db/kimera",
        reason=f"refused {secrets[2]} and {secrets[3]}",
    )
    try:
        raise ValueError(f"cannot reach redis://:{secrets[1]}@cache:6379 with {secrets[3]}")
    except ValueError:
        log.exception("failed")
    written = stream.getvalue()
    assert "connected" in written
    assert "ValueError" in written
    for secret in (*secrets[:3], "TOPSECRETPART"):
        assert secret not in written


def test_names_that_only_look_like_secrets_are_written():
    stream = configured()
    structlog.get_logger("x").info("counted", tokens_total=5, keyboard="qwerty", tokenizer="wordpiece")
    (record,) = records(stream)
    assert (record["tokens_total"], record["keyboard"], record["tokenizer"]) == (5, "qwerty", "wordpiece")


def test_a_line_break_in_a_value_does_not_fake_a_record():
    stream = configured(format="console")
    structlog.get_logger("x").info("refused", origin="evil\n2026-01-01T00:00:00Z [info] all is well")
    assert len(stream.getvalue().splitlines()) == 1


def test_configuring_again_replaces_the_first():
    first = configured()
    second = configured()
    structlog.get_logger("x").info("once")
    assert first.getvalue() == ""
    assert len(records(second)) == 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=20,
    )
)
def test_redaction_takes_any_value(value):
    event = Redaction()(None, "info", {"event": "x", "value": value, "password": value})
    assert event["password"] == "***"
    json.dumps(event["value"])


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_failures_of_services_are_counted_by_kind():
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.service_failed("vault", UnavailableError("disk full"))
    metrics.service_failed("vault", OSError("broken"))
    metrics.service_failed("hub", KeyError("defect"))

    def count(service: str, kind: str) -> float | None:
        return registry.get_sample_value("kimera_service_failures_total", {"service": service, "kind": kind})

    assert (count("vault", "operational"), count("vault", "defect"), count("hub", "defect")) == (2, None, 1)


def test_metrics_live_on_their_registry_alone():
    Metrics(CollectorRegistry())
    Metrics(CollectorRegistry())  # on one registry, or on the global one, this would be refused as a duplicate


# -- traces ------------------------------------------------------------------------------------------------------------


def traced() -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing = configure_tracing(
        TelemetrySettings(tracing=True), node="n1", version="1", processor=SimpleSpanProcessor(exporter)
    )
    return tracing, exporter


def test_spans_nest_and_say_what_failed_without_saying_why():
    tracing, exporter = traced()
    with pytest.raises(NotFoundError), tracing.span("publish", lane=5), tracing.span("embed"):
        raise NotFoundError("what the user said is in this message")
    inner, outer = exporter.get_finished_spans()
    assert (inner.name, outer.name) == ("embed", "publish")
    assert inner.parent.span_id == outer.context.span_id
    assert outer.attributes == {"lane": 5, "error.type": "not_found"}
    assert outer.status.status_code is StatusCode.ERROR
    assert not outer.events
    assert outer.resource.attributes["service.instance.id"] == "n1"
    tracing.close()


def test_off_it_records_nothing():
    tracing = configure_tracing(TelemetrySettings(tracing=False), node="n1", version="1")
    with tracing.span("publish"):
        pass
    assert not tracing.on
    tracing.close()


def test_an_exporter_that_is_not_installed_is_named():
    with pytest.raises(TracingError, match=r"OTEL_TRACES_EXPORTER: no exporter 'carrier_pigeon'.*console"):
        configure_tracing(
            TelemetrySettings(tracing=True), node="n", version="1", environ={"OTEL_TRACES_EXPORTER": "carrier_pigeon"}
        )


def test_no_exporter_at_all_is_a_choice():
    tracing = configure_tracing(
        TelemetrySettings(tracing=True), node="n", version="1", environ={"OTEL_TRACES_EXPORTER": "none"}
    )
    assert tracing.on
    tracing.close()
