"""One test per fact of uvicorn and websockets that `api/egress.py` rests on. A new minor of either must pass these first."""

import asyncio
import contextlib
import inspect
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import websockets
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.exceptions import InvalidState
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from kimera_stream.api.egress import EXTENSION, Conversation, EgressProtocol, TransportEgress, uvicorn_options
from kimera_stream.api.slim import SlimEvent, SlimQueue
from kimera_stream.api.transit import Transit, transit
from kimera_stream.streaming.egress import Egress
from tests.streaming.fakes import FakeEgress, settings_with
from tests.streaming.rawws import build

pytestmark = pytest.mark.anyio

REQUEST = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Transport(asyncio.Transport):
    """A transport whose buffer grows as the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.buffer = 0
        self.limits: dict[str, Any] = {}
        self.descriptor: int | None = None
        self.closed = self.aborted = self.reading_paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" and self.descriptor is not None else default

    def fileno(self) -> int:
        assert self.descriptor is not None
        return self.descriptor

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.limits = {"high": high}

    def get_write_buffer_size(self) -> int:
        return self.buffer

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.reading_paused = True

    def resume_reading(self) -> None:
        self.reading_paused = False


class Listener:
    """Hears of pauses, as the streaming core does."""

    def egress_paused(self) -> None: ...
    def egress_resumed(self) -> None: ...
    def egress_draining(self) -> None: ...


async def accepted(app: Any = None, **options: Any) -> tuple[EgressProtocol, Transport, list[Any]]:
    """A protocol past its handshake, and what its application was called with."""
    calls: list[Any] = []

    async def default(scope: Any, receive: Any, send: Any) -> None:
        calls.append((scope, receive, send))
        await receive()
        await send({"type": "websocket.accept"})
        await asyncio.Event().wait()

    config = uvicorn.Config(app or default, log_level="critical", lifespan="off", **options)
    config.load()
    protocol = EgressProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    transport = Transport()
    protocol.connection_made(transport)
    protocol.data_received(REQUEST)
    for _ in range(5):
        await asyncio.sleep(0)
    assert transport.sent.startswith(b"HTTP/1.1 101")
    transport.sent = b""
    return protocol, transport, calls


def gone(protocol: EgressProtocol) -> None:
    for task in protocol.tasks:
        task.cancel()
    protocol.connection_lost(None)


def test_the_versions_are_those_that_were_tested() -> None:
    minor = tuple(int(n) for n in re.findall(r"\d+", uvicorn.__version__)[:3])
    assert (0, 52, 1) <= minor < (0, 55)
    assert 15 <= int(websockets.__version__.split(".")[0]) < 18


def test_the_base_class_still_has_what_is_overridden() -> None:
    for name in (
        "connection_made", "connection_lost", "pause_writing", "resume_writing", "shutdown", "handle_close", "handle_cont",
        "handle_ping", "handle_text", "handle_parser_exception", "keepalive_timeout", "stop_keepalive", "send_500_response",
    ):  # fmt: skip
        assert callable(getattr(WebSocketsSansIOProtocol, name)), name
    assert list(inspect.signature(WebSocketsSansIOProtocol.__init__).parameters)[1:] == [
        "config", "server_state", "app_state", "_loop",
    ]  # fmt: skip


async def test_the_handle_is_in_the_scope_before_the_application_sees_it() -> None:
    protocol, _, calls = await accepted()
    handle = calls[0][0]["extensions"][EXTENSION]
    assert handle is protocol.egress
    assert isinstance(handle, Egress)
    assert isinstance(FakeEgress(), Egress)
    gone(protocol)


async def test_buffer_limits_are_set_when_the_connection_is_made() -> None:
    protocol, transport, _ = await accepted()
    assert transport.limits == {"high": EgressProtocol.high_water}
    gone(protocol)


async def test_pauses_reach_uvicorn_and_the_listener() -> None:
    protocol, _, _ = await accepted()
    heard: list[str] = []

    class Listener:
        def egress_paused(self) -> None:
            heard.append("paused")

        def egress_resumed(self) -> None:
            heard.append("resumed")

        def egress_draining(self) -> None:
            heard.append("draining")

    protocol.egress.listen(Listener())
    protocol.pause_writing()
    assert protocol.egress.paused
    assert not protocol.writable.is_set()
    protocol.resume_writing()
    assert not protocol.egress.paused
    assert protocol.writable.is_set()
    protocol.shutdown()
    assert heard == ["paused", "resumed", "draining"]
    gone(protocol)


async def test_a_connection_in_use_lets_go_of_its_opening_request() -> None:
    protocol, _, calls = await accepted()
    request = protocol.request
    assert len(list(request.headers.raw_items())) > 3
    protocol.egress.listen(FakeEgress())  # type: ignore[arg-type]
    assert list(request.headers.raw_items()) == []
    assert calls[0][0]["headers"] == []
    assert vars(protocol) == {}, "an attribute of the base class has no slot"
    gone(protocol)


async def test_the_slim_queue_and_event_do_what_uvicorn_asks_of_them() -> None:
    queue: SlimQueue[int] = SlimQueue()
    assert queue.empty()
    getter = asyncio.ensure_future(queue.get())  # noqa: TID251
    await asyncio.sleep(0)
    queue.put_nowait(1)
    queue.put_nowait(2)
    assert await getter == 1
    assert not queue.empty()
    assert await queue.get() == 2
    assert queue.empty()
    cancelled = asyncio.ensure_future(queue.get())  # noqa: TID251
    await asyncio.sleep(0)
    cancelled.cancel()
    queue.put_nowait(3)
    assert await queue.get() == 3

    event = SlimEvent()
    assert event.is_set()
    await event.wait()
    event.clear()
    waiters = [asyncio.ensure_future(event.wait()) for _ in range(3)]  # noqa: TID251
    await asyncio.sleep(0)
    waiters[0].cancel()
    await asyncio.sleep(0)
    assert not waiters[1].done()
    event.set()
    await asyncio.gather(*waiters[1:])


async def test_an_asgi_send_waits_while_paused_but_the_handle_does_not() -> None:
    """Why a slow client cannot be evicted through ASGI: its close would wait behind the pause."""
    protocol, transport, calls = await accepted()
    protocol.pause_writing()
    send = calls[0][2]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(send({"type": "websocket.close", "code": 4001}), 0.01)
    protocol.egress.close(4001, "slow_consumer")
    assert transport.sent == b"\x88\x0f\x0f\xa1slow_consumer"
    gone(protocol)


async def test_a_close_from_here_waits_for_the_answer_then_aborts() -> None:
    protocol, transport, calls = await accepted()
    protocol.close_deadline = 0.02
    protocol.egress.close(4000, "shutdown")
    assert protocol.conn.state is not OPEN
    assert (await calls[0][1]()) == {"type": "websocket.disconnect", "code": 4000, "reason": "shutdown"}
    assert not transport.closed
    assert not transport.aborted
    await asyncio.sleep(0.05)
    assert transport.aborted
    gone(protocol)


async def test_the_peers_answer_ends_it_before_that() -> None:
    protocol, transport, _ = await accepted()
    protocol.egress.close(4000, "shutdown")
    protocol.data_received(build(8, b"\x0f\xa0"))
    assert transport.closed
    gone(protocol)


async def test_shutdown_after_the_peers_close_does_not_raise() -> None:
    """The base class sends its own close without looking at the state."""
    protocol, transport, _ = await accepted()
    protocol.data_received(build(8, b"\x03\xe8"))
    assert transport.closed
    with pytest.raises(InvalidState):
        protocol.conn.send_close(1012)
    protocol.shutdown()
    protocol.egress.close(4000, "shutdown")
    gone(protocol)


async def test_a_transport_that_cannot_flush_is_aborted_after_a_deadline() -> None:
    protocol, transport, _ = await accepted()
    protocol.close_deadline = 0.01
    protocol.data_received(build(8, b"\x03\xe8"))
    assert transport.closed
    await asyncio.sleep(0.03)
    assert transport.aborted
    gone(protocol)


async def test_reading_pauses_until_the_application_receives_so_it_must_go_on_receiving() -> None:
    protocol, transport, calls = await accepted()
    protocol.data_received(build(1, b"hi"))
    assert transport.reading_paused
    assert (await calls[0][1]())["text"] == "hi"
    assert not transport.reading_paused
    gone(protocol)


async def test_a_close_resumes_reading_so_that_the_answer_is_read() -> None:
    protocol, transport, _ = await accepted()
    protocol.data_received(build(1, b"hi"))
    assert transport.reading_paused
    protocol.egress.close(4000, "shutdown")
    assert not transport.reading_paused
    gone(protocol)


async def test_keepalive_timeout_is_4004_and_ends_the_application() -> None:
    protocol, transport, calls = await accepted()
    protocol.keepalive_timeout()
    assert transport.sent.startswith(b"\x88\x09\x0f\xa4no_pong")
    assert (await calls[0][1]())["code"] == 4004
    gone(protocol)


async def test_a_stalled_peer_is_not_asked_for_a_pong_before_it_reads_on() -> None:
    protocol, transport, _ = await accepted()
    protocol.egress.listen(Listener())
    protocol.send_keepalive_ping()
    protocol.pause_writing()
    for _ in range(3):
        protocol.keepalive_timeout()
        assert not transport.closed
        assert protocol.pong_timer is not None
    protocol.resume_writing()
    protocol.keepalive_timeout()
    assert transport.closed
    gone(protocol)


async def test_the_time_for_a_pong_begins_when_the_ping_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that reads slowly, with the system's buffer full of what was said before the ping."""
    protocol, transport, _ = await accepted()
    transport.descriptor = 99
    now = Transit(1_000, 500)
    monkeypatch.setattr("kimera_stream.api.egress.transit", lambda _descriptor: now)
    protocol.send_keepalive_ping()
    now = Transit(1_200, 900)  # more was said meanwhile
    protocol.keepalive_timeout()
    now = Transit(1_499, 900)
    protocol.keepalive_timeout()
    now = Transit(1_700, 900)  # the ping among it
    protocol.keepalive_timeout()
    assert not transport.closed
    now = Transit(2_000, 900)
    protocol.keepalive_timeout()
    assert transport.closed, "it goes on reading, and does not answer"
    gone(protocol)


