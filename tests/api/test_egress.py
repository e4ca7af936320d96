"""Peers that stall, vanish or dawdle, on a real server: none delays another, and none blocks a stop."""

import anyio
import msgspec
import pytest
from prometheus_client import CollectorRegistry
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from kimera_stream.api.egress import EgressProtocol
from kimera_stream.streaming.egress import Egress
from kimera_stream.streaming.metrics import HubMetrics
from tests.streaming.fakes import World, full_until_gone, serving, settings_with, until
from tests.streaming.rawws import CLOSE, PONG, RawPeer, build

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


async def subscribed(world: World, **options: int) -> RawPeer:
    peer = await RawPeer.open(world.port, **options)
    await peer.say("connect", 1, subs=[{"channel": "geoids"}])
    assert (await peer.message())["op"] == "connected"
    return peer


async def stall(world: World) -> RawPeer:
    """A subscriber that stops reading, with the server's buffer for it full."""
    peer = await subscribed(world, receive_buffer=4096)
    seen = 0
    # Over plain ASGI a buffer may fill for a moment before the kernel's, too, is full; one that stays full is meant.
    while seen < 10 and world.hub.statistics()["connections"]:
        if world.hub.statistics()["stalled"]:
            seen += 1
        else:
            seen = 0
            world.publish(50, pad=2000)
        await anyio.sleep(0.002)
    return peer


