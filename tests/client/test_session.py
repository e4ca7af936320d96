"""The client against a server that misbehaves on demand."""

import random
from typing import Any

import anyio
import pytest

from kimera_stream.client import Backoff, Client, ConnectionEndedError, ConnectionLostError, Gap, connect
from kimera_stream.protocol.errors import (
    AlreadySubscribedError,
    BadRequestError,
    LimitExceededError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from kimera_stream.protocol.messages import Event, Resync
from kimera_stream.protocol.objects import GeoidBody, Position

pytestmark = pytest.mark.anyio
FAST = Backoff(base=0.01, cap=0.05, random=random.Random(1))


def client_of(server: Any, **options: Any) -> Client:
    options.setdefault("backoff", FAST)
    options.setdefault("timeout", 5)
    return connect(server.url, **options)


async def texts(sub: Any, count: int) -> list[str]:
    found: list[str] = []
    with anyio.fail_after(10):
        while len(found) < count:
            item = await anext(sub)
            assert isinstance(item, Event), item
            found.append(item.data["text"])
    return found


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_publishing_reaches_a_subscriber_in_order(server: Any, encoding: Any) -> None:
    async with client_of(server, encoding=encoding) as client, client.subscribe("geoids") as sub:
        for text in ("one", "two", "three"):
            published = await client.publish(text)
            assert published.geoid.text == text
        assert await texts(sub, 3) == ["one", "two", "three"]
        assert sub.position == Position("e1", 3)
        assert client.server.server.name == "fake"


async def test_commands_return_what_the_server_says(server: Any) -> None:
    async with client_of(server) as client:
        await client.publish(GeoidBody(text="one", id="mine"))
        await client.publish("two")
        assert await client.ping() == Position("e1", 2)
        page = await client.history("geoids", limit=1)
        assert [event.data["id"] for event in page.events] == ["mine"]
        assert page.more
        rest = await client.history("geoids", since=Position(page.epoch, page.offset))
        assert [event.offset for event in rest.events] == [2]
        assert (await client.presence("geoids")).principals == {"anonymous": 1}
        await client.ack("geoids", 2, "reader")
        assert await client.refresh("new") == 2_000_000_000
        with pytest.raises(NotFoundError, match="no geoid x"):
            await client.delete("x")
        with pytest.raises(BadRequestError, match=r"geoid\.text"):
            await client.publish("")
        await client.publish("the connection is still good")


async def test_a_dropped_connection_is_resumed_exactly_once(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids") as sub:
        await server.say("one")
        assert await texts(sub, 1) == ["one"]
        for round_ in range(3):
            before = server.connects
            await server.drop(4000 + round_)
            await server.say(f"missed {round_}")
            await server.until_connects(before + 1)
            await server.say(f"live {round_}")
            assert await texts(sub, 2) == [f"missed {round_}", f"live {round_}"]
        server.cut()
        await server.say("missed by a cut")
        assert await texts(sub, 1) == ["missed by a cut"]


async def test_a_subscription_that_cannot_be_taken_up_at_present_is_taken_up_later(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids") as sub, client.subscribe("stats"):
        await server.say("one")
        assert await texts(sub, 1) == ["one"]
        server.refuse_subs = 3
        before = server.connects
        await server.drop()
        await server.say("missed")
        with anyio.fail_after(10):
            await server.until_connects(before + 1)
            await client.ping()
            assert server.refuse_subs == 1, "nothing else waits for it"
            await server.say("live")
            assert await texts(sub, 2) == ["missed", "live"]
        assert (server.refuse_subs, server.connects) == (0, before + 1)


async def test_a_subscription_that_is_refused_for_the_moment_is_asked_for_with_pauses(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids") as sub:
        await server.say("one")
        assert await texts(sub, 1) == ["one"]
        server.refuse_subs = 6
        await server.drop()
        began = anyio.current_time()
        await server.say("missed")
        assert await texts(sub, 1) == ["missed"]
        assert server.refuse_subs == 0
        assert anyio.current_time() - began >= 0.005 + 0.01 + 0.02 + 0.025 + 0.025, "half of each delay at the least"


async def test_repeated_events_are_dropped(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids") as sub:
        await server.say("one")
        await server.push(server.log[0])
        await server.say("two")
        assert await texts(sub, 2) == ["one", "two"]


async def test_a_position_that_cannot_be_recovered_is_said(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids") as sub:
        await server.say("one")
        await texts(sub, 1)
        server.epoch = "e2"
        server.log.clear()
        before = server.connects
        await server.drop()
        await server.until_connects(before + 1)
        with anyio.fail_after(5):
            gap = await anext(sub)
        assert gap == Gap("geoids", Position("e1", 1), Position("e2", 0))
        await server.say("a new world")
        assert await texts(sub, 1) == ["a new world"]


async def test_a_slow_consumer_loses_nothing_and_blocks_nobody(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids", buffer=4) as sub:
        for number in range(50):
            await server.say(str(number))
        await client.ping()  # replies get through although nobody reads the events
        assert await texts(sub, 50) == [str(number) for number in range(50)]
        await server.say("after")
        assert await texts(sub, 1) == ["after"]


async def test_a_slow_consumer_that_is_cut_off_while_behind_loses_nothing(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids", buffer=2) as sub:
        for number in range(10):
            await server.say(str(number))
        await client.ping()
        before = server.connects
        await server.drop(4001)
        await server.until_connects(before + 1)
        assert await texts(sub, 10) == [str(number) for number in range(10)]


async def test_latest_channels_keep_the_newest(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("stats", buffer=2) as sub:
        for offset in range(1, 6):
            await server.push(
                {
                    "op": "event",
                    "channel": "stats",
                    "epoch": "e1",
                    "offset": offset,
                    "type": "stats.updated",
                    "ts": 1,
                    "data": {"text": str(offset)},
                }
            )
        await client.ping()
        assert await texts(sub, 2) == ["4", "5"]
        assert sub.dropped == 3
        await server.push({"op": "resync", "channel": "stats", "epoch": "e1", "offset": 9, "dropped": 4})
        with anyio.fail_after(5):
            item = await anext(sub)
        assert isinstance(item, Resync)
        assert item.dropped == 4


async def test_a_heartbeat_moves_the_position_to_resume_from(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids", filter={"field": "x", "op": "exists"}) as sub:
        await server.push({"op": "heartbeat", "epoch": "e1", "offset": 7})
        await client.ping()
        before = server.connects
        await server.drop()
        await server.until_connects(before + 1)
        asked = [c for c in server.commands if c["op"] == "connect"][-1]["subs"][0]
        assert asked["since"] == {"epoch": "e1", "offset": 7}
        assert asked["filter"] == {"field": "x", "op": "exists"}
        assert sub.position is None


async def test_since_rewind_and_cursor(server: Any) -> None:
    for text in ("one", "two", "three"):
        await server.say(text)
    async with client_of(server) as client:
        async with client.subscribe("geoids", since=Position("e1", 1)) as sub:
            assert await texts(sub, 2) == ["two", "three"]
        async with client.subscribe("geoids", rewind=1) as sub:
            assert await texts(sub, 1) == ["three"]
        async with client.subscribe("geoids", since="reader") as sub:
            assert await texts(sub, 2) == ["two", "three"]
        async with client.subscribe("geoids", since=Position("other", 1)) as sub:
            assert isinstance(await anext(sub), Gap)


async def test_publishing_through_a_lost_connection_happens_once(server: Any) -> None:
    lost = False

    async def lose_the_first_reply(peer: Any, command: dict[str, Any]) -> bool:
        nonlocal lost
        if command["op"] == "publish" and not lost:
            lost = True
            server.keys[command["key"]] = {
                "geoid": server.entry(1, command["geoid"])["data"],
                "offset": 1,
                "contradictions": [],
                "duplicate": False,
            }
            peer.transport.abort()
            return True
        return False

    server.before_reply = lose_the_first_reply
    async with client_of(server) as client:
        published = await client.publish("once")
        assert published.duplicate
        sent = [c for c in server.commands if c["op"] == "publish"]
        assert len(sent) == 2
        assert sent[0]["key"] == sent[1]["key"]


async def test_commands_that_must_not_be_repeated_fail(server: Any) -> None:
    async def cut(peer: Any, command: dict[str, Any]) -> bool:
        if command["op"] in ("publish", "delete"):
            peer.transport.abort()
            return True
        return False

    server.before_reply = cut
    async with client_of(server) as client:
        with pytest.raises(ConnectionLostError):
            await client.publish("x", once=False)
        with pytest.raises(ConnectionLostError):
            await client.delete("x")


async def test_no_answer_in_time(server: Any) -> None:
    async def silence(peer: Any, command: dict[str, Any]) -> bool:
        return command["op"] == "ping"

    server.before_reply = silence
    async with client_of(server, timeout=0.05) as client:
        with pytest.raises(UnavailableError, match="no reply"):
            await client.ping()


async def test_a_bad_token_is_final(server: Any) -> None:
    server.tokens = {"good"}
    with pytest.raises(UnauthorizedError):
        async with client_of(server, token="bad", patience=60):
            pytest.fail("entered")
    assert server.commands[-1]["token"] == "bad"
    async with client_of(server, token="good") as client:
        await client.ping()


@pytest.mark.parametrize(
    ("code", "error"),
    [(4500, UnauthorizedError), (4503, LimitExceededError), (4501, ConnectionEndedError), (4999, ConnectionEndedError)],
)
async def test_final_close_codes_end_the_client(server: Any, code: int, error: type[Exception]) -> None:
    async with client_of(server) as client, client.subscribe("geoids") as sub:
        await server.say("one")
        await client.ping()
        connects = server.connects
        await server.drop(code, "over")
        assert await texts(sub, 1) == ["one"]
        with anyio.fail_after(5), pytest.raises(error):
            await anext(sub)
        with pytest.raises(error):
            await client.ping()
        assert server.connects == connects


async def test_a_fresh_token_is_fetched_for_each_connection_and_before_expiry(server: Any) -> None:
    given: list[str] = []

    async def fresh() -> str:
        given.append(f"t{len(given)}")
        return given[-1]

    refreshed = anyio.Event()

    async def see(peer: Any, command: dict[str, Any]) -> bool:
        if command["op"] == "refresh":
            assert command["token"] == "t1"
            refreshed.set()
        return False

    server.before_reply = see
    async with client_of(server, token=fresh) as client:
        await server.push({"op": "expiring", "expires": 5})
        with anyio.fail_after(5):
            await refreshed.wait()
        await server.drop(4003, "token_expired")
        await client.ping()
        assert [c["token"] for c in server.commands if c["op"] == "connect"] == ["t0", "t2"]


async def test_a_server_that_is_not_there(server: Any, unused_port: int) -> None:
    with pytest.raises(UnavailableError, match="cannot reach"):
        async with connect(f"http://127.0.0.1:{unused_port}", backoff=FAST):
            pytest.fail("entered")
    states: list[str] = []
    with pytest.raises(UnavailableError):
        async with connect(
            f"http://127.0.0.1:{unused_port}", backoff=FAST, patience=0.05, on_state=lambda s, _: states.append(s)
        ):
            pytest.fail("entered")
    assert states.count("connecting") > 1


async def test_the_second_subscription_to_a_channel_is_refused_locally(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids"):
        with pytest.raises(AlreadySubscribedError):
            async with client.subscribe("geoids"):
                pytest.fail("entered")


async def test_errors_of_the_block_come_out_as_they_are(server: Any) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with client_of(server) as outer, outer.subscribe("geoids"):
            raise KeyError("mine")


async def test_leaving_while_waiting_ends_iteration_and_connection(server: Any) -> None:
    async with client_of(server) as client:
        with anyio.move_on_after(0.05):
            async with client.subscribe("geoids") as sub:
                await anext(sub)
        await client.ping()
        assert server.commands[-2]["op"] == "unsubscribe"
    with pytest.raises(UnavailableError):
        await client.ping()
    assert not client.connected


async def test_a_watch_lasts_as_long_as_its_block(server: Any) -> None:
    async with client_of(server) as client:
        async with client.watch("pumps", text="The pump runs") as matches:
            assert matches.channel == "watch:w1"
            await server.push(
                {
                    "op": "event",
                    "channel": "watch:w1",
                    "epoch": "e1",
                    "offset": 1,
                    "type": "watch.matched",
                    "ts": 1,
                    "data": {"text": "hit"},
                }
            )
            assert await texts(matches, 1) == ["hit"]
        assert [c["op"] for c in server.commands[-2:]] == ["unsubscribe", "unwatch"]


async def test_unknown_messages_are_ignored_and_nonsense_ends_the_connection(server: Any) -> None:
    async with client_of(server) as client, client.subscribe("geoids") as sub:
        await server.push({"op": "weather", "sunny": True})
        await server.say("one")
        assert await texts(sub, 1) == ["one"]
        before = server.connects
        for peer in list(server.peers):
            await peer.send("not json")
        await server.until_connects(before + 1)
        await server.say("two")
        assert await texts(sub, 1) == ["two"]
