"""A real server that compares only within sessions, agents or principals, and that says what its stages found."""

from typing import Any

import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server, peer, until, web

pytestmark = pytest.mark.anyio

OPEN, CLOSED = "The door of hall 3 is open.", "The door of hall 3 is closed."


async def published(server: Server, *geoids: dict[str, Any]) -> list[set[str]]:
    """What each contradicts (texts of what came before it), all sent at once."""
    async with peer(server) as client:
        ids = [await client.send("publish", geoid=each) for each in geoids]
        replies = [await client.reply(each) for each in ids]
    return [{each["a"] for each in reply["contradictions"]} for reply in replies]


async def test_sessions_are_kept_apart_over_a_restart_from_a_snapshot(start_server: StartServer) -> None:
    settings = {
        "KIMERA_SCORING__COMPARE_WITHIN": "session",
        "KIMERA_SCORING__CANDIDATES": "4",
        "KIMERA_SCORING__VERIFY_CANDIDATES": "4",
    }
    server = start_server(**settings)
    crowd = [{"id": f"crowd-{n}", "text": OPEN, "session_id": "s1"} for n in range(30)]
    assert await published(server, *crowd, {"id": "mine", "text": OPEN, "session_id": "s2"}) == [set()] * 31
    assert await published(server, {"text": CLOSED, "session_id": "s2"}) == [{"mine"}], "30 others do not crowd it out"
    assert await published(server, {"text": CLOSED, "session_id": "s3"}, {"text": CLOSED}) == [set(), set()]
    # Among each other in one batch as well; an update goes where it is said.
    together = [
        {"id": "x", "text": OPEN, "session_id": "s4"},
        {"text": CLOSED, "session_id": "s5"},
        {"text": CLOSED, "session_id": "s4"},
    ]
    assert await published(server, *together) == [set(), set(), {"x"}]
    symbolic = [
        {"id": f"{name}", "symbolic_state": {"subject": "db", "is": n}, "session_id": name}
        for n, name in enumerate("pq")
    ]
    assert await published(server, *symbolic, {"symbolic_state": {"subject": "db", "is": 9}, "session_id": "q"}) == [
        set(),
        set(),
        {"q"},
    ]
    server.terminate()
    assert server.wait() == 0

    server = start_server(**settings)
    assert await published(server, {"text": CLOSED, "session_id": "s2", "id": "again"}) == [{"mine"}]
    async with web(server) as http:
        assert '"source": "snapshot"' in server.text
        # The same statement, said in another session, no longer contradicts what is said here.
        moved = await http.patch("/v1/geoids/mine", json={"session_id": "s9", "text": OPEN + " "})
        assert moved.status_code == 200
        dissolved = (await http.get("/v1/contradictions", params={"geoid_id": "mine", "state": "dissolved"})).json()
        assert len(dissolved["items"]) == 2
    assert await published(server, {"text": CLOSED, "session_id": "s2"}) == [set()]
    assert "crash" not in server.text


@pytest.mark.parametrize(("within", "field"), [("all", None), ("agent", "originator_agent_id"), ("principal", None)])
async def test_other_groups(start_server: StartServer, within: str, field: str | None) -> None:
    server = start_server(KIMERA_SCORING__COMPARE_WITHIN=within)
    apart = {} if field is None else {field: "one"}
    [_, other] = await published(server, {"id": "a", "text": OPEN}, {"text": CLOSED, **apart})
    assert other == (set() if field else {"a"})  # all of this is said by one principal
    [mine] = await published(server, {"text": CLOSED})
    assert mine == {"a"}
    await published(server, {"id": "b", "text": OPEN, **apart})
    async with web(server) as http:
        found = (await http.post("/v1/search", json={"text": CLOSED, "relation": "contradicts", "k": 50})).json()
    assert {hit["geoid"]["id"] for hit in found["items"]} == {"a", "b"}, "a search asks everybody"


async def test_a_pair_is_explained_stage_by_stage(start_server: StartServer) -> None:
    server = start_server(KIMERA_SCORING__STAGES='["prefilter", "verify"]')
    async with web(server) as http:
        scored = (
            await http.post("/v1/score", params={"explain": 1}, json={"a": {"text": OPEN}, "b": {"text": CLOSED}})
        ).json()
        plain = (await http.post("/v1/score", json={"a": {"text": OPEN}, "b": {"text": CLOSED}})).json()
    stages = {each["stage"]: each for each in scored.pop("stages")}
    assert scored == plain
    assert {name: each["ran"] for name, each in stages.items()} == {
        "scan": True, "rules": True, "prefilter": True, "verify": False, "scope": False, "threshold": True,
    }  # fmt: skip
    assert stages["threshold"]["passed"]
    assert stages["rules"]["ms"] >= 0


async def test_an_unknown_stage_is_refused_with_what_is_allowed(start_server: StartServer) -> None:
    server = start_server(wait=False, KIMERA_SCORING__STAGES='["verify", "guess"]')
    await until(lambda: server.over)
    assert server.wait() != 0
    assert "KIMERA_SCORING__STAGES" in server.text
    assert "guess" in server.text
