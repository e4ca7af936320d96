"""The index over restarts: mapped from its snapshot and brought up to date, or rebuilt where the snapshot is of no use."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.settings import Settings
from tests.e2e.conftest import StartServer
from tests.e2e.harness import Peer, Server, peer, until, web

pytestmark = pytest.mark.anyio

FILE_LIMIT = 2 << 20
"""Bytes of a file at most: a small database fits, a snapshot, which keeps room for 2,048 vectors, does not."""


@contextmanager
def small_files(_services: Services, _settings: Settings) -> Iterator[None]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
    yield


def snapshots(server: Server) -> list[Path]:
    return sorted(server.data_dir.glob("index-*.snapshot"))


async def index_stats(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with web(server) as http:

        async def told() -> bool:
            answer = await http.get("/v1/stats")
            found.update(answer.json().get("index", {}))
            return answer.status_code == 200  # the first value comes within a second

        await until(told)
    return found


async def field_says(server: Server, geoids: int, open_contradictions: int) -> None:
    """Wait until it does: it tells of changes once in a while."""
    async with web(server) as http:

        async def told() -> bool:
            state = (await http.get("/v1/field")).json()
            return (state.get("geoids"), state.get("open_contradictions")) == (geoids, open_contradictions)

        await until(told)


async def service_line(server: Server, name: str) -> str:
    async with web(server) as http:
        report = await http.get("/health")
        assert (report.status_code, report.json()["status"]) == (200, "ok")
        line: str = report.json()["services"][name]
        return line


async def say(client: Peer, count: int, start: int = 0) -> None:
    for n in range(start, start + count):
        await client.publish(
            id=f"g{n}", text=f"Pump {n} is in hall {n}.", symbolic_state={"subject": f"pump {n}", "state": f"state {n}"}
        )


async def against(client: Peer, n: int) -> list[str]:
    """The statements that one about pump ``n`` in another state clashes with."""
    reply = await client.publish(symbolic_state={"subject": f"pump {n}", "state": "quite another one"})
    clashes = [each["a"] for each in reply["contradictions"]]
    await client.done("delete", geoid_id=reply["geoid"]["id"])
    return clashes


def stop(server: Server) -> None:
    server.terminate()
    assert server.wait() == 0


async def test_a_clean_stop_leaves_a_snapshot_that_the_start_maps(start_server: StartServer) -> None:
    server = start_server()
    async with peer(server) as client:
        await say(client, 30)
        await client.publish(id="clash", symbolic_state={"subject": "pump 3", "state": "on fire"})
        head = client.connected["offset"]
    await field_says(server, 31, 1)
    stop(server)
    assert len(snapshots(server)) == 1

    again = start_server()
    stats = await index_stats(again)
    assert (stats["snapshot"]["source"], stats["snapshot"]["replayed"]) == ("snapshot", 0)
    assert stats["snapshot"]["offset"] > head
    assert stats["geoids"] == 31
    assert stats["mapped_bytes"] > 0
    await field_says(again, 31, 1)
    async with peer(again) as client:
        assert sorted(await against(client, 3)) == ["clash", "g3"]
        assert await against(client, 29) == ["g29"]
    assert again.errors() == []


async def test_killed_between_snapshots_the_tail_of_the_log_is_replayed(start_server: StartServer) -> None:
    settings = {"KIMERA_PERFORMANCE__SNAPSHOT_ENTRIES": "20", "KIMERA_STREAM__STATS_INTERVAL": "0.1"}
    server = start_server(**settings)
    async with peer(server) as client:
        await say(client, 25)

        async def written() -> bool:
            return (await index_stats(server))["snapshot"]["written"] >= 1

        await until(written)
        await client.publish(id="g1", symbolic_state={"subject": "pump 1", "state": "changed"})
        await client.done("delete", geoid_id="g2")
        await say(client, 5, 25)
        (clash,) = (await client.publish(id="c", symbolic_state={"subject": "pump 3", "state": "x"}))["contradictions"]
        await client.publish(id="d", symbolic_state={"subject": "pump 4", "state": "x"})
        resolved = await client.done("resolve", contradiction_id=clash["id"], decision="buffer")
        head = resolved["offset"]
    await field_says(server, 31, 1)
    offset = (await index_stats(server))["snapshot"]["offset"]
    server.kill()

    again = start_server(**settings)
    stats = (await index_stats(again))["snapshot"]
    assert (stats["source"], stats["rejected"]) == ("snapshot", "")
    assert stats["replayed"] == head - offset > 0
    await field_says(again, 31, 1)
    async with peer(again) as client:
        assert await against(client, 2) == [], "it was deleted after the snapshot"
        assert await against(client, 28) == ["g28"], "it was said after the snapshot"
        reply = await client.publish(symbolic_state={"subject": "pump 1", "state": "state 1"})
        assert [each["a"] for each in reply["contradictions"]] == ["g1"], "it was changed after the snapshot"
    assert again.errors() == []


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [("flipped", "damaged"), ("cut short", "damaged"), ("not ours", "foreign"), ("another", "foreign")],
)
async def test_a_snapshot_of_no_use_is_told_of_and_the_index_rebuilt(
    start_server: StartServer, tmp_path: Path, trouble: str, reason: str
) -> None:
    server = start_server()
    async with peer(server) as client:
        await say(client, 20)
    stop(server)
    (path,) = snapshots(server)
    content = bytearray(path.read_bytes())
    if trouble == "flipped":
        content[next(i for i in range(len(content) // 2, len(content)) if content[i])] ^= 0x40
    elif trouble == "cut short":
        del content[-100:]
    elif trouble == "not ours":
        content = bytearray(b"something else entirely" * 1_000)
    else:
        other = start_server(tmp_path / "other")
        async with peer(other) as client:
            await say(client, 20)
        stop(other)
        content = bytearray(snapshots(other)[0].read_bytes())
    path.write_bytes(content)

    again = start_server()
    stats = (await index_stats(again))["snapshot"]
    assert stats["source"] == "vault"
    assert stats["rejected"].startswith(reason)
    assert reason in await service_line(again, "snapshots")
    assert any('"index snapshot not used"' in line and f'"{reason}"' in line for line in again.lines)
    await field_says(again, 20, 0)
    async with peer(again) as client:
        assert await against(client, 7) == ["g7"]
    assert again.errors() == []
    stop(again)
    last = start_server()
    assert (await index_stats(last))["snapshot"]["source"] == "snapshot", "the stop has written a good one"


async def test_a_snapshot_ahead_of_a_restored_database_is_never_used(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server()
    async with peer(server) as client:
        await say(client, 10)
    stop(server)
    (database,) = server.data_dir.glob("*.sqlite3")
    shutil.copy(database, tmp_path / "backup")
    server = start_server()
    async with peer(server) as client:
        await say(client, 10, 10)
        await client.done("delete", geoid_id="g0")
    stop(server)
    for file in server.data_dir.glob("*.sqlite3*"):
        file.unlink()
    shutil.copy(tmp_path / "backup", database)

    again = start_server()
    stats = (await index_stats(again))["snapshot"]
    assert (stats["source"], stats["replayed"], stats["offset"]) == ("snapshot", 0, 10), (
        "the older one, of the backup's day"
    )
    assert stats["rejected"].startswith("ahead")
    async with peer(again) as client:
        assert await against(client, 15) == []
        assert await against(client, 0) == ["g0"]
        await say(client, 30, 100)  # as far as the other future had come, and further
    again.kill()
    last = start_server()
    async with peer(last) as client:
        assert await against(client, 15) == []
        assert await against(client, 120) == ["g120"]
    assert last.errors() == []


async def test_a_full_disk_costs_the_snapshot_and_nothing_else(start_server: StartServer) -> None:
    server = start_server(
        tamper=small_files, KIMERA_PERFORMANCE__SNAPSHOT_ENTRIES="5", KIMERA_STREAM__STATS_INTERVAL="0.1"
    )
    async with peer(server) as client:
        await say(client, 6)

        async def failed() -> bool:
            return (await index_stats(server))["snapshot"]["failed"] >= 1

        await until(failed)
        await say(client, 6, 6)
        assert await against(client, 8) == ["g8"]
    stats = (await index_stats(server))["snapshot"]
    assert (stats["written"], stats["offset"]) == (0, None)
    assert "could not be written" in stats["error"]
    assert "no snapshot is written" in await service_line(server, "snapshots")
    async with web(server) as http:
        assert (await http.get("/readyz")).status_code == 200
        metrics = (await http.get("/metrics")).text
    assert 'kimera_index_snapshots_total{outcome="failed"} 1.0' in metrics
    assert any('"index snapshot not written"' in line and '"warning"' in line for line in server.lines)
    assert server.errors() == []
    stop(server)
    assert list(server.data_dir.glob("index-*")) == []
    again = start_server()
    assert (await index_stats(again))["snapshot"]["source"] == "vault"
    await field_says(again, 12, 0)
