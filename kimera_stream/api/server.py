"""The process: socket, signals, uvicorn around the application, and an end that always comes."""

import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO

import anyio
import anyio.abc
import structlog
import uvicorn

from kimera_stream.api.app import create_app
from kimera_stream.api.composition import build_runtime
from kimera_stream.api.egress import uvicorn_options
from kimera_stream.api.folders import FolderError, check_folders
from kimera_stream.api.http.protocol import KimeraHttpProtocol
from kimera_stream.api.progress import StartProgress
from kimera_stream.api.runtime import Runtime
from kimera_stream.infrastructure.compute import bound_native_caches, use_one_blas_thread
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.garbage import settle_garbage
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.infrastructure.tasks import ServiceFailed
from kimera_stream.infrastructure.telemetry import configure_logging
from kimera_stream.protocol.errors import KimeraError

log = structlog.get_logger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
"""It could not start, or a service failed for good; one line on standard error says why and what to do."""
EXIT_STUCK = 3
"""The stop did not end by its deadline; what was still running is on standard error."""

WATCHDOG_GRACE = 5.0
"""Seconds beyond the shutdown deadline after which the process ends itself."""


HURRY = 2.0
"""Seconds that a stop has left when a second signal comes."""


class BindError(KimeraError):
    """The address cannot be listened on."""


class KimeraServer(uvicorn.Server):
    """uvicorn's server, stopping in our order: no new connections, finish the accepted, close subscribers, end services."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are received by a task of ours: uvicorn would raise them again at the end, and the exit code is 0."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._runtime.drain()
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()  # which uvicorn leaves out then: our services still end in order, at once


def serve(settings: Settings, *, services: Services | None = None, console: IO[str] | None = None) -> int:
    """Run the server until it is told to stop; returns the exit code of the process.

    Prints ``listening on http://HOST:PORT`` when ready. SIGTERM and SIGINT stop it cleanly; a second one at once.

    Args:
        settings: Checked settings.
        services: Registrations with parts of their own (``composition.build_services``), for tests.
        console: Where the start is told; standard output by default.
    """
    out = console or sys.stdout
    configure_logging(settings.telemetry)
    bound_native_caches()
    use_one_blas_thread()
    try:
        check_folders(settings)
        sock = bind(settings.api.host, settings.api.port)
    except (FolderError, BindError) as error:
        print(f"kimera-stream: {error}", file=sys.stderr)  # noqa: T201 - for the person who started it
        return EXIT_FAILED
    try:
        return anyio.run(
            _serve,
            settings,
            services,
            sock,
            out,
            backend="asyncio",
            backend_options={"use_uvloop": sys.platform != "win32"},
        )
    finally:
        sock.close()


async def _serve(settings: Settings, services: Services | None, sock: socket.socket, out: IO[str]) -> int:
    runtime = await build_runtime(settings, services)
    server = KimeraServer(_config(settings, runtime), runtime)
    code = EXIT_OK
    watchdog = Watchdog(runtime)

    async def receive_signals() -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                name = signal.Signals(number).name
                if server.should_exit:
                    log.warning("stopping at once", signal=name)
                    server.force_exit = True
                    runtime.hurry()
                    watchdog.arm(HURRY)
                    continue
                server.should_exit = True
                log.info("stopping", signal=name, deadline=settings.api.shutdown_deadline)
                watchdog.arm(settings.api.shutdown_deadline + WATCHDOG_GRACE)

    async def announce() -> None:
        try:
            await runtime.ready()
        except ServiceFailed:
            return  # watch_for_failure ends the process and says why
        settle_garbage()
        scheme = "https" if settings.api.tls_certificate else "http"
        print(f"listening on {scheme}://{address(sock)}", file=out, flush=True)

    async def watch_for_failure() -> None:
        nonlocal code
        error = await runtime.failed()
        code = EXIT_FAILED
        print(f"kimera-stream: {error}", file=sys.stderr, flush=True)  # noqa: T201 - for the person who started it
        server.should_exit = True
        watchdog.arm(settings.api.shutdown_deadline + WATCHDOG_GRACE)

    with StartProgress(out) as progress:
        runtime.observe(progress)
        async with anyio.create_task_group() as group:
            group.start_soon(receive_signals, name="server:signals")
            group.start_soon(announce, name="server:announce")
            group.start_soon(watch_for_failure, name="server:failure")
            await server.serve(sockets=[sock])
            if server.lifespan.should_exit:  # uvicorn has logged why: our services could not begin, or not end
                code = EXIT_FAILED
            group.cancel_scope.cancel()
    report = runtime.stop_report
    if report is not None and not report.clean:
        log.warning("stopped, but not cleanly", aborted=report.aborted, undrained=report.undrained)
    return code


def _config(settings: Settings, runtime: Runtime) -> uvicorn.Config:
    api = settings.api
    return uvicorn.Config(
        create_app(runtime),
        **uvicorn_options(settings, KimeraHttpProtocol),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        proxy_headers=bool(api.trusted_proxies),
        forwarded_allow_ips=list(api.trusted_proxies),
        ssl_certfile=api.tls_certificate,
        ssl_keyfile=api.tls_key,
    )


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 picks a free one.

    Raises:
        BindError: names the address and what to do.
    """
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise BindError(
            f"KIMERA_API__HOST: cannot resolve {host!r} ({error.strerror}); give an address of this machine"
        ) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
    except OSError as error:
        sock.close()
        raise BindError(
            f"KIMERA_API__PORT: cannot listen on {host}:{port} ({error.strerror}); "
            "stop what uses the port, or choose another (0 picks a free one)"
        ) from error
    sock.setblocking(False)
    return sock


def address(sock: socket.socket) -> str:
    """``host:port`` of a bound socket, the host in brackets for IPv6."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Watchdog:
    """Ends the process when its stop takes too long: a thread, because the event loop may be what is stuck.

    It stays armed when the event loop has ended: the interpreter waits for threads, and one of them may be stuck.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._timer: threading.Timer | None = None
        self._due = math.inf

    def arm(self, seconds: float) -> None:
        """End the process in ``seconds``, unless an earlier call said sooner."""
        due = time.monotonic() + seconds
        if due >= self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = threading.Timer(seconds, self._end, (seconds,))
        self._timer.daemon = True
        self._timer.start()

    def _end(self, seconds: float) -> None:
        running = ", ".join(self._runtime.running()) or "none of ours"
        sys.stderr.write(f"kimera-stream: the stop did not end within {seconds:g} s; still running: {running}\n")
        faulthandler.dump_traceback(file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_STUCK)
