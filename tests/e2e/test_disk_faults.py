"""A disk that is slow, full, locked or read-only: new writes are refused, everything else goes on, and it is over by itself."""

import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import metric, offsets, peer, until, web
from tests.oracle import deployments
from tests.oracle.deployments import Deployment, deployed
from tests.oracle.processes import postgres_binaries

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        shutil.which("gcc") is None and shutil.which("cc") is None, reason="the faults come from a compiled library"
    ),
]

MINUTES = 600_000
"""Milliseconds that an fsync takes, until it is called off."""
WITHIN = 0.5
ON_POSTGRES = [
    pytest.mark.postgres,
    pytest.mark.skipif(postgres_binaries() is None, reason="starts a PostgreSQL of its own: its programs are not here"),
]


ALL = {"max_queue": None}
"""Of a listener that is not looked at for a while: its pongs go out meanwhile."""
SETTING = "KIMERA_DATABASE__COMMIT_WITHIN"


def fact(n: object) -> dict[str, object]:
    return {"symbolic_state": {f"fact-{n}": True}}


def alerts(event: dict[str, Any]) -> list[str]:
    return list(event["data"]["alerts"])


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        SETTING: str(WITHIN),
        "KIMERA_STREAM__STATS_INTERVAL": "0.2",
        "KIMERA_DATABASE__BUSY_TIMEOUT": "0.3",
        "KIMERA_PERFORMANCE__RETRY_WITHIN": "0.2",
    }.items():
        monkeypatch.setitem(deployments.SETTINGS, name, value)
    monkeypatch.setitem(deployments.CLUSTER_SETTINGS, SETTING, str(WITHIN))


async def lasting(http: httpx.AsyncClient, writer: str = "vault") -> bool:
    return await metric(http, "kimera_commit_lasting_seconds", writer=writer) > WITHIN


async def refuse_writes(http: httpx.AsyncClient, client: Any, geoid_id: str) -> int:
    """Every kind of write is refused at once; how many were tried."""
    answers = [
        await http.post("/v1/geoids", json=fact("refused")),
        await http.delete(f"/v1/geoids/{geoid_id}"),
        await http.post("/v1/watches", json={"watch": "refused", "text": "The valve is open.", "kinds": ["related"]}),
    ]
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable"), answer.text
        assert float(answer.headers["retry-after"]) > 0
    for op, fields in (
        ("publish", {"geoid": fact("refused")}),
        ("delete", {"geoid_id": geoid_id}),
        ("ack", {"channel": "geoids", "offset": 1, "name": "refused"}),
    ):
        with anyio.fail_after(5):
            reply = await client.ask(op, **fields)
        assert (reply["op"], reply["code"], reply["temporary"]) == ("error", "unavailable", True), (op, reply)
        assert reply["retry_after"] > 0
    return len(answers) + 3


async def read_everything(
    server: Any,
    http: httpx.AsyncClient,
    listener: Any,
    known: dict[str, Any],
    *,
    told: Callable[[dict[str, Any]], bool] = lambda _event: True,
) -> None:
    """Reads, replays, live streams and heartbeats, all while nothing can be committed. ``told``: of a value of ``stats``, whether it is
    the one to wait for; another one has to come after it."""
    geoid = known["geoid"]
    assert (await http.get(f"/v1/geoids/{geoid['id']}")).json()["id"] == geoid["id"]
    found = await http.post("/v1/search", json={"text": "The valve is open."})
    assert geoid["id"] in [hit["geoid"]["id"] for hit in found.json()["items"]]
    pair = {"a": {"text": "The valve is open."}, "b": {"text": "The valve is shut."}}
    assert (await http.post("/v1/score", json=pair)).status_code == 200
    async with peer(server) as newcomer:
        start = {"epoch": newcomer.connected["epoch"], "offset": 0}
        assert (await newcomer.done("subscribe", channel="geoids", since=start))["recovered"]
        replayed = await newcomer.wait_events("geoids", 1)
        assert replayed[0]["offset"] == known["offset"]
        beat = await newcomer.push("heartbeat")
        assert beat["offset"] >= known["offset"]
    await listener.events_until("stats", lambda events: bool(events) and told(events[-1]))
    heard = len(listener.events("stats"))
    await listener.events_until("stats", lambda events: len(events) > heard)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=ON_POSTGRES)])
