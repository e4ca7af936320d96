"""Two edges and two engines on one PostgreSQL and one Redis: what holds of one node holds of all of them together."""

from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from tests.e2e.harness import Peer, Server, handshake, offsets, peer, show, until, web
from tests.e2e.nodes import Cluster

pytestmark = [pytest.mark.anyio, pytest.mark.postgres, pytest.mark.redis]

Edges = tuple[Server, Server]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start_all(north="edge", south="edge", first="engine", second="engine")
        for edge in ("north", "south"):
            anyio.run(made.covered, made.nodes[edge], 2)
        yield made
    finally:
        made.close()


@pytest.fixture
def edges(cluster: Cluster) -> Iterator[Edges]:
    before = {name: len(node.lines) for name, node in cluster.nodes.items()}
    yield cluster.nodes["north"], cluster.nodes["south"]
    for name, node in cluster.nodes.items():
        show(f"--- {name}", *node.lines[before[name] :])
        assert not node.over, f"{name} has ended"
        assert not node.errors(), f"{name} reports errors"


def fact(subject: str, number: int, **fields: Any) -> dict[str, Any]:
    """A statement that contradicts every other one of its subject."""
    return {"symbolic_state": {"subject": subject, "n": number}, **fields}


def pairs(contradictions: list[dict[str, Any]]) -> set[frozenset[str]]:
    return {frozenset((each["a"], each["b"])) for each in contradictions}


async def test_what_is_said_on_one_edge_is_heard_on_the_other_in_one_order(edges: Edges) -> None:
    north, south = edges
    async with peer(north) as here, peer(south, "msgpack") as there, peer(north) as one, peer(south) as other:
        assert here.connected["epoch"] == there.connected["epoch"]
        assert (here.connected["server"]["node"], there.connected["server"]["node"]) == ("north", "south")
        for listener in (here, there):
            await listener.done("subscribe", channel="geoids")
            await listener.done("subscribe", channel="contradictions")

        said: dict[str, list[dict[str, Any]]] = {}

        async def speak(speaker: Peer, name: str) -> None:
            ids = [await speaker.send("publish", geoid=fact("order", n, id=f"{name}-{n}")) for n in range(20)]
            said[name] = [await speaker.reply(id) for id in ids]

        async with anyio.create_task_group() as group:
            group.start_soon(speak, one, "n")
            group.start_soon(speak, other, "s")
        replies = [reply for each in said.values() for reply in each]
        assert {reply["op"] for reply in replies} == {"published"}, replies
        for name, each in said.items():
            assert [reply["geoid"]["id"] for reply in each] == [f"{name}-{n}" for n in range(20)]
            assert offsets(each) == sorted(offsets(each)), "a session keeps its order"
        # Equal numbers agree, all others contradict each other: 40 statements, 20 numbers twice.
        expected = 40 * 39 // 2 - 20
        found = {pair for reply in replies for pair in pairs(reply["contradictions"])}
        assert len(found) == expected, "every pair is in the answer to the later of the two"
        heard = [await each.wait_events("geoids", 40) for each in (here, there)]
        clashes = [await each.wait_events("contradictions", expected) for each in (here, there)]
        assert offsets(heard[0]) == offsets(heard[1]) == sorted(offsets(replies))
        assert offsets(clashes[0]) == offsets(clashes[1])
        assert [event["data"] for event in clashes[0]] == [event["data"] for event in clashes[1]]
        assert pairs([event["data"] for event in clashes[0]]) == found


async def test_a_subscriber_resumes_on_the_other_edge(edges: Edges) -> None:
    north, south = edges
    async with peer(north) as speaker:
        async with peer(north) as listener:
            await listener.done("subscribe", channel="session:moving")
            await speaker.publish(**fact("moving", 0, session_id="moving"))
            (seen,) = await listener.wait_events("session:moving", 1)
        said = [await speaker.publish(**fact(f"missed-{n}", n, session_id="moving")) for n in range(5)]
        since = {"epoch": seen["epoch"], "offset": seen["offset"]}
        async with peer(south) as moved:
            reply = await moved.done("subscribe", channel="session:moving", since=since)
            assert (reply["was_recovering"], reply["recovered"], reply["offset"]) == (True, True, seen["offset"])
            # The newest position of one edge is a position for the other, told or not.
            last = await speaker.publish(**fact("last", 0, session_id="moving"))
            fresh = {"epoch": seen["epoch"], "offset": last["offset"]}
            reply = await moved.done("subscribe", channel="geoids", since=fresh)
            assert reply["recovered"], reply
            events = await moved.wait_events("session:moving", 6)
            assert offsets(events) == [*offsets(said), last["offset"]]
            assert (await moved.ask("subscribe", channel="scars", since={**since, "offset": 10**9}))["code"] == (
                "bad_position"
            )


