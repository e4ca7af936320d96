"""An edge and an engine: each sheds what its own memory has no room for, and churn leaves nothing behind in what they share."""

import contextlib
from collections.abc import Iterator, Mapping

import anyio
import pytest

from bench.churn import Load
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.settings import Settings
from tests.e2e.harness import Server, peer, show, until, web
from tests.e2e.nodes import Cluster
from tests.e2e.test_memory import (
    BALLAST,
    LIMIT,
    MB,
    TABLES,
    ballasted,
    client_metrics,
    settled,
    tidied_each_second,
    within_bounds,
)

pytestmark = [pytest.mark.anyio, pytest.mark.postgres, pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(240)]

BOUNDS = TABLES | {
    "KIMERA_PERFORMANCE__IDEMPOTENCY_WINDOW": "60",
    "KIMERA_DATABASE__RETENTION_COUNT": "40",
    "KIMERA_DATABASE__MAX_CURSORS": "5",
}
"""Bounds that some seconds of churn reach; keys of publishes have to outlive the longest wait for an answer."""
ALERT = {"edge": 540 * MB, "engine": 490 * MB}
"""An edge takes some 105 MB itself, an engine some 140."""
LEVELS = {"ok": 0, "alert": 1, "shedding": 2}


@contextlib.contextmanager
def tampered(made: Services, settings: Settings) -> Iterator[None]:
    """With ballast, and tidied once a second."""
    with ballasted(made, settings), tidied_each_second(made, settings):
        yield


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        for name in ("edge", "engine"):
            made.start(
                name,
                name,
                wait=False,
                tamper=tampered,
                KIMERA_PERFORMANCE__MAX_MEMORY=str(LIMIT),
                **BOUNDS,  # type: ignore[arg-type]
            )
        made.ready("edge", "engine")
        anyio.run(made.covered, made.nodes["edge"], 1)
        yield made
    finally:
        for name, node in made.nodes.items():
            show(f"--- {name}", node.text)
        made.close()


async def pressure(node: Server, wanted: str) -> None:
    async def there() -> bool:
        return (await client_metrics(node))["kimera_memory_pressure"] == LEVELS[wanted]

    await until(there)


@pytest.mark.parametrize("short", ["edge", "engine"])
async def test_a_node_short_of_memory_has_new_statements_refused_and_the_rest_served(
    cluster: Cluster, short: str
) -> None:
    edge, node = cluster.nodes["edge"], cluster.nodes[short]
    ballast = node.data_dir / "ballast"
    ballast.parent.mkdir(parents=True, exist_ok=True)  # an edge keeps no files
    async with peer(edge) as client, web(edge) as http:
        await client.done("subscribe", channel="geoids")
        for id_ in ("before", "gone"):
            await client.publish(text="The gate is open.", id=f"{short}-{id_}", vector=None)
        ballast.write_text(str(ALERT[short]))
        await pressure(node, "alert")
        await client.publish(text="The gate is still open.", id=f"{short}-alert")
        ballast.write_text(str(BALLAST["full"]))
        await pressure(node, "shedding")
        refused = await client.ask("publish", geoid={"text": "too much", "id": f"{short}-refused"})
        assert (refused["code"], refused["temporary"]) == ("overloaded", True)
        assert refused["retry_after"] > 0
        assert (await http.get(f"/v1/geoids/{short}-before")).status_code == 200
        found = (await http.post("/v1/search", json={"text": "the gate is open", "k": 9})).json()
        assert f"{short}-before" in {each["geoid"]["id"] for each in found["items"]}
        assert (await client_metrics(node))["kimera_memory_refusals_total"] >= 1
        ballast.unlink()
        await pressure(node, "ok")
        again = await client.publish(text="The gate is open again.", id=f"{short}-after")
        await client.events_until("geoids", lambda events: bool(events) and events[-1]["offset"] == again["offset"])
        assert (await http.get(f"/v1/geoids/{short}-refused")).status_code == 404


async def test_churn_leaves_nothing_behind_in_the_shared_tables(cluster: Cluster) -> None:
    """Statements, cursors and watches, these so many that there is always one that changes while a statement is prepared."""
    edge, engine = cluster.nodes["edge"], cluster.nodes["engine"]
    load = Load(edge.address, publishes=20, connections=6, watches=4, reads=1, geoids=100, sessions=30)

    def enough() -> bool:
        return load.done["published"] >= 45 and load.done["cursor limit_exceeded"] > 0 and load.done["unwatch 200"] > 5

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(load.run, name="load")
            await until(enough)
            group.cancel_scope.cancel()
    finally:
        show(str(load.done))
    assert not {"overloaded", "unavailable", "internal", "bad_request"} & set(load.done), load.done
    assert load.done["unwatch 200"] == load.done["watch 201"]
    (log,) = await cluster.query("SELECT head FROM log_state")
    assert log["head"] > 40, "more than is kept"

    async def sizes() -> dict[str, int]:
        # Nobody waits for the window of the keys here: they are made older than that.
        await cluster.query("UPDATE idempotency_key SET created_at = created_at - 60000")
        tables = await cluster.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        names = [row["tablename"] for row in tables]
        return {name: (await cluster.query(f'SELECT count(*) FROM "{name}"'))[0]["count"] for name in names}

    def within(tables: Mapping[str, int]) -> bool:
        return within_bounds(tables) and 0 < tables["log_entry"] <= 40

    tables = await settled(sizes, within)
    assert within(tables), tables
    assert 5 <= tables["cursor"] <= 7, "as many as may be of one principal, and two of the server's own"
    assert tables["cluster"] == 1
    assert tables["slice"] == 16
    assert tables["node"] == 2, "those that live"
    assert tables["lease"] <= 2
    assert not edge.errors() + engine.errors()
