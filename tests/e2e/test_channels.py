"""What a subscriber hears: which channel carries what, from where, in which order, in both encodings."""

import anyio
import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server, offsets, peer

pytestmark = pytest.mark.anyio

ENCODINGS = ["json", "msgpack"]


def fact(n: object) -> dict[str, object]:
    """A state that conflicts with no other one: without a subject, states with the same keys would be related."""
    return {f"fact-{n}": True}


def state(subject: str, **facts: object) -> dict[str, object]:
    """Symbolic states of one subject conflict exactly, whatever the encoder."""
    return {"subject": subject, **facts}


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_one_story_on_every_channel_that_it_concerns(server: Server, encoding: str) -> None:
    """Two statements clash, the clash is resolved; each channel shows its part of the one order."""
    tag = f"story-{encoding}"
    async with peer(server, encoding) as listener, peer(server, encoding) as speaker:
        channels = ["geoids", "contradictions", "scars", f"geoid:{tag}-1", f"session:{tag}", f"agent:{tag}-sensor"]
        for channel in channels:
            reply = await listener.done("subscribe", channel=channel)
            assert (reply["was_recovering"], reply["recovered"]) == (False, False)
        first = await speaker.publish(
            id=f"{tag}-1", session_id=tag, originator_agent_id=f"{tag}-sensor", symbolic_state=state(tag, door="open")
        )
        second = await speaker.publish(id=f"{tag}-2", session_id=tag, symbolic_state=state(tag, door="shut"))
        (found,) = second["contradictions"]
        assert (found["a"], found["b"], found["state"]) == (f"{tag}-1", f"{tag}-2", "open")
        assert any("door" in why for why in found["why"])
        resolved = await speaker.done("resolve", contradiction_id=found["id"], decision="collapse", reason="looked")
        gone = await speaker.done("delete", geoid_id=f"{tag}-1")

        session = await listener.wait_events(f"session:{tag}", 6)
        assert [each["type"] for each in session] == [
            "geoid.created",
            "geoid.created",
            "contradiction.found",
            "contradiction.resolved",
            "scar.formed",
            "geoid.deleted",
        ]
        assert offsets(session) == sorted(offsets(session))
        assert [session[0]["offset"], session[1]["offset"]] == [first["offset"], second["offset"]]
        assert [session[4]["offset"], session[5]["offset"]] == [resolved["offset"], gone["offset"]]
        assert session[2]["data"] == found
        assert session[4]["data"] == resolved["scar"]
        assert all(each["epoch"] == listener.connected["epoch"] for each in session)

        own = await listener.wait_events(f"geoid:{tag}-1", 5)
        assert [each["type"] for each in own] == [
            "geoid.created",
            "contradiction.found",
            "contradiction.resolved",
            "scar.formed",
            "geoid.deleted",
        ]
        agent = await listener.wait_events(f"agent:{tag}-sensor", 5)
        assert offsets(agent) == offsets(own)
        scars = await listener.wait_events("scars", 1)
        assert scars[0]["data"]["contradiction_id"] == found["id"]
        # One entry shows on several channels with the same offset on each.
        clashes = await listener.wait_events("contradictions", 2)
        assert offsets(clashes) == [session[2]["offset"], session[3]["offset"]]


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_since_brings_what_was_missed_once_and_before_the_new(server: Server, encoding: str) -> None:
    channel = f"session:since-{encoding}"
    async with peer(server, encoding) as speaker:
        published = [await speaker.publish(session_id=f"since-{encoding}", symbolic_state=fact(n)) for n in range(6)]
        seen = published[2]["offset"]
        async with peer(server, encoding) as listener:
            start = {"epoch": listener.connected["epoch"], "offset": seen}
            reply = await listener.done("subscribe", channel=channel, since=start)
            assert (reply["was_recovering"], reply["recovered"], reply["offset"]) == (True, True, seen)
            live = await speaker.publish(session_id=f"since-{encoding}", symbolic_state=fact(6))
            events = await listener.wait_events(channel, 4)
            assert offsets(events) == [each["offset"] for each in published[3:]] + [live["offset"]]
            other = {"epoch": "another-log", "offset": seen}
            await listener.done("unsubscribe", channel=channel)
            reply = await listener.done("subscribe", channel=channel, since=other)
            assert (reply["was_recovering"], reply["recovered"]) == (True, False)
            assert reply["epoch"] == listener.connected["epoch"]
            assert reply["offset"] >= live["offset"]