async def test_a_retry_on_the_other_edge_says_nothing_twice(edges: Edges) -> None:
    north, south = edges
    async with peer(north) as one, peer(south) as other:
        await one.publish(**fact("retry", 0))
        first = await one.done("publish", geoid=fact("retry", 1), key="k-1")
        again = await other.done("publish", geoid=fact("retry", 1), key="k-1")
        assert (first["duplicate"], again["duplicate"]) == (False, True)
        assert len(first["contradictions"]) == 1
        assert {**again, "id": 0, "duplicate": False} == {**first, "id": 0}
        # Both at once, on different lanes: one is first, whichever.
        replies: list[dict[str, Any]] = []

        async def ask(speaker: Peer, key: str) -> None:
            replies.append(await speaker.done("publish", geoid=fact("retry", 2), key=key))

        for key in map(str, range(5)):
            replies.clear()
            async with anyio.create_task_group() as group:
                group.start_soon(ask, one, key)
                group.start_soon(ask, other, key)
            assert sorted(reply["duplicate"] for reply in replies) == [False, True]
            assert len({reply["offset"] for reply in replies}) == 1


async def test_watches_are_everywhere(edges: Edges) -> None:
    north, south = edges
    async with peer(north) as owner, peer(south) as elsewhere, web(south) as http:
        made = await owner.done("watch", watch="doors", text="The door of hangar nine is open", kinds=["related"])
        await elsewhere.done("subscribe", channel=made["channel"])
        assert [each["watch"] for each in (await http.get("/v1/watches")).json()["items"]] == ["doors"]
        for number in range(4):  # whichever engine commits it
            said = await owner.publish(text="The door of hangar nine is open", session_id=f"watch-{number}")
            events = await elsewhere.wait_events(made["channel"], number + 1)
            assert events[-1]["data"]["geoid"]["id"] == said["geoid"]["id"]
        await elsewhere.done("unwatch", watch="doors")
        assert (await elsewhere.ask("subscribe", channel="watch:unknown"))["code"] == "not_found"
        await owner.publish(text="The door of hangar nine is open")
        async with web(north) as other:
            await until(lambda: _no_watches(other))
        assert len(elsewhere.events(made["channel"])) == 4


async def _no_watches(http: Any) -> bool:
    return (await http.get("/v1/watches")).json()["items"] == []


async def test_the_match_of_a_watch_names_the_contradiction(edges: Edges) -> None:
    north, south = edges
    text, against = "The crane of pier seven works.", "The crane of pier seven does not work."
    async with peer(north) as owner, peer(south) as speaker:
        made = await owner.done("watch", watch="crane", text=text, kinds=["contradicts"])
        await owner.done("subscribe", channel=made["channel"])
        await owner.done("subscribe", channel="contradictions")
        stored = await speaker.publish(text=text)
        for number in range(3):  # whichever engine commits it
            said = await speaker.publish(text=against, session_id=f"crane-{number}")
            match = (await owner.wait_events(made["channel"], number + 1))[-1]["data"]
            assert (match["kind"], match["geoid"]["id"]) == ("contradicts", said["geoid"]["id"])
            clash = match["contradiction"]
            assert (clash["a"], clash["b"]) == (stored["geoid"]["id"], said["geoid"]["id"])
            assert clash in said["contradictions"]
        told = [event["data"] for event in await owner.wait_events("contradictions", 3)]
        assert pairs(told) == {frozenset((clash["a"], clash["b"])) for clash in told}
        assert len(pairs(told)) == len(told), "each pair once"


