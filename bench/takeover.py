"""How long the slices of an engine stay away that is killed, or stops, with a large store: ``python -m bench.takeover --json``, its last
line one JSON object.

One edge and two engines on PostgreSQL and Redis, hashing encoder and rules, their database filled through the vault (vectors drawn
around topics, as ``bench.restart`` does). Statements go on being published meanwhile.

- kills: seconds from ``kill -9`` of an engine until ``stats`` says that the other covers every slice; until a statement is answered with
  the contradiction to one of the dead engine's slices, for the first and for the last of these slices; and the longest that any publish waited;
- stops: seconds from SIGTERM to the end of the engine, seconds in which a slice had no owner by the database, and the longest wait.
"""

import argparse
import itertools
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from prometheus_client import CollectorRegistry

from bench.cluster import LIGHT, Load, covered_without, measure
from bench.publishes import fill
from bench.restart import batch_at
from bench.server import processor_seconds
from deploy.local_cluster import Cluster, Node, cluster, ground, make_database
from kimera_stream.client import connect
from kimera_stream.core.embedding import BatchingEmbedder, make_provider
from kimera_stream.core.slices import slice_of
from kimera_stream.core.vault.cluster import SqlCluster
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.resources import Resources
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.protocol.objects import GeoidBody

SESSIONS = 6
"""Publishers that go on meanwhile."""
PATIENCE = 120.0


async def make(url: str, geoids: int) -> None:
    """Fill a database; one that is filled already stays as it is."""
    settings = Settings.model_validate({"embedding": {"provider": "hashing"}})
    vault = SqlVault(url, settings.database)
    await vault.start()
    try:
        if vault.encoder is None:
            registry = CollectorRegistry()
            provider = make_provider(settings.embedding, Resources(settings.performance, registry))
            await vault.record_encoder(BatchingEmbedder(provider, settings.embedding, registry).model)
        await fill(vault, geoids, partial(batch_at, geoids=geoids))
    finally:
        await vault.close()