@pytest.fixture(params=[True, False], ids=["egress", "asgi"])
def egress(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_a_stalled_peer_does_not_delay_another_and_catches_up_exactly_once(egress: bool) -> None:
    async with serving(egress=egress) as world, await subscribed(world) as quick:
        got: list[int] = []

        async def read() -> None:
            while True:
                got.append((await quick.message())["offset"])

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            async with await stall(world) as slow:
                await until(lambda: len(got) == world.vault.head)
                assert got == list(range(1, world.vault.head + 1))
                held = max(e.egress.buffered for e in world.hub._outlets)
                assert held < 1_000_000
                last = world.vault.head
                offsets = []
                while not offsets or offsets[-1] != last:
                    offsets.append((await slow.message())["offset"])
                assert offsets == list(range(1, last + 1))
                await until(lambda: not world.hub.statistics()["lagging"])
                world.publish(1)
                assert (await slow.message())["offset"] == last + 1
            group.cancel_scope.cancel()


async def test_a_peer_that_stays_stalled_is_aborted(egress: bool) -> None:
    settings = settings_with(stream={"outbox_age": 0.2}, api={"shutdown_deadline": 0.4})
    async with serving(settings, egress=egress) as world, await subscribed(world, receive_buffer=4096):
        await full_until_gone(world)
        if egress:
            # Plain ASGI has no way to drop what a transport still holds.
            await until(lambda: not world.server.server_state.connections)


async def test_a_stalled_peer_does_not_block_a_stop() -> None:
    settings = settings_with(api={"shutdown_deadline": 1.0})
    async with serving(settings, timeout_graceful_shutdown=3) as world, await stall(world):
        world.server.should_exit = True
        await until(lambda: not world.server.server_state.connections, 8)


async def test_a_close_from_the_peer_with_data_still_buffered_does_not_break_the_stop() -> None:
    """uvicorn 0.54 would raise InvalidState here, and the lifespan shutdown would never run."""
    settings = settings_with(api={"shutdown_deadline": 0.5})
    async with serving(settings) as world, await stall(world) as peer:
        await peer.send(build(8, b"\x03\xe8"))
        await until(lambda: not world.hub.statistics()["connections"])
        world.server.should_exit = True
        await until(lambda: not world.server.server_state.connections)


async def test_a_position_that_retention_passes_by_during_a_stall_is_4002() -> None:
    async with serving(settings_with(stream={"tail_bytes": 4096})) as world, await stall(world) as slow:
        world.publish(100, pad=2000)
        world.vault.trim(world.vault.head - 5)
        offsets: list[int] = []
        while (frame := await slow.frame()).opcode != CLOSE:
            offsets.append(msgspec.json.decode(frame.payload)["offset"])
        assert (frame.code, frame.payload[2:]) == (4002, b"position_lost")
        assert offsets == list(range(1, len(offsets) + 1)), "what came before it is whole"
        assert len(offsets) < world.vault.head
        async with await RawPeer.open(world.port) as again:
            since = {"epoch": world.vault.epoch, "offset": offsets[-1]}
            await again.say("connect", 1, subs=[{"channel": "geoids", "since": since}])
            (start,) = (await again.message())["subs"]
            assert (start["was_recovering"], start["recovered"], start["offset"]) == (True, False, world.vault.head)


async def test_replies_that_are_not_read_end_in_4001() -> None:
    settings = settings_with(
        stream={"outbox_bytes": 65_536}, api={"commands_per_second": 1e6, "commands_burst": 100_000}
    )
    async with serving(settings) as world:
        world.publish(400, pad=100)
        async with await subscribed(world, receive_buffer=4096) as peer:
            with anyio.move_on_after(20):
                for id in range(2, 5000):
                    if not world.hub.statistics()["connections"]:
                        break
                    await peer.say("history", id, channel="geoids", limit=400)
            await until(lambda: not world.hub.statistics()["connections"])


async def test_no_pong_is_4004() -> None:
    settings = settings_with(stream={"ping_interval": 0.05, "pong_timeout": 0.1})
    async with serving(settings) as world, await subscribed(world) as peer:
        registry = CollectorRegistry()
        world.hub.metrics = HubMetrics(registry)
        assert await peer.close_code() == 4004
        await until(lambda: not world.hub.statistics()["connections"])
        assert registry.get_sample_value("kimera_stream_closes_total", {"code": "4004"}) == 1


async def test_a_peer_that_answers_pings_stays() -> None:
    settings = settings_with(stream={"ping_interval": 0.03, "pong_timeout": 0.2})
    async with serving(settings) as world, await subscribed(world) as peer:
        pings = 0
        while pings < 5:
            frame = await peer.frame()
            if frame.opcode == 9:
                pings += 1
                await peer.send(build(PONG, frame.payload))
        assert world.hub.statistics()["connections"] == 1


async def test_a_stalled_peer_has_its_age_not_the_time_of_a_pong() -> None:
    async with serving(settings_with(stream={"outbox_age": 30})) as world, await stall(world) as peer:
        (protocol,) = world.server.server_state.connections
        assert isinstance(protocol, EgressProtocol)
        protocol.stop_keepalive()
        protocol.ping_timeout = 0.5
        protocol.send_keepalive_ping()
        await until(lambda: protocol.ping_sent_at < protocol.loop.time() - 1.2)
        last, offset = world.vault.head, 0
        while offset < last:
            frame = await peer.frame()
            if frame.opcode == 9:
                await peer.send(build(PONG, frame.payload))
            else:
                message = msgspec.json.decode(frame.payload)
                if message["op"] == "event":
                    assert message["offset"] == offset + 1
                    offset += 1
        assert world.hub.statistics()["connections"] == 1


async def test_pings_of_a_peer_that_does_not_read_are_not_piled_up() -> None:
    settings = settings_with(stream={"outbox_age": 30})
    async with serving(settings) as world, await stall(world) as peer:
        (outlet,) = world.hub._outlets
        before = outlet.egress.buffered
        for _ in range(2000):
            await peer.send(build(9, b"x" * 125))
        await anyio.sleep(0.05)
        assert outlet.egress.buffered <= before


async def test_a_stop_answers_what_is_in_flight_then_closes_with_4000() -> None:
    async with serving() as world, connect(world.url, proxy=None) as ws:
        await ws.send('{"op":"connect","id":1}')
        await ws.recv()
        world.knowledge.gate = anyio.Event()
        await ws.send('{"op":"publish","id":2,"geoid":{"text":"x"}}')
        await until(lambda: world.hub.statistics()["connections"] == 1)
        await ws.send('{"op":"ping","id":3}')
        assert '"pong"' in str(await ws.recv())
        world.server.should_exit = True
        await until(lambda: not world.server.servers[0].is_serving())
        await ws.send('{"op":"ping","id":4}')
        assert '"unavailable"' in str(await ws.recv())
        world.knowledge.gate.set()
        assert '"published"' in str(await ws.recv())
        with pytest.raises(ConnectionClosed) as caught:
            await ws.recv()
        assert caught.value.rcvd is not None
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4000, "shutdown")


async def test_a_peer_that_does_not_answer_a_close_is_aborted() -> None:
    settings = settings_with(api={"shutdown_deadline": 0.3})
    async with serving(settings) as world, await subscribed(world) as peer:
        (outlet,) = world.hub._outlets
        assert isinstance(outlet.egress, Egress)
        await peer.send(build(2, b"{}"))
        assert await peer.close_code() == 1003
        assert await peer.ended()
        await until(lambda: not world.server.server_state.connections)


async def test_many_come_and_go_while_events_flow(egress: bool) -> None:
    """Nothing is left behind, and those who stay miss nothing."""
    async with serving(egress=egress) as world, await subscribed(world) as steady, anyio.create_task_group() as group:
        visits = 0

        async def visit() -> None:
            nonlocal visits
            for _ in range(5):
                async with await subscribed(world) as peer:
                    await peer.message()
                visits += 1

        for _ in range(10):
            group.start_soon(visit)
        offsets: list[int] = []
        with anyio.fail_after(20):
            while visits < 50:
                world.publish(5)
                offsets.extend([(await steady.message())["offset"] for _ in range(5)])
        assert offsets == list(range(1, len(offsets) + 1))
        await until(lambda: world.hub.statistics()["connections"] == 1)
