"""A full index, as its settings say: new statements refused with a clear error, or the oldest let go; told on ``stats``."""

from typing import Any

import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Peer, Server, peer, until, web

pytestmark = pytest.mark.anyio

STATS = {"KIMERA_STREAM__STATS_INTERVAL": "0.1", "KIMERA_STREAM__FIELD_INTERVAL": "0.1"}


async def index_says(server: Server, **expected: Any) -> None:
    async with web(server) as http:

        async def told() -> bool:
            index = (await http.get("/v1/stats")).json().get("index", {})
            return bool(index) and all(index[name] == value for name, value in expected.items())

        await until(told)


async def say(client: Peer, n: int, **fields: Any) -> dict[str, Any]:
    return await client.ask(
        "publish", geoid={"id": f"g{n}", "symbolic_state": {"subject": f"s{n}", "state": "one"}, **fields}
    )


async def clashes(client: Peer, n: int) -> list[str]:
    """Whom an update of ``g0`` that contradicts ``g{n}`` clashes with."""
    reply = await client.done("publish", geoid={"id": "g0", "symbolic_state": {"subject": f"s{n}", "state": "two"}})
    return [each["a"] for each in reply["contradictions"]]


async def test_refusing(start_server: StartServer) -> None:
    server = start_server(KIMERA_PERFORMANCE__MAX_GEOIDS="3", **STATS)
    async with peer(server) as client, web(server) as http:
        for n in range(3):
            assert (await say(client, n))["op"] == "published"
        await index_says(server, geoids=3, capacity=3, full=True, refused=0, policy="refuse")
        refused = await say(client, 3)
        assert (refused["op"], refused["code"], refused["temporary"]) == ("error", "limit_exceeded", False)
        assert "3 geoids, KIMERA_PERFORMANCE__MAX_GEOIDS" in refused["message"]
        assert "evict_oldest" in refused["message"]
        over_http = await http.post("/v1/geoids", json={"text": "One more."})
        assert over_http.json()["code"] == "limit_exceeded"
        await index_says(server, refused=2)
        assert (await http.get("/v1/geoids/g3")).status_code == 404, "nothing of it was stored"
        assert (await say(client, 1, metadata={"again": True}))["op"] == "published", "updates are taken"
        await client.done("delete", geoid_id="g2")
        await index_says(server, geoids=2, full=False)
        assert (await say(client, 3))["op"] == "published"
    server.kill()
    smaller = start_server(wait=False, KIMERA_PERFORMANCE__MAX_GEOIDS="2")
    assert smaller.wait() == 1
    (line,) = [each for each in smaller.lines if each.startswith("kimera-stream: service index failed for good")]
    assert "KIMERA_PERFORMANCE__MAX_GEOIDS" in line
    assert "Traceback" not in smaller.text


async def test_refusing_by_bytes(start_server: StartServer) -> None:
    server = start_server(KIMERA_PERFORMANCE__MAX_INDEX_BYTES="5000", **STATS)
    async with peer(server) as client:
        replies = [await say(client, n, text=f"This is statement {n}.") for n in range(20)]
        published = [reply["op"] == "published" for reply in replies]
        assert published.index(False) > 3
        refused = replies[published.index(False)]
        assert (refused["code"], "5,000 bytes, KIMERA_PERFORMANCE__MAX_INDEX_BYTES" in refused["message"]) == (
            "limit_exceeded",
            True,
        )
        await index_says(server, max_bytes=5000, full=True, refused=published.count(False))
    assert any('"index full"' in line for line in server.lines)


async def test_letting_the_oldest_go(start_server: StartServer) -> None:
    settings = {"KIMERA_PERFORMANCE__MAX_GEOIDS": "3", "KIMERA_PERFORMANCE__INDEX_FULL": "evict_oldest", **STATS}
    server = start_server(**settings)
    async with peer(server) as client, web(server) as http:
        for n in range(5):
            assert (await say(client, n))["op"] == "published"
        await index_says(server, geoids=3, full=True, evicted=2, refused=0, policy="evict_oldest")
        assert (await http.get("/v1/geoids/g1")).status_code == 200, "it is still stored"
        # An update takes a new place among the newest: g2 goes when g0 comes back.
        assert await clashes(client, 4) == ["g4"]
        assert await clashes(client, 2) == []

        async def field_follows() -> bool:
            return (await http.get("/v1/field")).json().get("geoids") == 3

        await until(field_follows)
    server.terminate()
    assert server.wait() == 0
    again = start_server(**settings)
    await index_says(again, geoids=3, evicted=0)
    async with peer(again) as client:
        assert await clashes(client, 3) == ["g3"]
        assert (await say(client, 9))["op"] == "published"
        assert await clashes(client, 3) == [], "it was the oldest before the stop, and is so after it"
    assert again.errors() == []


@pytest.mark.parametrize("device", ["torch-cpu", "cuda"])
async def test_the_scan_through_torch(start_server: StartServer, device: str) -> None:
    server = start_server(KIMERA_SCORING__SCAN_DEVICE=device, **STATS)
    async with peer(server) as client, web(server) as http:
        for n in range(5):
            assert (await say(client, n, text=f"The gate {n} is open."))["op"] == "published"
        assert await clashes(client, 3) == ["g3"]
        found = await http.post("/v1/search", json={"text": "The gate 2 is open.", "relation": "related", "k": 1})
        assert [each["geoid"]["id"] for each in found.json()["items"]] == ["g2"]
        index = (await http.get("/v1/stats")).json()["index"]
        assert index["device"] == device
        if device == "cuda" and index["device_trouble"] is not None:  # the kernel has found it
            assert "no CUDA device" in index["device_trouble"]
            await index_says(server, device_bytes=0)
        else:
            assert index["device_trouble"] is None
            await index_says(server, device_bytes=262_144 * (2 * 384 + 4))
    assert server.errors() == []