async def test_new_writes_are_refused_while_an_fsync_hangs_and_the_rest_goes_on(kind: str, tmp_path: Path) -> None:
    async with deployed(kind, tmp_path) as deployment:
        server, shim = deployment.nodes[0].server, deployment.shims[0]
        async with web(server) as http, peer(server) as speaker, peer(server, options=ALL) as listener:  # type: ignore[arg-type]
            known = await speaker.publish(text="The valve is open.")
            for channel in ("geoids", "stats"):
                await listener.done("subscribe", channel=channel)

            shim.sync_takes(MINUTES)
            handed = [await speaker.send("publish", geoid=fact(n), key=f"key-{n}") for n in range(2)]
            try:
                await until(lambda: lasting(http))
                repeated: list[httpx.Response] = []

                async def repeat() -> None:
                    repeated.append(await http.post("/v1/geoids", json=fact(0), headers={"idempotency-key": "key-0"}))

                async with anyio.create_task_group() as group:
                    group.start_soon(repeat)
                    refused = await refuse_writes(http, speaker, known["geoid"]["id"])
                    await read_everything(
                        server, http, listener, known, told=lambda event: any(SETTING in a for a in alerts(event))
                    )

                    ready = await http.get("/readyz")
                    assert ready.status_code == 200, "reads and streams are worth coming here"
                    assert SETTING in ready.json()["services"]["vault"]
                    health = await http.get("/health")
                    assert (health.status_code, health.json()["status"]) == (503, "degraded")
                    assert await metric(http, "kimera_slow_commit_refusals_total", writer="vault") == refused
                    assert repeated == [], "it was handed over before: no false answer"
                    assert not any(speaker.replies[id] for id in handed)

                    shim.sync_takes(0)
                    answers = [await speaker.reply(id) for id in handed]
            finally:
                shim.sync_takes(0)
            assert [answer["offset"] for answer in answers] == [known["offset"] + 1, known["offset"] + 2]
            assert repeated[0].json()["offset"] == answers[0]["offset"]
            assert repeated[0].json()["duplicate"]

            after = await speaker.publish(**fact("after"))
            assert after["offset"] == known["offset"] + 3
            live = await listener.wait_events("geoids", 3)
            assert offsets(live) == [known["offset"] + n for n in (1, 2, 3)]

            async def well() -> bool:
                state = (await http.get("/readyz")).json()["services"]["vault"]
                return state == "ready" and (await http.get("/health")).status_code == 200

            await until(well)
            assert await metric(http, "kimera_slow_commit_refusals_total", writer="vault") == refused
        assert server.defects() == []


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.skipif(
    postgres_binaries() is None or shutil.which("redis-server") is None,
    reason="starts a PostgreSQL and a Redis of its own",
)
async def test_several_nodes_refuse_at_once_what_is_new_and_finish_what_they_have(tmp_path: Path) -> None:
    async with deployed("cluster", tmp_path) as deployment:
        nodes = {node.name: node.server for node in deployment.nodes}
        shim, edge, other = deployment.shims[0], nodes["edge-1"], nodes["edge-2"]
        engines = [server for name, server in nodes.items() if name.startswith("engine")]
        async with AsyncExitStack() as stack:
            doors = [await stack.enter_async_context(web(server)) for server in engines]  # type: ignore[arg-type]
            http = await stack.enter_async_context(web(edge))  # type: ignore[arg-type]
            speaker = await stack.enter_async_context(peer(edge))  # type: ignore[arg-type]
            listener = await stack.enter_async_context(peer(other))  # type: ignore[arg-type]
            known = await speaker.publish(text="The valve is open.")
            await listener.done("subscribe", channel="geoids")
            try:
                shim.sync_takes(MINUTES)
                handed = await speaker.send("publish", geoid=fact("handed"))

                async def all_know() -> bool:
                    """The engine by what it commits, the edge by the word that it lives, which does not get through either."""
                    return any([await lasting(door) for door in doors]) and await lasting(http, "cluster")

                await until(all_know)
                with anyio.fail_after(5):
                    refused = await http.post("/v1/geoids", json=fact("refused"))
                assert (refused.status_code, refused.json()["code"]) == (503, "unavailable"), refused.text
                assert float(refused.headers["retry-after"]) > 0
                assert (await http.get(f"/v1/geoids/{known['geoid']['id']}")).status_code == 200
                async with peer(other) as newcomer:  # type: ignore[arg-type]
                    start = {"epoch": newcomer.connected["epoch"], "offset": 0}
                    assert (await newcomer.done("subscribe", channel="geoids", since=start))["recovered"]
                    assert offsets(await newcomer.wait_events("geoids", 1)) == [known["offset"]]
                assert not speaker.replies[handed]
            finally:
                shim.sync_takes(0)
            answer = await speaker.reply(handed)
            assert answer["op"] == "published", answer

            async def published() -> bool:
                return (await http.post("/v1/geoids", json=fact("after"))).status_code == 201

            await until(published)
            heard = await listener.wait_events("geoids", 2)
            stated = [list(event["data"]["symbolic_state"]) for event in heard]
            assert stated[:2] == [["fact-handed"], ["fact-after"]]
        assert [server.defects() for server in nodes.values()] == [[]] * 4


# -- full, locked, read-only -------------------------------------------------------------------------------------------


@asynccontextmanager
async def full(deployment: Deployment) -> AsyncIterator[None]:
    """No room for another byte."""
    shim = deployment.shims[0]
    shim.disk_full(True)
    try:
        yield
    finally:
        shim.disk_full(False)


