"""SIGTERM: what was accepted is finished or refused, subscribers are told, the process ends with 0 in time."""

import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread
import httpx
import msgspec
import pytest
from websockets.exceptions import ConnectionClosed

from kimera_stream.engines.sequencer import Sequencer
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.settings import Settings
from tests.e2e.conftest import StartServer
from tests.e2e.harness import PATIENCE, Server, offsets, peer, until, web

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
    async with web(again) as http:
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
    async with web(server) as http:
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
        server.terminate()
        assert server.wait() == 0
        assert time.monotonic() - began < 3 + 5 + 5  # deadline, the watchdog's grace, a busy machine
    assert "still running" not in server.text


@contextmanager
def database_held(server: Server) -> Iterator[None]:
    """No commit gets through meanwhile: another program writes."""
    (file,) = server.data_dir.glob("*.sqlite3")
    holder = sqlite3.connect(file, isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        yield
    finally:
        holder.close()


async def test_what_was_accepted_is_finished_while_new_work_is_refused(start_server: StartServer) -> None:
    server = start_server(KIMERA_API__SHUTDOWN_DEADLINE="30", KIMERA_DATABASE__BUSY_TIMEOUT="20")
    limits = httpx.Limits(max_keepalive_connections=1, max_connections=1)
    async with web(server, limits=limits) as http, peer(server) as client:
        assert (await http.get("/readyz")).status_code == 200
        with database_held(server):
            accepted = await client.send("publish", geoid={"text": "Accepted before the stop."})
            await client.done("ping")
            server.terminate()

            async def not_ready() -> bool:  # asked on a connection that was open before
                return (await http.get("/readyz")).status_code == 503

            await until(not_ready)
            ready = await http.get("/readyz")
            assert (ready.json()["ready"], ready.json()["draining"]) == (False, True)
            refused = await http.post("/v1/geoids", json={"text": "too late"})
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            assert refused.json()["temporary"]
            late = await client.ask("publish", geoid={"text": "too late"})
            assert (late["op"], late["code"], late["temporary"]) == ("error", "unavailable", True)
        assert (await client.reply(accepted))["offset"] == 1
        await client.ws.wait_closed()
        assert (client.ws.close_code, client.ws.close_reason) == (4000, "shutdown")
    assert await anyio.to_thread.run_sync(server.wait) == 0


async def test_what_cannot_be_finished_in_time_is_refused(start_server: StartServer) -> None:
    server = start_server(KIMERA_API__SHUTDOWN_DEADLINE="2", KIMERA_DATABASE__BUSY_TIMEOUT="4")
    async with peer(server) as client:
        await client.publish(text="Something.")
        with database_held(server):
            waiting = [await client.send("publish", geoid={"symbolic_state": {f"n{n}": 1}}) for n in range(50)]
            await client.done("ping")
            server.terminate()
            for id in waiting:
                reply = await client.reply(id)
                assert (reply["op"], reply["code"], reply["temporary"]) == ("error", "unavailable", True)
            await client.ws.wait_closed()
            assert client.ws.close_code == 4000
            assert await anyio.to_thread.run_sync(server.wait) in (0, 3)


async def test_a_second_signal_ends_the_waiting(start_server: StartServer) -> None:
    """The stop would wait for a commit, the commit for the database, and that for a minute."""
    server = start_server(KIMERA_API__SHUTDOWN_DEADLINE="60", KIMERA_DATABASE__BUSY_TIMEOUT="60")
    async with peer(server) as client:
        await client.publish(text="Something.")
        with database_held(server):
            waiting = await client.send("publish", geoid={"text": "It waits for the database."})
            await client.done("ping")
            server.terminate()
            await server.line(lambda line: '"stopping"' in line)
            server.terminate()
            assert await anyio.to_thread.run_sync(server.wait) in (0, 3)
        assert not client.replies[waiting]
    async with web(start_server()) as http:
        assert (await http.get("/health")).json()["offset"] == 1


async def test_sse_and_ndjson_end_with_the_server(start_server: StartServer) -> None:
    server = start_server()
    followed = anyio.Event()
    ended: list[str] = []

    async def follow(http: httpx.AsyncClient) -> None:
        async with http.stream("GET", "/v1/events", params={"channel": "geoids"}) as response:
            async for _ in response.aiter_lines():
                followed.set()
        ended.append("events")

    stream = await anyio.connect_tcp(*server.address.split(":"))  # type: ignore[arg-type]
    head = f"POST /v1/geoids HTTP/1.1\r\nHost: {server.address}\r\nContent-Type: application/x-ndjson\r\n"
    await stream.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
    seen = b""
    async with (
        web(server) as http,
        anyio.create_task_group() as group,
    ):
        group.start_soon(follow, http)
        await followed.wait()
        with anyio.fail_after(PATIENCE):
            for n in range(5):
                line = msgspec.json.encode({"symbolic_state": {f"line-{n}": 1}}) + b"\n"
                await stream.send(b"%x\r\n%b\r\n" % (len(line), line))
            while b'"line":5' not in seen:
                seen += await stream.receive()
            server.terminate()
            while not seen.endswith(b"0\r\n\r\n"):  # the answer ends as a whole one does
                seen += await stream.receive()
    await stream.aclose()
    assert ended == ["events"]
    assert await anyio.to_thread.run_sync(server.wait) == 0
    last = msgspec.json.decode(next(line for line in seen.split(b"\n") if b'"line":6' in line))
    assert (last["code"], last["temporary"]) == ("unavailable", True)
    assert "line 6" in last["detail"]


@contextmanager
def first_group_never_ends(_services: Services, _settings: Settings) -> Iterator[None]:
    """Whatever comes first is worked on forever: the stop's time runs out with work waiting."""

    async def process(_self: Sequencer, _group: Any) -> None:
        await anyio.sleep_forever()

    Sequencer.process = process  # type: ignore[method-assign]
    yield


async def test_keyed_work_that_the_stop_had_no_time_for_is_done_by_the_next_start(start_server: StartServer) -> None:
    server = start_server(
        tamper=first_group_never_ends, KIMERA_API__SHUTDOWN_DEADLINE="2", KIMERA_DATABASE__GROUP_COMMIT_MAX="1"
    )
    async with peer(server) as client:
        ids = [
            await client.send("publish", geoid={"id": f"g{n}", "text": f"Gate {n} is open."}, key=f"key-{n}")
            for n in range(10)
        ]
        ids.append(await client.send("publish", geoid={"id": "unkeyed", "text": "Nobody knows my name."}))

        async def accepted() -> bool:
            async with web(server) as http:
                return 'kimera_queue_depth{queue="intake"} 11.0' in (await http.get("/metrics")).text

        await until(accepted)
        server.terminate()
        while not all(client.replies[each] for each in ids):
            await client.receive()
        answers = [client.replies[each][0] for each in ids]
    assert [each["code"] for each in answers] == ["unavailable"] * 11
    kept = [n for n, each in enumerate(answers) if "it is kept" in each["message"]]
    assert kept == list(range(1, 10)), "all but what was being worked on and what has no key"
    assert server.wait() == 0

    again = start_server()
    async with peer(again) as client, web(again) as http:

        async def done() -> bool:
            return (await http.get("/health")).json()["offset"] == len(kept)

        await until(done)
        for n in kept:
            repeated = await client.done("publish", geoid={"text": "whatever"}, key=f"key-{n}")
            assert (repeated["duplicate"], repeated["geoid"]["id"]) == (True, f"g{n}")
        assert (await client.done("publish", geoid={"id": "g0", "text": "Gate 0 is open."}, key="key-0"))[
            "duplicate"
        ] is False
        assert (await http.get("/v1/geoids/unkeyed")).status_code == 404
    assert again.errors() == []
