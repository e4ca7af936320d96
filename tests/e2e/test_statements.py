"""Statements over HTTP and WebSocket: published, updated, deleted, searched; contradictions that come and go."""

import json
from typing import Any

import httpx
import msgspec
import pytest

from tests.e2e.harness import Server, peer

pytestmark = pytest.mark.anyio

NDJSON = {"content-type": "application/x-ndjson"}


async def say(http: httpx.AsyncClient, **geoid: Any) -> dict[str, Any]:
    response = await http.post("/v1/geoids", json=geoid)
    assert response.status_code in (200, 201), response.text
    return response.json()


async def open_of(http: httpx.AsyncClient, geoid_id: str) -> list[dict[str, Any]]:
    response = await http.get(f"/v1/geoids/{geoid_id}/contradictions", params={"state": "open"})
    assert response.status_code == 200, response.text
    return response.json()["items"]


async def test_one_statement(server: Server, http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/geoids", json={"id": "one", "text": "The kettle is on."})
    assert response.status_code == 201
    assert response.headers["location"] == "/v1/geoids/one"
    told = response.json()
    assert (told["duplicate"], told["geoid"]["version"]) == (False, 1)
    assert (await http.get("/v1/geoids/one")).json() == told["geoid"]
    with_vector = (await http.get("/v1/geoids/one", params={"vector": "true"})).json()
    assert len(with_vector["vector"]) == 384
    again = await http.post("/v1/geoids", json={"id": "one", "text": "The kettle is off."})
    assert (again.status_code, again.json()["geoid"]["version"]) == (200, 2)
    assert again.json()["offset"] > told["offset"]
    assert again.json()["geoid"]["created_at"] == told["geoid"]["created_at"]


async def test_an_array_is_answered_in_order_each_for_itself(server: Server, http: httpx.AsyncClient) -> None:
    items = [
        {"id": "array-1", "symbolic_state": {"subject": "array", "gate": "open"}},
        {"text": ""},
        {"geoid": {"id": "array-2", "symbolic_state": {"subject": "array", "gate": "shut"}}, "key": "array-key"},
        {"geoid": {"id": "array-2", "symbolic_state": {"subject": "array", "gate": "shut"}}, "key": "array-key"},
    ]
    for kind, body in (("json", msgspec.json.encode(items)), ("msgpack", msgspec.msgpack.encode(items))):
        response = await http.post(
            "/v1/geoids", content=body, headers={"content-type": f"application/{kind}", "accept": f"application/{kind}"}
        )
        assert response.status_code == 200
        assert response.headers["content-type"] == f"application/{kind}"
        decode = msgspec.json.decode if kind == "json" else msgspec.msgpack.decode
        first, bad, second, repeated = decode(response.content)
        assert first["geoid"]["id"] == "array-1"
        assert bad["code"] == "bad_request"
        assert repeated["duplicate"]
        assert repeated["offset"] == second["offset"]
        if kind == "json":
            assert [each["a"] for each in second["contradictions"]] == ["array-1"]


async def test_a_stream_of_lines_is_answered_in_order_as_it_comes(server: Server) -> None:
    """Answers come while the body is still being sent: the stream is one in both directions."""
    import anyio

    stream = await anyio.connect_tcp(*server.address.split(":"))  # type: ignore[arg-type]
    head = f"POST /v1/geoids HTTP/1.1\r\nHost: {server.address}\r\nContent-Type: application/x-ndjson\r\n"
    await stream.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
    seen = b""
    with anyio.fail_after(20):
        for number in range(5):
            line = json.dumps({"id": f"stream-{number}", "text": f"Line number {number} of the stream."}).encode()
            await stream.send(b"%x\r\n%b\n\r\n" % (len(line) + 1, line))
            while f'"line":{number + 1}'.encode() not in seen:
                seen += await stream.receive()
        await stream.send(b"0\r\n\r\n")
        while not seen.endswith(b"0\r\n\r\n"):
            seen += await stream.receive()
    await stream.aclose()


async def test_many_lines_at_once(server: Server, http: httpx.AsyncClient) -> None:
    """300 lines with every tenth bad: each answered in its place, offsets of the good ones rising by one each."""
    lines = [
        b"{bad" if n % 10 == 3 else json.dumps({"id": f"many-{n}", "symbolic_state": {f"many-{n}": n}}).encode()
        for n in range(300)
    ]
    response = await http.post("/v1/geoids", content=b"\n".join(lines), headers=NDJSON)
    answers = [json.loads(line) for line in response.text.splitlines()]
    assert [each["line"] for each in answers] == list(range(1, 301))
    for n, answer in enumerate(answers):
        if n % 10 == 3:
            assert answer["code"] == "bad_request"
        else:
            assert answer["geoid"]["id"] == f"many-{n}"
    good = [each["offset"] for each in answers if "offset" in each]
    assert good == list(range(good[0], good[0] + 270))


async def test_an_update_dissolves_what_no_longer_holds(server: Server, http: httpx.AsyncClient) -> None:
    await say(http, id="up-1", symbolic_state={"subject": "up", "valve": "open", "level": 3})
    second = await say(http, id="up-2", symbolic_state={"subject": "up", "valve": "shut", "level": 4})
    (found,) = second["contradictions"]
    async with peer(server) as listener:
        await listener.done("subscribe", channel="geoid:up-2")
        # Only the label changes: what is stated, and so the contradiction, stays.
        same = await http.patch("/v1/geoids/up-2", json={"purpose": "report"})
        assert same.json()["geoid"]["version"] == 2
        assert [each["id"] for each in await open_of(http, "up-2")] == [found["id"]]
        # Still another level: the same contradiction in a new version.
        still = await http.patch("/v1/geoids/up-2", json={"symbolic_state": {"subject": "up", "level": 4}})
        (kept,) = still.json()["contradictions"]
        assert (kept["id"], kept["version"]) == (found["id"], 2)
        assert still.json()["geoid"]["purpose"] == "report"
        fixed = await http.patch("/v1/geoids/up-2", json={"symbolic_state": {"subject": "up", "level": 3}})
        assert fixed.json()["contradictions"] == []
        events = await listener.wait_events("geoid:up-2", 5)
        assert [each["type"] for each in events] == [
            "geoid.updated",
            "geoid.updated",
            "contradiction.found",
            "geoid.updated",
            "contradiction.dissolved",
        ]
        assert (events[-1]["data"]["id"], events[-1]["data"]["state"]) == (found["id"], "dissolved")
    assert await open_of(http, "up-1") == []
    assert (await http.get(f"/v1/contradictions/{found['id']}")).json()["state"] == "dissolved"


async def test_patch_keeps_what_it_leaves_out(server: Server, http: httpx.AsyncClient) -> None:
    await say(
        http,
        id="patch",
        text="The bakery opens at seven.",
        symbolic_state={"subject": "bakery", "opens": 7},
        semantic_state={"bread": 1.0},
        metadata={"source": "sign"},
        originator_agent_id="walker",
    )
    told = (await http.patch("/v1/geoids/patch", json={"metadata": {"source": "owner"}})).json()["geoid"]
    assert (told["text"], told["symbolic_state"]) == ("The bakery opens at seven.", {"subject": "bakery", "opens": 7})
    assert (told["metadata"], told["originator_agent_id"], told["version"]) == ({"source": "owner"}, "walker", 2)
    whole = await say(http, id="patch", text="The bakery opens at eight.")
    assert (whole["geoid"]["symbolic_state"], whole["geoid"]["metadata"]) == ({}, {})
    assert (await http.patch("/v1/geoids/patch", json={})).status_code in (200, 400)
    other = await http.patch("/v1/geoids/patch", json={"id": "somebody-else", "text": "x"})
    assert other.status_code == 400


async def test_a_delete_dissolves_and_the_id_can_be_said_anew(server: Server, http: httpx.AsyncClient) -> None:
    await say(http, id="del-1", symbolic_state={"subject": "del", "lamp": "on"})
    second = await say(http, id="del-2", symbolic_state={"subject": "del", "lamp": "off"})
    (found,) = second["contradictions"]
    gone = await http.delete("/v1/geoids/del-1")
    assert gone.status_code == 200
    assert (await http.get("/v1/geoids/del-1")).status_code == 404
    assert (await http.delete("/v1/geoids/del-1")).status_code == 404
    assert await open_of(http, "del-2") == []
    assert (await http.get(f"/v1/contradictions/{found['id']}")).json()["state"] == "dissolved"
    third = await say(http, symbolic_state={"subject": "del", "lamp": "dim"})
    assert [each["a"] for each in third["contradictions"]] == ["del-2"]
    anew = await say(http, id="del-1", symbolic_state={"subject": "del", "lamp": "on"})
    assert anew["geoid"]["version"] == 1
    assert len(anew["contradictions"]) == 2
    history = (await http.get("/v1/history", params={"channel": "geoid:del-1"})).json()["events"]
    assert [each["type"] for each in history if each["type"].startswith("geoid.")] == [
        "geoid.created",
        "geoid.deleted",
        "geoid.created",
    ]


async def test_resolving_leaves_a_scar_once(server: Server, http: httpx.AsyncClient) -> None:
    await say(http, id="res-1", symbolic_state={"subject": "res", "seats": 40}, semantic_state={"a": 1})
    second = await say(http, id="res-2", symbolic_state={"subject": "res", "seats": 44}, semantic_state={"b": 1})
    (found,) = second["contradictions"]
    path = f"/v1/contradictions/{found['id']}"
    resolved = await http.post(f"{path}/resolve", json={"decision": "surge", "reason": "counted again"})
    assert resolved.status_code == 200, resolved.text
    scar = resolved.json()["scar"]
    assert (scar["geoids"], scar["decision"], scar["reason"]) == (["res-1", "res-2"], "surge", "counted again")
    assert scar["resolved_by"] == "anonymous"
    assert scar["vault"] in ("a", "b")
    assert scar["delta_entropy"] == pytest.approx(scar["post_entropy"] - scar["pre_entropy"])
    again = await http.post(f"{path}/resolve", json={"decision": "collapse"})
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    async with peer(server, "msgpack") as client:
        refused = await client.ask("resolve", contradiction_id=found["id"], decision="buffer")
        assert refused["code"] == "conflict"
    assert (await http.get(path)).json()["state"] == "resolved"
    scars = (await http.get("/v1/scars", params={"limit": 1000})).json()["items"]
    assert [each["id"] for each in scars if each["contradiction_id"] == found["id"]] == [scar["id"]]
    assert await open_of(http, "res-1") == []


async def test_lists_page_in_offset_order(server: Server, http: httpx.AsyncClient) -> None:
    told = [await say(http, session_id="pages", symbolic_state={f"pages-{n}": n}) for n in range(5)]
    seen: list[int] = []
    after = 0
    while True:
        params = {"session_id": "pages", "limit": 2, "after": after}
        page = (await http.get("/v1/geoids", params=params)).json()
        seen += [each["offset"] for each in page["items"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert seen == [each["offset"] for each in told]
    await say(http, id="page-c", symbolic_state={"subject": "page-c", "n": 1})
    await say(http, symbolic_state={"subject": "page-c", "n": 2})
    params = {"state": "open", "min_score": 0.9, "limit": 1000}
    contradictions = (await http.get("/v1/contradictions", params=params)).json()["items"]
    assert [each["offset"] for each in contradictions] == sorted(each["offset"] for each in contradictions)
    assert any(each["a"] == "page-c" for each in contradictions)


async def test_a_repeated_key_gives_the_first_result(server: Server, http: httpx.AsyncClient) -> None:
    headers = {"idempotency-key": "key-1"}
    first = await http.post("/v1/geoids", json={"text": "Said once."}, headers=headers)
    second = await http.post("/v1/geoids", json={"text": "Said once."}, headers=headers)
    assert (first.status_code, second.status_code) == (201, 200)
    assert second.json() == {**first.json(), "duplicate": True}
    async with peer(server, "msgpack") as client:
        third = await client.done("publish", geoid={"text": "Said once."}, key="key-1")
        assert (third["duplicate"], third["offset"]) == (True, first.json()["offset"])
        # Sent together: one is published, the other waits for it.
        one = await client.send("publish", geoid={"text": "Said twice at once."}, key="key-2")
        two = await client.send("publish", geoid={"text": "Said twice at once."}, key="key-2")
        replies = [await client.reply(one), await client.reply(two)]
        assert sorted(each["duplicate"] for each in replies) == [False, True]
        assert len({each["offset"] for each in replies}) == 1


async def test_search_and_score(server: Server, http: httpx.AsyncClient) -> None:
    await say(http, id="find-1", text="The heron stands in the northern pond.", symbolic_state={"kind": "bird"})
    await say(http, id="find-2", text="The heron stands in the northern pond at dawn.", symbolic_state={"kind": "time"})
    await say(http, id="find-3", text="Interest rates went up by half a point.")
    body = {"text": "A heron stands in the northern pond.", "relation": "related", "k": 2}
    hits = (await http.post("/v1/search", json=body)).json()["items"]
    assert {hit["geoid"]["id"] for hit in hits} == {"find-1", "find-2"}
    assert hits[0]["score"] >= hits[1]["score"]
    body["filter"] = {"field": "data.symbolic_state.kind", "op": "eq", "value": "time"}
    hits = (await http.post("/v1/search", json=body)).json()["items"]
    assert [hit["geoid"]["id"] for hit in hits] == ["find-2"]
    body = {"text": "The heron does not stand in the northern pond.", "relation": "contradicts", "k": 5}
    hits = (await http.post("/v1/search", json=body)).json()["items"]
    assert "find-1" in {hit["geoid"]["id"] for hit in hits}
    assert "find-3" not in {hit["geoid"]["id"] for hit in hits}
    head = (await http.get("/health")).json()["offset"]
    pair = {"a": {"symbolic_state": {"subject": "s", "n": 1}}, "b": {"symbolic_state": {"subject": "s", "n": 2}}}
    scored = (await http.post("/v1/score", json=pair)).json()
    assert scored["score"] > 0.9
    assert set(scored["components"]) == {
        "relatedness",
        "semantic",
        "embedding_misalignment",
        "layer_conflict",
        "symbolic_opposition",
        "composite",
    }
    assert scored["components"]["symbolic_opposition"] == 1.0
    assert (await http.get("/health")).json()["offset"] == head, "scoring stores nothing"


async def test_unrelated_statements_do_not_contradict(server: Server, http: httpx.AsyncClient) -> None:
    """The original composite ranked unrelated pairs first; here they must not be reported."""
    for text in (
        "The orchestra rehearses on Thursday evening.",
        "Copper melts at 1085 degrees Celsius.",
        "Nobody has fed the cat.",
        "Route 66 was never finished in this county.",
    ):
        assert (await say(http, text=text))["contradictions"] == []


async def test_documents_and_metrics(server: Server, http: httpx.AsyncClient) -> None:
    assert (await http.get("/livez")).status_code == 200
    assert (await http.get("/openapi.json")).json()["openapi"].startswith("3.1")
    assert (await http.get("/asyncapi.json")).json()["asyncapi"].startswith("3.")
    assert (await http.get("/docs")).status_code == 200
    assert "Kimera" in (await http.get("/")).text
    metrics = (await http.get("/metrics")).text
    assert "kimera_log_entries_total" in metrics
    health = (await http.get("/health")).json()
    assert health["status"] == "ok"
    assert all(check["ok"] for check in health["checks"].values())


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_a_delete_does_not_overtake_the_publish_before_it(server: Server, encoding: str) -> None:
    """Commands of one connection that concern one geoid take effect in the order in which they were sent."""
    async with peer(server, encoding) as client:
        for turn in range(20):
            geoid_id = f"order-{encoding}-{turn}"
            sent = [
                await client.send(
                    "publish", geoid={"id": geoid_id, "text": f"Crate {turn} stands in hall {encoding}."}
                ),
                await client.send("delete", geoid_id=geoid_id),
            ]
            replies = [await client.reply(each) for each in sent]
            assert [each["op"] for each in replies] == ["published", "deleted"]
            assert replies[0]["offset"] < replies[1]["offset"]
