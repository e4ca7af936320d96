"""A server whose index is past the size from which scans go through a sieve: it makes one, tells of it, and answers as before."""

import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import peer, until, web

pytestmark = pytest.mark.anyio


async def test_a_large_index_gets_a_sieve_that_is_told_on_stats(start_server: StartServer) -> None:
    server = start_server(KIMERA_PERFORMANCE__SIEVE_FROM="40", KIMERA_STREAM__STATS_INTERVAL="0.1")
    async with peer(server) as client, web(server) as http:
        index = (await http.get("/v1/stats")).json()["index"]
        assert (index["sieved"], index["cells"]) == (0, 0)
        for n in range(60):
            text = f"Depot {n} keeps {n * 7} crates of lamps."
            await client.done(
                "publish", geoid={"id": f"g{n}", "text": text, "symbolic_state": {"subject": f"s{n}", "state": "one"}}
            )

        async def made() -> bool:
            return bool((await http.get("/v1/stats")).json()["index"]["cells"])

        await until(made)
        reply = await client.done("publish", geoid={"id": "new", "symbolic_state": {"subject": "s7", "state": "two"}})
        assert [each["a"] for each in reply["contradictions"]] == ["g7"]
        body = {"text": "Depot 31 keeps 217 crates of lamps.", "relation": "related", "k": 3}
        found = (await http.post("/v1/search", json=body)).json()["items"]
        assert found[0]["geoid"]["id"] == "g31"
