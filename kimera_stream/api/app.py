"""The ASGI application: routes, middleware and the lifespan around one runtime."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from kimera_stream.api.dashboard import dashboard_routes
from kimera_stream.api.http.routes import http_routes
from kimera_stream.api.middleware import http_middleware
from kimera_stream.api.problems import EXCEPTION_HANDLERS
from kimera_stream.api.runtime import Runtime


def create_app(runtime: Runtime) -> ASGIApp:
    """The application of one runtime. The server answers /livez and /readyz from the start, the rest once it is ready."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with runtime.lifespan():
            yield

    door = runtime.parts.door
    return Starlette(
        routes=[
            *http_routes(door),
            WebSocketRoute("/v1/stream", StreamGate(runtime)),
            *dashboard_routes(runtime.settings),
        ],
        middleware=http_middleware(door, runtime.tracing),
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )


class StreamGate:
    """In front of the WebSocket endpoint, which exists once the server is ready: until then handshakes get a 503."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._runtime.parts.stream
        if endpoint is not None:
            await endpoint(scope, receive, send)
            return
        await receive()
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1013})
            return
        body = b"the server is starting; try again\n"
        headers = [
            (b"retry-after", b"1"),
            (b"content-type", b"text/plain"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "websocket.http.response.start", "status": 503, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": body})
