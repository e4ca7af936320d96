"""A real server process on a real port, and a client that knows nothing but the public contract."""

import inspect
import itertools
import json
import multiprocessing
import os
import socket
import ssl
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect

PATIENCE = 20.0
"""Seconds that anything awaited may take on a busy machine before the test fails."""

START_PATIENCE = 60.0
"""The same for a server's start: the first one waits for everything to be imported, and one with weights loads them."""

_FORKS = multiprocessing.get_context("forkserver")
"""A process that has imported everything once and forks the programs: a start then takes a tenth of the time."""
_FORKS.set_forkserver_preload(["kimera_stream.api.server", "kimera_stream.api.cli.main", __name__])


def environment(**changes: str) -> dict[str, str]:
    """Of a child process: what the machine sets about Kimera left out; no weights, so that a start takes no time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KIMERA_", "OTEL_"))}
    return {
        **kept,
        "KIMERA_EMBEDDING__PROVIDER": "hashing",
        "KIMERA_SCORING__VERIFIER": "off",
        "KIMERA_TELEMETRY__LOG_FORMAT": "json",
        "KIMERA_API__SHUTDOWN_DEADLINE": "6",
        **changes,
    }


def _run_program(
    arguments: list[str],
    settings: dict[str, str],
    output: str,
    directory: str,
    tampering: Callable[[Any, Any], Any] | None = None,
) -> None:
    """``kimera-stream ARGUMENTS`` in this process, which was forked for it."""
    with Path(output).open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(settings)
    os.chdir(directory)
    if tampering is not None:
        _serve_tampered(tampering)
    sys.argv = ["kimera-stream", *arguments]
    from kimera_stream.api.cli.main import main

    main()


def _serve_tampered(tamper: Callable[[Any, Any], Any]) -> None:
    """The server with registrations that ``tamper(services, settings)`` has changed: how to make a part of it crash."""
    from kimera_stream.api.composition import build_services
    from kimera_stream.api.server import serve
    from kimera_stream.infrastructure.settings import load_settings

    settings = load_settings(os.environ, None)
    services = build_services(settings)
    with tamper(services, settings):
        sys.exit(serve(settings, services=services))


class Program:
    """The command line program as a process of its own; its output goes to a file."""

    def __init__(
        self, *arguments: str, directory: Path, tamper: Callable[[Any, Any], Any] | None = None, **settings: str
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.output = directory / f"output-{next(_numbers)}.txt"
        self.output.touch()
        self.process = _FORKS.Process(
            target=_run_program,
            args=(list(arguments), environment(**settings), str(self.output), str(directory), tamper),
            daemon=True,
        )
        self.process.start()

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """The whole lines of its output so far."""
        return [line.removesuffix("\n") for line in self.text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def over(self) -> bool:
        return self.process.exitcode is not None

    def wait_for_line(self, wanted: Callable[[str], bool], patience: float = PATIENCE) -> str:
        """The first line of output that is wanted; blocking."""
        limit = time.monotonic() + patience
        while True:
            over = self.over
            for line in self.lines:
                if wanted(line):
                    return line
            if over or time.monotonic() > limit:
                raise AssertionError("the line did not come:\n" + self.text)
            time.sleep(0.01)  # noqa: TID251 - of a test that waits for another process

    async def line(self, wanted: Callable[[str], bool]) -> str:
        """``wait_for_line`` while other tasks go on."""
        return await anyio.to_thread.run_sync(self.wait_for_line, wanted)

    def kill(self) -> None:
        """As a power cut would: no chance to do anything."""
        self.process.kill()
        self.process.join()

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it has not ended:\n" + self.text
        return self.process.exitcode

    def stop(self) -> None:
        """However it is, it is over then."""
        if not self.over:
            self.terminate()
            self.process.join(10)
        if not self.over:
            self.kill()


_numbers = itertools.count()


class Server(Program):
    """One server process.

    Args:
        data_dir: Its data; the same one again is a restart.
        wait: Return when it is ready; otherwise at once.
        tamper: Given the services and the settings, a context in which parts of them are others.
        settings: Further environment.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        wait: bool = True,
        port: int = 0,
        tamper: Callable[[Any, Any], Any] | None = None,
        **settings: str,
    ) -> None:
        arguments = ["serve", "--port", str(port), "--data-dir", str(data_dir), "--env-file", ""]
        if tamper is not None:
            settings |= {"KIMERA_API__PORT": str(port), "KIMERA_PATHS__DATA_DIR": str(data_dir)}
        super().__init__(*arguments, directory=data_dir.parent, tamper=tamper, **settings)
        self.data_dir = data_dir
        self.address = f"127.0.0.1:{port}"
        if wait:
            line = self.wait_for_line(lambda each: each.startswith("listening on "), START_PATIENCE)
            self.address = line.removeprefix("listening on http://").strip()
        self.url = f"http://{self.address}"
        self.ws_url = f"ws://{self.address}/v1/stream"

    def errors(self) -> list[dict[str, Any]]:
        """Log records of level error and above."""
        records = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [record for record in records if record.get("level") in ("error", "critical")]