async def test_a_peer_whose_machine_takes_nothing_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol, transport, _ = await accepted()
    transport.descriptor = 99
    monkeypatch.setattr("kimera_stream.api.egress.transit", lambda _descriptor: Transit(1_000, 500))
    protocol.send_keepalive_ping()
    protocol.keepalive_timeout()
    assert transport.closed
    gone(protocol)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say")
def test_the_system_says_what_a_peer_has_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(listening.getsockname())
        ours, _ = listening.accept()
        with ours:
            ours.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    sent += ours.send(b"x" * 65_536)
            before = transit(ours.fileno())
            assert before is not None
            assert before.held > 0
            assert before.taken + before.held == pytest.approx(sent, abs=1)
            read = 0
            while read < sent:
                read += len(peer.recv(65_536))
            while (after := transit(ours.fileno())) is not None and after.held:
                pass
            assert after is not None
            assert after.taken == pytest.approx(sent, abs=1)
        assert transit(-1) is None
    with Path(os.devnull).open("rb") as file:
        assert transit(file.fileno()) is None


async def test_what_is_written_after_the_end_is_dropped() -> None:
    protocol, transport, _ = await accepted()
    gone(protocol)
    transport.closed = True
    protocol.egress.write(b"late")
    assert transport.sent == b""
    assert protocol.egress.closing


