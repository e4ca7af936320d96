"""The WebSocket door on a real server: over our egress and over plain ASGI, in both encodings."""

import gc
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from kimera_stream.protocol.errors import OverloadedError
from tests.streaming.fakes import World, serving, settings_with, until

pytestmark = [pytest.mark.anyio]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


WAYS = [(egress, encoding) for egress in (True, False) for encoding in ("json", "msgpack")]


class Peer:
    """A client that counts ids and knows its encoding."""

    def __init__(self, ws: ClientConnection, encoding: str) -> None:
        self.ws = ws
        self.encoding = encoding
        self.id = 0
        self.pushed: list[dict[str, Any]] = []

    async def send(self, op: str, **fields: Any) -> int:
        self.id += 1
        message = {"op": op, "id": self.id, **fields}
        await self.ws.send(
            msgspec.json.encode(message).decode() if self.encoding == "json" else msgspec.msgpack.encode(message)
        )
        return self.id

    async def recv(self) -> dict[str, Any]:
        with anyio.fail_after(10):
            data = await self.ws.recv()
        if self.encoding == "json":
            assert isinstance(data, str)
            return msgspec.json.decode(data)
        assert isinstance(data, bytes)
        return msgspec.msgpack.decode(data)

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The reply to a command; pushes that come before it are kept in `pushed`."""
        id = await self.send(op, **fields)
        while True:
            message = await self.recv()
            if message.get("id") == id:
                return message
            self.pushed.append(message)

    async def events(self, count: int) -> list[dict[str, Any]]:
        while len(self.pushed) < count:
            self.pushed.append(await self.recv())
        found, self.pushed = self.pushed[:count], self.pushed[count:]
        return found

    async def closed(self) -> tuple[int, str]:
        with pytest.raises(ConnectionClosed) as caught:
            await self._drain()
        assert caught.value.rcvd is not None
        return caught.value.rcvd.code, caught.value.rcvd.reason

    async def _drain(self) -> None:
        while True:
            self.pushed.append(await self.recv())


@asynccontextmanager
async def dial(
    world: World, encoding: str = "json", *, say_connect: bool = True, **options: Any
) -> AsyncIterator[Peer]:
    options.setdefault("subprotocols", [f"kimera.v1.{encoding}"])
    async with connect(world.url, proxy=None, **options) as ws:
        peer = Peer(ws, encoding)
        if say_connect:
            reply = await peer.ask("connect")
            assert reply["op"] == "connected"
        yield peer


@pytest.fixture(params=WAYS, ids=[f"{'egress' if e else 'asgi'}-{c}" for e, c in WAYS])
async def way(request: pytest.FixtureRequest) -> AsyncIterator[tuple[World, str]]:
    egress, encoding = request.param
    async with serving(egress=egress) as world:
        yield world, encoding


async def test_every_command_has_its_reply(way: tuple[World, str]) -> None:
    world, encoding = way
    async with dial(world, encoding, say_connect=False) as peer:
        hello = await peer.ask("connect", client={"name": "test"}, subs=[{"channel": "geoids"}, {"channel": "x"}])
        assert hello["op"] == "connected"
        assert (hello["epoch"], hello["offset"], hello["ping"]) == ("E1", 0, 25.0)
        assert hello["server"] == {"name": "kimera-stream", "version": "0", "node": "test"}
        assert hello["limits"]["command_bytes"] == 65536
        assert [sub["op"] for sub in hello["subs"]] == ["subscribed", "error"]
        assert hello["subs"][1]["code"] == "bad_channel"
        published = await peer.ask("publish", geoid={"text": "the door is open"})
        assert (published["op"], published["offset"], published["duplicate"]) == ("published", 1, False)
        (event,) = await peer.events(1)
        assert (event["channel"], event["offset"], event["type"]) == ("geoids", 1, "geoid.created")
        assert event["data"] == published["geoid"]
        assert published["geoid"]["session_id"] == hello["session"]
        assert (await peer.ask("subscribe", channel="scars"))["op"] == "subscribed"
        assert (await peer.ask("unsubscribe", channel="scars"))["op"] == "unsubscribed"
        assert (await peer.ask("delete", geoid_id="g1"))["op"] == "deleted"
        assert (await peer.ask("delete", geoid_id="missing"))["code"] == "not_found"
        resolved = await peer.ask("resolve", contradiction_id="c1", decision="surge", reason="why not")
        assert resolved["scar"]["decision"] == "surge"
        watching = await peer.ask("watch", watch="doors", text="the door is shut", kinds=["contradicts"])
        assert (watching["op"], watching["watch"], watching["channel"]) == ("watching", "doors", "watch:w-doors")
        assert (await peer.ask("unwatch", watch="doors"))["op"] == "unwatched"
        page = await peer.ask("history", channel="geoids", limit=10)
        assert page["events"] == [event]
        assert (page["offset"], page["more"]) == (1, False)
        presence = await peer.ask("presence", channel="geoids")
        assert (presence["subscribers"], presence["principals"]) == (1, {"anonymous": 1})
        assert (await peer.ask("ack", channel="geoids", offset=1, name="mine"))["op"] == "acked"
        assert (await peer.ask("refresh", token="anonymous"))["op"] == "refreshed"
        pong = await peer.ask("ping")
        assert (pong["op"], pong["epoch"], pong["offset"]) == ("pong", "E1", 1)


async def test_recovery_while_others_publish(way: tuple[World, str]) -> None:
    world, encoding = way
    world.publish(500)
    async with dial(world, encoding) as peer, anyio.create_task_group() as group:

        async def go_on() -> None:
            for _ in range(50):
                world.publish(4)
                await anyio.lowlevel.checkpoint()

        group.start_soon(go_on)
        reply = await peer.ask("subscribe", channel="geoids", since={"epoch": "E1", "offset": 100})
        assert (reply["was_recovering"], reply["recovered"], reply["offset"]) == (True, True, 100)
        events = await peer.events(600)
        assert [event["offset"] for event in events] == list(range(101, 701))


async def test_recovery_that_cannot_be(way: tuple[World, str]) -> None:
    world, encoding = way
    world.publish(5)
    async with dial(world, encoding) as peer:
        reply = await peer.ask("subscribe", channel="geoids", since={"epoch": "other", "offset": 2})
        assert (reply["was_recovering"], reply["recovered"], reply["epoch"]) == (True, False, "E1")
        assert (await peer.ask("subscribe", channel="scars", since={"epoch": "E1", "offset": 6}))[
            "code"
        ] == "bad_position"
        assert (await peer.ask("history", channel="scars", since={"epoch": "E1", "offset": 6}, limit=1))[
            "code"
        ] == "bad_position"
        assert (await peer.ask("history", channel="scars", limit=1001))["code"] == "bad_request"
        assert (await peer.ask("ping"))["op"] == "pong"


async def test_durable_cursors(way: tuple[World, str]) -> None:
    world, encoding = way
    world.publish(9)
    async with dial(world, encoding) as peer:
        missing = await peer.ask("subscribe", channel="geoids", since={"cursor": "mine"})
        assert missing["code"] == "not_found"
        assert (await peer.ask("ack", channel="geoids", offset=10, name="mine"))["code"] == "bad_position"
        await peer.ask("ack", channel="geoids", offset=6, name="mine")
    async with dial(world, encoding) as peer:
        reply = await peer.ask("subscribe", channel="geoids", since={"cursor": "mine"})
        assert (reply["offset"], reply["recovered"]) == (6, True)
        assert [event["offset"] for event in await peer.events(3)] == [7, 8, 9]


async def test_a_page_in_reverse_says_where_its_newest_entry_is(way: tuple[World, str]) -> None:
    """So that a client that shows the last events goes on from there, with nothing twice and nothing left out."""
    world, encoding = way
    world.publish(9)
    async with dial(world, encoding) as peer:
        page = await peer.ask("history", channel="geoids", limit=3, reverse=True)
        assert ([event["offset"] for event in page["events"]], page["offset"], page["more"]) == ([9, 8, 7], 9, True)
        all_of_it = await peer.ask("history", channel="geoids", limit=100, reverse=True)
        assert (len(all_of_it["events"]), all_of_it["offset"], all_of_it["more"]) == (9, 9, False)
        world.publish(2)
        since = {"epoch": page["epoch"], "offset": page["offset"]}
        await peer.ask("subscribe", channel="geoids", since=since)
        assert [event["offset"] for event in await peer.events(2)] == [10, 11]


async def test_a_cursor_goes_where_it_was_put_last_be_it_back(way: tuple[World, str]) -> None:
    """A consumer that wants to see some of it again says so with `ack`; what was acknowledged before is no floor."""
    world, encoding = way
    world.publish(9)
    async with dial(world, encoding) as peer:
        for offset in (7, 3):
            assert (await peer.ask("ack", channel="geoids", offset=offset, name="mine"))["op"] == "acked"
        reply = await peer.ask("subscribe", channel="geoids", since={"cursor": "mine"})
        assert (reply["offset"], reply["recovered"]) == (3, True)
        assert [event["offset"] for event in await peer.events(6)] == [4, 5, 6, 7, 8, 9]
        # One cursor per channel: the same name elsewhere is another.
        assert (await peer.ask("subscribe", channel="scars", since={"cursor": "mine"}))["code"] == "not_found"
        assert (await peer.ask("ack", channel="geoids", offset=-1, name="mine"))["code"] in (
            "bad_request",
            "bad_position",
        )


async def test_the_channel_of_no_watch_is_not_found(way: tuple[World, str]) -> None:
    world, encoding = way
    async with dial(world, encoding, say_connect=False) as peer:
        hello = await peer.ask("connect", subs=[{"channel": "watch:none"}, {"channel": "geoid:none"}])
        assert [sub.get("code") for sub in hello["subs"]] == ["not_found", None], "a geoid may come yet"
        for more in ({}, {"rewind": 5}, {"since": {"epoch": "E1", "offset": 0}}, {"since": {"cursor": "c"}}):
            assert (await peer.ask("subscribe", channel="watch:none", **more))["code"] == "not_found"
        made = await peer.ask("watch", watch="doors", text="the door is shut", kinds=["related"])
        assert (await peer.ask("subscribe", channel=made["channel"]))["op"] == "subscribed"
        assert (await peer.ask("subscribe", channel="watch:"))["code"] == "bad_channel"


async def test_bad_input_is_answered_and_the_connection_stays(way: tuple[World, str]) -> None:
    world, encoding = way
    async with dial(world, encoding) as peer:
        for fields, code in [
            ({"op": "nonsense"}, "unknown_op"),
            ({"op": "publish", "geoid": {"text": 5}}, "bad_request"),
            ({"op": "publish", "geoid": {"text": "x", "metadata": {"big": "x" * 70_000}}}, "too_large"),
            ({"op": "subscribe", "channel": "nowhere"}, "bad_channel"),
            ({"op": "subscribe", "channel": "geoid:" + "x" * 300}, "bad_channel"),
            ({"op": "subscribe", "channel": "geoids", "filter": {"field": "a", "op": "like"}}, "bad_filter"),
            ({"op": "watch", "watch": "w", "text": "x", "kinds": [], "filter": None}, "bad_request"),
            ({"op": "watch", "watch": "w", "text": "x", "kinds": ["related"], "filter": {"no": 1}}, "bad_filter"),
            ({"op": "unsubscribe", "channel": "geoids"}, "not_subscribed"),
        ]:
            op = fields.pop("op")
            reply = await peer.ask(op, **fields)
            assert (reply["op"], reply["code"]) == ("error", code), fields
        await peer.ws.send("{" if encoding == "json" else b"\xc1")
        reply = await peer.recv()
        assert reply["code"] == "bad_request"
        assert "id" not in reply
        assert (await peer.ask("ping"))["op"] == "pong"
    assert world.hub.statistics()["connections"] == 0


async def test_operational_errors_and_defects_of_a_service(way: tuple[World, str]) -> None:
    world, encoding = way
    async with dial(world, encoding) as peer:
        world.knowledge.crash = OverloadedError("the queue is full", retry_after=2.0)
        reply = await peer.ask("publish", geoid={"text": "x"})
        assert (reply["code"], reply["temporary"], reply["retry_after"]) == ("overloaded", True, 2.0)
        world.knowledge.crash = ZeroDivisionError("secret detail")
        with structlog.testing.capture_logs() as logs:
            reply = await peer.ask("publish", geoid={"text": "x"})
        assert (reply["code"], reply["temporary"]) == ("internal", True)
        assert "secret" not in reply["message"]
        assert [entry["event"] for entry in logs] == ["command failed"]
        assert (await peer.ask("ping"))["op"] == "pong"


async def test_commands_run_side_by_side(way: tuple[World, str]) -> None:
    world, encoding = way
    world.knowledge.gate = anyio.Event()
    async with dial(world, encoding) as peer:
        slow = await peer.send("publish", geoid={"text": "x"})
        again = await peer.ask("ping")
        assert again["op"] == "pong"
        world.knowledge.gate.set()
        published = await peer.recv()
        assert (published["op"], published["id"]) == ("published", slow)


async def test_a_connection_that_goes_takes_its_tasks_with_it(way: tuple[World, str]) -> None:
    world, encoding = way
    world.knowledge.gate = anyio.Event()
    async with dial(world, encoding) as peer:
        await peer.ask("subscribe", channel="geoids")
        await peer.send("publish", geoid={"text": "x"})
        await peer.ask("ping")
    await until(lambda: world.knowledge.cancelled == 1)
    await until(lambda: world.hub.statistics()["connections"] == 0)
    assert world.hub.presence("geoids") == (0, {})


async def test_latest_channels(way: tuple[World, str]) -> None:
    world, encoding = way
    world.hub.latest("stats", "stats.updated", b'{"rate":1}', offset=0)
    async with dial(world, encoding) as peer:
        await peer.ask("subscribe", channel="stats")
        assert (await peer.events(1))[0]["data"] == {"rate": 1}
        world.hub.latest("stats", "stats.updated", b'{"rate":2}', offset=0)
        assert (await peer.events(1))[0]["data"] == {"rate": 2}
        page = await peer.ask("history", channel="stats", limit=1)
        assert [event["data"] for event in page["events"]] == [{"rate": 2}]


@pytest.mark.parametrize("egress", [True, False])
class TestHandshake:
    async def test_the_first_known_subprotocol_is_taken(self, egress: bool) -> None:
        async with serving(egress=egress) as world:
            for offered, chosen, encoding in [
                (["kimera.v1.msgpack", "kimera.v1.json"], "kimera.v1.msgpack", "msgpack"),
                (["soap", "kimera.v1.json", "kimera.v1.msgpack"], "kimera.v1.json", "json"),
                (["kimera.token.ann", "kimera.v1.json"], "kimera.v1.json", "json"),
                (None, None, "json"),
            ]:
                async with dial(world, encoding, subprotocols=offered) as peer:
                    assert peer.ws.subprotocol == chosen

    async def test_only_unknown_ones_are_refused_with_400(self, egress: bool) -> None:
        async with serving(egress=egress) as world:
            with pytest.raises(InvalidStatus) as caught:
                await connect(world.url, subprotocols=["soap", "kimera.v2.json"], proxy=None)
            assert caught.value.response.status_code == 400

    async def test_where_a_token_can_come_from(self, egress: bool) -> None:
        async with serving(egress=egress, required=True) as world:
            async with dial(world, subprotocols=["kimera.v1.json", "kimera.token.sub"]):
                pass
            async with dial(world, additional_headers={"Authorization": "Bearer head"}):
                pass
            async with dial(world, say_connect=False, additional_headers={"Authorization": "Bearer head"}) as peer:
                assert (await peer.ask("connect", token="mine"))["op"] == "connected"
            assert world.authenticator.seen == ["sub", "head", "mine"]
            for token in (None, "bad"):
                async with dial(world, say_connect=False) as peer:
                    reply = await peer.ask("connect", **({"token": token} if token else {}))
                    assert reply["code"] == "unauthorized"
                    assert await peer.closed() == (4500, "unauthorized")

    async def test_roles(self, egress: bool) -> None:
        async with serving(egress=egress, required=True) as world:
            async with dial(world, say_connect=False) as peer:
                await peer.ask("connect", token="reader/subscribe")
                assert (await peer.ask("publish", geoid={"text": "x"}))["code"] == "forbidden"
                assert (await peer.ask("subscribe", channel="geoids"))["op"] == "subscribed"
            async with dial(world, say_connect=False) as peer:
                assert (await peer.ask("connect", token="nobody/none"))["code"] == "forbidden"
                assert await peer.closed() == (4502, "forbidden")

    async def test_origins(self, egress: bool) -> None:
        settings = settings_with(security={"allowed_origins": ["https://good.example"]})
        async with serving(settings, egress=egress) as world:
            for origin in ("https://good.example", f"http://127.0.0.1:{world.port}"):
                async with dial(world, origin=origin):
                    pass
            for origin in ("https://evil.example", "null"):
                async with dial(world, origin=origin, say_connect=False) as peer:
                    assert await peer.closed() == (4505, "origin_refused")
        settings = settings_with(security={"allowed_origins": ["*"]})
        async with serving(settings, egress=egress) as world, dial(world, origin="https://any.example"):
            pass

    async def test_a_full_node(self, egress: bool) -> None:
        async with serving(settings_with(api={"max_connections": 1}), egress=egress) as world:
            async with dial(world), dial(world, say_connect=False) as second:
                assert await second.closed() == (4503, "connection_limit")
            await until(lambda: world.endpoint._open == 0)
            async with dial(world):
                pass

    async def test_too_many_of_one_principal(self, egress: bool) -> None:
        async with serving(settings_with(api={"max_connections_per_principal": 2}), egress=egress) as world:
            async with dial(world) as first, dial(world), dial(world, say_connect=False) as third:
                assert (await third.ask("connect"))["code"] == "limit_exceeded"
                assert await third.closed() == (4503, "connection_limit")
                async with dial(world, say_connect=False) as other:
                    assert (await other.ask("connect", token="somebody-else"))["op"] == "connected"
                assert (await first.ask("ping"))["op"] == "pong"
            await until(lambda: not world.hub.statistics()["connections"])
            async with dial(world), dial(world):
                pass

    async def test_what_cannot_be_a_token_is_said_unless_connect_brings_one(self, egress: bool) -> None:
        wrong: list[dict[str, Any]] = [
            {"additional_headers": {"Authorization": "Basic abc"}},
            {"subprotocols": ["kimera.v1.json", "kimera.token.a", "kimera.token.b"]},
        ]
        async with serving(egress=egress, required=True) as world:
            for options in wrong:
                async with dial(world, say_connect=False, **options) as peer:
                    assert (await peer.ask("connect"))["code"] == "unauthorized"
                    assert await peer.closed() == (4500, "unauthorized")
                async with dial(world, say_connect=False, **options) as peer:
                    assert (await peer.ask("connect", token="mine"))["op"] == "connected"

    async def test_connect_must_come_first_and_in_time(self, egress: bool) -> None:
        async with serving(settings_with(stream={"connect_timeout": 0.05}), egress=egress) as world:
            async with dial(world, say_connect=False) as peer:
                assert await peer.closed() == (4504, "connect_timeout")
            async with dial(world, say_connect=False) as peer:
                assert (await peer.ask("ping"))["code"] == "bad_request"
                assert await peer.closed() == (4501, "protocol_violation")

    async def test_expiry(self, egress: bool) -> None:
        import time

        async with serving(egress=egress) as world, dial(world, say_connect=False) as peer:
            expires = int(time.time()) + 1
            reply = await peer.ask("connect", token=f"ann@{expires}")
            assert reply["expires"] == expires
            assert await peer.closed() == (4003, "token_expired")
            assert [m["op"] for m in peer.pushed] == ["expiring"]

    async def test_the_wrong_frame_type_is_1003(self, egress: bool) -> None:
        async with serving(egress=egress) as world:
            async with dial(world) as peer:
                await peer.ws.send(b"{}")
                assert await peer.closed() == (1003, "unsupported_data")
            async with dial(world, "msgpack") as peer:
                await peer.ws.send("{}")
                assert await peer.closed() == (1003, "unsupported_data")

    async def test_an_enormous_message_is_1009(self, egress: bool) -> None:
        async with serving(egress=egress) as world, dial(world) as peer:
            await peer.ws.send("x" * 300_000)
            code, reason = await peer.closed()
            assert code == 1009
            assert reason == "too_big" or not egress, "another server's reasons are its own"

    async def test_commands_are_rate_limited(self, egress: bool) -> None:
        settings = settings_with(api={"commands_per_second": 0.5, "commands_burst": 3})
        async with serving(settings, egress=egress) as world, dial(world) as peer:
            assert [(await peer.ask("ping")).get("code") for _ in range(3)] == [None, None, "rate_limited"]

    async def test_heartbeats(self, egress: bool) -> None:
        settings = settings_with(stream={"ping_interval": 0.1})
        world_of = serving(settings, egress=egress)
        async with world_of as world, dial(world) as peer:
            world.publish(3)
            for _ in range(2):
                assert await peer.recv() == {"op": "heartbeat", "epoch": "E1", "offset": 3}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_on_either_loop(loop: str) -> None:
    if loop == "uvloop" and sys.platform == "win32":
        pytest.skip("no uvloop here")

    async def talk() -> None:
        async with serving() as world, dial(world) as peer, dial(world, "msgpack") as other:
            for p in (peer, other):
                await p.ask("subscribe", channel="geoids")
            world.publish(2000)
            for p in (peer, other):
                events = await p.events(2000)
                assert [event["offset"] for event in events] == list(range(1, 2001))

    anyio.run(talk, backend_options={"use_uvloop": loop == "uvloop"})


def test_over_starlettes_test_client() -> None:
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.testclient import TestClient
    from starlette.websockets import WebSocketDisconnect

    from tests.streaming.fakes import build

    _, _, _, hub, endpoint = build(settings_with())

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(hub.run)
            yield
            await hub.shutdown(1)
            group.cancel_scope.cancel()

    app = Starlette(routes=[WebSocketRoute("/v1/stream", endpoint)], lifespan=lifespan)
    with TestClient(app) as client:
        with client.websocket_connect("/v1/stream", subprotocols=["kimera.v1.json"]) as ws:
            assert ws.accepted_subprotocol == "kimera.v1.json"
            ws.send_json({"op": "connect", "id": 1, "subs": [{"channel": "geoids"}]})
            assert ws.receive_json()["op"] == "connected"
            ws.send_json({"op": "publish", "id": 2, "geoid": {"text": "x"}})
            assert {ws.receive_json()["op"] for _ in range(2)} == {"published", "event"}
        with client.websocket_connect("/v1/stream") as ws:
            ws.send_json({"op": "ping", "id": 1})
            assert ws.receive_json()["code"] == "bad_request"
            with pytest.raises(WebSocketDisconnect) as caught:
                ws.receive_json()
            assert (caught.value.code, caught.value.reason) == (4501, "protocol_violation")
    gc.collect()
