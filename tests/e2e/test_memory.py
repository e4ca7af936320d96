"""Memory: a limit that is told of, kept and left again; and a server that does not grow under churn."""

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import anyio.to_thread
import pytest

from bench.churn import Load
from bench.memory import SMALL, Sample, table_sizes, take
from kimera_stream.api import services
from kimera_stream.api.nodes import engine
from kimera_stream.infrastructure import resources
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.settings import Settings
from tests.e2e.conftest import StartServer
from tests.e2e.harness import Peer, Server, peer, until, web

pytestmark = pytest.mark.anyio

MB = 1 << 20
LIMIT = 700 * MB
BALLAST = {"alert": 540 * MB, "full": 680 * MB}
"""A server without a model takes 60 to 150 MB."""


@contextlib.contextmanager
def ballasted(_services: Services, settings: Settings) -> Iterator[None]:
    """The process holds as many bytes more as the file ``ballast`` in its data directory says, from its next look at memory on."""
    look = resources.memory_in_use
    held: list[bytearray] = []
    wanted = settings.paths.data_dir / "ballast"

    def with_ballast() -> tuple[int, int]:
        size = int(wanted.read_text() or 0) if wanted.exists() else 0
        if sum(map(len, held)) != size:
            held.clear()
            if size:
                held.append(bytearray(b"\1") * size)
        return look()

    with mock.patch.object(resources, "memory_in_use", with_ballast):
        yield


async def stats_until(stream: Peer, pressure: str) -> dict[str, Any]:
    events = await stream.events_until(
        "stats", lambda found: bool(found) and found[-1]["data"]["memory_pressure"] == pressure
    )
    return dict(events[-1]["data"])


