"""SIGTERM: what was accepted is finished or refused, subscribers are told, the process ends with 0 in time."""

import socket
import time

import anyio
import httpx
import msgspec
import pytest
from websockets.exceptions import ConnectionClosed

from tests.e2e.conftest import StartServer
from tests.e2e.harness import PATIENCE, Server, offsets, peer, until

pytestmark = pytest.mark.anyio

REFUSED = {"unavailable", "overloaded"}


async def test_stop_while_publishing_with_subscribers(start_server: StartServer) -> None:
    server = start_server(KIMERA_API__COMMANDS_PER_SECOND="100000", KIMERA_API__COMMANDS_BURST="100000")
    acked: list[int] = []
    refused: list[str] = []
    closes: list[tuple[int | None, str | None]] = []
    heard: list[list[int]] = []
    unanswered: list[int] = []

    async def publish(number: int) -> None:
        waiting: set[int] = set()
        async with peer(server) as client:
            try:
                for n in range(100_000):
                    waiting.add(await client.send("publish", geoid={"symbolic_state": {f"s{number}-{n}": 1}}))
                    while len(waiting) >= 8:
                        await client.receive()
                        answer(client.replies, waiting)
            except ConnectionClosed:
                answer(client.replies, waiting)
            try:
                while True:  # what came before the close frame is still there to be read
                    await client.receive()
            except ConnectionClosed:
                answer(client.replies, waiting)
            closes.append((client.ws.close_code, client.ws.close_reason))
        unanswered.append(len(waiting))

    def answer(replies: dict, waiting: set[int]) -> None:
        for id in [each for each in waiting if replies[each]]:
            waiting.discard(id)
            (reply,) = replies.pop(id)
            if reply["op"] == "published":
                acked.append(reply["offset"])
            else:
                refused.append(reply["code"])
                assert reply["temporary"]

    async def listen(encoding: str) -> None:
        async with peer(server, encoding) as client:
            await client.done("subscribe", channel="geoids", since={"epoch": client.connected["epoch"], "offset": 0})
            try:
                while True:
                    await client.receive()
            except ConnectionClosed:
                closes.append((client.ws.close_code, client.ws.close_reason))
            heard.append(offsets(client.events("geoids")))

    async def stop() -> None:
        await until(lambda: len(acked) > 50, every=0.001)
        server.terminate()

    async with anyio.create_task_group() as group:
        for encoding in ("json", "msgpack"):
            group.start_soon(listen, encoding)
        for number in range(3):
            group.start_soon(publish, number)
        group.start_soon(stop)
    assert server.wait() == 0
    assert set(closes) == {(4000, "shutdown")}
    assert set(refused) <= REFUSED
    # A command sent after the server stopped reading may go without an answer, never one that it had accepted.
    again = start_server()
    async with httpx.AsyncClient(base_url=again.url) as http:
        head = (await http.get("/health")).json()["offset"]
    assert sorted(acked) == list(range(1, head + 1)), "something was committed and not acknowledged, or the reverse"
    assert [sorted(each) for each in heard] == [sorted(acked)] * 2
    assert server.errors() == []


def stalled_subscriber(server: Server, *, receive_buffer: int = 4096) -> socket.socket:
    """A WebSocket that subscribes to everything and then never reads again."""
    host, _, port = server.address.partition(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect((host, int(port)))
    sock.sendall(
        f"GET /v1/stream HTTP/1.1\r\nHost: {server.address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    sock.settimeout(PATIENCE)
    seen = b""
    while b"\r\n\r\n" not in seen:
        seen += sock.recv(1024)
    connect = b'{"op":"connect","id":1,"subs":[{"channel":"geoids"}]}'
    mask = b"\x01\x02\x03\x04"
    payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(connect))
    sock.sendall(bytes([0x81, 0x80 | len(connect)]) + mask + payload)
    while b"subscribed" not in seen:
        seen += sock.recv(1024)
    return sock


async def fill(server: Server, total: int) -> None:
    """Publish about ``total`` bytes of events."""
    size = 8_000
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        lines = [
            msgspec.json.encode({"symbolic_state": {f"fill-{n}": 1}, "metadata": {"filler": "x" * size}})
            for n in range(total // size)
        ]
        response = await http.post(
            "/v1/geoids", content=b"\n".join(lines), headers={"content-type": "application/x-ndjson"}
        )
        assert response.status_code == 200
        assert all("offset" in msgspec.json.decode(line) for line in response.text.splitlines())


async def test_a_stalled_subscriber_does_not_hold_up_the_stop(start_server: StartServer) -> None:
    server = start_server(KIMERA_API__SHUTDOWN_DEADLINE="3")
    with stalled_subscriber(server):
        await fill(server, 8_000_000)
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=server.url) as http:
            assert (await http.get("/readyz")).status_code == 200
            server.terminate()
            # Kept-alive connections are answered while the stop waits for the stalled one.
            states: list[tuple[int, bool]] = []
            try:
                while len(states) < 1000:
                    response = await http.get("/readyz")
                    states.append((response.status_code, response.json()["draining"]))
                    if response.status_code == 503:
                        refused = await http.post("/v1/geoids", json={"text": "too late"})
                        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
                        break
                    await anyio.sleep(0.01)
            except httpx.TransportError:
                pass
            assert (503, True) in states, states
        assert server.wait() == 0
        assert time.monotonic() - began < 3 + 5 + 5  # deadline, the watchdog's grace, a busy machine
    assert not any("still running" in line for line in server.lines)


async def test_sse_and_ndjson_end_with_the_server(start_server: StartServer) -> None:
    server = start_server()
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        answers: list[dict] = []
        sent = anyio.Event()

        async def lines():  # type: ignore[no-untyped-def]
            for n in range(100_000):
                yield msgspec.json.encode({"symbolic_state": {f"line-{n}": 1}}) + b"\n"
                if n > 20:
                    sent.set()
                    await anyio.sleep(0.005)

        async def ingest() -> None:
            kind = {"content-type": "application/x-ndjson"}
            async with http.stream("POST", "/v1/geoids", content=lines(), headers=kind) as response:
                async for line in response.aiter_lines():
                    answers.append(msgspec.json.decode(line))

        async def follow() -> None:
            async with http.stream("GET", "/v1/events", params={"channel": "geoids"}) as response:
                async for _ in response.aiter_lines():
                    followed.set()

        async def ingest_until_stopped() -> None:
            try:
                await ingest()
            except httpx.TransportError:
                pass  # the rest of the body had nowhere to go

        followed = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            group.start_soon(ingest_until_stopped)
            await followed.wait()
            await sent.wait()
            await until(lambda: len(answers) > 10)
            server.terminate()
    assert server.wait() == 0
    last = answers[-1]
    assert last.get("code") == "unavailable", last
    assert f"line {last['line']}" in last["detail"]
    published = [each["offset"] for each in answers if "offset" in each]
    assert published == list(range(1, len(published) + 1))


async def test_a_second_signal_ends_at_once(start_server: StartServer) -> None:
    server = start_server(KIMERA_API__SHUTDOWN_DEADLINE="20")
    with stalled_subscriber(server):
        await fill(server, 8_000_000)
        server.terminate()
        await server.line(lambda line: '"stopping"' in line)
        server.terminate()
        server.wait(15)
