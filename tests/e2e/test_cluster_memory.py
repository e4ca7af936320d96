"""An edge and an engine: each sheds what its own memory has no room for."""

from collections.abc import Iterator

import anyio
import pytest

from tests.e2e.harness import Server, peer, show, until, web
from tests.e2e.nodes import Cluster
from tests.e2e.test_memory import (
    BALLAST,
    LIMIT,
    MB,
    ballasted,
    client_metrics,
)

pytestmark = [pytest.mark.anyio, pytest.mark.postgres, pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(240)]

ALERT = {"edge": 540 * MB, "engine": 490 * MB}
"""An edge takes some 105 MB itself, an engine some 140."""
LEVELS = {"ok": 0, "alert": 1, "shedding": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        for name in ("edge", "engine"):
            made.start(
                name,
                name,
                wait=False,
                tamper=ballasted,
                KIMERA_PERFORMANCE__MAX_MEMORY=str(LIMIT),
                # type: ignore[arg-type]
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