async def test_every_reader_that_joins_while_others_publish_gets_all_once(server: Server) -> None:
    """Readers with a position join at different moments of a busy time: no gap and no repeat at the seam."""
    count, writers = 60, 3
    channel = "session:seam"
    async with peer(server) as first:
        before = {"epoch": first.connected["epoch"], "offset": (await first.done("ping"))["offset"]}
        said: list[int] = []
        joined = anyio.Event()

        async def write(number: int) -> None:
            async with peer(server) as speaker:
                for n in range(count):
                    said.append(
                        (await speaker.publish(session_id="seam", symbolic_state=fact(f"{number}-{n}")))["offset"]
                    )
                    if len(said) == count:
                        joined.set()

        async def read(wait: bool) -> None:
            if wait:
                await joined.wait()
            async with peer(server, "msgpack" if wait else "json") as listener:
                await listener.done("subscribe", channel=channel, since=before)
                got.append(offsets(await listener.wait_events(channel, count * writers)))

        got: list[list[int]] = []
        async with anyio.create_task_group() as group:
            for number in range(writers):
                group.start_soon(write, number)
            for wait in (False, True, True):
                group.start_soon(read, wait)
        assert got == [sorted(said)] * 3


async def test_rewind_starts_with_the_last_events(server: Server) -> None:
    async with peer(server) as client:
        published = [await client.publish(session_id="rewind", symbolic_state=fact(n)) for n in range(5)]
        await client.done("subscribe", channel="session:rewind", rewind=2)
        more = await client.publish(session_id="rewind", symbolic_state=fact(5))
        events = await client.wait_events("session:rewind", 3)
        assert offsets(events) == [published[3]["offset"], published[4]["offset"], more["offset"]]


async def test_filters_let_through_what_they_say(server: Server) -> None:
    hot = {
        "all": [
            {"field": "type", "op": "eq", "value": "geoid.created"},
            {"field": "data.symbolic_state.degrees", "op": "gte", "value": 30},
        ]
    }
    async with peer(server) as client, peer(server) as plain:
        await client.done("subscribe", channel="session:filtered", filter=hot)
        await plain.done("subscribe", channel="session:filtered", filter={"not": hot})
        told = [
            await client.publish(session_id="filtered", symbolic_state=state(f"room-{n}", degrees=n))
            for n in (10, 30, 20, 35)
        ]
        await client.publish(session_id="filtered", symbolic_state=state("room-x", degrees="many"))
        end = await client.publish(session_id="filtered", symbolic_state=state("room-99", degrees=99))
        passed = await client.events_until(
            "session:filtered", lambda found: found[-1:] and found[-1]["offset"] == end["offset"]
        )
        assert offsets(passed) == [told[1]["offset"], told[3]["offset"], end["offset"]]
        rest = await plain.wait_events("session:filtered", 3)
        assert offsets(rest)[:2] == [told[0]["offset"], told[2]["offset"]]


async def test_connect_subscribes_at_once_and_says_what_it_could_not(server: Server) -> None:
    subs = [{"channel": "session:at-once", "rewind": 0}, {"channel": "nonsense"}, {"channel": "stats"}]
    async with peer(server, subs=subs) as client:
        good, bad, stats = client.connected["subs"]
        assert (good["op"], good["channel"]) == ("subscribed", "session:at-once")
        assert (bad["op"], bad["code"], bad["channel"]) == ("error", "bad_channel", "nonsense")
        assert stats["channel"] == "stats"
        assert client.connected["limits"]["text_chars"] == 8192
        assert client.connected["server"]["name"] == "kimera-stream"
        told = await client.publish(session_id="at-once", text="Said right after connecting.")
        assert offsets(await client.wait_events("session:at-once", 1)) == [told["offset"]]