@asynccontextmanager
async def read_only(deployment: Deployment) -> AsyncIterator[None]:
    """The file system was remounted read-only under the server, as one is that has found an error."""
    shim = deployment.shims[0]
    shim.read_only(True)
    try:
        yield
    finally:
        shim.read_only(False)


@asynccontextmanager
async def locked(deployment: Deployment) -> AsyncIterator[None]:
    """Another program holds the database's write lock."""

    def hold() -> sqlite3.Connection:
        holder = sqlite3.connect(deployment.database, isolation_level=None, check_same_thread=False)
        holder.execute("BEGIN IMMEDIATE")
        return holder

    with closing(await anyio.to_thread.run_sync(hold)):
        yield


@asynccontextmanager
async def locked_in_postgres(deployment: Deployment) -> AsyncIterator[None]:
    """Another session holds the row that orders writers."""
    assert deployment.postgres is not None
    holder = await asyncpg.connect(deployment.postgres.url().replace("+asyncpg", ""))
    try:
        async with holder.transaction():
            await holder.execute("SELECT head FROM log_state FOR UPDATE")
            yield
    finally:
        await holder.close()


@asynccontextmanager
async def read_only_postgres(deployment: Deployment) -> AsyncIterator[None]:
    """The server has become a standby, as it were: its sessions end, and new ones may not write."""
    assert deployment.postgres is not None
    operator = await asyncpg.connect(deployment.postgres.url().replace("+asyncpg", ""))

    async def make(value: str) -> None:
        await operator.execute("SET default_transaction_read_only = off")
        await operator.execute(f"ALTER DATABASE oracle SET default_transaction_read_only = {value}")
        assert deployment.postgres is not None
        await operator.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'oracle' AND pid <> pg_backend_pid()"
        )

    try:
        await make("on")
        yield
    finally:
        await make("off")
        await operator.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("sqlite", full),
        ("sqlite", locked),
        ("sqlite", read_only),
        pytest.param("postgres", locked_in_postgres, marks=ON_POSTGRES),
        pytest.param("postgres", read_only_postgres, marks=ON_POSTGRES),
    ],
)
async def test_writes_are_refused_while_reads_and_streams_go_on_and_it_is_over_by_itself(
    kind: str, fault: Callable[[Deployment], Any], tmp_path: Path
) -> None:
    async with deployed(kind, tmp_path) as deployment:
        server = deployment.nodes[0].server
        async with web(server) as http, peer(server) as speaker, peer(server, options=ALL) as listener:  # type: ignore[arg-type]
            known = await speaker.publish(text="The valve is open.")
            for channel in ("geoids", "stats"):
                await listener.done("subscribe", channel=channel)
            async with fault(deployment):
                assert (await speaker.ask("publish", geoid=fact("refused")))["code"] == "unavailable"
                await read_everything(server, http, listener, known)
                # What the first one has left behind is met by the next.
                refused = await http.post("/v1/geoids", json=fact("refused"))
                assert (refused.status_code, refused.json()["code"]) == (503, "unavailable"), refused.text
                if fault is not locked_in_postgres:  # the row that orders writers of the log does not hold up cursors
                    reply = await speaker.ask("ack", channel="geoids", offset=1, name="refused")
                    assert (reply["op"], reply["code"]) == ("error", "unavailable")
                assert (await http.get(f"/v1/geoids/{known['geoid']['id']}")).status_code == 200
                assert (await http.get("/readyz")).status_code == 200

            async def published() -> bool:
                return (
                    await http.post("/v1/geoids", json=fact("after"), headers={"idempotency-key": "k"})
                ).status_code < 300

            await until(published)
            (live,) = await listener.wait_events("geoids", 1)
            assert (live["offset"], live["data"]["symbolic_state"]) == (known["offset"] + 1, {"fact-after": True})
        assert server.defects() == []


# -- read-only at the start --------------------------------------------------------------------------------------------


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which may be remounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)):
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["stopped", "killed"])
async def test_a_start_on_a_read_only_disk_ends_with_what_to_do_and_works_once_it_is_writable(
    start_server: StartServer, disk: Path, ended: str
) -> None:
    first = start_server(disk)
    async with peer(first) as client:
        known = await client.publish(text="The valve is open.")
    if ended == "killed":
        first.kill()
    else:
        first.stop()
    assert mount("-o", "remount,ro", str(disk))
    second = start_server(disk, wait=False)
    assert second.wait() == 1
    (line,) = [line for line in second.lines if str(disk) in line]
    assert "KIMERA_PATHS__DATA_DIR" in line
    assert "read-only file system; remount it writable" in line
    assert not any("Traceback" in each or "service failed" in each for each in second.lines)
    assert mount("-o", "remount,rw", str(disk))
    third = start_server(disk)
    async with web(third) as http:
        assert (await http.get(f"/v1/geoids/{known['geoid']['id']}")).status_code == 200
    async with peer(third) as client:
        assert (await client.publish(text="It works again."))["offset"] == known["offset"] + 1