async def test_cursors_and_presence_are_everywhere(edges: Edges) -> None:
    north, south = edges
    async with peer(north) as one, peer(south) as other:
        said = [await one.publish(**fact(f"cursor-{n}", n, session_id="cursors")) for n in range(3)]
        await one.done("ack", channel="session:cursors", offset=said[0]["offset"], name="bookmark")
        reply = await other.done("subscribe", channel="session:cursors", since={"cursor": "bookmark"})
        assert (reply["recovered"], reply["offset"]) == (True, said[0]["offset"])
        assert offsets(await other.wait_events("session:cursors", 2)) == offsets(said[1:])
        await one.done("subscribe", channel="session:cursors")
        for asked in (one, other):
            told = await asked.done("presence", channel="session:cursors")
            assert (told["subscribers"], told["principals"]) == (2, {"anonymous": 2})


async def test_what_is_stored_can_be_asked_and_changed_on_any_edge(edges: Edges) -> None:
    north, south = edges
    async with peer(north) as one, peer(south) as other, web(south) as http:
        await other.done("subscribe", channel="scars")
        a = await one.publish(
            text="The gauge of boiler seven reads high", id="gauge-a", symbolic_state={"g": 1, "subject": "g"}
        )
        b = await other.publish(
            text="The gauge of boiler seven reads low", id="gauge-b", symbolic_state={"g": 2, "subject": "g"}
        )
        (clash,) = b["contradictions"]
        assert (clash["a"], clash["b"]) == (a["geoid"]["id"], b["geoid"]["id"])
        found = (
            await http.post(
                "/v1/search", json={"text": "The gauge of boiler seven reads high", "relation": "related", "k": 2}
            )
        ).json()
        assert {hit["geoid"]["id"] for hit in found["items"]} == {"gauge-a", "gauge-b"}, found
        scored = (await http.post("/v1/score", json={"a": fact("s", 1), "b": fact("s", 2)})).json()
        assert scored["score"] > 0.9
        settled = await one.done("resolve", contradiction_id=clash["id"], decision="collapse", reason="read again")
        (scar,) = await other.wait_events("scars", 1)
        assert (scar["offset"], scar["data"]["id"]) == (settled["offset"], settled["scar"]["id"])
        assert (await other.ask("resolve", contradiction_id=clash["id"], decision="collapse"))["code"] == "conflict"
        changed = await other.publish(
            id="gauge-a", text="The gauge of boiler seven reads low", symbolic_state={"g": 2, "subject": "g"}
        )
        assert (changed["geoid"]["version"], changed["contradictions"]) == (2, [])
        gone = await one.done("delete", geoid_id="gauge-a")
        assert (await http.get("/v1/geoids/gauge-a")).status_code == 404
        assert (await other.ask("delete", geoid_id="gauge-a"))["code"] == "not_found"
        missing = await http.patch("/v1/geoids/gauge-a", json={"text": "no more"})
        assert missing.status_code == 404
        assert gone["offset"] > changed["offset"]
        refused = await one.ask("publish", geoid={"text": ""})
        assert (refused["code"], refused["field"]) == ("bad_request", "geoid.text")


async def test_stats_and_field_tell_of_all_nodes(cluster: Cluster, edges: Edges) -> None:
    north, south = edges
    async with peer(north) as one, peer(south) as other, web(south) as http:
        await other.done("subscribe", channel="field")
        said = await one.publish(text="Something for the field to take in.")
        heard = await other.events_until("field", lambda found: bool(found) and found[-1]["offset"] >= said["offset"])
        assert heard[-1]["data"]["geoids"] >= 1
        assert (await http.get("/v1/field")).json()["geoids"] >= 1
        seen = await cluster.stats(south)
        assert sorted(seen["nodes"].values()) == ["edge", "edge", "engine", "engine"]
        assert (seen["slices"]["total"], seen["completeness"], seen["bus"]["state"]) == (16, 1.0, "connected")
        health = (await http.get("/health")).json()
        assert (health["status"], health["cluster"]["completeness"]) == ("ok", 1.0)

        async def told_by_engines() -> bool:
            engines = (await cluster.stats(south))["engines"].values()
            return len(engines) == 2 and sum(each["slices"] for each in engines) == 16

        await until(told_by_engines)
    async with web(cluster.nodes["first"]) as engine:
        assert (await engine.get("/readyz")).status_code == 200
        refused = await engine.get("/v1/geoids")
        assert refused.status_code == 503
        assert "engine" in refused.json()["detail"]