async def test_statements_of_a_connection_belong_to_its_session(server: Server) -> None:
    async with peer(server) as client:
        session = client.connected["session"]
        await client.done("subscribe", channel=f"session:{session}")
        told = await client.publish(text="No session is named here.")
        assert told["geoid"]["session_id"] == session
        assert offsets(await client.wait_events(f"session:{session}", 1)) == [told["offset"]]


async def test_unsubscribed_means_silence(server: Server) -> None:
    async with peer(server) as client:
        await client.done("subscribe", channel="session:silence")
        await client.publish(session_id="silence", symbolic_state=fact(1))
        await client.wait_events("session:silence", 1)
        await client.done("unsubscribe", channel="session:silence")
        await client.publish(session_id="silence", symbolic_state=fact(2))
        await client.done("subscribe", channel="session:silence")
        last = await client.publish(session_id="silence", symbolic_state=fact(3))
        events = await client.wait_events("session:silence", 2)
        assert offsets(events)[1:] == [last["offset"]]


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_history_forwards_and_back(server: Server, http: httpx.AsyncClient, encoding: str) -> None:
    channel = f"session:history-{encoding}"
    async with peer(server, encoding) as client:
        published = [
            (await client.publish(session_id=f"history-{encoding}", symbolic_state=fact(n)))["offset"] for n in range(7)
        ]
        pages: list[int] = []
        since = {"epoch": client.connected["epoch"], "offset": 0}
        while True:
            page = await client.done("history", channel=channel, limit=3, since=since)
            assert all(each["channel"] == channel for each in page["events"])
            pages += offsets(page["events"])
            since = {"epoch": page["epoch"], "offset": page["offset"]}
            if not page["more"]:
                break
        assert pages == published
        back = await client.done("history", channel=channel, limit=3, reverse=True)
        assert offsets(back["events"]) == published[:-4:-1]
        assert back["more"]
    over_http = (await http.get("/v1/history", params={"channel": channel, "limit": 3, "reverse": "true"})).json()
    assert offsets(over_http["events"]) == published[:-4:-1]


async def test_latest_channels_send_their_newest_value_and_go_on(server: Server, http: httpx.AsyncClient) -> None:
    async with peer(server) as client:
        await client.publish(symbolic_state={"latest": "something happened"})
        for channel, kind in (("stats", "stats.updated"), ("field", "field.updated")):
            await client.done("subscribe", channel=channel)
            (event,) = (await client.wait_events(channel, 1))[:1]
            assert event["type"] == kind
        stats = await client.wait_events("stats", 3)
        assert stats[-1]["data"]["geoids"] >= 1
        assert stats[-1]["data"]["connections"] >= 1
        head = (await client.publish(symbolic_state={"latest": "again"}))["offset"]
        field = await client.events_until("field", lambda found: found[-1]["offset"] >= head)
        data = field[-1]["data"]
        assert 0 <= data["activation"] <= 1
        assert data["geoids"] >= 2
        assert data["open_contradictions"] >= 0
    assert (await http.get("/v1/field")).json()["geoids"] >= 2
    assert (await http.get("/v1/stats")).json()["geoids"] >= 2


async def test_presence_counts_who_listens(server: Server) -> None:
    channel = "session:presence"
    async with peer(server) as one, peer(server, "msgpack") as two:
        assert (await one.done("presence", channel=channel))["subscribers"] == 0
        await one.done("subscribe", channel=channel)
        await two.done("subscribe", channel=channel)
        present = await one.done("presence", channel=channel)
        assert (present["subscribers"], present["principals"]) == (2, {"anonymous": 2})
        await two.done("unsubscribe", channel=channel)
        assert (await one.done("presence", channel=channel))["subscribers"] == 1


