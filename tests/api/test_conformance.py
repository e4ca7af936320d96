"""RFC 6455 by section, against the real server; messages are judged by the replies they get. Both encodings, deflate off and on.

Sections: 5.2 framing, 5.3 masking, 5.4 fragmentation, 5.5 control frames, 5.6/8.1 UTF-8, 7 closing, 9 extensions, 10.4 limits, and
RFC 7692 for compression.
"""

import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.streaming.fakes import World, serving, settings_with, until
from tests.streaming.rawws import BINARY, CLOSE, CONT, PING, PONG, TEXT, RawPeer, build

pytestmark = pytest.mark.anyio

PING_JSON = b'{"op":"ping","id":2}'
UTF8 = '{"op":"nonsense \u00e9\u20ac\U0001f600","id":2}'.encode()


@asynccontextmanager
async def peer_of(world: World, **options: object) -> AsyncIterator[RawPeer]:
    async with await RawPeer.open(world.port, **options) as peer:  # type: ignore[arg-type]
        await peer.hello()
        yield peer


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop, and so one server, for the whole module."""
    return "asyncio"


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "deflate"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    api = {"commands_per_second": 1e6, "commands_burst": 100_000, "shutdown_deadline": 1.0}
    async with serving(settings_with(stream={"compression": request.param}, api=api)) as world:
        yield world


@pytest.fixture
async def world(server: World) -> AsyncIterator[World]:
    yield server
    # Whatever a case did, the server is well and nothing of the connection is left.
    async with peer_of(server) as peer:
        await peer.say("ping", 9)
        assert (await peer.message())["op"] == "pong"
    await until(lambda: not server.hub.statistics()["connections"])


async def pongs(peer: RawPeer, id: int = 2) -> None:
    message = await peer.message()
    assert (message["op"], message["id"]) == ("pong", id)


# -- 5.2 framing


@pytest.mark.parametrize("pad", [0, 125 - 20, 126 - 20, 127 - 20, 65_535 - 20])
async def test_5_2_every_length_encoding(world: World, pad: int) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, b" " * pad + PING_JSON))
        await pongs(peer)


async def test_5_2_bytes_may_come_one_by_one(world: World) -> None:
    async with peer_of(world) as peer:
        for byte in build(TEXT, PING_JSON):
            await peer.send(bytes([byte]))
            await anyio.lowlevel.checkpoint()
        await pongs(peer)


async def test_5_2_many_frames_may_come_at_once(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(b"".join(build(TEXT, b'{"op":"ping","id":%d}' % id) for id in range(2, 102)))
        assert sorted([(await peer.message())["id"] for _ in range(100)]) == list(range(2, 102))


@pytest.mark.parametrize("rsv", [1, 2, 3, 5, 7])
async def test_5_2_reserved_bits_fail(world: World, rsv: int) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, PING_JSON, rsv=rsv))
        assert await peer.close_code() == 1002
        assert await peer.ended()


@pytest.mark.parametrize("opcode", [3, 4, 7, 11, 15])
async def test_5_2_reserved_opcodes_fail(world: World, opcode: int) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(opcode, b"x"))
        assert await peer.close_code() == 1002


async def test_5_2_an_empty_message_is_a_bad_command(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT))
        assert (await peer.message())["code"] == "bad_request"


async def test_5_2_a_frame_that_never_ends_costs_nothing(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, b"abc", length=50_000))
    await until(lambda: not world.hub.statistics()["connections"])


# -- 5.3 masking


async def test_5_3_unmasked_frames_fail(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, PING_JSON, masked=False))
        assert await peer.close_code() == 1002


# -- 5.4 fragmentation


async def test_5_4_fragments_join(world: World) -> None:
    async with peer_of(world) as peer:
        parts = [PING_JSON[i : i + 3] for i in range(0, len(PING_JSON), 3)]
        frames = [build(TEXT if i == 0 else CONT, p, fin=i == len(parts) - 1) for i, p in enumerate(parts)]
        await peer.send(*frames)
        await pongs(peer)


async def test_5_4_empty_fragments_join(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, fin=False), build(CONT, fin=False), build(CONT, PING_JSON, fin=False), build(CONT))
        await pongs(peer)


async def test_5_4_control_frames_between_fragments(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, PING_JSON[:5], fin=False), build(PING, b"in between"), build(CONT, PING_JSON[5:]))
        pong = await peer.frame()
        assert (pong.opcode, pong.payload) == (PONG, b"in between")
        await pongs(peer)


async def test_5_4_a_continuation_of_nothing_fails(world: World) -> None:
    for opcode in (CONT,):
        async with peer_of(world) as peer:
            await peer.send(build(opcode, b"x"))
            assert await peer.close_code() == 1002


async def test_5_4_a_new_message_within_another_fails(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, b"a", fin=False), build(TEXT, b"b"))
        assert await peer.close_code() == 1002


async def test_5_4_fragments_count_together_towards_the_limit(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, b" " * 60_000, fin=False))
        for _ in range(4):
            await peer.send(build(CONT, b" " * 60_000, fin=False))
        assert await peer.close_code() == 1009


async def test_5_4_a_moderately_oversized_message_is_answered(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, PING_JSON + b" " * 70_000))
        message = await peer.message()
        assert (message["code"], message["id"]) == ("too_large", 2)


# -- 5.5 control frames


@pytest.mark.parametrize("payload", [b"", b"hello", b"\x00\xff" * 62, b"x" * 125])
async def test_5_5_2_ping_is_answered_with_its_payload(world: World, payload: bytes) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(PING, payload))
        pong = await peer.frame()
        assert (pong.opcode, pong.payload, pong.fin, pong.rsv) == (PONG, payload, True, 0)


async def test_5_5_3_unasked_pongs_are_ignored(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(PONG, b"unasked"), build(TEXT, PING_JSON))
        await pongs(peer)


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
async def test_5_5_control_frames_are_short_and_whole(world: World, opcode: int) -> None:
    for frame in (build(opcode, b"x" * 126), build(opcode, b"", fin=False)):
        async with peer_of(world) as peer:
            await peer.send(frame)
            assert await peer.close_code() == 1002


# -- 5.6, 8.1 UTF-8


async def test_8_1_valid_utf8_in_every_cut(world: World) -> None:
    async with peer_of(world) as peer:
        for cut in range(1, len(UTF8)):
            await peer.send(build(TEXT, UTF8[:cut], fin=False), build(CONT, UTF8[cut:]))
            assert (await peer.message())["code"] == "unknown_op"


@pytest.mark.parametrize(
    "bad",
    [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80", b"\xf8\x88\x80\x80\x80"],
    ids=lambda b: b.hex(),
)
async def test_8_1_invalid_utf8_is_1007(world: World, bad: bytes) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, b'{"op":"' + bad + b'"}'))
        assert await peer.close_code() == 1007
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, b'{"op":"' + bad[:1], fin=False), build(CONT, bad[1:] + b'"}'))
        assert await peer.close_code() == 1007


async def test_8_1_invalid_utf8_fails_before_the_message_ends(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, b"abc", fin=False), build(CONT, b"\xff", fin=False))
        assert await peer.close_code() == 1007


async def test_8_1_binary_data_is_not_checked(world: World) -> None:
    async with await RawPeer.open(world.port, headers={"Sec-WebSocket-Protocol": "kimera.v1.msgpack"}) as peer:
        await peer.send(build(BINARY, msgspec.msgpack.encode({"op": "connect", "id": 1})))
        assert (await peer.message())["op"] == "connected"
        await peer.send(build(BINARY, b"\xff\xfe\xfd"))
        assert (await peer.message())["code"] == "bad_request"
        whole = msgspec.msgpack.encode({"op": "ping", "id": 2})
        await peer.send(build(BINARY, whole[:4], fin=False), build(PING), build(CONT, whole[4:]))
        assert (await peer.frame()).opcode == PONG
        await pongs(peer)


# -- 7 closing


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999])
async def test_7_4_valid_codes_are_echoed(world: World, code: int) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(CLOSE, code.to_bytes(2, "big") + b"bye"))
        assert await peer.close_code() == code
        assert await peer.ended()


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535])
async def test_7_4_invalid_codes_fail(world: World, code: int) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(CLOSE, code.to_bytes(2, "big")))
        assert await peer.close_code() == 1002


async def test_7_an_empty_close_is_answered(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(CLOSE))
        assert await peer.close_code() == 1005


async def test_7_a_close_of_one_byte_fails(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(CLOSE, b"\x03"))
        assert await peer.close_code() == 1002


async def test_7_a_reason_must_be_utf8(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(CLOSE, b"\x03\xe8\xff\xff"))
        assert await peer.close_code() == 1007


async def test_7_nothing_is_read_after_a_close(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(CLOSE, b"\x03\xe8") + build(TEXT, PING_JSON) + b"\xff" * 100)
        assert await peer.close_code() == 1000
        assert await peer.ended()


async def test_7_a_close_within_a_fragmented_message(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.send(build(TEXT, b"abc", fin=False), build(CLOSE, b"\x03\xe8"))
        assert await peer.close_code() in (1000, 1002)


async def test_7_a_peer_that_just_vanishes(world: World) -> None:
    async with peer_of(world) as peer:
        await peer.say("subscribe", 2, channel="geoids")
    await until(lambda: not world.hub.statistics()["connections"])
    assert world.hub.presence("geoids") == (0, {})


# -- 4 handshake


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-WebSocket-Key": "short"}, b"400"),
        ({"Sec-WebSocket-Version": "12"}, b"4"),
        ({"Sec-WebSocket-Protocol": "soap"}, b"400"),
    ],
)
async def test_4_bad_handshakes_are_refused(world: World, headers: dict[str, str], status: bytes) -> None:
    async with await RawPeer.open(world.port, headers=headers) as peer:
        assert peer.response.split(b" ", 2)[1].startswith(status)


async def test_4_slow_and_endless_handshakes_are_bounded() -> None:
    settings = settings_with(stream={"connect_timeout": 0.2})
    async with serving(settings) as world:
        for start in (b"", b"GET /v1/stream HTTP/1.1\r\nHost: x\r\n"):
            async with await anyio.connect_tcp("127.0.0.1", world.port) as stream:
                if start:
                    await stream.send(start)
                peer = RawPeer(stream)
                assert await peer.ended()
        async with await anyio.connect_tcp("127.0.0.1", world.port) as stream:
            peer = RawPeer(stream)
            with suppress(anyio.BrokenResourceError):
                await stream.send(b"GET / HTTP/1.1\r\n")
                for i in range(200):
                    await stream.send(b"X-%d: %s\r\n" % (i, b"y" * 1000))
            assert await peer.ended()
            assert peer.data.startswith(b"HTTP/1.1 431") or not peer.data
        async with await RawPeer.open(world.port) as peer:
            await peer.hello()
        await until(lambda: not world.server.server_state.connections)


async def test_4_the_answer_is_that_of_the_rfc(world: World) -> None:
    async with await RawPeer.open(world.port) as peer:
        assert peer.response.startswith(b"HTTP/1.1 101 ")
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in peer.response
        assert b"sec-websocket-protocol" not in peer.response.lower()
        assert b"sec-websocket-extensions" not in peer.response.lower()


# -- RFC 7692


@asynccontextmanager
async def deflating() -> AsyncIterator[tuple[World, RawPeer]]:
    headers = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
    async with (
        serving(settings_with(stream={"compression": True})) as world,
        await RawPeer.open(world.port, headers=headers) as peer,
    ):
        assert b"permessage-deflate" in peer.response
        assert b"server_no_context_takeover" in peer.response
        await peer.hello()
        yield world, peer


def deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\x00\x00\xff\xff")


async def test_7692_compressed_commands_are_read() -> None:
    async with deflating() as (_, peer):
        await peer.send(build(TEXT, deflate(PING_JSON), rsv=4))
        await pongs(peer)
        whole = deflate(PING_JSON)
        await peer.send(build(TEXT, whole[:4], rsv=4, fin=False), build(PING), build(CONT, whole[4:]))
        assert (await peer.frame()).opcode == PONG
        await pongs(peer)
        await peer.send(build(TEXT, PING_JSON))
        await pongs(peer)


async def test_7692_a_bomb_is_1009() -> None:
    async with deflating() as (world, peer):
        bomb = deflate(b" " * 50_000_000)
        assert len(bomb) < 60_000
        await peer.send(build(TEXT, bomb, rsv=4))
        assert await peer.close_code() == 1009
        await until(lambda: not world.hub.statistics()["connections"])


async def test_7692_garbage_fails() -> None:
    async with deflating() as (_, peer):
        await peer.send(build(TEXT, b"\xff\xff\xff\xff", rsv=4))
        assert await peer.close_code() in (1002, 1007)


async def test_7692_invalid_utf8_inside() -> None:
    async with deflating() as (_, peer):
        await peer.send(build(TEXT, deflate(b"\xff"), rsv=4))
        assert await peer.close_code() == 1007


async def test_7692_a_compressed_control_frame_fails() -> None:
    async with deflating() as (_, peer):
        await peer.send(build(PING, b"x", rsv=4))
        assert await peer.close_code() == 1002


# -- fuzz

pieces = st.lists(
    st.one_of(
        st.builds(
            lambda op, data, fin, rsv, masked: build(op, data, fin=fin, rsv=rsv, masked=masked),
            st.integers(0, 15),
            st.binary(max_size=60),
            st.booleans(),
            st.sampled_from([0, 0, 0, 4, 1]),
            st.sampled_from([True, True, True, False]),
        ),
        st.builds(
            lambda op: build(TEXT, b'{"op":"%s","id":2,"channel":"geoids","limit":1}' % op.encode()),
            st.sampled_from(["ping", "history", "subscribe", "connect", "x"]),
        ),
        st.binary(max_size=30),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=pieces, say_hello=st.booleans())
async def test_fuzzed_frames_never_hurt_the_server(server: World, parts: list[bytes], say_hello: bool) -> None:
    async with await RawPeer.open(server.port) as peer:
        if say_hello:
            await peer.hello()
        with suppress(anyio.BrokenResourceError, anyio.EndOfStream):  # The server may have had enough of it.
            await peer.send(*parts)
    async with peer_of(server) as peer:
        await peer.say("ping", 2)
        await pongs(peer)
    await until(lambda: not server.hub.statistics()["connections"])
    assert server.hub.metrics._defects._metrics == {}


# -- both encodings


@pytest.fixture(params=["json", "msgpack"])
def said(request: pytest.FixtureRequest) -> tuple[dict[str, str], int, Any]:
    """Headers of the handshake, opcode and encoder of one encoding."""
    headers = {"Sec-WebSocket-Protocol": f"kimera.v1.{request.param}"}
    if request.param == "json":
        return headers, TEXT, msgspec.json.encode
    return headers, BINARY, msgspec.msgpack.encode


@asynccontextmanager
async def speaking(world: World, said: tuple[dict[str, str], int, Any]) -> AsyncIterator[RawPeer]:
    headers, opcode, encode = said
    async with await RawPeer.open(world.port, headers=headers) as peer:
        await peer.send(build(opcode, encode({"op": "connect", "id": 1})))
        assert (await peer.message())["op"] == "connected"
        yield peer


@pytest.mark.parametrize("size", [0, 100, 200, 65_000])
async def test_lengths_and_fragments_in_both_encodings(
    world: World, said: tuple[dict[str, str], int, Any], size: int
) -> None:
    _, opcode, encode = said
    whole = encode({"op": "publish", "id": 2, "geoid": {"text": "x" * size}})
    async with speaking(world, said) as peer:
        await peer.send(build(opcode, whole))
        assert (await peer.message())["id"] == 2
        cut = len(whole) // 3
        await peer.send(
            build(opcode, whole[:cut], fin=False),
            build(PING, b"p"),
            build(CONT, b"", fin=False),
            build(CONT, whole[cut:]),
        )
        answers = [await peer.frame() for _ in range(2)]
        assert [frame.opcode for frame in answers] == [PONG, opcode]
        assert answers[0].payload == b"p"


async def test_broken_messages_and_the_other_kind_of_frame_in_both_encodings(
    world: World, said: tuple[dict[str, str], int, Any]
) -> None:
    _, opcode, encode = said
    async with speaking(world, said) as peer:
        broken = encode({"op": "ping", "id": 2})[:-3]
        await peer.send(build(opcode, broken))
        assert (await peer.message())["code"] == "bad_request"
        await peer.send(build(opcode, encode({"op": "publish", "id": 3, "geoid": {"text": "x" * 100_000}})))
        assert (await peer.message())["code"] == "too_large"
        await peer.send(build(BINARY if opcode == TEXT else TEXT, b"{}"))
        assert await peer.close_code() == 1003


async def test_closes_of_the_protocol_name_their_reason_in_one_word(
    world: World, said: tuple[dict[str, str], int, Any]
) -> None:
    _, opcode, _ = said
    for bad, code, word in [
        (build(opcode, b"x" * 300_000), 1009, b"too_big"),
        (build(3, b""), 1002, b"protocol_error"),
        (build(opcode, b"x", masked=False), 1002, b"protocol_error"),
        (build(CLOSE, b"\x03\xe8\xff"), 1007, b"invalid_payload"),
    ]:
        async with speaking(world, said) as peer:
            await peer.send(bad)
            frame = await peer.frame()
            assert (frame.opcode, frame.code, frame.payload[2:]) == (CLOSE, code, word)
