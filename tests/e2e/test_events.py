"""Server-Sent Events: the same events as over WebSocket, resumed by ``Last-Event-ID``; and a subscriber that stalls."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import PATIENCE, Peer, Server, offsets, peer, until, web
from tests.e2e.test_stop import fill, stalled_subscriber

pytestmark = pytest.mark.anyio


@dataclass
class Sent:
    """One event as a browser would see it."""

    id: str
    event: str
    data: dict[str, Any]


class Source:
    """Parses a stream by the rules of the HTML standard, as far as they are used."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines

    async def next(self) -> Sent:
        fields: dict[str, str] = {}
        with anyio.fail_after(PATIENCE):
            async for line in self._lines:
                if not line:
                    if "data" in fields:
                        return Sent(fields["id"], fields["event"], json.loads(fields["data"]))
                    fields = {}
                elif not line.startswith(":"):
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
        raise AssertionError("the stream has ended")

    async def take(self, count: int) -> list[Sent]:
        return [await self.next() for _ in range(count)]


@asynccontextmanager
async def source(http: httpx.AsyncClient, last: str | None = None, **params: str) -> AsyncIterator[tuple[Sent, Source]]:
    """The first event, which says where the stream starts, and the rest."""
    headers = {} if last is None else {"last-event-id": last}
    async with http.stream("GET", "/v1/events", params=params, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        made = Source(response.aiter_lines())
        yield await made.next(), made


async def say(client: Peer, session: str, *numbers: int) -> list[int]:
    return [(await client.publish(session_id=session, symbolic_state={f"{session}-{n}": n}))["offset"] for n in numbers]


async def test_the_same_events_as_over_websocket(server: Server, http: httpx.AsyncClient) -> None:
    async with peer(server) as client, source(http, channel="session:sse-same") as (start, events):
        assert start.event == "subscribed"
        assert (start.data["was_recovering"], start.data["recovered"]) == (False, False)
        await client.done("subscribe", channel="session:sse-same")
        await say(client, "sse-same", 1, 2)
        sent = await events.take(2)
        heard = await client.wait_events("session:sse-same", 2)
        assert [each.data for each in sent] == heard
        assert [each.event for each in sent] == ["geoid.created"] * 2
        assert [each.id for each in sent] == [f"{each['epoch']}:{each['offset']}" for each in heard]


async def test_last_event_id_goes_on_where_it_was(server: Server, http: httpx.AsyncClient) -> None:
    async with peer(server) as client:
        async with source(http, channel="session:sse-last") as (_, events):
            said = await say(client, "sse-last", 1, 2, 3)
            first = await events.next()
        said += await say(client, "sse-last", 4)  # nobody listened
        async with source(http, first.id, channel="session:sse-last") as (start, events):
            assert (start.data["was_recovering"], start.data["recovered"]) == (True, True)
            said += await say(client, "sse-last", 5)
            sent = await events.take(4)
            assert [each.data["offset"] for each in sent] == said[1:]
        # `Last-Event-ID` goes before `since`, which a reconnecting browser repeats with the address.
        epoch = client.connected["epoch"]
        async with source(http, sent[2].id, channel="session:sse-last", since=f"{epoch}:0") as (_, events):
            assert (await events.next()).data["offset"] == said[-1]
        async with source(http, "another-log:1", channel="session:sse-last") as (start, events):
            assert (start.data["was_recovering"], start.data["recovered"]) == (True, False)
            live = await say(client, "sse-last", 6)
            assert (await events.next()).data["offset"] == live[0]


async def test_filters_rewind_and_since(server: Server, http: httpx.AsyncClient) -> None:
    async with peer(server) as client:
        said = await say(client, "sse-filter", 1, 2, 3)
        async with source(http, channel="session:sse-filter", rewind="2") as (_, events):
            assert [each.data["offset"] for each in await events.take(2)] == said[1:]
        since = f"{client.connected['epoch']}:{said[0]}"
        late = json.dumps({"field": "offset", "op": "gte", "value": said[2]})
        async with source(http, channel="session:sse-filter", since=since, filter=late) as (_, events):
            assert (await events.next()).data["offset"] == said[2]
        async with source(http, channel="stats") as (_, events):
            one, two = await events.take(2)
            assert (one.event, two.event) == ("stats.updated", "stats.updated")


async def test_a_subscriber_that_stalls_costs_nobody_else(start_server: StartServer) -> None:
    server = start_server(KIMERA_STREAM__OUTBOX_AGE="0.5", KIMERA_STREAM__SLOW_CONSUMER="disconnect")
    with stalled_subscriber(server) as stalled:
        async with peer(server) as reader, peer(server, "msgpack") as other:
            for each in (reader, other):
                await each.done("subscribe", channel="geoids")
            async with anyio.create_task_group() as group:
                group.start_soon(fill, server, 8_000_000)
                for each in (reader, other):
                    group.start_soon(each.wait_events, "geoids", 1000)
            assert offsets(reader.events("geoids")) == offsets(other.events("geoids")) == list(range(1, 1001))
            async with web(server) as http:

                async def only_two_are_left() -> bool:
                    return (await http.get("/v1/stats")).json()["connections"] == 2

                await until(only_two_are_left)
        stalled.settimeout(PATIENCE)
        with suppress(ConnectionResetError):  # it was cut off, with or without what is still on the way
            while stalled.recv(1 << 20):
                pass
    assert server.errors() == []


async def test_too_many_commands_are_refused_for_a_while(start_server: StartServer) -> None:
    server = start_server(KIMERA_API__COMMANDS_PER_SECOND="5", KIMERA_API__COMMANDS_BURST="10")
    async with peer(server) as client:
        replies = [await client.reply(id) for id in [await client.send("ping") for _ in range(30)]]
        refused = [each for each in replies if each["op"] == "error"]
        assert len(refused) >= 15
        assert all((each["code"], each["temporary"]) == ("rate_limited", True) for each in refused)
        assert all(each["retry_after"] > 0 for each in refused)
        await anyio.sleep(max(each["retry_after"] for each in refused))
        await client.done("ping")
