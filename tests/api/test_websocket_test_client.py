"""The behaviour of the WebSocket door over Starlette's TestClient: another ASGI server, without a socket and without our handle."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from kimera_stream.streaming.hub import Hub
from tests.streaming.fakes import FakeVault, build, settings_with


class Spoken:
    """One connection in one encoding."""

    def __init__(self, ws: WebSocketTestSession, encoding: str) -> None:
        self.ws = ws
        self.encoding = encoding
        self.id = 0
        self.events: list[dict[str, Any]] = []

    def recv(self) -> dict[str, Any]:
        if self.encoding == "json":
            return msgspec.json.decode(self.ws.receive_text())
        return msgspec.msgpack.decode(self.ws.receive_bytes())

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        self.id += 1
        message = {"op": op, "id": self.id, **fields}
        if self.encoding == "json":
            self.ws.send_text(msgspec.json.encode(message).decode())
        else:
            self.ws.send_bytes(msgspec.msgpack.encode(message))
        while (reply := self.recv()).get("id") != self.id:
            self.events.append(reply)
        return reply

    def take(self, count: int) -> list[dict[str, Any]]:
        while len(self.events) < count:
            self.events.append(self.recv())
        taken, self.events = self.events[:count], self.events[count:]
        return taken

    def closed(self) -> tuple[int, str]:
        while True:
            try:
                self.recv()
            except WebSocketDisconnect as closed:
                return closed.code, closed.reason or ""


class House:
    """The application under a TestClient, and what is behind it."""

    def __init__(self, client: TestClient, vault: FakeVault, hub: Hub, encoding: str) -> None:
        self.client = client
        self.vault = vault
        self.hub = hub
        self.encoding = encoding

    @contextmanager
    def open(self, *, hello: bool = True, **options: Any) -> Iterator[Spoken]:
        options.setdefault("subprotocols", [f"kimera.v1.{self.encoding}"])
        with self.client.websocket_connect("/v1/stream", **options) as ws:
            spoken = Spoken(ws, self.encoding)
            if hello:
                assert spoken.ask("connect")["op"] == "connected"
            yield spoken


@contextmanager
def living(encoding: str, *, required: bool = False, **groups: Any) -> Iterator[House]:
    vault, _, _, hub, endpoint = build(settings_with(**groups), required=required)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(hub.run)
            yield
            await hub.shutdown(1)
            group.cancel_scope.cancel()

    app = Starlette(routes=[WebSocketRoute("/v1/stream", endpoint)], lifespan=lifespan)
    with TestClient(app) as client:
        yield House(client, vault, hub, encoding)


@pytest.fixture(params=["json", "msgpack"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_commands_events_and_recovery(encoding: str) -> None:
    with living(encoding) as house:
        with house.open() as peer:
            assert peer.ask("subscribe", channel="geoids")["op"] == "subscribed"
            for number in range(3):
                assert peer.ask("publish", geoid={"text": f"statement {number}"})["offset"] == number + 1
            assert [event["offset"] for event in peer.take(3)] == [1, 2, 3]
            assert peer.ask("presence", channel="geoids")["subscribers"] == 1
            assert peer.ask("ack", channel="geoids", offset=1, name="mine")["op"] == "acked"
            assert peer.ask("unsubscribe", channel="geoids")["op"] == "unsubscribed"
            assert peer.ask("unsubscribe", channel="geoids")["code"] == "not_subscribed"
        with house.open() as peer:
            since = {"epoch": "E1", "offset": 0}
            reply = peer.ask("subscribe", channel="geoids", since=since)
            assert (reply["was_recovering"], reply["recovered"]) == (True, True)
            assert [event["offset"] for event in peer.take(3)] == [1, 2, 3]
            assert peer.ask("subscribe", channel="scars", since={"epoch": "E0", "offset": 0})["recovered"] is False
            page = peer.ask("history", channel="geoids", limit=2, reverse=True)
            assert ([event["offset"] for event in page["events"]], page["more"]) == ([3, 2], True)
        with house.open() as peer:
            peer.ask("subscribe", channel="geoids", since={"cursor": "mine"})
            assert [event["offset"] for event in peer.take(2)] == [2, 3]
        with house.open() as peer:
            peer.ask("subscribe", channel="geoids", rewind=1, filter={"field": "offset", "op": "gte", "value": 1})
            assert [event["offset"] for event in peer.take(1)] == [3]


def test_bad_commands_leave_the_connection_open(encoding: str) -> None:
    with living(encoding) as house, house.open() as peer:
        for op, fields, code in [
            ("nonsense", {}, "unknown_op"),
            ("publish", {"geoid": {"text": 5}}, "bad_request"),
            ("subscribe", {"channel": "nowhere"}, "bad_channel"),
            ("subscribe", {"channel": "watch:none"}, "not_found"),
            ("subscribe", {"channel": "geoids", "filter": {"field": "a", "op": "like"}}, "bad_filter"),
            ("subscribe", {"channel": "geoids", "since": {"epoch": "E1", "offset": 9}}, "bad_position"),
        ]:
            assert peer.ask(op, **fields)["code"] == code
        assert peer.ask("ping")["op"] == "pong"


def test_handshakes_and_closes(encoding: str) -> None:
    with living(encoding, required=True, api={"max_connections_per_principal": 1}) as house:
        with pytest.raises(WebSocketDenialResponse) as denied, house.open(subprotocols=["soap"]):
            pass
        assert denied.value.status_code == 400
        with house.open(hello=False, headers={"origin": "https://evil.example"}) as peer:
            assert peer.closed() == (4505, "origin_refused")
        with house.open(hello=False) as peer:
            assert peer.ask("connect")["code"] == "unauthorized"
            assert peer.closed() == (4500, "unauthorized")
        with house.open(hello=False) as peer:
            assert peer.ask("ping")["code"] == "bad_request"
            assert peer.closed() == (4501, "protocol_violation")
        with house.open(headers={"authorization": "Bearer ann"}), house.open(hello=False) as second:
            assert second.ask("connect", token="ann")["code"] == "limit_exceeded"
            assert second.closed() == (4503, "connection_limit")
        with house.open(hello=False) as peer:
            peer.ask("connect", token="ann")
            if encoding == "json":
                peer.ws.send_bytes(b"{}")
            else:
                peer.ws.send_text("{}")
            assert peer.closed() == (1003, "unsupported_data")


def test_a_token_that_runs_out(encoding: str) -> None:
    import time

    with living(encoding) as house, house.open(hello=False) as peer:
        expires = int(time.time()) + 1
        assert peer.ask("connect", token=f"ann@{expires}")["expires"] == expires
        assert peer.recv() == {"op": "expiring", "expires": expires}
        later = expires + 1000
        assert peer.ask("refresh", token=f"ann@{later}")["expires"] == later
        assert peer.ask("refresh", token=f"ben@{later}")["code"] == "forbidden"
        assert peer.ask("refresh", token="bad")["code"] == "unauthorized"
        assert peer.ask("ping")["op"] == "pong"


def test_latest_channels_and_heartbeats(encoding: str) -> None:
    with living(encoding, stream={"ping_interval": 0.05}) as house, house.open() as peer:
        assert house.client.portal is not None
        house.client.portal.call(lambda: house.hub.latest("stats", "stats.updated", b'{"rate":1}', offset=0))
        peer.ask("subscribe", channel="stats")
        event = next(message for message in iter(peer.recv, None) if message["op"] == "event")
        assert (event["channel"], event["data"]) == ("stats", {"rate": 1})
        heartbeat = next(message for message in iter(peer.recv, None) if message["op"] == "heartbeat")
        assert heartbeat == {"op": "heartbeat", "epoch": "E1", "offset": 0}
