"""The ASGI application: routes, middleware and the lifespan around one runtime."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from kimera_stream.api.auth.transport import host_allowed
from kimera_stream.api.dashboard import dashboard_routes
from kimera_stream.api.http.routes import http_routes
from kimera_stream.api.middleware import http_middleware
from kimera_stream.api.problems import EXCEPTION_HANDLERS
from kimera_stream.api.runtime import Runtime

STREAM_PATH: Final = "/v1/stream"


def create_app(runtime: Runtime) -> ASGIApp:
    """The application of one runtime. The server answers /livez and /readyz from the start, the rest once it is ready."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with runtime.lifespan():
            yield

    door = runtime.parts.door
    pages = Starlette(
        routes=[*http_routes(door), *dashboard_routes(runtime.settings)],
        middleware=http_middleware(door, runtime.tracing),
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    gate = StreamGate(runtime)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Past the middleware and thirty routes, none of which has anything to say of it: a crowd may be at this door.
        if scope["type"] == "websocket" and scope["path"] == STREAM_PATH:
            await gate(scope, receive, send)
        else:
            await pages(scope, receive, send)

    return app


class StreamGate:
    """In front of the WebSocket endpoint, which exists once the server is ready: until then handshakes get a 503.

    Where access is open, a handshake that calls the server by another name than this machine's is refused, as
    ``OriginMiddleware`` does with requests.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._bound = runtime.settings.api.host
        self._open_access = not runtime.parts.door.authenticator.required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._open_access and not host_allowed(_host(scope), self._bound):
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "host"})
            return
        endpoint = self._runtime.parts.stream
        if endpoint is not None:
            await endpoint(scope, receive, send)
            return
        await receive()
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1013})
            return
        refusal = self._runtime.parts.door.refusal
        body = f"{refusal}\n".encode() if refusal else b"the server is starting; try again\n"
        headers = [
            (b"retry-after", b"1"),
            (b"content-type", b"text/plain"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "websocket.http.response.start", "status": 503, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": body})


def _host(scope: Scope) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), None)
