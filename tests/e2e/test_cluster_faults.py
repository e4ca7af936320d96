"""Nodes are killed and Redis loses everything while statements come in: nothing acked is lost, nothing is said twice, and what
contradicts is found, as one node that nothing happens to finds it."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from websockets.exceptions import WebSocketException

from tests.e2e.harness import Peer, Server, offsets, peer, show, until
from tests.e2e.nodes import Cluster
from tests.infrastructure.redis_servers import HAS_SERVER, OwnRedis

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.postgres,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

PATIENCE = 90.0
"""Seconds that statements may take on a busy machine: each passes through five processes."""

TELLERS = 4
SUBJECTS = 12


def statements(count: int) -> list[dict[str, Any]]:
    """Facts of a few subjects; every two of one subject with other numbers contradict each other."""
    return [
        {
            "id": f"s-{n}",
            "session_id": f"by-{n % TELLERS}",
            "symbolic_state": {"subject": f"t-{n % SUBJECTS}", "n": n % 7},
        }
        for n in range(count)
    ]


class Teller:
    """Tells its statements one after the other, each with a key and until it is acked, on whichever edge there is."""

    def __init__(self, edges: list[Server], told: list[dict[str, Any]]) -> None:
        self._edges = edges
        self._told = told
        self.acked: dict[str, dict[str, Any]] = {}
        self.refusals: list[str] = []
        self.progress = anyio.Event()

    async def run(self) -> None:
        left = list(self._told)
        turn = 0
        while left:
            turn += 1
            try:
                async with peer(self._edges[turn % len(self._edges)]) as speaker:
                    while left:
                        await self._tell(speaker, left[0])
                        left.pop(0)
            except (OSError, WebSocketException) as error:
                self.refusals.append(type(error).__name__)
                await anyio.sleep(0.05)

    async def _tell(self, speaker: Peer, statement: dict[str, Any]) -> None:
        while True:
            reply = await speaker.ask("publish", geoid=statement, key=f"key-{statement['id']}")
            if reply["op"] == "published":
                self.acked[statement["id"]] = reply
                self.progress.set()
                self.progress = anyio.Event()
                return
            assert reply["temporary"], reply
            self.refusals.append(reply["code"])
            await anyio.sleep(min(0.5, reply.get("retry_after", 0.1)))


class Listener:
    """Hears the whole log, on whichever edge there is, from where it was."""

    def __init__(self, edges: list[Server]) -> None:
        self._edges = edges
        self.heard: list[dict[str, Any]] = []
        self.connections = 0

    async def run(self) -> None:
        while True:
            try:
                async with peer(self._edges[self.connections % len(self._edges)]) as listener:
                    self.connections += 1
                    await self._listen(listener)
            except (OSError, WebSocketException):
                await anyio.sleep(0.05)

    async def _listen(self, listener: Peer) -> None:
        since = {"epoch": listener.connected["epoch"], "offset": self.heard[-1]["offset"] if self.heard else 0}
        reply = await listener.done("subscribe", channel="geoids", since=since)
        assert reply["recovered"]
        while True:
            await listener.receive()
            self.heard += listener.pushed
            listener.pushed.clear()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        made.close()
        for name, node in made.nodes.items():
            show(f"--- {name}, exit code {node.process.exitcode}", node.text)


async def check(
    cluster: Cluster, told: list[dict[str, Any]], tellers: list[Teller], listener: Listener, epoch: str
) -> None:
    """What was promised, by the database and by what clients were told; never by the servers' own word."""
    acked = {id_: reply for teller in tellers for id_, reply in teller.acked.items()}
    assert acked.keys() == {each["id"] for each in told}
    rows = await cluster.query('SELECT "offset", data, type FROM log_entry ORDER BY "offset"')
    assert [row["offset"] for row in rows] == list(range(1, len(rows) + 1)), "offsets have no holes"
    created = await cluster.query('SELECT id, version, "offset" FROM geoid')
    assert {(row["id"], row["version"], row["offset"]) for row in created} == {
        (id_, 1, reply["offset"]) for id_, reply in acked.items()
    }, "each acked statement is there, once, where it was said to be"
    for teller in tellers:
        order = [teller.acked[each["id"]]["offset"] for each in teller._told]
        assert order == sorted(order), "what one session said is in its order"
    of = {each["id"]: each["symbolic_state"] for each in told}
    expected = {
        frozenset((a, b))
        for a, x in of.items()
        for b, y in of.items()
        if a < b and x["subject"] == y["subject"] and x["n"] != y["n"]
    }
    found = await cluster.query("SELECT a, b FROM contradiction WHERE state = 'open'")
    assert len(found) == len(expected), "no contradiction is told twice"
    assert {frozenset((row["a"], row["b"])) for row in found} == expected
    for id_, reply in acked.items():
        seen = {frozenset((each["a"], each["b"])) for each in reply["contradictions"]}
        older = {
            pair for pair in expected if id_ in pair and all(acked[each]["offset"] <= reply["offset"] for each in pair)
        }
        assert seen == older, f"the answer for {id_} names what contradicts it"
    assert {event["epoch"] for event in listener.heard} == {epoch}
    in_log = [row["offset"] for row in rows if row["type"].startswith("geoid.")]
    assert offsets(listener.heard) == in_log, "what is heard is the log"


