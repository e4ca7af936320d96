"""A disk that takes minutes over an fsync: new writes are told so at once, and everything else goes on."""

import shutil
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.e2e.harness import metric, offsets, peer, until, web
from tests.oracle import deployments
from tests.oracle.deployments import deployed
from tests.oracle.processes import postgres_binaries

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        shutil.which("gcc") is None and shutil.which("cc") is None, reason="slow fsyncs come from a compiled library"
    ),
]

MINUTES = 600_000
"""Milliseconds that an fsync takes, until it is called off."""
WITHIN = 0.5
ON_POSTGRES = [
    pytest.mark.postgres,
    pytest.mark.skipif(postgres_binaries() is None, reason="starts a PostgreSQL of its own: its programs are not here"),
]


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
    }.items():
        monkeypatch.setitem(deployments.SETTINGS, name, value)


async def lasting(http: httpx.AsyncClient) -> bool:
    return await metric(http, "kimera_commit_lasting_seconds", writer="vault") > WITHIN


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


async def read_everything(server: Any, http: httpx.AsyncClient, listener: Any, known: dict[str, Any]) -> None:
    """Reads, replays, live streams and heartbeats, all while nothing can be committed."""
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
    await listener.events_until("stats", lambda events: bool(events) and any(SETTING in a for a in alerts(events[-1])))
    heard = len(listener.events("stats"))
    await listener.events_until("stats", lambda events: len(events) > heard)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=ON_POSTGRES)])
async def test_new_writes_are_refused_while_an_fsync_hangs_and_the_rest_goes_on(kind: str, tmp_path: Path) -> None:
    async with deployed(kind, tmp_path) as deployment:
        server, shim = deployment.nodes[0].server, deployment.shims[0]
        async with web(server) as http, peer(server) as speaker, peer(server) as listener:  # type: ignore[arg-type]
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
                    await read_everything(server, http, listener, known)

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

                async def engine_hangs() -> bool:
                    return any([await lasting(door) for door in doors])

                await until(engine_hangs)
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