async def test_both_encodings_get_the_same_events(server: Server) -> None:
    async with peer(server, "json") as one, peer(server, "msgpack") as two:
        for client in (one, two):
            await client.done("subscribe", channel="session:same")
        await one.publish(
            session_id="same",
            text="Grüße: ½ of the 37 lamps in hall 4 are out.",
            semantic_state={"light": 3, "hall": 1},
            symbolic_state=state("same", lamps=37, ok=False, note=None, share=0.5),
            metadata={"nested": [1, {"deep": [None, True, "ü"]}], "big": 2**53 + 1},
            purpose="report",
        )
        await two.publish(session_id="same", symbolic_state=state("same", lamps=36))
        left = await one.wait_events("session:same", 3)
        right = await two.wait_events("session:same", 3)
        assert left == right
        assert left[0]["data"]["semantic_state"] == {"light": 0.75, "hall": 0.25}
        assert left[0]["data"]["metadata"]["big"] == 2**53 + 1
        assert left[0]["data"]["entropy"] == pytest.approx(0.8112781)
        assert "vector" not in left[0]["data"]


async def test_a_quiet_connection_gets_heartbeats(start_server: StartServer) -> None:
    server = start_server(KIMERA_STREAM__PING_INTERVAL="0.3")
    nothing = {"field": "type", "op": "eq", "value": "never"}
    async with peer(server) as quiet, peer(server) as speaker:
        assert quiet.connected["ping"] == 0.3
        await quiet.done("subscribe", channel="geoids", filter=nothing)
        told = await speaker.publish(symbolic_state={"a": 1})

        def caught_up() -> bool:
            beats = [each for each in quiet.pushed if each["op"] == "heartbeat"]
            return bool(beats) and beats[-1]["offset"] >= told["offset"]

        while not caught_up():  # the filter dropped the event; the heartbeat carries the position
            await quiet.receive()
        assert not quiet.events("geoids")


class _Watch:
    """The watches of these tests: a text, and what is said about it."""

    text = "The pump in station nine runs."
    same = "The pump in station nine runs today."
    against = "The pump in station nine does not run."


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_watches_fire_for_what_relates_and_what_contradicts(server: Server, encoding: str) -> None:
    name = f"pump-{encoding}"
    async with peer(server, encoding) as client, peer(server) as speaker:
        watching = await client.done(
            "watch", watch=name, text=_Watch.text, kinds=["contradicts", "related"], min_score=0.5
        )
        assert watching["watch"] == name
        await client.done("subscribe", channel=watching["channel"])
        tag = {"session_id": name}
        await speaker.publish(text="Bananas are yellow in the autumn market.", **tag)
        near = await speaker.publish(text=_Watch.same, **tag)
        against = await speaker.publish(text=_Watch.against, **tag)

        def both(found: list[dict]) -> bool:
            return any(each["data"]["kind"] == "contradicts" for each in found)

        events = await client.events_until(watching["channel"], both)
        assert {each["type"] for each in events} == {"watch.matched"}
        assert all(each["data"]["watch"] == name for each in events)
        kinds = {(each["data"]["geoid"]["id"], each["data"]["kind"]) for each in events}
        assert (near["geoid"]["id"], "related") in kinds
        assert (against["geoid"]["id"], "contradicts") in kinds
        assert all("Bananas" not in each["data"]["geoid"]["text"] for each in events)
        await client.done("unwatch", watch=name)
        await speaker.publish(text=_Watch.same, **tag)
        assert (await client.ask("unwatch", watch=name))["code"] == "not_found"
        assert client.events(watching["channel"]) == events


async def test_watches_over_http(server: Server, http: httpx.AsyncClient) -> None:
    body = {"watch": "over-http", "text": "The lift in tower B is out of order.", "kinds": ["related"]}
    made = await http.post("/v1/watches", json=body)
    assert made.status_code == 201, made.text
    listed = (await http.get("/v1/watches")).json()["items"]
    assert made.json()["id"] in [each["id"] for each in listed]
    again = await http.post("/v1/watches", json={**body, "min_score": 0.9})
    assert again.json()["channel"] == made.json()["channel"], "a replaced watch keeps its channel"
    async with peer(server) as client:
        await client.done("subscribe", channel=made.json()["channel"])
        await client.publish(text="The lift in tower B is out of order.")
        (event,) = await client.wait_events(made.json()["channel"], 1)
        assert event["data"]["kind"] == "related"
    removed = await http.request("DELETE", "/v1/watches", params={"watch": "over-http"})
    assert removed.status_code == 200
    removed = await http.request("DELETE", "/v1/watches", params={"watch": "over-http"})
    assert removed.status_code == 404
