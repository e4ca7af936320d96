"""What several nodes cost and bring: ``python -m bench.cluster --json``, its last line one JSON object.

A single node and a cluster of two edges and two engines stand side by side on one PostgreSQL (a database each) and one Redis, started for
the occasion from the Debian packages, or those that are named. Hashing encoder and rules, so that the nodes are measured and not the models.
Rounds of the two take turns, and ratios are medians over rounds, because the speed of a shared machine drifts.

- publishes: statements a second into the log over NDJSON, all answered: two edges against the single node;
- hear: milliseconds from sending a publish to one edge to the event arriving from the other; on the single node, over two connections;
- failover: an engine is killed under load: seconds until the cluster says that the other covers every slice, until a publish
  is answered again, and the longest that any publish waited.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np

from deploy.local_cluster import Cluster, Node, cluster, ground, make_database
from kimera_stream.client import Event, connect
from kimera_stream.protocol.errors import OperationalError
from kimera_stream.protocol.objects import GeoidBody

NUMBERS = itertools.count()
WORDS = ["".join(syllables) for syllables in itertools.product(("ba", "do", "fi", "ku", "le", "mo"), repeat=4)]
LIGHT = {
    "KIMERA_EMBEDDING__PROVIDER": "hashing",
    "KIMERA_SCORING__VERIFIER": "off",
    "KIMERA_STREAM__STATS_INTERVAL": "0.1",
    "KIMERA_TELEMETRY__LOG_LEVEL": "warning",
}


def texts(count: int) -> list[str]:
    """Statements of eight words each that have little in common, but every tenth denies the one before."""
    made: list[str] = []
    for number in itertools.islice(NUMBERS, count):
        subject, verb, *rest = random.Random(number - (number % 10 == 9)).sample(WORDS, 8)
        negation = " never" if number % 10 == 9 else ""
        made.append(f"{subject}{negation} {verb} {' '.join(rest)}")
    return made


# -- publishes ---------------------------------------------------------------------------------------------------------


async def ingest(addresses: Sequence[str], statements: int, streams: int) -> float:
    """Statements a second: ``statements`` in all over ``streams`` NDJSON requests, each a session, spread over the addresses.

    Raises:
        RuntimeError: a statement was not committed.
    """
    committed, refusals = 0, Counter[str]()

    async def one(client: httpx.AsyncClient, address: str, session: str, some: list[str]) -> None:
        nonlocal committed
        body = b"".join(json.dumps({"text": text, "session_id": session}).encode() + b"\n" for text in some)
        answer = await client.post(
            f"{address}/v1/geoids", content=body, headers={"Content-Type": "application/x-ndjson"}
        )
        answer.raise_for_status()
        for result in map(json.loads, answer.text.splitlines()):
            if "geoid" in result:
                committed += 1
            else:
                refusals[f"{result.get('code')}: {result.get('detail') or result.get('message')}"] += 1

    each = statements // streams
    parts = [(addresses[number % len(addresses)], f"bench-{next(NUMBERS)}", texts(each)) for number in range(streams)]
    async with httpx.AsyncClient(timeout=600) as client:
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for address, session, some in parts:
                group.start_soon(one, client, address, session, some, name=session)
        took = time.perf_counter() - began
    if committed != each * streams:
        raise RuntimeError(f"{committed} of {each * streams} statements were committed: {refusals.most_common(3)}")
    return committed / took


async def publishes(single: Node, made: Cluster, *, rounds: int, statements: int, streams: int) -> dict[str, Any]:
    edges = [node.url for node in made.edges]
    alone, joined, through_one = [], [], []
    await ingest([single.url], statements // 4, streams)  # warm
    await ingest(edges, statements // 4, streams)
    for _ in range(rounds):
        alone.append(await ingest([single.url], statements, streams))
        joined.append(await ingest(edges, statements, streams))
        through_one.append(await ingest(edges[:1], statements, streams))
    return {
        "statements_a_round": statements,
        "streams": streams,
        "single_per_second": round(statistics.median(alone), 1),
        "two_edges_per_second": round(statistics.median(joined), 1),
        "one_edge_per_second": round(statistics.median(through_one), 1),
        "ratio_to_single": round(statistics.median(a / b for a, b in zip(joined, alone, strict=True)), 3),
        "rounds": {
            "single": [round(rate, 1) for rate in alone],
            "two_edges": [round(rate, 1) for rate in joined],
            "one_edge": [round(rate, 1) for rate in through_one],
        },
    }


# -- hear --------------------------------------------------------------------------------------------------------------


async def hearing(here: str, there: str, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds from sending a publish ``here`` to its answer, and to its event from ``there``; one after another."""
    answered, heard = [], []
    async with connect(here) as speaker, connect(there) as listener, listener.subscribe("geoids") as events:
        for text in texts(count):
            arrived = anyio.Event()
            began = time.perf_counter()

            async def listen(text: str = text, arrived: anyio.Event = arrived, began: float = began) -> None:
                async for item in events:
                    if isinstance(item, Event) and item.data["text"] == text:
                        heard.append((time.perf_counter() - began) * 1000)
                        arrived.set()
                        return

            async with anyio.create_task_group() as group:
                group.start_soon(listen, name="listen")
                await speaker.publish(text)
                answered.append((time.perf_counter() - began) * 1000)
                with anyio.fail_after(30):
                    await arrived.wait()
    return answered, heard