async def test_alert_refusal_and_recovery_around_the_limit(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(
        tamper=ballasted, KIMERA_PERFORMANCE__MAX_MEMORY=str(LIMIT), KIMERA_STREAM__STATS_INTERVAL="0.1"
    )
    ballast = server.data_dir / "ballast"
    async with peer(server) as stream, web(server) as client:
        for channel in ("stats", "geoids"):
            await stream.done("subscribe", channel=channel)
        first = await stream.publish(text="The door is open.", id="before")
        assert (await stats_until(stream, "ok"))["memory_limit"] == LIMIT

        ballast.write_text(str(BALLAST["alert"]))
        told = await stats_until(stream, "alert")
        assert "of the limit of" in told["alerts"][0]
        assert told["caches"]["geoids"] == 0, "emptied"
        assert (await stream.publish(text="The door is shut.", id="meanwhile"))["geoid"]["id"] == "meanwhile"

        ballast.write_text(str(BALLAST["full"]))
        told = await stats_until(stream, "shedding")
        assert "new statements are refused" in told["alerts"][0]
        refused = await stream.ask("publish", geoid={"text": "too much", "id": "refused"})
        assert (refused["code"], refused["temporary"]) == ("overloaded", True)
        assert refused["retry_after"] > 0
        answer = await client.post("/v1/geoids", json={"text": "too much"})
        assert answer.status_code == 503
        assert answer.json()["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
        assert "new statements are refused" in (await client.get("/health")).text
        # Reads, streams and what makes room are served.
        assert (await client.get("/v1/geoids/before")).json()["text"] == "The door is open."
        assert (await client.get("/v1/history", params={"channel": "geoids"})).json()["events"]
        found = (await client.post("/v1/search", json={"text": "the door is open", "k": 3})).json()
        assert {each["geoid"]["id"] for each in found["items"]} >= {"before"}
        async with peer(server) as late:
            await late.done("subscribe", channel="geoids", since={"epoch": late.connected["epoch"], "offset": 0})
            assert (await late.wait_events("geoids", 2))[0]["offset"] == first["offset"]
        await stream.done("delete", geoid_id="meanwhile")
        await stream.wait_events("geoids", 3)
        assert (await client.get("/readyz")).status_code == 200

        ballast.unlink()
        assert (await stats_until(stream, "ok"))["alerts"] == []
        again = await stream.publish(text="The door is open again.", id="after")
        await stream.events_until("geoids", lambda events: events[-1]["offset"] == again["offset"])
    assert (await client_metrics(server))["kimera_memory_refusals_total"] == 2
    assert server.errors() == []


async def client_metrics(server: Server) -> dict[str, float]:
    """Metrics without labels."""
    async with web(server) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in pairs}


@contextlib.contextmanager
def tidied_each_second(_services: Services, _settings: Settings) -> Iterator[None]:
    """What settings let go goes once a second, not once a minute."""
    with mock.patch.object(services, "RETENTION_INTERVAL", 1.0), mock.patch.object(engine, "RETENTION_INTERVAL", 1.0):
        yield


TABLES = {
    "KIMERA_DATABASE__RETENTION_COUNT": "300",
    "KIMERA_DATABASE__RETENTION_AUDIT_COUNT": "5",
    "KIMERA_DATABASE__MAX_CURSORS": "20",
    "KIMERA_PERFORMANCE__IDEMPOTENCY_WINDOW": "4",
}
"""Bounds that half a minute of churn reaches."""


def within_bounds(tables: Mapping[str, int]) -> bool:
    """Whether what grows with traffic is not more than ``TABLES`` and the load's own numbers let it be."""
    return (
        tables["watch"] == 0
        and tables["geoid"] <= 200
        and tables["session"] <= 50
        and tables["idempotency_key"] == 0
        and tables["cursor"] <= 22  # two of them the server's own
        and tables["audit_entry"] <= 5
        and tables["log_entry"] <= 300
        and tables["log_channel"] <= 6 * 300
        and tables["dead_letter"] == tables["checkpoint_request"] == 0
    )


async def settled(
    sizes: Callable[[], Awaitable[dict[str, int]]], within: Callable[[Mapping[str, int]], bool] = within_bounds
) -> dict[str, int]:
    """The tables once they are within their bounds, or as they are when they should long be."""
    found: dict[str, int] = {}
    with anyio.move_on_after(20):
        while not within(found := await sizes()):  # noqa: ASYNC110 - another process
            await anyio.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_churn_leaves_nothing_behind(start_server: StartServer) -> None:
    """Half a minute of everything coming and going. The long form is ``python -m bench.memory``."""
    small = SMALL | {"KIMERA_SCORING__READING_CACHE_BYTES": str(MB // 4)}
    server = start_server(**(small | TABLES), tamper=tidied_each_second, KIMERA_STREAM__STATS_INTERVAL="0.2")
    pid = server.process.pid
    assert pid is not None
    async with web(server) as client:

        async def now(seconds: float) -> Sample:
            await until(lambda: _sampled(client))
            return take(pid, (await client.get("/v1/stats")).json(), seconds)

        load = Load(server.address, publishes=40, connections=15, watches=4, reads=8, geoids=200, sessions=50)
        samples = []
        async with anyio.create_task_group() as group:
            group.start_soon(load.run, name="load")
            for number in range(7):  # a sample each five seconds, the server's own
                before = (await client.get("/v1/stats")).json()["uptime"]
                await until(lambda before=before: _later(client, before + 5))
                samples.append(await now(5.0 * number))
            group.cancel_scope.cancel()
        await until(lambda: _quiet(client))
        before = (await client.get("/v1/stats")).json()["uptime"]
        await until(lambda: _later(client, before + 6))
        after = await now(60.0)
    warm, most = samples[2:], samples[2]
    assert load.done["visit"] > 50
    assert load.done["published"] > 100
    assert not {"overloaded", "unavailable", "internal", "bad_request"} & set(load.done), load.done
    assert load.done["unwatch 200"] == load.done["watch 201"] > 0
    # What came has gone.
    assert (after.connections, after.subscriptions) == (0, 0)
    assert after.tasks <= most.tasks
    assert after.descriptors <= min(each.descriptors for each in samples)
    assert after.threads <= most.threads + 2
    tables = await settled(partial(anyio.to_thread.run_sync, table_sizes, server.data_dir / "kimera.sqlite3"))
    assert within_bounds(tables), tables
    assert tables["cursor"] >= 20, "as many as may be: the load has come to the bound"
    assert load.done["cursor limit_exceeded"] > 0
    assert load.done["cursor acked"] >= 20
    # What is bounded stays within its bound, and what is small stays small.
    assert after.sessions <= 50
    for name, bound in (
        ("texts", 4 * MB),
        ("readings", MB // 4),
        ("geoids", 4 * MB),
        ("tail", 2 * MB),
        ("catch_up", 1 * MB),
        ("conversations", MB),
    ):
        assert max(each.caches[name] for each in samples) <= bound + 4_096, name
    assert after.own - warm[0].own < 40 * MB
    assert server.errors() == []


async def _sampled(client: Any) -> bool:
    answer = await client.get("/v1/stats")
    return answer.status_code == 200 and answer.json()["process"]["tasks"] > 0


async def _later(client: Any, uptime: float) -> bool:
    return bool((await client.get("/v1/stats")).json()["uptime"] >= uptime)


async def _quiet(client: Any) -> bool:
    return bool((await client.get("/v1/stats")).json()["connections"] == 0)
