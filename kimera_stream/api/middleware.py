"""Around every request, as plain ASGI: its id, its metrics, the pages that may make it, and what a defect looks like from outside.

Outermost first: ``RequestMiddleware``, ``OriginMiddleware``. Neither buffers or wraps a body, so streams and cancellation pass
through untouched.
"""

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimera_stream.api.auth.transport import host_allowed, origin_allowed
from kimera_stream.api.http.door import HttpDoor
from kimera_stream.api.http.operations import ROUTE_KEY
from kimera_stream.api.problems import REQUEST_ID_KEY, problem_response
from kimera_stream.infrastructure.settings import ApiSettings
from kimera_stream.infrastructure.telemetry import Metrics, Tracing
from kimera_stream.protocol.errors import ForbiddenError, InternalError

log = structlog.get_logger(__name__)

_SANE_ID: Final = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_STREAMS: Final = ("text/event-stream", "application/x-ndjson")
_EXPOSED: Final = "x-request-id, retry-after, location"
_ACCEPTED_HEADERS: Final = "authorization, content-type, accept, idempotency-key, last-event-id, x-request-id"
_OPEN_PATHS: Final = frozenset({"/livez", "/readyz"})


def http_middleware(door: HttpDoor, tracing: Tracing) -> list[Middleware]:
    """For ``Starlette(middleware=...)``."""
    return [
        Middleware(RequestMiddleware, metrics=door.metrics, tracing=tracing),
        Middleware(
            OriginMiddleware,
            api=door.settings.api,
            allowed_origins=tuple(door.settings.security.allowed_origins),
            open_access=not door.authenticator.required,
        ),
    ]


class RequestMiddleware:
    """Gives every HTTP request an id, counts and times it, and answers a programming error with a bare 500.

    The id is the client's ``X-Request-Id`` where that is sane, else a new one; it is in the response, in every log record
    made on the way, and in every problem. A defect is logged here, once, with its traceback; nothing of it leaves the server.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope[REQUEST_ID_KEY] = request_id
        method = scope["method"] if scope["method"] in _METHODS else "other"
        status = 0
        streamed = False
        ended = False

        async def tagging_send(message: Message) -> None:
            nonlocal status, streamed, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.setdefault("x-content-type-options", "nosniff")
                streamed = headers.get("content-type", "").startswith(_STREAMS)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        began = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=request_id), self._metrics.http_open.track_inprogress():
            try:
                with self._tracing.span("http", method=method, path=scope["path"]):
                    await self._app(scope, receive, tagging_send)
            except Exception:  # the last place that can tell of it: reported, answered, counted
                self._metrics.defects.labels("http").inc()
                log.exception("request failed", method=method, route=scope.get(ROUTE_KEY), sent=status)
                if not status:
                    self._metrics.error("http", InternalError.code)
                    told = problem_response(scope, InternalError("the server made a mistake; it is logged"))
                    await told(scope, receive, tagging_send)
                # A response that has begun cannot be repaired: left unfinished, the server drops the connection, and the
                # client sees that it is not whole.
            finally:
                self._count(scope, method, status, time.perf_counter() - began, streamed=streamed, ended=ended)

    def _count(self, scope: Scope, method: str, status: int, seconds: float, *, streamed: bool, ended: bool) -> None:
        route = _route(scope)
        shown = str(status) if ended else "gone"
        self._metrics.http_requests.labels(method, route, shown).inc()
        if not streamed and ended:
            self._metrics.http_seconds.labels(method, route).observe(seconds)
        log.debug("request", method=method, route=route, status=shown, ms=round(seconds * 1000, 2))


def _route(scope: Scope) -> str:
    """The path's template: one label per route, however many ids there are."""
    template = scope.get(ROUTE_KEY)
    if template is not None:
        return str(template)
    return str(getattr(scope.get("route"), "path", "unmatched"))


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else secrets.token_hex(8)


class OriginMiddleware:
    """Which web pages may use the server, and by which name it may be called.

    A page of another origin is refused unless ``KIMERA_SECURITY__ALLOWED_ORIGINS`` names it; one that is named gets the CORS
    headers it needs. Where access is open, the server is on a loopback address and has to be called by a loopback name: a page
    that has its own name point there (DNS rebinding) is refused. ``/v1/stream`` is judged by its own door (``api.app``),
    another WebSocket handshake by the name alone.
    """

    def __init__(self, app: ASGIApp, api: ApiSettings, allowed_origins: Sequence[str], *, open_access: bool) -> None:
        self._app = app
        self._bound = api.host
        self._allowed = allowed_origins
        self._open_access = open_access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host")
        if self._open_access and not host_allowed(host, self._bound) and scope["path"] not in _OPEN_PATHS:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": "host"})
                return
            refused = ForbiddenError(
                f"host: expected a name of this machine (localhost, 127.0.0.1), got {(host or 'none')[:80]}; "
                "to serve other names, require tokens (KIMERA_SECURITY__AUTH=required)",
                field="host",
            )
            await self._refuse(refused, scope, receive, send)
            return
        origin = headers.get("origin")
        if scope["type"] == "websocket" or origin is None:
            await self._app(scope, receive, send)
            return
        if not origin_allowed(origin, host, self._allowed):
            refused = ForbiddenError(
                f"origin: {origin[:80]} may not use this server; KIMERA_SECURITY__ALLOWED_ORIGINS names those that may",
                field="origin",
            )
            await self._refuse(refused, scope, receive, send)
            return
        granted = {"access-control-allow-origin": origin, "access-control-expose-headers": _EXPOSED}
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            preflight = {
                **granted,
                "access-control-allow-methods": "GET, POST, PATCH, DELETE",
                "access-control-allow-headers": _ACCEPTED_HEADERS,
                "access-control-max-age": "600",
                "vary": "Origin",
            }
            await Response(status_code=204, headers=preflight)(scope, receive, send)
            return

        async def granting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                _grant(message, granted)
            await send(message)

        await self._app(scope, receive, granting_send)

    async def _refuse(self, error: ForbiddenError, scope: Scope, receive: Receive, send: Send) -> None:
        await problem_response(scope, error)(scope, receive, send)


def _grant(message: Message | dict[str, Any], granted: Mapping[str, str]) -> None:
    headers = MutableHeaders(scope=message)
    headers.update(granted)
    headers.add_vary_header("Origin")
