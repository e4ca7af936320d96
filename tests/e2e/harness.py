"""A real server process on a real port, and a client that knows nothing but the public contract."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
from websockets.asyncio.client import ClientConnection, connect

PATIENCE = 20.0
"""Seconds that anything awaited may take on a busy machine before the test fails."""

PROGRAM = [sys.executable, "-m", "kimera_stream.api.cli.main"]


def environment(**changes: str) -> dict[str, str]:
    """Of a child process: what the machine sets about Kimera left out; no weights, so that a start takes no time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KIMERA_", "OTEL_"))}
    return {
        **kept,
        "KIMERA_EMBEDDING__PROVIDER": "hashing",
        "KIMERA_SCORING__VERIFIER": "off",
        "KIMERA_TELEMETRY__LOG_FORMAT": "json",
        "KIMERA_API__SHUTDOWN_DEADLINE": "6",
        "PYTHONUNBUFFERED": "1",
        **changes,
    }


class Server:
    """One server process.

    Args:
        data_dir: Its data; the same one again is a restart.
        wait: Return when it is ready; otherwise as soon as it accepts connections.
        settings: Further environment.
    """

    def __init__(self, data_dir: Path, *, wait: bool = True, port: int = 0, **settings: str) -> None:
        self.data_dir = data_dir
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._over = False
        command = [*PROGRAM, "serve", "--port", str(port), "--data-dir", str(data_dir), "--env-file", ""]
        self.process = subprocess.Popen(
            command,
            env=environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = f"127.0.0.1:{port}"
        if wait:
            line = self.wait_for_line(lambda each: each.startswith("listening on "))
            self.address = line.removeprefix("listening on http://").strip()
        self.url = f"http://{self.address}"
        self.ws_url = f"ws://{self.address}/v1/stream"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    @property
    def lines(self) -> list[str]:
        with self._changed:
            return list(self._lines)

    def wait_for_line(self, wanted: Callable[[str], bool]) -> str:
        """The first line of output that is wanted; the whole output where it does not come."""
        limit = time.monotonic() + PATIENCE
        seen = 0
        with self._changed:
            while True:
                for line in self._lines[seen:]:
                    if wanted(line):
                        return line
                seen = len(self._lines)
                if self._over or not self._changed.wait(limit - time.monotonic()):
                    raise AssertionError("the line did not come:\n" + "\n".join(self._lines))

    def kill(self) -> None:
        """As a power cut would: no chance to do anything."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def stop(self) -> None:
        """However it is, it is over then."""
        if self.process.poll() is None:
            self.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()

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
    """Look again until it holds: for what another process does without telling."""
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(every)
