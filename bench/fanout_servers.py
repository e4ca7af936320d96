"""The Python servers of bench/fanout.py, each run in a process of its own: ``python -m bench.fanout_servers NAME``.

Each prints its port, then answers ``push B SECONDS RATE OFFSET FILTERS`` on stdin with one line of JSON, as fanout_server.c does.
"""

import asyncio
import gc
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
import structlog
import uvicorn
import uvloop

from kimera_stream.core.access import ALL_ROLES, Principal
from kimera_stream.core.interfaces import LogPage
from kimera_stream.infrastructure.garbage import settle_garbage
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.messages import ServerInfo

EVENT_BYTES = 200
PAD = "x" * 400
BACKLOG = 65_536
"""Bytes that one connection of a peer that buffers without end may have waiting before the next tick waits for it."""
ENCODED = [0]
"""Statements that the encoder has been through."""
LOADED = threading.Event()
Push = Callable[[int, int, int, bool], Awaitable[None]]
"""Sends ``batch`` events from ``offset`` on to everyone; unless paced by the clock, returns when all of it is on its way."""


def cpu() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def data_of(offset: int, filters: int) -> bytes:
    head = b'{"t":%d,"k":%d,"pad":"' % (time.monotonic_ns(), offset % filters)
    # What surrounds the data in an event is 105 bytes and the digits of its offset.
    return head + PAD[: max(0, EVENT_BYTES - 107 - len(str(offset)) - len(head))].encode() + b'"}'


def event_text(offset: int, filters: int) -> str:
    head = f'{{"op":"event","channel":"geoids","epoch":"bench","offset":{offset},"type":"geoid.created","ts":1700000000000,'
    return f'{head}"data":{data_of(offset, filters).decode()}}}'


async def drive(push: Push) -> None:
    """Carry out what stdin says."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().split():
        if line[0] == "encoded":
            print(ENCODED[0], flush=True)
            continue
        batch, seconds, rate, offset, filters = int(line[1]), float(line[2]), float(line[3]), int(line[4]), int(line[5])
        begun, used, events = time.monotonic(), cpu(), 0
        while time.monotonic() - begun < seconds:
            if rate:
                wait = events / rate - (time.monotonic() - begun)
                if wait > 0:
                    await asyncio.sleep(wait)
            await push(batch, offset, filters, rate > 0)
            offset += batch
            events += batch
        print(
            json.dumps(
                {"events": events, "seconds": time.monotonic() - begun, "cpu": cpu() - used, "last": offset - 1}
            ),
            flush=True,
        )


class Log:
    """The newest entries, as long a log as a run needs."""

    epoch = "bench"
    trimmed = 0

    def __init__(self) -> None:
        self.head = 0
        self.entries: list[LogEntry] = []

    async def read(
        self, channel: str | None, *, after: int, limit: int, until: int | None = None, reverse: bool = False
    ) -> LogPage:
        await anyio.lowlevel.checkpoint()
        until = self.head if until is None else until
        first = self.entries[0].offset if self.entries else 1
        page = self.entries[max(0, after + 1 - first) : max(0, min(until, after + limit) + 1 - first)]
        scanned = page[-1].offset if page else until
        return LogPage(page, scanned, scanned < until)


class Nobody:
    """Lets everyone in; there is nothing to ask of the other services here."""

    required = False

    def known(self, token: str | None) -> Principal | None:
        return Principal("bench", ALL_ROLES)

    def holds(self, principal: Principal) -> bool:
        return True


class Quiet(uvicorn.Server):
    def _log_started_message(self, listeners: Any) -> None:
        print(listeners[0].getsockname()[1], flush=True)


def encode_on_and_on() -> None:
    """The ingest path's work beside the event loop: the packaged encoder, batch after batch, in a thread as in the product."""
    from kimera_stream.core.embedding.minilm import model_path
    from kimera_stream.core.embedding.minilm_encoder import MiniLmEncoder
    from kimera_stream.infrastructure.compute import plan_compute

    encoder = MiniLmEncoder(model_path(), plan_compute("cpu", "auto"), 32)
    texts = [f"The pump number {number} in the north hall was checked on Friday." for number in range(32)]
    encoder.encode(texts)
    LOADED.set()
    while True:
        encoder.encode(texts)
        ENCODED[0] += len(texts)