@pytest.fixture
def narrow(cluster: Cluster) -> Iterator[Edges]:
    """Two more edges, which allow two connections a principal."""
    names = ("east", "west")
    for name in names:
        cluster.start(
            name,
            "edge",
            wait=False,
            KIMERA_API__MAX_CONNECTIONS_PER_PRINCIPAL="2",
            KIMERA_DATABASE__MAX_CURSORS="2",
        )
    cluster.ready(*names)
    east, west = (cluster.nodes.pop(name) for name in names)
    try:
        yield east, west
    finally:
        east.stop()
        west.stop()
        show(east.text, west.text)
        assert not east.errors() + west.errors()


async def refused(edge: Server) -> bool:
    async with handshake(edge) as third:
        reply = await third.ask("connect")
        return reply["op"] == "error" and reply["code"] == "limit_exceeded"


async def test_the_connections_of_a_principal_are_limited_over_all_edges(edges: Edges, narrow: Edges) -> None:
    """And none that is gone counts, wherever it was: a client that comes back elsewhere is let in at once."""
    wide, (east, west) = edges[0], narrow
    for left, entered in ((wide, east), (east, west), (west, east)):
        async with peer(left), peer(left):
            await until(lambda edge=entered: refused(edge))  # type: ignore[misc]
        async with peer(entered), peer(entered):
            assert await refused(entered)


async def test_the_cursors_of_a_principal_are_limited_over_all_edges(narrow: Edges, cluster: Cluster) -> None:
    await cluster.query("DELETE FROM cursor WHERE principal = 'anonymous'")
    async with peer(narrow[0]) as one, peer(narrow[1]) as other:
        await one.done("ack", channel="geoids", offset=0, name="first")
        await other.done("ack", channel="geoids", offset=0, name="second")
        for each in (one, other):
            assert (await each.ask("ack", channel="geoids", offset=0, name="third"))["code"] == "limit_exceeded"
            for name in ("first", "second"):  # those that there are still move
                await each.done("ack", channel="geoids", offset=0, name=name)


async def test_the_watches_of_a_principal_are_limited_over_all_edges(edges: Edges, cluster: Cluster) -> None:
    north, south = edges
    async with peer(north) as one, peer(south) as other:
        await one.done("watch", watch="many-0", text="The lamp of berth 0 is lit", kinds=["related"])
        await cluster.query(
            "INSERT INTO watch SELECT (jsonb_populate_record(w, jsonb_build_object('id', 'many-' || n, 'name', 'many-' || n))).* "
            "FROM watch w, generate_series(1, 999 - (SELECT count(*)::int FROM watch o WHERE o.principal = w.principal)) n "
            "WHERE w.name = 'many-0'"
        )
        try:
            await other.done("watch", watch="many-999", text="The lamp of berth 999 is lit", kinds=["related"])
            for each in (one, other):
                for number in range(2):  # whichever engine is asked
                    reply = await each.ask("watch", watch=f"more-{number}", text="The lamp is lit", kinds=["related"])
                    assert reply["code"] == "limit_exceeded"
            await one.done("unwatch", watch="many-999")
            await other.done("watch", watch="more", text="The lamp is lit", kinds=["related"])
            assert (await one.ask("watch", watch="many-999", text="It is", kinds=["related"]))[
                "code"
            ] == "limit_exceeded"
        finally:
            await cluster.query("DELETE FROM watch WHERE name LIKE 'many-%' AND name <> 'many-0' OR name = 'more'")
            await one.done("unwatch", watch="many-0")  # and with that every engine reads them anew


async def test_the_connections_of_an_edge_that_died_do_not_count(narrow: Edges) -> None:
    east, west = narrow
    async with peer(west) as one, handshake(east) as two:
        await two.done("connect")
        await until(lambda: refused(west))
        east.kill()
        async with peer(west) as other:
            for each in (one, other):
                await each.done("ping")
            assert await refused(west)