@asynccontextmanager
async def told_and_heard(
    cluster: Cluster, edges: list[Server], told: list[dict[str, Any]]
) -> AsyncIterator[list[Teller]]:
    """Statements told and heard while the body of the block does its worst; checked at its end."""
    tellers = [Teller(edges, told[number::TELLERS]) for number in range(TELLERS)]
    listener = Listener(edges)
    async with peer(edges[0]) as first:
        epoch = first.connected["epoch"]
    with anyio.fail_after(3 * PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(listener.run)
            async with anyio.create_task_group() as telling:
                for teller in tellers:
                    telling.start_soon(teller.run)
                yield tellers
            with anyio.fail_after(PATIENCE):
                while len(listener.heard) < len(told):  # noqa: ASYNC110 - of another task
                    await anyio.sleep(0.02)
            group.cancel_scope.cancel()
    show("refusals", str([teller.refusals for teller in tellers]))
    assert {name: node.errors() for name, node in cluster.nodes.items() if node.errors()} == {}, "no defects on the way"
    await check(cluster, told, tellers, listener, epoch)


async def acked(tellers: list[Teller], count: int) -> None:
    """Wait until so many statements have been acked."""
    with anyio.fail_after(PATIENCE):
        while sum(len(teller.acked) for teller in tellers) < count:  # noqa: ASYNC110 - of several tellers
            await anyio.sleep(0.02)


async def owned_by(cluster: Cluster, name: str) -> dict[int, int]:
    """Slices of an engine and their generations."""
    rows = await cluster.query("SELECT number, generation FROM slice WHERE owner LIKE $1", f"{name}~%")
    return {row["number"]: row["generation"] for row in rows}


async def test_an_engine_is_killed(cluster: Cluster) -> None:
    north, south, first, _ = cluster.start_all(north="edge", south="edge", first="engine", second="engine")
    await cluster.covered(north, 2)
    async with told_and_heard(cluster, [north, south], statements(96)) as tellers:
        await acked(tellers, 24)
        first.kill()
        seconds = await cluster.covered(south, 1)
        show(f"covered again after {seconds:.1f} s")
        assert seconds <= 10.0, "a failed engine is noticed and covered"

        async def filled() -> bool:
            return (await cluster.stats(south)).get("completeness") == 1.0

        await until(filled)
        await acked(tellers, 56)
        cluster.start("third", "engine")
        await cluster.covered(north, 2)


async def test_an_edge_is_killed_and_an_engine_stops(cluster: Cluster) -> None:
    north, south, first, _ = cluster.start_all(north="edge", south="all", first="engine", second="engine")
    await cluster.covered(north, 3)
    async with told_and_heard(cluster, [north, south], statements(84)) as tellers:
        await acked(tellers, 20)
        north.kill()
        await acked(tellers, 40)
        before = await owned_by(cluster, "first")
        assert before
        first.terminate()
        assert first.wait() == 0
        # Handed over by the one to others that had them ready: given back and taken, it would have been two generations.
        after = await cluster.query("SELECT number, owner, generation FROM slice")
        handed = {row["number"]: row["generation"] for row in after if row["number"] in before}
        assert handed == {number: generation + 1 for number, generation in before.items()}
        assert not [row["number"] for row in after if row["owner"] is None or row["owner"].startswith("first~")]
        await cluster.covered(south, 2)


async def test_an_engine_hangs_and_wakes_up(cluster: Cluster) -> None:
    north, first, _ = cluster.start_all(north="edge", first="engine", second="engine")
    await cluster.covered(north, 2)
    assert first.process.pid is not None
    async with told_and_heard(cluster, [north], statements(84)) as tellers:
        await acked(tellers, 20)
        os.kill(first.process.pid, signal.SIGSTOP)
        try:
            assert await cluster.covered(north, 1) <= 10.0
            await acked(tellers, 44)
        finally:
            os.kill(first.process.pid, signal.SIGCONT)
        await cluster.covered(north, 2)  # with new leases; what it had begun with the old ones is refused


@pytest.mark.skipif(not HAS_SERVER, reason="needs redis-server")
async def test_redis_loses_everything(cluster: Cluster, tmp_path: Path) -> None:
    redis = OwnRedis(tmp_path)
    await redis.start()
    try:
        cluster.redis = redis.url
        north, south, _, _ = cluster.start_all(north="edge", south="edge", first="engine", second="engine")
        await cluster.covered(north, 2)
        async with told_and_heard(cluster, [north, south], statements(96)) as tellers:
            for count in (16, 32, 48):
                await acked(tellers, count)
                await redis.command("FLUSHALL")
            await acked(tellers, 60)
            await redis.stop()
            await anyio.sleep(1.0)  # for that long there is none
            await redis.start()
    finally:
        await redis.stop()
