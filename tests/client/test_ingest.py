"""Sending many statements to a server that loses connections, refuses lines and is busy."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import msgspec
import pytest
import uvicorn

from kimera_stream.client.backoff import Backoff
from kimera_stream.client.ingest import Ingest, Statement
from kimera_stream.protocol.errors import UnauthorizedError, UnavailableError

pytestmark = pytest.mark.anyio
FAST = Backoff(base=0.01, cap=0.02)
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Store:
    """An ASGI application with the two routes that ingesting needs."""

    def __init__(self) -> None:
        self.url = ""
        self.texts: dict[str, str] = {}
        self.order: list[str] = []
        self.updates = 0
        self.requests = 0
        self.look_ups = 0
        self.die_after: list[int] = []
        """For each request in turn, break the connection after so many lines were committed, some unanswered."""
        self.busy: set[str] = set()
        self.status = 200
        self.instead: Any = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        if self.instead is not None:
            await self.instead(scope, receive, send)
            return
        if scope["method"] == "GET":
            self.look_ups += 1
            known = scope["path"].removeprefix("/v1/geoids/") in self.texts
            await self.answer(send, 200 if known else 404, b"{}")
            return
        self.requests += 1
        if self.status != 200:
            await self.answer(send, self.status, b'{"code":"unauthorized","detail":"no token"}')
            return
        limit = self.die_after.pop(0) if self.die_after else None
        await send({"type": "http.response.start", "status": 200, "headers": []})
        rest, count, more = b"", 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            more = message.get("more_body", False)
            *lines, rest = (rest + message.get("body", b"")).split(b"\n")
            for line in lines:
                result = self.commit(line)
                count += 1
                if limit is not None and count >= limit:
                    raise ConnectionError("the test breaks the connection")
                # The last five before a break are committed and never answered.
                if limit is None or count < limit - 5:
                    await send({"type": "http.response.body", "body": result + b"\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def commit(self, line: bytes) -> bytes:
        body = msgspec.json.decode(line)
        text = body["text"]
        if text in self.busy:
            self.busy.discard(text)
            return b'{"code":"overloaded","message":"busy","temporary":true,"retry_after":0.01}'
        if text == "bad":
            return b'{"code":"bad_request","message":"text: no","temporary":false}'
        self.updates += body["id"] in self.texts
        self.texts[body["id"]] = text
        self.order.append(text)
        return msgspec.json.encode({"geoid": {"id": body["id"]}, "offset": len(self.order), "contradictions": []})

    async def answer(self, send: Send, status: int, body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    app = Store()
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", http="httptools", ws="none")
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    app.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield app
    await server.shutdown()


def statements(texts: list[str], first: int = 1) -> list[Statement]:
    return [
        Statement(line, f"s{line}", msgspec.json.encode({"id": f"s{line}", "text": text}))
        for line, text in enumerate(texts, first)
    ]


def source_of(items: list[Statement], size: int = 7) -> Any:
    send, receive = anyio.create_memory_object_stream[list[Statement]](len(items) + 1)
    for start in range(0, len(items), size):
        send.send_nowait(items[start : start + size])
    send.close()
    return receive


TEXTS = [f"statement {number}" for number in range(200)]


async def test_everything_arrives_in_order(store: Store) -> None:
    seen: list[int] = []
    ingest = Ingest(store.url, window=16, on_progress=lambda progress: seen.append(progress.done_line))
    progress = await ingest.run(source_of(statements(TEXTS)))
    assert store.order == TEXTS
    assert store.requests == 1
    assert (progress.committed, progress.known, progress.rejected) == (200, 0, 0)
    assert seen[-1] == progress.done_line == 200


async def test_broken_connections_lose_nothing_and_repeat_nothing(store: Store) -> None:
    store.die_after = [30, 60, 7]
    progress = await Ingest(store.url, window=16, backoff=FAST).run(source_of(statements(TEXTS)))
    assert store.order == TEXTS
    assert store.updates == 0
    assert progress.committed + progress.known == 200
    assert progress.known >= 5
    assert progress.reconnects == 3


async def test_a_later_run_goes_on_where_the_first_one_died(store: Store) -> None:
    everything = statements(TEXTS)
    for statement in everything[:100]:
        store.commit(statement.body)  # what an earlier process committed; its notes only say 40
    progress = await Ingest(store.url, window=16).run(source_of(everything[40:]), look_first=True)
    assert store.order == TEXTS
    assert store.updates == 0
    assert (progress.known, progress.committed) == (60, 100)


async def test_refused_lines_are_counted_and_named(store: Store) -> None:
    progress = await Ingest(store.url).run(source_of(statements(["a", "bad", "c", "bad"])))
    assert store.order == ["a", "c"]
    assert progress.rejected == 2
    assert progress.errors == [(2, "text: no"), (4, "text: no")]
    assert progress.done_line == 4


async def test_a_busy_server_is_asked_again(store: Store) -> None:
    store.busy = {"statement 3", "statement 199"}
    progress = await Ingest(store.url, window=4, backoff=FAST).run(source_of(statements(TEXTS)))
    assert sorted(store.order) == sorted(TEXTS)
    assert progress.committed == 200


async def test_a_refusal_is_final(store: Store) -> None:
    store.status = 401
    with pytest.raises(UnauthorizedError, match="no token"):
        await Ingest(store.url, backoff=FAST).run(source_of(statements(TEXTS)))
    assert store.requests == 1


async def test_it_gives_up_after_its_patience(unused_port: int) -> None:
    with pytest.raises(UnavailableError, match="cannot reach"):
        await Ingest(f"http://127.0.0.1:{unused_port}", backoff=FAST, patience=0.05).run(source_of(statements(["a"])))


async def test_a_live_source_is_answered_while_it_waits(store: Store) -> None:
    send, receive = anyio.create_memory_object_stream[list[Statement]](1)
    committed = anyio.Event()
    ingest = Ingest(store.url, on_progress=lambda progress: committed.set() if progress.committed else None)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(ingest.run, receive)
            await send.send(statements(["first"]))
            await committed.wait()
            assert store.order == ["first"]
            await send.send(statements(["second"], 2))
            send.close()
    assert store.order == ["first", "second"]


async def test_the_window_bounds_what_is_on_its_way(store: Store) -> None:
    """Answers are held back: the client must stop sending at the window."""
    got: list[bytes] = []
    hold = anyio.Event()
    reached = anyio.Event()

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        rest, answered, more = b"", 0, True
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while more:
            message = await receive()
            more = message.get("more_body", False)
            *lines, rest = (rest + message.get("body", b"")).split(b"\n")
            got.extend(lines)
            if len(got) >= 10 and not hold.is_set():
                reached.set()
                with anyio.move_on_after(0.2):
                    while True:  # anything more would come in here
                        message = await receive()
                        *lines, rest = (rest + message.get("body", b"")).split(b"\n")
                        got.extend(lines)
                most.append(len(got))
                hold.set()
            if hold.is_set():
                for _ in range(answered, len(got)):
                    answered += 1
                    line = b'{"geoid":{},"contradictions":[]}\n'
                    await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    most: list[int] = []
    store.instead = app
    await Ingest(store.url, window=10).run(source_of(statements(TEXTS)))
    assert most == [10]
    assert len(got) == 200
