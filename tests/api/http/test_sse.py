"""Server-Sent Events over a real server."""

import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from kimera_stream.api.http.outflow import Outflow
from kimera_stream.api.http.protocol import KimeraHttpProtocol
from tests.api.http.conftest import until
from tests.garbage import uncollected

pytestmark = pytest.mark.anyio


@dataclass
class Sent:
    id: str
    event: str
    data: Any


class EventReader:
    """Reads a stream as a browser does; comments are kept aside."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()
        self.comments: list[str] = []
        self.retry: int | None = None

    async def next(self) -> Sent | None:
        """The next event, None at the end of the stream."""
        fields: dict[str, str] = {}
        with anyio.fail_after(10):
            async for line in self._lines:
                if line.startswith(":"):
                    self.comments.append(line)
                elif line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif "data" in fields:
                    self.retry = int(fields["retry"]) if "retry" in fields else self.retry
                    return Sent(fields["id"], fields["event"], msgspec.json.decode(fields["data"]))
        return None

    async def quiet_at(self) -> str | None:
        """The position that the next heartbeat brings."""
        quiet, position = False, None
        with anyio.fail_after(10):
            async for line in self._lines:
                if line == ": heartbeat":
                    quiet = True
                elif quiet and line:
                    position = line.removeprefix("id: ")
                elif quiet:
                    return position
        raise EOFError

    async def take(self, count: int) -> list[Sent]:
        found = [await self.next() for _ in range(count)]
        assert None not in found
        return [each for each in found if each is not None]


@asynccontextmanager
async def listening(http: httpx.AsyncClient, **params: str) -> AsyncIterator[EventReader]:
    headers = {
        name.replace("_", "-"): params.pop(name) for name in ("last_event_id", "authorization") if name in params
    }
    async with http.stream("GET", "/v1/events", params=params, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        yield EventReader(response)


async def publish(http: httpx.AsyncClient, *texts: str) -> None:
    for text in texts:
        (await http.post("/v1/geoids", json={"text": text})).raise_for_status()


async def test_the_first_event_says_where_the_stream_starts_and_the_rest_follow(world):
    async with world.serving() as http:
        await publish(http, "before")
        async with listening(http, channel="geoids") as events:
            start = await events.next()
            await publish(http, "one", "two")
            one, two = await events.take(2)
    assert (start.event, start.id, events.retry) == ("subscribed", "E1:1", 1000)
    assert start.data == {"channel": "geoids", "epoch": "E1", "offset": 1, "was_recovering": False, "recovered": False}
    assert [one.id, two.id] == ["E1:2", "E1:3"]
    assert one.event == "geoid.created"
    assert {key: one.data[key] for key in ("op", "channel", "epoch", "offset", "type")} == {
        "op": "event", "channel": "geoids", "epoch": "E1", "offset": 2, "type": "geoid.created",
    }  # fmt: skip
    assert one.data["data"]["text"] == "one"
    assert world.metric("kimera_http_events_total") == 2


async def test_last_event_id_resumes_without_gap_or_repeat_and_goes_before_since(world):
    async with world.serving() as http:
        await publish(http, *map(str, range(1, 301)))
        async with listening(http, channel="geoids", since="E1:0", last_event_id="E1:7") as events:
            start = await events.next()
            replayed = await events.take(293)
            await publish(http, "live")
            live = await events.next()
    assert (start.data["was_recovering"], start.data["recovered"], start.data["offset"]) == (True, True, 7)
    assert [each.data["offset"] for each in [*replayed, live]] == list(range(8, 302))


async def test_a_position_of_another_log_is_not_recovered(world):
    async with world.serving() as http:
        await publish(http, "a", "b")
        async with listening(http, channel="geoids", since="OTHER:1") as events:
            start = await events.next()
            await publish(http, "c")
            event = await events.next()
    assert (start.data["was_recovering"], start.data["recovered"], start.data["offset"]) == (True, False, 2)
    assert event.data["offset"] == 3


async def test_filter_and_rewind(world):
    async with world.serving() as http:
        await publish(http, "apple", "banana", "apricot", "cherry")
        tree = '{"field": "data.text", "op": "prefix", "value": "a"}'
        async with listening(http, channel="geoids", since="E1:0", filter=tree) as events:
            found = await events.take(3)
        async with listening(http, channel="geoids", rewind="2") as events:
            rewound = await events.take(3)
    assert [each.data["data"]["text"] for each in found[1:]] == ["apple", "apricot"]
    assert [each.data["data"]["text"] for each in rewound[1:]] == ["apricot", "cherry"]


async def test_a_latest_channel_gives_its_newest_value(world):
    async with world.serving() as http:
        world.hub.latest("field", "field.updated", b'{"entropy":1}', offset=0)
        async with listening(http, channel="field") as events:
            _, value = await events.take(2)
            world.hub.latest("field", "field.updated", b'{"entropy":2}', offset=0)
            newer = await events.next()
    assert (value.event, value.data["data"]) == ("field.updated", {"entropy": 1})
    assert newer.data["data"] == {"entropy": 2}


@pytest.mark.parametrize(
    ("params", "code", "field"),
    [
        ({}, "bad_request", "channel"),
        ({"channel": "nowhere"}, "bad_channel", "channel"),
        ({"channel": "watch:none"}, "not_found", "channel"),
        ({"channel": "geoids", "since": "E1"}, "bad_position", "since"),
        ({"channel": "geoids", "since": "E1:x"}, "bad_position", "since"),
        ({"channel": "geoids", "since": "E1:" + "9" * 40}, "bad_position", "since"),
        ({"channel": "geoids", "since": "E1:" + "0" * 5_000}, "bad_position", "since"),
        ({"channel": "geoids", "since": "E1:5"}, "bad_position", "since.offset"),
        ({"channel": "geoids", "filter": "{"}, "bad_filter", "filter"),
        ({"channel": "geoids", "filter": '{"field": "a", "op": "no", "value": 1}'}, "bad_filter", "filter.op"),
        ({"channel": "geoids", "rewind": "1", "since": "E1:0"}, "bad_request", "rewind"),
        ({"channel": "geoids", "colour": "red"}, "bad_request", "colour"),
    ],
)
async def test_what_cannot_be_streamed_is_refused_before_the_stream_begins(world, params, code, field):
    async with world.client() as http:
        answer = await http.get("/v1/events", params=params)
    assert answer.status_code == (404 if code == "not_found" else 400)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.json()["code"], answer.json()["field"]) == (code, field)


@pytest.mark.parametrize("given", ["E1", "E1:x", "E1:5"])
async def test_a_last_event_id_that_is_none_is_named_as_such(world, given):
    async with world.client() as http:
        answer = await http.get("/v1/events", params={"channel": "geoids"}, headers={"last-event-id": given})
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (400, "bad_position", "last-event-id")
    assert answer.json()["detail"].startswith("last-event-id: ")
    assert "since" not in answer.json()["detail"]


async def test_a_quiet_stream_has_heartbeats(make_world):
    world = make_world(stream={"ping_interval": 0.05})
    async with world.serving() as http, http.stream("GET", "/v1/events", params={"channel": "geoids"}) as response:
        with anyio.fail_after(10):
            async for line in response.aiter_lines():
                if line == ": heartbeat":
                    break
            else:
                pytest.fail("the stream ended")


async def test_a_filter_that_drops_everything_leaves_nobody_behind(make_world):
    world = make_world(stream={"ping_interval": 0.05, "tail_bytes": 1024})
    never = msgspec.json.encode({"field": "data.text", "op": "eq", "value": "never"}).decode()
    async with world.serving() as http:
        await publish(http, "one")
        async with listening(http, channel="geoids", filter=never) as events:
            await events.next()
            await publish(http, *"abcdefghij")
            with anyio.fail_after(10):
                while await events.quiet_at() != "E1:11":
                    pass
        world.vault.trim(8)
        async with listening(http, channel="geoids", filter=never, last_event_id="E1:11") as events:
            start = await events.next()
            await publish(http, "never")
            event = await events.next()
    assert (start.data["recovered"], start.data["offset"], event.id) == (True, 11, "E1:12")


async def test_the_heartbeat_of_a_stream_that_is_behind_says_no_position(make_world):
    world = make_world(stream={"ping_interval": 0.05, "tail_bytes": 1024})
    async with world.serving() as http:
        await publish(http, *"abcdefghij")
        gate = world.vault.gate = anyio.Event()
        async with listening(http, channel="geoids", since="E1:0") as events:
            await events.next()
            assert await events.quiet_at() is None
            gate.set()
            assert [each.id for each in await events.take(10)] == [f"E1:{offset}" for offset in range(1, 11)]
            assert await events.quiet_at() == "E1:10"


async def test_a_trimmed_log_is_never_streamed_in_part(make_world):
    """Trimmed while it is streamed: the stream ends. Trimmed before: it says so and goes on from now."""
    world = make_world(stream={"tail_bytes": 1024})
    async with world.serving() as http:
        await publish(http, *map(str, range(1, 31)))
        gate = world.vault.gate = anyio.Event()
        async with listening(http, channel="geoids", since="E1:5") as events:
            start = await events.next()
            assert start.data["recovered"]
            world.vault.trim(20)
            gate.set()
            assert await events.next() is None, "6 to 20 would have been missing without a word"
        async with listening(http, channel="geoids", last_event_id=start.id) as events:
            start = await events.next()
            await publish(http, "live")
            live = await events.next()
    assert (start.data["was_recovering"], start.data["recovered"], start.id) == (True, False, "E1:30")
    assert live.id == "E1:31"


async def test_one_entry_comes_on_every_channel_that_it_concerns(world):
    story = [
        ("contradiction.found", ["contradictions", "geoid:a", "geoid:b"]),
        ("scar.formed", ["scars", "geoid:a", "geoid:b", "session:s"]),
        ("contradiction.resolved", ["contradictions", "geoid:a", "geoid:b"]),
        ("geoid.updated", ["geoids", "geoid:b", "session:s", "agent:x"]),
    ]

    def tell() -> None:
        world.hub.deliver([world.vault.append(type, {"told": type}, *channels) for type, channels in story])

    expected = {
        "contradictions": [1, 3], "scars": [2], "geoids": [4], "geoid:a": [1, 2, 3], "geoid:b": [1, 2, 3, 4],
        "session:s": [2, 4], "agent:x": [4],
    }  # fmt: skip
    async with world.serving() as http:
        tell()
        for channel, offsets in expected.items():
            async with listening(http, channel=channel, since="E1:0") as events:
                assert (await events.next()).data["channel"] == channel
                found = await events.take(len(offsets))
            assert [each.data["offset"] for each in found] == offsets
            assert [(each.event, each.data["data"]) for each in found] == [
                (story[offset - 1][0], {"told": story[offset - 1][0]}) for offset in offsets
            ]
            assert {each.data["channel"] for each in found} == {channel}


async def test_a_stream_ends_when_the_client_leaves(world, eventually):
    async with world.serving() as http:
        async with listening(http, channel="geoids") as events:
            await events.next()
            assert world.door.streams.open == 1
            assert world.hub.statistics()["readers"] == 1
        await eventually(lambda: world.door.streams.open == 0)
        assert world.hub.statistics()["readers"] == 0


async def test_a_stop_ends_the_stream_cleanly(world):
    async with world.serving() as http, listening(http, channel="geoids") as events:
        await events.next()
        await publish(http, "last")
        assert (await events.next()).data["data"]["text"] == "last"
        await world.door.streams.drain(10)
        assert await events.next() is None
        assert world.door.streams.open == 0


async def test_a_stream_ends_when_its_token_expires(world):
    token = f"Bearer reader/subscribe@{int(time.time()) + 1}"
    async with world.serving() as http, listening(http, channel="geoids", authorization=token) as events:
        assert (await events.next()).event == "subscribed"
        assert await events.next() is None


async def test_a_client_that_does_not_read_is_given_up_and_slows_nobody(make_world, eventually):
    world = make_world(stream={"outbox_bytes": 65536, "outbox_age": 0.2})
    async with world.serving() as http, await anyio.connect_tcp("127.0.0.1", world.port) as deaf:
        await deaf.send(b"GET /v1/events?channel=geoids HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        await eventually(lambda: world.door.streams.open == 1)
        async with listening(http, channel="geoids") as events:
            await events.next()
            for number in range(200):
                entries = [world.vault.append("geoid.created", {"pad": "x" * 50_000}, "geoids") for _ in range(5)]
                world.hub.deliver(entries)
                found = await events.take(5)
                assert found[-1].data["offset"] == 5 * (number + 1)
            await eventually(lambda: world.door.streams.open == 1)


async def test_the_right_to_subscribe_is_needed(world):
    async with world.client() as http:
        answer = await http.get("/v1/events?channel=geoids", headers={"authorization": "Bearer writer/publish"})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def test_head_opens_no_stream(world):
    async with world.serving() as http:
        answer = await http.head("/v1/events?channel=geoids")
        assert answer.status_code == 200
        assert world.door.streams.open == 0


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"channel": "rumours"},
        {"channel": "geoids", "since": "yesterday"},
        {"channel": "geoids", "since": "E1:99"},
        {"channel": "geoids", "filter": "{"},
        {"channel": "geoids", "colour": "red"},
        {"channel": "watch:none"},
        {"channel": "geoids"},
    ],
)
async def test_head_answers_as_get_does(world, params):
    async with world.serving() as http:
        with anyio.fail_after(10):
            head = await http.head("/v1/events", params=params)
            async with http.stream("GET", "/v1/events", params=params) as get:
                pass
    assert head.status_code == get.status_code
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.content == b""


async def test_streams_that_ended_leave_nothing_for_the_collector_of_garbage(world):
    def left() -> int:
        return sum(isinstance(each, Outflow | KimeraHttpProtocol) for each in gc.get_objects())

    async with world.serving():
        with uncollected():
            before = left()
            for _ in range(5):
                async with await anyio.connect_tcp("127.0.0.1", world.port) as peer:
                    await peer.send(b"GET /v1/events?channel=geoids HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
                    told = b""
                    while b"event: subscribed" not in told:
                        told += await peer.receive()
            await until(lambda: not world.server.server_state.connections)
            await anyio.wait_all_tasks_blocked()
            assert left() == before