async def test_compression_never_keeps_context_between_messages() -> None:
    """Frames made once go to many: a receiver whose context expects others' messages would read garbage."""
    protocol, _, _ = await accepted(ws_per_message_deflate=True)
    (factory,) = protocol.conn.available_extensions
    assert factory.server_no_context_takeover
    assert isinstance(protocol.conn, ServerProtocol)
    gone(protocol)


async def test_pongs_are_not_piled_up_while_paused() -> None:
    protocol, transport, _ = await accepted()
    protocol.data_received(build(9, b"1"))
    assert transport.sent == b"\x8a\x011"
    protocol.pause_writing()
    protocol.data_received(build(9, b"2"))
    protocol.resume_writing()
    protocol.data_received(build(9, b"3"))
    assert transport.sent == b"\x8a\x011\x8a\x013"
    gone(protocol)


def test_the_options_for_uvicorn() -> None:
    settings = settings_with(api={"max_command_bytes": 2048, "shutdown_deadline": 3}, stream={"outbox_bytes": 131_072})
    options = uvicorn_options(settings)
    assert options["ws_max_size"] == 8192
    assert (options["ws_ping_interval"], options["ws_ping_timeout"]) == (25.0, 10.0)
    assert options["ws_per_message_deflate"] is False
    assert issubclass(options["ws"], EgressProtocol)
    assert options["ws"].high_water == 32_768
    assert options["ws"].close_deadline == 1.5
    assert TransportEgress.__slots__
    uvicorn.Config(lambda: None, **options).load()


def test_the_conversation_has_every_attribute_that_websockets_gives_one() -> None:
    made = Conversation(extensions=None, state=OPEN, max_size=1000)
    given = ServerProtocol(state=OPEN, max_size=1000)
    own = {"id", "logger", "parser", "reader"}  # no name, our logger, and one each
    assert vars(made).keys() == vars(given).keys()
    assert {k: v for k, v in vars(made).items() if k not in own} == {
        k: v for k, v in vars(given).items() if k not in own
    }