def spread(times: Sequence[float]) -> dict[str, float]:
    return {"p50_ms": round(statistics.median(times), 2), "p99_ms": round(float(np.quantile(times, 0.99)), 2)}


async def hear(single: Node, made: Cluster, *, rounds: int, count: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"single": [], "edges": [], "single_answer": [], "edges_answer": []}
    ratios = []
    for _ in range(rounds):
        answered, alone = await hearing(single.url, single.url, count)
        found["single_answer"] += answered
        found["single"] += alone
        answered, joined = await hearing(made.edges[0].url, made.edges[1].url, count)
        found["edges_answer"] += answered
        found["edges"] += joined
        ratios.append(statistics.median(joined) / statistics.median(alone))
    return {
        "measured": len(found["edges"]),
        **{name: spread(times) for name, times in found.items()},
        "ratio_to_single_p50": round(statistics.median(ratios), 2),
    }


# -- failover ----------------------------------------------------------------------------------------------------------


class Load:
    """Publishes one after another in several sessions, and notes when each was sent and answered."""

    def __init__(self) -> None:
        self.answers: list[tuple[float, float]] = []
        self.refused = 0
        self._stopping = False

    async def publish(self, address: str, session: str) -> None:
        async with connect(address, timeout=60) as client:
            while not self._stopping:
                body = GeoidBody(text=texts(1)[0], session_id=session)
                sent = time.perf_counter()
                try:
                    await client.publish(body)
                except OperationalError:
                    self.refused += 1
                    await anyio.sleep(0.05)
                else:
                    self.answers.append((sent, time.perf_counter()))
                await anyio.sleep(0.02)

    def stop(self) -> None:
        self._stopping = True


async def covered_without(address: str, dead: str) -> float:
    """Clock time at which an edge says on ``stats`` that every slice is covered, and not by the dead engine."""
    async with connect(address) as client, client.subscribe("stats") as values:
        async for item in values:
            slices = item.data["cluster"].get("slices") if isinstance(item, Event) else None
            if slices and slices["covered"] == slices["total"] and not any(dead in owner for owner in slices["owners"]):
                return time.perf_counter()
    raise RuntimeError("the subscription ended")


