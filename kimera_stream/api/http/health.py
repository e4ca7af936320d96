"""/livez, /readyz, /health and /metrics: for whoever operates the server."""

import time
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response
from starlette.types import ASGIApp

from kimera_stream.api.http.content import MSGPACK
from kimera_stream.api.http.door import Check
from kimera_stream.api.http.operations import Answer, Call, Content, Operation
from kimera_stream.protocol.errors import NotFoundError


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["alive"] = "alive"


class ReadyReport(msgspec.Struct, frozen=True, kw_only=True):
    """``services``: each with its state, and while it starts with its progress in words."""

    ready: bool
    draining: bool
    services: dict[str, str]


class ServiceReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``latency``: seconds that the service took to answer."""

    ok: bool
    latency: float
    error: str | None = None


class HealthReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``uptime``: seconds since the door was opened."""

    status: Literal["ok", "degraded", "starting", "stopping"]
    node: str
    version: str
    environment: str
    uptime: float
    epoch: str | None = None
    offset: Annotated[int, Meta(description="Newest position of the log.")] | None = None
    services: dict[str, str]
    checks: dict[str, ServiceReport]
    versions: dict[str, str]
    cluster: Annotated[dict[str, Any], Meta(description="Nodes and slices, where there are several.")] | None = None


async def livez(call: Call) -> ASGIApp:
    return call.answer(Alive())


async def readyz(call: Call) -> ASGIApp:
    state = call.door.readiness()
    stopping = state.draining or call.door.streams.lines_stopping.is_set()
    report = ReadyReport(ready=state.ready and not stopping, draining=stopping, services=dict(state.services))
    if report.ready:
        return call.answer(report)
    return call.answer(report, status=503, headers={"retry-after": "1"})


async def health(call: Call) -> ASGIApp:
    door = call.door
    state = door.readiness()
    checks = {name: _service_report(found) for name, found in (await door.health()).items()}
    cluster = None if door.cluster is None else dict(door.cluster())
    covered = cluster is None or cluster.get("completeness", 0.0) >= 1.0
    healthy = covered and all(check.ok for check in checks.values())
    status: Literal["ok", "degraded", "starting", "stopping"]
    if state.draining or door.streams.lines_stopping.is_set():
        status = "stopping"
    elif door.services is None and not door.refusal:
        status = "starting"
    else:
        status = "ok" if healthy and state.ready else "degraded"
    vault = None if door.services is None else door.services.vault
    report = HealthReport(
        status=status,
        node=door.node,
        version=door.version,
        environment=door.settings.environment,
        uptime=round(time.monotonic() - door.opened_at, 3),
        epoch=None if vault is None else vault.epoch,
        offset=None if vault is None else vault.head,
        services=dict(state.services),
        checks=checks,
        versions=dict(door.versions),
        cluster=cluster,
    )
    return call.answer(report, status=200 if status == "ok" else 503)


def _service_report(found: Check) -> ServiceReport:
    return ServiceReport(ok=found.ok, latency=round(found.latency, 6), error=found.error)


async def metrics(call: Call) -> ASGIApp:
    if not call.door.settings.telemetry.metrics:
        raise NotFoundError("/metrics: switched off by KIMERA_TELEMETRY__METRICS=false")
    expose: tuple[Callable[..., bytes], str] = choose_encoder(call.request.headers.get("accept", ""))
    generate, content_type = expose
    # Some gauges read files when they are collected.
    text = await call.door.threads.run("io", generate, call.door.metrics.registry)
    return Response(text, headers={"content-type": content_type, "cache-control": "no-store"})


_INSIDE: Final = (
    "From this machine (a loopback address, no proxy in between) it needs no token; from elsewhere one with the role "
    "`subscribe`, where tokens are required."
)

OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/livez",
        name="isAlive",
        summary="Whether the process answers",
        handler=livez,
        tag="operations",
        access="open",
        answers={200: Answer("It does", (Content(Alive),))},
        needs_services=False,
    ),
    Operation(
        method="GET",
        path="/readyz",
        name="isReady",
        summary="Whether the server takes work",
        handler=readyz,
        tag="operations",
        access="open",
        answers={
            200: Answer("It does", (Content(ReadyReport),)),
            503: Answer("It starts, or stops", (Content(ReadyReport),), {"Retry-After": "Seconds."}),
        },
        needs_services=False,
    ),
    Operation(
        method="GET",
        path="/health",
        name="getHealth",
        summary="How every part is",
        description=_INSIDE,
        handler=health,
        tag="operations",
        access="inside",
        role="subscribe",
        answers={
            200: Answer("All is well", (Content(HealthReport), Content(HealthReport, MSGPACK))),
            503: Answer("Starting, stopping, or something is not well", (Content(HealthReport),)),
        },
        needs_services=False,
    ),
    Operation(
        method="GET",
        path="/metrics",
        name="getMetrics",
        summary="Metrics for Prometheus, as OpenMetrics where the client accepts that",
        description=_INSIDE,
        handler=metrics,
        tag="operations",
        access="inside",
        role="subscribe",
        answers={
            200: Answer("The metrics", (Content(None, "text/plain"), Content(None, "application/openmetrics-text")))
        },
        fails=(404,),
        needs_services=False,
    ),
)
