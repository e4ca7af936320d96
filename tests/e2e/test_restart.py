"""Killed without warning and started again: what was acknowledged is there, once, in the same order."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Peer, Server, offsets, peer, until, web

pytestmark = pytest.mark.anyio

WRITERS = 4


class Writer:
    """Publishes statements with keys until the server is gone, and keeps what was acknowledged."""

    def __init__(self, number: int, seed: int) -> None:
        self.number = number
        self.random = random.Random(f"{seed}-{number}")
        self.acked: dict[str, dict[str, Any]] = {}
        self.sent: dict[str, dict[str, Any]] = {}

    def statement(self, n: int) -> dict[str, Any]:
        """Every subject is spoken of by all writers, in ever new ways: many of them clash."""
        subject = f"subject-{self.random.randrange(12)}"
        return {
            "id": f"w{self.number}-{n}",
            "text": f"Writer {self.number} says {n} about {subject}.",
            "symbolic_state": {"subject": subject, "value": self.random.randrange(3)},
            "session_id": f"writer-{self.number}",
        }

    async def run(self, server: Server) -> None:
        in_flight: dict[int, str] = {}
        try:
            async with peer(server, self.random.choice(["json", "msgpack"])) as client:
                for n in range(100_000):
                    while len(in_flight) >= 4:
                        await self._take(client, in_flight)
                    key = f"key-{self.number}-{n}"
                    self.sent[key] = self.statement(n)
                    in_flight[await client.send("publish", geoid=self.sent[key], key=key)] = key
        except (ConnectionClosed, OSError):
            return

    async def _take(self, client: Peer, in_flight: dict[int, str]) -> None:
        while not (answered := [id for id in in_flight if client.replies[id]]):
            await client.receive()
        for id in answered:
            (reply,) = client.replies.pop(id)
            assert reply["op"] == "published", reply
            self.acked[in_flight.pop(id)] = reply


async def whole_log(http: httpx.AsyncClient, channel: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    since: dict[str, str] = {}
    while True:
        response = await http.get("/v1/history", params={"channel": channel, "limit": 1000, **since})
        page = response.json()
        events += page["events"]
        if not page["more"]:
            return events
        since = {"since": f"{page['epoch']}:{page['offset']}"}


@pytest.mark.parametrize("seed", [1, 2])
async def test_kill_in_the_middle_of_an_ingest(start_server: StartServer, seed: int) -> None:
    server = start_server(KIMERA_API__COMMANDS_PER_SECOND="100000")
    writers = [Writer(number, seed) for number in range(WRITERS)]
    chance = random.Random(seed)
    heard: list[dict[str, Any]] = []
    epoch = ""

    async def listen() -> None:
        nonlocal epoch
        try:
            async with peer(server) as client:
                epoch = client.connected["epoch"]
                await client.done("subscribe", channel="geoids")
                while True:
                    await client.receive()
                    heard[:] = client.events("geoids")
        except (ConnectionClosed, OSError):
            return

    async def pull_the_plug() -> None:
        enough = chance.randrange(80, 160)
        await until(lambda: sum(len(writer.acked) for writer in writers) >= enough, every=0.001)
        server.kill()

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        for writer in writers:
            group.start_soon(writer.run, server)
        group.start_soon(pull_the_plug)
    acked = {key: reply for writer in writers for key, reply in writer.acked.items()}
    sent = {key: geoid for writer in writers for key, geoid in writer.sent.items()}
    assert len(acked) >= 80

    again = start_server()
    async with web(again) as http:
        health = (await http.get("/health")).json()
        assert health["epoch"] == epoch
        head = health["offset"]
        # Every entry shows on a main channel, so together they are the whole log.
        geoids = await whole_log(http, "geoids")
        contradictions = await whole_log(http, "contradictions")
        log = sorted(geoids + contradictions, key=lambda each: each["offset"])
        assert offsets(log) == list(range(1, head + 1)), "the log has a gap, or an offset twice"
        # Nothing acknowledged is lost, and it is what was acknowledged.
        stored = {each["data"]["id"]: each for each in geoids}
        found = {each["data"]["id"]: each["data"] for each in contradictions}
        for reply in acked.values():
            assert stored[reply["geoid"]["id"]]["data"] == reply["geoid"]
            assert stored[reply["geoid"]["id"]]["offset"] == reply["offset"]
            for contradiction in reply["contradictions"]:
                assert found[contradiction["id"]] == contradiction
        # What was told live had been durable.
        assert heard == geoids[: len(heard)]
        # Whatever is open is so in the lists too, as many as the field says.
        listed: list[str] = []
        after: int | None = 0
        while after is not None:
            params = {"state": "open", "limit": 1000, "after": after}
            page = (await http.get("/v1/contradictions", params=params)).json()
            listed += [each["id"] for each in page["items"]]
            after = page["next"]
        assert sorted(listed) == sorted(found)
        field = (await http.get("/v1/field")).json()
        assert (field["geoids"], field["open_contradictions"]) == (len(stored), len(found))

        # Retried with their keys: the acknowledged ones are not published again, the others once.
        async with peer(again) as client:
            for key in chance.sample(sorted(acked), 10):
                retried = await client.done("publish", geoid=sent[key], key=key)
                assert (retried["duplicate"], retried["offset"]) == (True, acked[key]["offset"])
                assert retried["contradictions"] == acked[key]["contradictions"]
            for key in sorted(sent.keys() - acked.keys()):
                retried = await client.done("publish", geoid=sent[key], key=key)
                assert retried["duplicate"] == (sent[key]["id"] in stored)
                assert retried["geoid"]["version"] == 1

            # A subscriber goes on from where it was and gets exactly the rest, once.
            seen = offsets(heard)[-1] if heard else 0
            await client.done("subscribe", channel="geoids", since={"epoch": epoch, "offset": seen})
            last = await client.publish(text="This is said after the restart.")
            rest = await client.events_until("geoids", lambda got: got[-1:] and got[-1]["offset"] == last["offset"])
            assert offsets(rest) == offsets((await whole_log(http, "geoids"))[len(heard) :])
            assert len({each["data"]["id"] for each in heard + rest}) == len(heard) + len(rest)
            # What is said now is compared with what was said then.
            contrary = await client.publish(
                symbolic_state={**sent[next(iter(acked))]["symbolic_state"], "value": "neither of these"}
            )
            assert acked[next(iter(acked))]["geoid"]["id"] in {each["a"] for each in contrary["contradictions"]}
    assert again.errors() == []


async def test_what_is_kept_over_a_clean_restart(start_server: StartServer, tmp_path: Path) -> None:
    """Cursors, watches, keys, vectors, resolutions."""
    server = start_server()
    async with peer(server) as client:
        epoch = client.connected["epoch"]
        one = await client.publish(id="one", text="The ferry to the island sails at noon.")
        two = await client.done("publish", geoid={"id": "two", "symbolic_state": {"subject": "s", "n": 1}}, key="k")
        await client.done("ack", channel="geoids", offset=one["offset"], name="reader")
        await client.done("watch", watch="ferry", text=one["geoid"]["text"], kinds=["related", "contradicts"])
        (clash,) = (await client.publish(id="three", symbolic_state={"subject": "s", "n": 2}))["contradictions"]
        resolved = await client.done("resolve", contradiction_id=clash["id"], decision="buffer")
        head = resolved["offset"]
    server.terminate()
    assert server.wait() == 0

    again = start_server()
    async with peer(again, "msgpack") as client:
        assert (client.connected["epoch"], client.connected["offset"]) == (epoch, head)
        reply = await client.done("subscribe", channel="geoids", since={"cursor": "reader"})
        assert (reply["was_recovering"], reply["recovered"], reply["offset"]) == (True, True, one["offset"])
        assert [each["data"]["id"] for each in await client.wait_events("geoids", 2)] == ["two", "three"]
        repeated = await client.done("publish", geoid={"text": "whatever"}, key="k")
        assert (repeated["duplicate"], repeated["geoid"]) == (True, two["geoid"])
        watching = await client.done("watch", watch="ferry2", text="unused", kinds=["related"])
        async with web(again) as http:
            listed = {each["watch"]: each for each in (await http.get("/v1/watches")).json()["items"]}
            assert set(listed) == {"ferry", "ferry2"}
            assert watching["channel"] == listed["ferry2"]["channel"]
            assert (await http.get(f"/v1/contradictions/{clash['id']}")).json()["state"] == "resolved"
        await client.done("subscribe", channel=listed["ferry"]["channel"])
        against = await client.publish(text="The ferry to the island does not sail at noon.")
        assert [each["a"] for each in against["contradictions"]] == ["one"]
        assert against["offset"] == head + 1
        events = await client.wait_events(listed["ferry"]["channel"], 2)
        assert {each["data"]["kind"] for each in events} == {"related", "contradicts"}
        named = next(each["data"] for each in events if each["data"]["kind"] == "contradicts")
        assert named["contradiction"]["id"] == against["contradictions"][0]["id"]
        refused = await client.ask("resolve", contradiction_id=clash["id"], decision="surge")
        assert refused["code"] == "conflict"


async def test_another_encoder_on_old_vectors_is_refused_with_the_way_out(start_server: StartServer) -> None:
    server = start_server()
    async with peer(server) as client:
        await client.publish(text="Encoded with 384 numbers.")
    server.terminate()
    assert server.wait() == 0
    other = start_server(wait=False, KIMERA_EMBEDDING__DIMENSION="64")
    assert other.wait() == 1
    assert any("KIMERA_EMBEDDING__PROVIDER" in line for line in other.lines)


async def test_a_newer_database_is_refused_with_the_way_out(start_server: StartServer) -> None:
    server = start_server()
    server.terminate()
    assert server.wait() == 0
    (file,) = server.data_dir.glob("*.sqlite3")
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    old = start_server(wait=False)
    assert old.wait() == 1
    (line,) = [line for line in old.lines if line.startswith("kimera-stream: service vault failed for good")]
    assert "9999" in line or "newer" in line
    assert "Traceback" not in old.text
