"""The ordinary handshake is read once and answered as uvicorn and `websockets` would; everything else goes their way."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from kimera_stream.api.egress import EgressProtocol, uvicorn_options
from kimera_stream.api.opening import read_opening
from kimera_stream.streaming.connection import Connection
from tests.garbage import uncollected
from tests.streaming.fakes import QuietServer, serving, settings_with, until
from tests.streaming.rawws import RawPeer

pytestmark = pytest.mark.anyio

ORDINARY = (
    b"GET /v1/stream?a=%20b HTTP/1.1\r\nHost: x:1\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: kimera.v1.json, kimera.token.abc\r\nX-Name: caf\xe9\r\n\r\n"
)


def with_line(line: bytes) -> bytes:
    return ORDINARY[:-2] + line + b"\r\n\r\n"


def without(start: bytes) -> bytes:
    return b"\r\n".join(line for line in ORDINARY.split(b"\r\n") if not line.lower().startswith(start.lower()))


def test_an_ordinary_handshake_is_read_whole() -> None:
    opening = read_opening(ORDINARY)
    assert opening is not None
    assert (opening.path, opening.query) == ("/v1/stream", b"a=%20b")
    assert opening.subprotocols == ["kimera.v1.json", "kimera.token.abc"]
    assert opening.accept == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "the example of RFC 6455"
    assert opening.headers[0] == (b"host", b"x:1")
    assert opening.headers[-1] == (b"x-name", b"caf\xe9")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        ORDINARY[:40],
        ORDINARY + b"\x81\x80\0\0\0\0",
        ORDINARY + ORDINARY,
        ORDINARY.replace(b"GET", b"POST"),
        ORDINARY.replace(b"HTTP/1.1", b"HTTP/1.0"),
        ORDINARY.replace(b"\r\n", b"\n"),
        ORDINARY.replace(b"/v1/stream", b"/v1/str\xc3\xa9am"),
        ORDINARY.replace(b": websocket", b": h2c"),
        ORDINARY.replace(b": websocket", b": websocket, h2c"),
        ORDINARY.replace(b"keep-alive, Upgrade", b"keep-alive"),
        ORDINARY.replace(b"keep-alive, Upgrade", b"keep-alive,, Upgrade;"),
        ORDINARY.replace(b"Version: 13", b"Version: 8"),
        ORDINARY.replace(b"bm9uY2U=", b"").replace(b"dGhlIHNhbXBsZSBub25jZQ==", b"c2hvcnQ="),
        ORDINARY.replace(b"kimera.v1.json,", b"kimera v1 json,"),
        without(b"Sec-WebSocket-Key"),
        without(b"Sec-WebSocket-Version"),
        without(b"Connection"),
        with_line(b"Origin: https://a.example\r\nOrigin: https://b.example"),
        with_line(b"Host: y"),
        with_line(b"Sec-WebSocket-Protocol: kimera.v1.msgpack"),
        with_line(b"Content-Length: 5"),
        with_line(b"Transfer-Encoding: chunked"),
        with_line(b"X-Long: " + b"x" * 9000),
    ],
)
def test_what_is_doubtful_is_left_to_others(data: bytes) -> None:
    assert read_opening(data) is None


def test_a_wish_for_extensions_is_ordinary_only_where_none_are_offered() -> None:
    asking = with_line(b"Sec-WebSocket-Extensions: permessage-deflate")
    assert read_opening(asking) is not None
    assert read_opening(asking, extensions=True) is None
    assert read_opening(ORDINARY, extensions=True) is not None


@asynccontextmanager
async def remembering(scopes: list[Any], answer: dict[str, Any]) -> AsyncIterator[int]:
    """A server whose application notes its scope and answers the handshake."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        scopes.append({key: value for key, value in scope.items() if key not in ("client", "extensions")})
        assert "kimera.egress" in scope["extensions"]
        await send(answer)
        if answer["type"] == "websocket.http.response.start":
            await send({"type": "websocket.http.response.body", "body": b"no"})
        elif answer["type"] == "websocket.accept":
            await send({"type": "websocket.send", "text": "hello"})
            await send({"type": "websocket.close", "code": 1001, "reason": "bye"})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    config = uvicorn.Config(
        app, port=0, lifespan="off", log_level="critical", access_log=False, headers=[("x-ours", "1")],
        **uvicorn_options(settings_with()),
    )  # fmt: skip
    server = QuietServer(config)
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve)
        await until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True


