"""Statements as a stream of lines."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.api.http import ndjson
from kimera_stream.api.http.ndjson import Line, LineSplitter
from kimera_stream.protocol.errors import InternalError, OverloadedError

HEADERS = {"content-type": "application/x-ndjson"}


# -- cutting lines -----------------------------------------------------------------------------------------------------


def whole(data: bytes, limit: int) -> list[Line]:
    """What the splitter should find, the simple way."""
    found = []
    lines = data.split(b"\n")
    last = lines.pop()
    if last:
        lines.append(last)
    for number, line in enumerate(lines, 1):
        bare = line.removesuffix(b"\r")
        if len(bare) > limit:
            found.append(Line(number, None))
        elif bare.strip():
            found.append(Line(number, bare))
    return found


@given(
    st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b" ", b"d" * 7, b"\r"]), max_size=40).map(b"".join),
    st.lists(st.integers(1, 6), max_size=60),
)
def test_lines_do_not_depend_on_how_the_bytes_arrive(data, sizes):
    splitter = LineSplitter(6)
    found: list[Line] = []
    rest = data
    for size in sizes:
        found += splitter.feed(rest[:size])
        rest = rest[size:]
    found += splitter.feed(rest)
    found += splitter.finish()
    assert found == whole(data, 6)


def test_an_endless_line_is_not_kept():
    splitter = LineSplitter(100)
    for _ in range(1000):
        assert list(splitter.feed(b"x" * 50)) == []
        assert len(splitter._rest) <= 101
    assert list(splitter.feed(b"\nnext\n")) == [Line(1, None), Line(2, b"next")]


# -- over ASGI: the whole stream at once ----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_one_answer_per_line_in_order(world):
    lines = [
        b'{"text": "one"}',
        b"",
        b'{"text": 2}',
        b'{"text": "three", "colour": "red"}',
        b"not json at all",
        b'{"text": "\xff"}',
        b'{"geoid": {"text": "seven"}, "key": "k7"}',
        b"[1, 2]",
        b'{"text": "nine", "sem',
    ]
    async with world.client() as http:
        answer = await http.post("/v1/geoids", content=b"\n".join(lines), headers=HEADERS)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    got = [json.loads(line) for line in answer.text.splitlines()]
    assert [each["line"] for each in got] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert [each["geoid"]["text"] if "geoid" in each else each["code"] for each in got] == [
        "one", "bad_request", "bad_request", "bad_request", "bad_request", "seven", "bad_request", "bad_request",
    ]  # fmt: skip
    problems = {each["line"]: each for each in got if "code" in each}
    assert all(problem["detail"].startswith(f"line {number}: ") for number, problem in problems.items())
    assert problems[3]["field"] == "text"
    assert problems[4]["field"] == "colour"
    assert "UTF-8" in problems[6]["detail"]
    assert "truncated" in problems[9]["detail"]
    assert world.metric("kimera_http_lines_total", outcome="published") == 2
    assert world.metric("kimera_http_lines_total", outcome="bad_request") == 6


@pytest.mark.anyio
async def test_lines_that_come_after_the_tokens_end_are_refused(world, monkeypatch):
    ends = int(time.time()) + 100

    async def lines():
        yield b'{"text": "in time"}\n'
        while not world.knowledge.calls:
            await anyio.lowlevel.checkpoint()
        monkeypatch.setattr(ndjson, "time", SimpleNamespace(time=lambda: ends))
        yield b'{"text": "too late"}\n{"text": "later still"}\n'

    headers = {**HEADERS, "authorization": f"Bearer ann/publish@{ends}"}
    async with world.client() as http:
        answer = await http.post("/v1/geoids", content=lines(), headers=headers)
    first, second = [json.loads(line) for line in answer.text.splitlines()]
    assert first["geoid"]["text"] == "in time"
    assert (second["code"], second["line"]) == ("unauthorized", 2)
    assert "line 2: the token has expired; send again from this line on" in second["detail"]


@pytest.mark.anyio
async def test_a_line_that_is_too_long_is_refused_and_the_next_goes_on(make_world):
    world = make_world(api={"max_line_bytes": 1024})
    content = b'{"text": "' + b"x" * 5000 + b'"}\n{"text": "short"}\n'
    async with world.client() as http:
        answer = await http.post("/v1/geoids", content=content, headers=HEADERS)
    first, second = [json.loads(line) for line in answer.text.splitlines()]
    assert (first["code"], first["line"]) == ("too_large", 1)
    assert "1024" in first["detail"]
    assert second["geoid"]["text"] == "short"


@pytest.mark.anyio
async def test_at_most_256_lines_are_under_way(world):
    content = b"".join(b'{"text": "%d"}\n' % number for number in range(600))
    world.knowledge.gate = anyio.Event()
    answers: list[Any] = []
    async with world.client() as http, anyio.create_task_group() as group:

        async def post() -> None:
            answers.append(await http.post("/v1/geoids", content=content, headers=HEADERS))

        group.start_soon(post)
        while world.knowledge.under_way < 256:
            await anyio.lowlevel.checkpoint()
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
        assert world.knowledge.under_way == 256
        world.knowledge.gate.set()
    got = [json.loads(line) for line in answers[0].text.splitlines()]
    assert [each["geoid"]["text"] for each in got] == [str(number) for number in range(600)]
    assert [each["offset"] for each in got] == list(range(1, 601))
    assert world.knowledge.most_under_way == 256


@pytest.mark.anyio
async def test_an_overloaded_server_holds_the_stream_up_instead_of_failing_it(world):
    world.knowledge.fail["b"] = [OverloadedError("busy", retry_after=0.01), OverloadedError("busy", retry_after=0.01)]
    content = b"".join(b'{"text": "%s"}\n' % text for text in (b"a", b"b", b"c"))
    async with world.client() as http:
        answer = await http.post("/v1/geoids", content=content, headers=HEADERS)
    got = [json.loads(line) for line in answer.text.splitlines()]
    assert [each["geoid"]["text"] for each in got] == ["a", "b", "c"]
    assert [call["body"].text for call in world.knowledge.calls] == ["a", "b", "b", "b", "c"]


@pytest.mark.anyio
async def test_an_operational_error_of_one_line_leaves_the_others(world):
    world.knowledge.fail["b"] = [InternalError("a defect, told as the contract tells it")]
    content = b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n'
    async with world.client() as http:
        answer = await http.post("/v1/geoids", content=content, headers=HEADERS)
    got = [json.loads(line) for line in answer.text.splitlines()]
    assert [each.get("code") for each in got] == [None, "internal", None]


# -- over a socket: both directions at once -------------------------------------------------------------------------------


class Exchange:
    """One request whose two directions run side by side."""

    def __init__(self, stream: anyio.abc.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)
        self._rest = b""
        self.ended = False

    async def start(self, **headers: str) -> None:
        request = h11.Request(
            method="POST",
            target="/v1/geoids",
            headers=[
                ("host", "127.0.0.1"),
                ("content-type", "application/x-ndjson"),
                ("transfer-encoding", "chunked"),
                *headers.items(),
            ],
        )
        await self._stream.send(self._http.send(request) or b"")

    async def send(self, data: bytes) -> None:
        await self._stream.send(self._http.send(h11.Data(data=data)) or b"")

    async def finish(self) -> None:
        await self._stream.send(self._http.send(h11.EndOfMessage()) or b"")

    async def event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            try:
                self._http.receive_data(await self._stream.receive())
            except anyio.EndOfStream:
                self._http.receive_data(b"")
        return event

    async def line(self) -> dict[str, Any] | None:
        """The next answer, None at the end of the response."""
        while b"\n" not in self._rest:
            event = await self.event()
            if isinstance(event, h11.EndOfMessage):
                return None
            if isinstance(event, h11.Data):
                self._rest += bytes(event.data)
        line, _, self._rest = self._rest.partition(b"\n")
        decoded: dict[str, Any] = json.loads(line)
        return decoded


@asynccontextmanager
async def exchange(world: Any) -> AsyncIterator[Exchange]:
    async with await anyio.connect_tcp("127.0.0.1", world.port) as stream:
        with anyio.fail_after(20):
            yield Exchange(stream)


@pytest.mark.anyio
async def test_answers_come_while_the_client_still_sends(world):
    async with world.serving(), exchange(world) as http:
        await http.start()
        assert (await http.event()).status_code == 200
        for number in range(5):
            await http.send(b'{"text": "%d"}\n' % number)
            answer = await http.line()
            assert (answer["geoid"]["text"], answer["line"]) == (str(number), number + 1)
        for part in (b'{"te', b'xt": "slo', b"wly", b'"}', b"\n"):
            await http.send(part)
        assert (await http.line())["geoid"]["text"] == "slowly"
        await http.send(b'{"text": "unended"}')
        await http.finish()
        assert (await http.line())["geoid"]["text"] == "unended"
        assert await http.line() is None


@pytest.mark.anyio
async def test_a_client_that_waits_for_100_continue_gets_it(world):
    async with world.serving(), exchange(world) as http:
        await http.start(expect="100-continue")
        first = await http.event()
        assert isinstance(first, h11.InformationalResponse)
        assert first.status_code == 100
        await http.send(b'{"text": "a"}\n')
        await http.finish()
        assert (await http.event()).status_code == 200
        assert (await http.line())["geoid"]["text"] == "a"


@pytest.mark.anyio
async def test_a_disconnect_leaves_the_unfinished_line_unpublished(world, eventually):
    async with world.serving():
        async with exchange(world) as http:
            await http.start()
            await http.send(b'{"text": "whole"}\n{"text": "cut"}')
            await http.event()
            assert (await http.line())["geoid"]["text"] == "whole"
        await eventually(lambda: world.door.streams.open == 0)
    assert [call["body"].text for call in world.knowledge.calls] == ["whole"]


@pytest.mark.anyio
async def test_a_disconnect_cancels_what_waits_and_nothing_is_left_running(world, eventually):
    world.knowledge.gate = anyio.Event()
    async with world.serving():
        async with exchange(world) as http:
            await http.start()
            await http.send(b'{"text": "a"}\n{"text": "b"}\n')
            await eventually(lambda: world.knowledge.under_way == 2)
        await eventually(lambda: world.door.streams.open == 0)
        assert world.knowledge.under_way == 0
    assert world.vault.head == 0


@pytest.mark.anyio
async def test_a_client_that_does_not_read_is_not_read_from_and_in_the_end_given_up(make_world, eventually):
    world = make_world(api={"max_body_bytes": 4096}, stream={"outbox_age": 0.2})
    line = b'{"text": "' + b"x" * 8000 + b'"}\n'
    async with world.serving(), exchange(world) as http:
        await http.start()
        sent = 0
        with anyio.move_on_after(10) as stuck:
            try:
                while True:
                    await http.send(line)
                    sent += 1
            except (anyio.BrokenResourceError, OSError):
                pass
        assert not stuck.cancelled_caught, "the server should have dropped the connection"
        await eventually(lambda: world.door.streams.open == 0)
    # It stopped reading long before everything was sent, and what it published is bounded by what it could answer.
    assert len(world.knowledge.calls) < sent


@pytest.mark.anyio
async def test_a_client_that_sends_everything_before_it_reads_is_served(world):
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(5000))
    async with world.serving() as http:
        answer = await http.post("/v1/geoids", content=lines, headers=HEADERS)
    assert len(answer.text.splitlines()) == 5000


@pytest.mark.anyio
async def test_a_stopping_server_answers_what_it_has_read_and_says_where_to_go_on(world, eventually):
    world.knowledge.gate = anyio.Event()
    async with world.serving(), exchange(world) as http, anyio.create_task_group() as group:
        await http.start()
        await http.send(b'{"text": "a"}\n{"text": "b"}\n{"text": "unfini')
        await eventually(lambda: world.knowledge.under_way == 2)
        group.start_soon(world.door.streams.drain_lines, 10)
        await eventually(world.door.streams.lines_stopping.is_set)
        world.knowledge.gate.set()
        await http.event()
        answers = [await http.line() for _ in range(4)]
    assert [answer and answer.get("code") for answer in answers] == [None, None, "unavailable", None]
    assert answers[2]["line"] == 3
    assert answers[2]["temporary"] is True
    assert answers[3] is None
    assert [call["body"].text for call in world.knowledge.calls] == ["a", "b"]


@pytest.mark.anyio
async def test_a_stop_submits_no_further_line_of_what_it_has_read(world, eventually):
    world.knowledge.gate = anyio.Event()
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(1000))
    async with world.serving(), exchange(world) as http, anyio.create_task_group() as group:
        await http.start()
        await http.send(lines)
        await eventually(lambda: world.knowledge.under_way == 256)
        group.start_soon(world.door.streams.drain_lines, 10)
        await eventually(world.door.streams.lines_stopping.is_set)
        world.knowledge.gate.set()
        await http.event()
        answers = []
        while (answer := await http.line()) is not None:
            answers.append(answer)
    *published, last = answers
    assert all("geoid" in answer for answer in published)
    assert 256 <= len(published) < 1000
    assert (last["code"], last["line"]) == ("unavailable", len(published) + 1)
    assert len(world.knowledge.calls) == len(published)


@pytest.mark.anyio
async def test_a_stream_without_the_right_to_publish_is_refused_before_it_begins(world):
    async with world.client() as http:
        answer = await http.post(
            "/v1/geoids", content=b'{"text": "a"}\n', headers={**HEADERS, "authorization": "Bearer reader/subscribe"}
        )
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


@pytest.mark.anyio
async def test_more_streams_than_allowed_are_refused(make_world, eventually):
    world = make_world(api={"max_connections": 1})
    async with world.serving() as http, exchange(world) as first:
        await first.start()
        await first.event()
        second = await http.post("/v1/geoids", content=b'{"text": "a"}\n', headers=HEADERS)
        assert (second.status_code, second.json()["code"]) == (503, "overloaded")
        await first.finish()
        assert await first.line() is None