async def kimera() -> None:
    from kimera_stream.api.egress import uvicorn_options
    from kimera_stream.api.websocket import StreamEndpoint
    from kimera_stream.infrastructure.settings import Settings
    from kimera_stream.streaming.hub import Hub

    tick = float(os.environ.get("BENCH_TICK", "0"))
    settings = Settings(
        _env_file=None,
        api={"max_connections": 20_000, "max_connections_per_principal": 20_000},
        stream={"tick": tick, "outbox_age": 300, "pong_timeout": 300, "connect_timeout": 300, "ping_interval": 300},
    )
    log = Log()
    hub = Hub(log, settings.stream)
    nobody: Any = Nobody()
    endpoint = StreamEndpoint(hub, nobody, nobody, nobody, settings, server=ServerInfo("kimera-stream", "0", "bench"))

    async def push(batch: int, offset: int, filters: int, paced: bool) -> None:
        entries = [
            LogEntry(
                offset + i, "geoid.created", 1_700_000_000_000, ("geoids",), msgspec.Raw(data_of(offset + i, filters))
            )
            for i in range(batch)
        ]
        log.entries.extend(entries)
        if len(log.entries) > 400_000:
            del log.entries[:200_000]
        log.head = entries[-1].offset
        hub.deliver(entries)
        while hub.flushed < hub.delivered:  # noqa: ASYNC110
            await asyncio.sleep(0)
        while hub.stalled_connections and not paced:  # noqa: ASYNC110
            await asyncio.sleep(0.0002)

    config = uvicorn.Config(
        endpoint, host="0.0.0.0", port=0, lifespan="off", log_level="critical", access_log=False, backlog=4096, proxy_headers=False,
        **uvicorn_options(settings),
    )  # fmt: skip
    if os.environ.get("BENCH_ENCODE"):
        threading.Thread(target=encode_on_and_on, daemon=True).start()
        LOADED.wait()
    async with anyio.create_task_group() as group:
        group.start_soon(hub.run)
        group.start_soon(Quiet(config).serve)
        await drive(push)
        os._exit(0)


async def starlette() -> None:
    """What one writes first: a queue per subscriber, and a task that sends from it."""
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    queues: set[asyncio.Queue[str]] = set()

    async def stream(ws: WebSocket) -> None:
        await ws.accept()
        queue: asyncio.Queue[str] = asyncio.Queue(1000)
        queues.add(queue)
        try:
            while True:
                await ws.send_text(await queue.get())
        except (WebSocketDisconnect, RuntimeError):
            queues.discard(queue)

    async def push(batch: int, offset: int, filters: int, paced: bool) -> None:
        for i in range(batch):
            text = event_text(offset + i, filters)
            for queue in queues:
                await queue.put(text)
        while any(queue.qsize() > 500 for queue in queues):  # noqa: ASYNC110
            await asyncio.sleep(0)

    config = uvicorn.Config(
        Starlette(routes=[WebSocketRoute("/v1/stream", stream)]), host="0.0.0.0", port=0, lifespan="off", log_level="critical",
        access_log=False, backlog=4096, proxy_headers=False, ws_per_message_deflate=False, ws_ping_interval=None,
    )  # fmt: skip
    async with anyio.create_task_group() as group:
        group.start_soon(Quiet(config).serve)
        await drive(push)
        os._exit(0)


async def websockets() -> None:
    """The library's own broadcast."""
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    connections: set[ServerConnection] = set()

    async def handler(ws: ServerConnection) -> None:
        connections.add(ws)
        await ws.wait_closed()

    async def push(batch: int, offset: int, filters: int, paced: bool) -> None:
        for i in range(batch):
            broadcast(connections, event_text(offset + i, filters))
        while any(ws.transport.get_write_buffer_size() for ws in connections):  # noqa: ASYNC110
            await asyncio.sleep(0.0002)

    async with serve(handler, "0.0.0.0", 0, compression=None, ping_interval=None, backlog=4096) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await drive(push)
        os._exit(0)


def socketify() -> None:
    """uWebSockets from Python: its own publish, on its own loop."""
    from socketify import App, OpCode, WebSocket

    app = App()
    sockets: list[WebSocket] = []

    def opened(ws: WebSocket) -> None:
        ws.subscribe("geoids")
        sockets.append(ws)

    async def push(batch: int, offset: int, filters: int, paced: bool) -> None:
        for i in range(batch):
            app.publish("geoids", event_text(offset + i, filters), OpCode.TEXT)
        await asyncio.sleep(0)
        while not paced and any(ws.get_buffered_amount() > BACKLOG for ws in sockets):  # noqa: ASYNC110
            await asyncio.sleep(0)

    app.ws(
        "/v1/stream",
        {
            "open": opened,
            "idle_timeout": 0,
            "max_backpressure": 1 << 28,
            "compression": 0,
            "send_pings_automatically": False,
        },
    )
    app.listen(0, lambda config: print(config.port, flush=True))
    driver = app.loop.create_task(drive(push))  # the loop itself holds it weakly
    app.run()
    del driver


SERVERS = {"kimera": kimera, "starlette": starlette, "websockets": websockets}

if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # standard output is spoken on
    # What was imported is not looked through for garbage again and again; ours as the product's server has it.
    gc.collect()
    gc.freeze()
    if sys.argv[1] == "kimera":
        settle_garbage()
    if sys.argv[1] == "socketify":
        socketify()
        sys.exit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(SERVERS[sys.argv[1]]())