async def answered(port: int, *parts: bytes) -> bytes:
    """All that a server says to a request that comes in these parts, and to an answer to its close."""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        for part in parts:
            await stream.send(part)
            await anyio.sleep(0.02)  # so that the parts are not read as one
        data = b""
        try:
            while True:
                data += await stream.receive()
                if data.endswith(b"\x88\x05\x03\xe9bye"):
                    await stream.send(b"\x88\x80\0\0\0\0")
        except anyio.EndOfStream:
            return data


def comparable(data: bytes) -> tuple[bytes, list[bytes], bytes]:
    """Status line, headers in no order and without the date, and what follows."""
    head, _, rest = data.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = sorted(
        name.lower() + b":" + value
        for name, _, value in (line.partition(b":") for line in lines)
        if name.lower() != b"date"
    )
    return status, headers, rest


@pytest.mark.parametrize(
    "answer",
    [
        {"type": "websocket.accept", "subprotocol": "kimera.v1.json", "headers": [(b"x-more", b"2")]},
        {"type": "websocket.accept"},
        {"type": "websocket.close", "code": 1008},
        {"type": "websocket.http.response.start", "status": 503, "headers": [(b"retry-after", b"1")]},
    ],
    ids=["accept", "accept bare", "close", "response"],
)
@pytest.mark.parametrize("head", [ORDINARY, with_line(b"Origin: https://a.example")], ids=["ordinary", "origin"])
async def test_it_makes_no_difference_which_way_a_handshake_takes(head: bytes, answer: dict[str, Any]) -> None:
    scopes: list[Any] = []
    async with remembering(scopes, answer) as port:
        at_once = await answered(port, head)
        in_parts = await answered(port, head[:30], head[30:])
    assert comparable(at_once) == comparable(in_parts)
    assert len(scopes) == 2
    assert scopes[0] == scopes[1]


async def test_who_says_nothing_does_not_hold_up_a_stop_and_is_dropped_in_time() -> None:
    async with serving(settings_with(stream={"connect_timeout": 0.1})) as world:
        async with await anyio.connect_tcp("127.0.0.1", world.port) as stream:
            await until(lambda: len(world.server.server_state.connections) == 1)
            with anyio.fail_after(5), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()
        await until(lambda: not world.server.server_state.connections)
    async with serving() as world, await anyio.connect_tcp("127.0.0.1", world.port) as stream:
        await until(lambda: len(world.server.server_state.connections) == 1)
        world.server.should_exit = True
        with anyio.fail_after(5), pytest.raises(anyio.EndOfStream):
            await stream.receive()


async def test_our_protocol_has_every_attribute_that_uvicorns_has() -> None:
    config = uvicorn.Config(lambda: None, ws=EgressProtocol)
    config.load()
    base = WebSocketsSansIOProtocol(config, ServerState(), {})
    ours = EgressProtocol(config, ServerState(), {})
    for name, value in vars(base).items():
        assert hasattr(ours, name), name
        if isinstance(value, bool | int | float | str | None):
            assert getattr(ours, name) == value or name == "close_timeout", name
    assert not vars(ours), "what is not named in the slots costs every connection a dictionary"


async def test_closed_connections_leave_nothing_for_the_collector_of_garbage() -> None:
    def left() -> int:
        return sum(isinstance(each, EgressProtocol) for each in gc.get_objects())

    async with serving() as world:
        with uncollected():
            before = left()
            for _ in range(5):
                async with await RawPeer.open(world.port) as peer:
                    await peer.say("connect", 1, subs=[{"channel": "geoids"}])
                    await peer.message()
            await until(lambda: not world.server.server_state.connections)
            await anyio.wait_all_tasks_blocked()
            assert left() == before


async def test_what_is_under_way_as_its_connection_closes_leaves_nothing_for_the_collector_of_garbage() -> None:
    def left() -> int:
        return sum(isinstance(each, Connection) for each in gc.get_objects())

    async with serving() as world:
        world.knowledge.gate = anyio.Event()
        with uncollected():
            before = left()
            for number in range(5):
                async with await RawPeer.open(world.port) as peer:
                    await peer.say("connect", 1)
                    await peer.message()
                    await peer.say("publish", 2, geoid={"text": "x"})
                    await peer.say("ping", 3)
                    assert (await peer.message())["op"] == "pong", "and the publish is held"
                await until(lambda ended=number + 1: world.knowledge.cancelled == ended)
            await until(lambda: not world.server.server_state.connections)
            await anyio.wait_all_tasks_blocked()
            assert left() == before
