"""The fan-out loop on real sockets: every connection's bytes in the order of the writes, however they get there."""

import asyncio
import contextlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from kimera_stream.kernels import egress as kernel
from kimera_stream.kernels.egress import COMPILED, PlainSink, Sink, plain_fan_out

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Handle(Sink):  # type: ignore[misc]
    """As `api.egress.TransportEgress`, without a protocol behind it."""

    def write(self, data: bytes) -> None:
        if not self.closing and not self.transport.is_closing():
            self.dirty = True
            self.transport.write(data)


class Protocol(asyncio.Protocol):
    def __init__(self) -> None:
        self.handle: Handle | None = None

    def connection_made(self, transport: Any) -> None:
        self.handle = Handle(transport, transport.get_extra_info("socket").fileno())

    def connection_lost(self, exc: Exception | None) -> None:
        assert self.handle is not None
        self.handle.closing = True


@pytest.fixture(params=["compiled", "plain"])
def fan_out(request: pytest.FixtureRequest) -> Any:
    if request.param == "plain":
        return plain_fan_out
    if not COMPILED:
        pytest.skip("the compiled module was not built")
    return kernel.fan_out


@pytest.fixture(params=LOOPS)
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        yield runner


async def pair(buffer: int = 4096) -> tuple[Handle, socket.socket]:
    """A handle, and the other end of its connection, which takes little at a time."""
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    far = socket.socket()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    far.setblocking(False)
    await asyncio.gather(loop.sock_connect(far, listener.getsockname()), asyncio.sleep(0))
    near, _ = listener.accept()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    near.setblocking(False)
    listener.close()
    _, protocol = await loop.create_connection(Protocol, sock=near)
    assert protocol.handle is not None
    return protocol.handle, far


def test_mixed_writes_keep_their_order(fan_out: Any, runner: asyncio.Runner) -> None:
    async def play() -> None:
        rng = random.Random(5)
        pairs = [await pair() for _ in range(8)]
        sent = [b""] * len(pairs)
        got = [b""] * len(pairs)
        for step in range(400):
            if rng.random() < 0.6:
                chosen = sorted(rng.sample(range(len(pairs)), rng.randint(1, len(pairs))))
                data = b"<%d>" % step * rng.choice([1, 30, 3000])
                fan_out([pairs[i][0] for i in chosen], data)
            else:
                chosen = [rng.randrange(len(pairs))]
                data = b"[%d]" % step
                pairs[chosen[0]][0].write(data)
            for i in chosen:
                sent[i] += data
            if rng.random() < 0.7:
                i = rng.randrange(len(pairs))
                with contextlib.suppress(BlockingIOError):
                    got[i] += pairs[i][1].recv(rng.choice([10, 5000, 100_000]))
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        for i, (handle, far) in enumerate(pairs):
            while len(got[i]) < len(sent[i]):
                got[i] += await asyncio.wait_for(loop.sock_recv(far, 1 << 20), 5)
            assert got[i] == sent[i]
            handle.transport.close()
            far.close()
        await asyncio.sleep(0.01)

    runner.run(play())


def test_a_reset_connection_closes_in_its_own_way_and_harms_nobody(fan_out: Any, runner: asyncio.Runner) -> None:
    async def play() -> None:
        (broken, gone), (handle, far) = await pair(), await pair()
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        gone.close()
        loop = asyncio.get_running_loop()
        for _ in range(50):
            fan_out([broken, handle], b"x" * 10)
            await asyncio.sleep(0)
        assert broken.closing
        assert not handle.closing
        data = b""
        while len(data) < 500:
            data += await asyncio.wait_for(loop.sock_recv(far, 4096), 5)
        assert data == b"x" * 500
        handle.transport.close()
        far.close()
        await asyncio.sleep(0.01)

    runner.run(play())


def test_closing_handles_are_passed_over_and_others_written_to(fan_out: Any, runner: asyncio.Runner) -> None:
    class Plain:
        closing = False
        data = b""

        def write(self, frames: bytes) -> None:
            self.data += frames

    async def play() -> None:
        handle, far = await pair()
        handle.closing = True
        plain = Plain()
        fan_out([handle, plain], b"abc")
        fan_out([], b"abc")
        fan_out([plain], b"")
        assert plain.data == b"abc"
        await asyncio.sleep(0.01)
        with pytest.raises(BlockingIOError):
            far.recv(10)
        handle.transport.close()
        far.close()
        await asyncio.sleep(0.01)

    runner.run(play())


def test_the_plain_sink_has_the_same_fields() -> None:
    plain, sink = PlainSink(None, 3), Sink(None, 3)
    for name in ("transport", "fd", "closing", "dirty"):
        assert getattr(plain, name) == getattr(sink, name)