class Peer:
    """A connection in one encoding. Replies are told from events by their id; events are kept per channel."""

    def __init__(self, ws: ClientConnection, encoding: str) -> None:
        self.ws = ws
        self.encoding = encoding
        self.connected: dict[str, Any] = {}
        self.pushed: list[dict[str, Any]] = []
        self.replies: dict[int | None, list[dict[str, Any]]] = defaultdict(list)
        self._id = 0

    def encode(self, message: Any) -> str | bytes:
        return msgspec.json.encode(message).decode() if self.encoding == "json" else msgspec.msgpack.encode(message)

    async def closed(self) -> tuple[int | None, str | None]:
        """Wait for the server to close; code and reason."""
        with anyio.fail_after(PATIENCE):
            await self.ws.wait_closed()
        return self.ws.close_code, self.ws.close_reason

    async def send(self, op: str, **fields: Any) -> int:
        """A command; returns its id."""
        self._id += 1
        await self.ws.send(self.encode({"op": op, "id": self._id, **fields}))
        return self._id

    async def receive(self) -> None:
        """Take in one message."""
        with anyio.fail_after(PATIENCE):
            data = await self.ws.recv()
        if self.encoding == "json":
            assert isinstance(data, str)
            message = msgspec.json.decode(data)
        else:
            assert isinstance(data, bytes)
            message = msgspec.msgpack.decode(data)
        if message["op"] in ("event", "heartbeat", "expiring", "resync"):
            self.pushed.append(message)
        else:
            self.replies[message.get("id")].append(message)

    async def reply(self, id: int | None) -> dict[str, Any]:
        while not self.replies[id]:
            await self.receive()
        return self.replies[id].pop(0)

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        return await self.reply(await self.send(op, **fields))

    async def done(self, op: str, **fields: Any) -> dict[str, Any]:
        """``ask`` for something that works."""
        reply = await self.ask(op, **fields)
        assert reply["op"] != "error", reply
        return reply

    async def publish(self, **geoid: Any) -> dict[str, Any]:
        return await self.done("publish", geoid=geoid)

    def events(self, channel: str) -> list[dict[str, Any]]:
        return [each for each in self.pushed if each["op"] == "event" and each["channel"] == channel]

    async def events_until(self, channel: str, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        while not enough(found := self.events(channel)):
            await self.receive()
        return found

    async def wait_events(self, channel: str, count: int) -> list[dict[str, Any]]:
        return await self.events_until(channel, lambda found: len(found) >= count)

    async def push(self, op: str) -> dict[str, Any]:
        while not (found := [each for each in self.pushed if each["op"] == op]):
            await self.receive()
        return found[0]


def web(server: Server, **options: Any) -> httpx.AsyncClient:
    """An HTTP client; without certificates, which take longer to read than most tests."""
    return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, verify=_NO_CERTIFICATES, trust_env=False, **options)


_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


async def metric(http: httpx.AsyncClient, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels; 0 where there is none."""
    text = (await http.get("/metrics")).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@asynccontextmanager
async def handshake(server: Server, encoding: str = "json", **options: Any) -> AsyncIterator[Peer]:
    """A WebSocket on which nothing has been said yet."""
    subprotocols = [f"kimera.v1.{encoding}", *options.pop("subprotocols", [])]
    async with connect(
        server.ws_url, subprotocols=subprotocols, open_timeout=PATIENCE, close_timeout=2, **options
    ) as ws:
        yield Peer(ws, encoding)


@asynccontextmanager
async def peer(
    server: Server, encoding: str = "json", *, options: dict[str, Any] | None = None, **fields: Any
) -> AsyncIterator[Peer]:
    """A connected client; ``fields`` are those of ``connect``."""
    async with handshake(server, encoding, **(options or {})) as made:
        made.connected = await made.done("connect", **fields)
        assert made.connected["op"] == "connected"
        yield made


def offsets(events: Iterable[dict[str, Any]]) -> list[int]:
    return [event["offset"] for event in events]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def until(condition: Callable[[], Any], *, every: float = 0.02) -> None:
    """Look again until it holds (or, awaited, holds): for what another process does without telling."""
    with anyio.fail_after(PATIENCE):
        while True:
            found = condition()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return
            await anyio.sleep(every)


def show(*lines: str) -> None:
    """Print for the report of a test that fails."""
    sys.stdout.write("\n".join([*lines, ""]))