async def failover(made: Cluster, *, kills: int) -> list[dict[str, Any]]:
    """Kills an engine under load, waits until the rest covers for it, starts another one; several times."""
    results = []
    for number in range(kills):
        victim = made.engines[-1]
        load = Load()
        async with anyio.create_task_group() as group:
            for edge, session in itertools.product(made.edges, range(8)):
                group.start_soon(load.publish, edge.url, f"failover-{edge.name}-{session}", name="publish")
            await anyio.sleep(3)
            killed = time.perf_counter()
            victim.kill()
            with anyio.fail_after(60):
                covered = await covered_without(made.edges[0].url, victim.name)
            await anyio.sleep(2)
            load.stop()
        await victim.stop()
        made.nodes.remove(victim)
        after = [(sent, answered) for sent, answered in load.answers if sent > killed]
        waiting = [answered - sent for sent, answered in load.answers if answered > killed]
        results.append(
            {
                "noticed_and_covered_s": round(covered - killed, 2),
                "answered_again_s": round(min(answered for _, answered in after) - killed, 2),
                "longest_wait_s": round(max(waiting), 2),
                "answered": len(load.answers),
                "refused": load.refused,
            }
        )
        if number + 1 < kills:
            replacement = await made.add(f"engine-{number + 3}", "engine")
            await replacement.listening()
            await anyio.sleep(8)  # it takes its slices over
    return results


# -- all ---------------------------------------------------------------------------------------------------------------


async def run(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"processors": os.cpu_count(), "load_at_start": round(os.getloadavg()[0], 2)}
    async with ground(directory, arguments.postgres, arguments.redis) as (postgres, redis):
        name = f"bench_{os.getpid()}"
        alone = {
            **LIGHT,
            "KIMERA_NODE": "single",
            "KIMERA_DATABASE__URL": await make_database(postgres, f"{name}_single"),
        }
        joined = {
            **LIGHT,
            "KIMERA_DATABASE__URL": await make_database(postgres, f"{name}_cluster"),
            "KIMERA_BUS__URL": redis,
            "KIMERA_BUS__PREFIX": f"{name}:",
            "KIMERA_BUS__ANSWER_WITHIN": "60",  # what is measured is how long it takes, on however slow a machine
        }
        single = Node("single", directory / "single")
        try:
            await single.serve(alone)
            await single.listening()
            async with cluster(directory, joined) as made:
                result["publishes"] = await publishes(
                    single, made, rounds=arguments.rounds, statements=arguments.statements, streams=arguments.streams
                )
                result["hear"] = await hear(single, made, rounds=arguments.rounds, count=arguments.hear)
                if arguments.kills:
                    kills = await failover(made, kills=arguments.kills)
                    worst = max(each["noticed_and_covered_s"] for each in kills)
                    result["failover"] = {"worst_s": worst, "within_10_s": worst <= 10, "kills": kills}
        finally:
            await single.stop()
    return result


def measure(
    run: Callable[[argparse.Namespace, Path], Awaitable[dict[str, Any]]], arguments: argparse.Namespace
) -> None:
    """``run`` with a directory of its own; what it returns is printed, the last line one JSON object."""
    with tempfile.TemporaryDirectory(prefix="kimera-bench-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # PostgreSQL's own user has to get to its part
        result = anyio.run(run, arguments, directory)
    if not arguments.json:
        print(json.dumps(result, indent=2))
    sys.stdout.write(json.dumps(result) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="only the one JSON line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--statements", type=int, default=2_000, help="published in each round on each side")
    parser.add_argument("--streams", type=int, default=16, help="requests (sessions) at a time")
    parser.add_argument("--hear", type=int, default=100, help="publishes in each round whose events are timed")
    parser.add_argument("--kills", type=int, default=2, help="engines killed; 0: none")
    parser.add_argument(
        "--postgres", default="", help="postgresql+asyncpg://... to use; databases are made in it, and stay"
    )
    parser.add_argument("--redis", default="", help="redis://... to use")
    arguments = parser.parse_args()
    measure(run, arguments)


if __name__ == "__main__":
    main()