class Shares:
    """Who owns what, by the database."""

    def __init__(self, store: SqlCluster) -> None:
        self._store = store
        self.uncovered = 0.0
        """Seconds in which a slice had no owner."""

    async def of(self, name: str) -> list[int]:
        """The slices of an engine."""
        found = (await self._store.coverage(lease=5.0)).slices
        return [each.number for each in found if each.covered and (each.owner or "").startswith(f"{name}~")]

    async def even(self, engines: int) -> None:
        """Wait until so many engines share them."""
        with anyio.fail_after(PATIENCE):
            while True:
                found = (await self._store.coverage(lease=5.0)).slices
                owners = [each.owner for each in found if each.covered]
                if len(owners) == len(found) and all(owners.count(each) == len(found) // engines for each in owners):
                    return
                await anyio.sleep(0.2)

    async def watch(self) -> None:
        """Count the time in which one has no owner, until cancelled."""
        before = time.perf_counter()
        while True:
            whole = all(each.covered for each in (await self._store.coverage(lease=5.0)).slices)
            now = time.perf_counter()
            self.uncovered += 0.0 if whole else now - before
            before = now
            await anyio.sleep(0.05)


def named(number: int, slices: int, tag: str) -> str:
    """An id that belongs to a slice."""
    return next(name for each in itertools.count() if slice_of(name := f"{tag}-{each}", slices) == number)


def fact(geoid_id: str, subject: str, state: str, session: str) -> GeoidBody:
    return GeoidBody(id=geoid_id, symbolic_state={"subject": subject, "state": state}, session_id=session)


async def say(edge: Node, probes: list[str], state: str) -> None:
    """A statement in each slice that is going to be taken over."""
    async with connect(edge.url, timeout=PATIENCE) as client:
        for probe in probes:
            await client.publish(fact(probe, f"of {probe}", state, f"say-{probe}"))


async def find(edge: Node, probe: str, found: list[float]) -> None:
    """Contradict one of them; the clock time of an answer that names it."""
    async with connect(edge.url, timeout=PATIENCE) as client:
        answer = await client.publish(fact(f"{probe}-again", f"of {probe}", "shut", f"find-{probe}"))
        if probe not in {each.a for each in answer.contradictions}:
            raise RuntimeError(f"the answer does not name {probe}")
        found.append(time.perf_counter())


async def kill(made: Cluster, shares: Shares, slices: int, turn: int) -> dict[str, Any]:
    victim, survivor, edge = made.engines[-1], made.engines[0], made.edges[0]
    tag = f"probe-{time.time_ns():x}"  # the database may be of an earlier run
    probes = [named(number, slices, tag) for number in await shares.of(victim.name)]
    await say(edge, probes, "open")
    load, found, covered = Load(), list[float](), 0.0
    async with anyio.create_task_group() as group:
        for session in range(SESSIONS):
            group.start_soon(load.publish, edge.url, f"load-{turn}-{session}", name="publish")
        await anyio.sleep(2)
        before, killed = processor_seconds(survivor.pid), time.perf_counter()
        victim.kill()
        async with anyio.create_task_group() as finding:
            for probe in probes:
                finding.start_soon(find, edge, probe, found, name=f"find:{probe}")
            with anyio.fail_after(PATIENCE):
                covered = await covered_without(edge.url, victim.name)
        spent = processor_seconds(survivor.pid) - before
        load.stop()
    await victim.stop()
    made.nodes.remove(victim)
    return {
        "slices": len(probes),
        "covered_s": round(covered - killed, 2),
        "first_found_s": round(min(found) - killed, 2),
        "last_found_s": round(max(found) - killed, 2),
        "longest_wait_s": round(max(answered - sent for sent, answered in load.answers), 2),
        "survivor_cpu_s": round(spent, 2),
        "answered": len(load.answers),
        "refused": load.refused,
    }


async def stop(made: Cluster, shares: Shares, turn: int) -> dict[str, Any]:
    victim, edge = made.engines[-1], made.edges[0]
    load = Load()
    async with anyio.create_task_group() as group:
        for session in range(SESSIONS):
            group.start_soon(load.publish, edge.url, f"stop-{turn}-{session}", name="publish")
        await anyio.sleep(2)
        shares.uncovered = 0.0
        group.start_soon(shares.watch, name="watch")
        began = time.perf_counter()
        await victim.stop()
        took = time.perf_counter() - began
        await shares.even(len(made.engines) - 1)
        await anyio.sleep(1)
        load.stop()
        group.cancel_scope.cancel()
    made.nodes.remove(victim)
    return {
        "stopped_in_s": round(took, 2),
        "uncovered_s": round(shares.uncovered, 2),
        "longest_wait_s": round(max(answered - sent for sent, answered in load.answers), 2),
        "answered": len(load.answers),
        "refused": load.refused,
    }


async def run(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = {
        "processors": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "geoids": arguments.geoids,
    }
    async with ground(directory, arguments.postgres, arguments.redis) as (postgres, redis):
        url = await make_database(postgres, arguments.database)
        began = time.perf_counter()
        await make(url, arguments.geoids)
        result["filled_in_s"] = round(time.perf_counter() - began, 1)
        settings = Settings()
        store = SqlCluster(url, settings.database)
        shares, slices = Shares(store), settings.bus.slices
        joined = {
            **LIGHT,
            "KIMERA_DATABASE__URL": url,
            "KIMERA_BUS__URL": redis,
            "KIMERA_BUS__PREFIX": f"takeover-{os.getpid()}:",
            "KIMERA_BUS__ANSWER_WITHIN": "60",  # what is measured is how long it takes, on however slow a machine
            "KIMERA_API__SHUTDOWN_DEADLINE": "30",
            **({"KIMERA_TELEMETRY__LOG_LEVEL": "info"} if arguments.verbose else {}),
        }
        names = (f"engine-{number}" for number in itertools.count(3))
        try:
            async with cluster(directory, joined, edges=1) as made:
                await shares.even(2)
                result["kills"], result["stops"] = [], []
                ways = [*["kills"] * arguments.kills, *["stops"] * arguments.stops]
                for turn, way in enumerate(ways):
                    victim = made.engines[-1]
                    told = await (kill(made, shares, slices, turn) if way == "kills" else stop(made, shares, turn))
                    result[way].append(told)
                    if arguments.verbose:
                        print(json.dumps(told), *_lines(victim, made.engines[0]), sep="\n", file=sys.stderr)
                    if turn + 1 < len(ways):
                        await (await made.add(next(names), "engine")).listening()
                        await shares.even(2)
        finally:
            await store.close()
    return result


def _lines(*nodes: Node) -> list[str]:
    """The end of what they logged."""
    return [f"{node.name}: {line}" for node in nodes for line in node.log.read_text().splitlines()[-12:]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.takeover", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="only the one JSON line")
    parser.add_argument("--geoids", type=int, default=200_000, help="in all slices together")
    parser.add_argument("--kills", type=int, default=3, help="engines killed")
    parser.add_argument("--stops", type=int, default=2, help="engines stopped")
    parser.add_argument("--postgres", default="", help="postgresql+asyncpg://... to use; the database stays in it")
    parser.add_argument("--redis", default="", help="redis://... to use")
    parser.add_argument("--database", default="bench_takeover", help="its name; one that is filled is used as it is")
    parser.add_argument("--verbose", action="store_true", help="with what the engines log")
    arguments = parser.parse_args()
    measure(run, arguments)


if __name__ == "__main__":
    main()
