"""Over TLS the handle writes to the transport, never to the socket; everything else is as without."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.certificates import certify
from tests.streaming.fakes import World, full_until_gone, serving, settings_with, until
from tests.streaming.rawws import RawPeer, build

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    certify(path, "localhost")
    return path


@pytest.fixture
def trust(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


@asynccontextmanager
async def secured(certificate: Path, **groups: Any) -> AsyncIterator[World]:
    async with serving(settings_with(**groups), ssl_certfile=str(certificate), ssl_keyfile=str(certificate)) as world:
        yield world


async def subscribed(world: World, trust: ssl.SSLContext, **options: Any) -> RawPeer:
    peer = await RawPeer.open(world.port, tls=trust, **options)
    await peer.say("connect", 1, subs=[{"channel": "geoids"}])
    assert (await peer.message())["op"] == "connected"
    return peer


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_events_and_replies(certificate: Path, trust: ssl.SSLContext, encoding: str) -> None:
    pack = msgspec.json.encode if encoding == "json" else msgspec.msgpack.encode
    unpack = msgspec.json.decode if encoding == "json" else msgspec.msgpack.decode
    async with secured(certificate) as world:
        url = f"wss://localhost:{world.port}/v1/stream"
        async with connect(url, ssl=trust, proxy=None, subprotocols=[f"kimera.v1.{encoding}"]) as ws:  # type: ignore[list-item]
            said = pack({"op": "connect", "id": 1, "subs": [{"channel": "geoids"}]})
            await ws.send(said, text=encoding == "json")
            assert unpack(await ws.recv(decode=False))["op"] == "connected"
            world.publish(300, pad=500)
            offsets = [unpack(await ws.recv(decode=False))["offset"] for _ in range(300)]
            assert offsets == list(range(1, 301))
            assert [each.egress.fd for each in world.hub._outlets] == [-1]
            world.server.should_exit = True
            with pytest.raises(ConnectionClosed) as caught:
                await ws.recv()
            assert caught.value.rcvd is not None
            assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4000, "shutdown")


async def test_a_stalled_peer_catches_up_exactly_once_and_delays_nobody(
    certificate: Path, trust: ssl.SSLContext
) -> None:
    async with (
        secured(certificate) as world,
        await subscribed(world, trust) as quick,
        await subscribed(world, trust, receive_buffer=4096) as slow,
    ):
        got: list[int] = []

        async def read() -> None:
            while True:
                got.append((await quick.message())["offset"])

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            while not world.hub.statistics()["stalled"]:
                world.publish(50, pad=2000)
                await anyio.sleep(0.002)
            last = world.vault.head
            await until(lambda: len(got) == last)
            offsets = [(await slow.message())["offset"] for _ in range(last)]
            assert got == offsets == list(range(1, last + 1))
            group.cancel_scope.cancel()


async def test_one_that_stays_stalled_is_given_up_on(certificate: Path, trust: ssl.SSLContext) -> None:
    groups = {"stream": {"outbox_age": 0.2}, "api": {"shutdown_deadline": 0.4}}
    async with secured(certificate, **groups) as world, await subscribed(world, trust, receive_buffer=4096):
        await full_until_gone(world)
        await until(lambda: not world.server.server_state.connections)


async def test_the_scheme_the_close_and_a_broken_frame(certificate: Path, trust: ssl.SSLContext) -> None:
    async with secured(certificate) as world:
        async with await subscribed(world, trust) as peer:
            (protocol,) = world.server.server_state.connections
            assert protocol.scheme == "wss"  # type: ignore[union-attr]
            await peer.send(build(3, b""))
            frame = await peer.frame()
            assert (frame.code, frame.payload[2:]) == (1002, b"protocol_error")
            assert await peer.ended()
        await until(lambda: not world.server.server_state.connections)
