"""A small server that speaks the contract from memory, with switches for everything that can go wrong."""

import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

SUBPROTOCOLS = {"kimera.v1.json": "json", "kimera.v1.msgpack": "msgpack"}


def geoid(offset: int, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": body.get("id", f"g{offset}"),
        "version": 1,
        "text": body.get("text"),
        "semantic_state": {},
        "symbolic_state": {},
        "metadata": {},
        "entropy": 0.0,
        "created_at": 1,
        "updated_at": 1,
        "offset": offset,
    }


class FakeServer:
    """One log, one channel (``geoids``) that carries all of it; ``stats`` as a latest channel."""

    def __init__(self) -> None:
        self.port = 0
        self.epoch = "e1"
        self.log: list[dict[str, Any]] = []
        self.keys: dict[str, dict[str, Any]] = {}
        self.peers: dict[ServerConnection, dict[str, Any]] = {}
        self.commands: list[dict[str, Any]] = []
        self.connects = 0
        self.trimmed = 0
        self.tokens: set[str] | None = None
        self.before_reply: Callable[[ServerConnection, dict[str, Any]], Any] | None = None
        self.refuse_with: int | None = None
        self.refuse_subs = 0
        """Times that a subscription is refused for the moment."""
        self.arrived = anyio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- what a test makes it do --

    async def say(self, text: str) -> int:
        """Append a statement and send it to the live subscribers; returns its offset."""
        offset = len(self.log) + 1
        self.log.append(self.entry(offset, {"text": text}))
        for peer, state in list(self.peers.items()):
            if "geoids" in state["subs"]:
                await self.send(peer, self.log[-1])
        return offset

    def entry(self, offset: int, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "op": "event",
            "channel": "geoids",
            "epoch": self.epoch,
            "offset": offset,
            "type": "geoid.created",
            "ts": 1,
            "data": geoid(offset, body),
        }

    async def push(self, message: dict[str, Any]) -> None:
        for peer in list(self.peers):
            await self.send(peer, message)

    async def drop(self, code: int = 4000, reason: str = "shutdown") -> None:
        """Close every connection."""
        for peer in list(self.peers):
            await peer.close(code, reason)

    def cut(self) -> None:
        """Break every connection without a word."""
        for peer in list(self.peers):
            peer.transport.abort()

    async def until_connects(self, count: int) -> None:
        while self.connects < count:
            await self.arrived.wait()

    # -- the protocol --

    async def send(self, peer: ServerConnection, message: dict[str, Any]) -> None:
        try:
            if peer.subprotocol == "kimera.v1.msgpack":
                await peer.send(msgspec.msgpack.encode(message))
            else:
                await peer.send(msgspec.json.encode(message).decode())
        except ConnectionClosed:
            self.peers.pop(peer, None)

    async def handle(self, peer: ServerConnection) -> None:
        try:
            async for frame in peer:
                binary = peer.subprotocol == "kimera.v1.msgpack"
                assert isinstance(frame, bytes) == binary
                command = (msgspec.msgpack if binary else msgspec.json).decode(frame)
                self.commands.append(command)
                if self.before_reply is not None and await self.before_reply(peer, command):
                    continue
                await getattr(self, "do_" + command["op"])(peer, command)
        except ConnectionClosed:
            return
        finally:
            self.peers.pop(peer, None)

    async def reply(self, peer: ServerConnection, command: dict[str, Any], op: str, **fields: Any) -> None:
        await self.send(peer, {"op": op, "id": command["id"], **fields})

    async def error(self, peer: ServerConnection, command: dict[str, Any], code: str, message: str) -> None:
        await self.reply(peer, command, "error", code=code, message=message, temporary=False)

    async def do_connect(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        if self.refuse_with is not None:
            await peer.close(self.refuse_with, "refused")
            return
        if self.tokens is not None and command.get("token") not in self.tokens:
            await self.error(peer, command, "unauthorized", "token: missing or unknown")
            await peer.close(4500, "unauthorized")
            return
        self.peers[peer] = {"subs": set()}
        answers, replays = [], []
        for body in command.get("subs") or []:
            answer, replay = self.start(peer, body)
            answers.append(answer)
            replays += replay
        await self.reply(
            peer,
            command,
            "connected",
            session="s1",
            epoch=self.epoch,
            offset=len(self.log),
            server={"name": "fake", "version": "0", "node": "n"},
            ping=25,
            limits={},
            **({"subs": answers} if answers else {}),
        )
        for event in replays:
            await self.send(peer, event)
        self.connects += 1
        self.arrived.set()
        self.arrived = anyio.Event()

    def start(self, peer: ServerConnection, body: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        channel, since = body["channel"], body.get("since")
        if self.refuse_subs:
            self.refuse_subs -= 1
            error = {"code": "unavailable", "message": "the log cannot be read", "temporary": True, "retry_after": 0.01}
            return {"op": "error", "channel": channel, **error}, []
        answer = {"op": "subscribed", "channel": channel, "epoch": self.epoch, "offset": len(self.log)}
        self.peers[peer]["subs"].add(channel)
        if channel != "geoids":
            return {**answer, "was_recovering": False, "recovered": False}, []
        if since is not None:
            if "cursor" in since:
                since = {"epoch": self.epoch, "offset": 1}
            ok = since["epoch"] == self.epoch and since["offset"] >= self.trimmed
            if not ok:
                return {**answer, "was_recovering": True, "recovered": False}, []
            replay = self.log[since["offset"] :]
            return {**answer, "offset": since["offset"], "was_recovering": True, "recovered": True}, replay
        rewind = body.get("rewind") or 0
        replay = self.log[max(0, len(self.log) - rewind) :] if rewind else []
        return {**answer, "was_recovering": False, "recovered": False}, replay

    async def do_subscribe(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        if command["channel"] in self.peers[peer]["subs"]:
            await self.error(peer, command, "already_subscribed", "channel: subscribed already")
            return
        answer, replay = self.start(peer, command)
        await self.send(peer, {**answer, "id": command["id"]})
        for event in replay:
            await self.send(peer, event)

    async def do_unsubscribe(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        self.peers[peer]["subs"].discard(command["channel"])
        await self.reply(peer, command, "unsubscribed", channel=command["channel"])

    async def do_publish(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        key = command.get("key")
        if key in self.keys:
            await self.reply(peer, command, "published", **{**self.keys[key], "duplicate": True})
            return
        body = command["geoid"]
        if body.get("text") == "":
            await self.error(peer, command, "bad_request", "geoid.text: expected 1-8192 characters")
            return
        offset = len(self.log) + 1
        self.log.append(self.entry(offset, body))
        result = {"geoid": self.log[-1]["data"], "offset": offset, "contradictions": [], "duplicate": False}
        if key is not None:
            self.keys[key] = result
        await self.reply(peer, command, "published", **result)
        for other, state in list(self.peers.items()):
            if "geoids" in state["subs"]:
                await self.send(other, self.log[-1])

    async def do_ping(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        await self.reply(peer, command, "pong", epoch=self.epoch, offset=len(self.log))

    async def do_history(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        after = (command.get("since") or {"offset": 0})["offset"]
        page = self.log[after : after + command["limit"]]
        await self.reply(
            peer,
            command,
            "history",
            events=page,
            epoch=self.epoch,
            offset=after + len(page),
            more=after + len(page) < len(self.log),
        )

    async def do_watch(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        await self.reply(peer, command, "watching", watch=command["watch"], channel="watch:w1")

    async def do_unwatch(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        await self.reply(peer, command, "unwatched", watch=command["watch"])

    async def do_presence(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        await self.reply(peer, command, "presence", subscribers=len(self.peers), principals={"anonymous": 1})

    async def do_ack(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        await self.reply(peer, command, "acked")

    async def do_refresh(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        await self.reply(peer, command, "refreshed", expires=2_000_000_000)

    async def do_delete(self, peer: ServerConnection, command: dict[str, Any]) -> None:
        await self.error(peer, command, "not_found", f"geoid_id: no geoid {command['geoid_id']}")


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    async with serve(
        fake.handle,
        "127.0.0.1",
        0,
        subprotocols=list(SUBPROTOCOLS),  # type: ignore[arg-type]
        compression=None,
        close_timeout=1,
    ) as running:
        fake.port = running.sockets[0].getsockname()[1]
        yield fake


@pytest.fixture
def unused_port() -> int:
    """A port where nobody listens (it was just given back by the system)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
