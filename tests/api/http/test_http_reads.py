"""Contradictions, scars, meaning, history and newest values over HTTP."""

import time
from datetime import UTC, datetime

import msgspec
import pytest

from kimera_stream.core.kept import UsageRecord
from kimera_stream.engines.queries import MOST_RESULTS

pytestmark = pytest.mark.anyio


async def test_contradictions_are_listed_filtered_and_read(world, make_contradiction):
    world.vault.contradictions = {
        "c1": make_contradiction("c1", 1, score=0.5),
        "c2": make_contradiction("c2", 2, score=0.9),
        "c3": make_contradiction("c3", 3, score=0.95, state="resolved"),
    }

    async def ids(http, **params):
        return [item["id"] for item in (await http.get("/v1/contradictions", params=params)).json()["items"]]

    async with world.client() as http:
        assert await ids(http) == ["c1", "c2", "c3"]
        assert await ids(http, state="open") == ["c1", "c2"]
        assert await ids(http, min_score=0.9) == ["c2", "c3"]
        assert await ids(http, after=2) == ["c3"]
        assert await ids(http, geoid_id="nobody") == []
        one = await http.get("/v1/contradictions/c2")
        missing = await http.get("/v1/contradictions/c9")
        wrong = await http.get("/v1/contradictions?state=closed")
        nan = await http.get("/v1/contradictions?min_score=nan")
    assert one.json()["why"] == ["symbolic: status: 'up' vs 'down'"]
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["field"]) == (400, "state")
    assert (nan.status_code, nan.json()["field"]) == (400, "min_score")


async def test_resolving_leaves_a_scar(world, make_contradiction):
    world.vault.contradictions = {"c1": make_contradiction("c1", 1)}
    async with world.client(headers={"authorization": "Bearer judge/resolve"}) as http:
        resolved = await http.post(
            "/v1/contradictions/c1/resolve", json={"decision": "collapse", "reason": "b is newer"}
        )
        again = await http.post("/v1/contradictions/c1/resolve", json={"decision": "collapse"})
        wrong = await http.post("/v1/contradictions/c1/resolve", json={"decision": "maybe"})
        long = await http.post("/v1/contradictions/c1/resolve", json={"decision": "buffer", "reason": "r" * 2001})
        missing = await http.post("/v1/contradictions/c9/resolve", json={"decision": "buffer"})
    assert resolved.status_code == 200
    assert set(resolved.json()) == {"scar", "offset"}
    assert resolved.json()["scar"]["resolved_by"] == "judge"
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    assert (wrong.status_code, wrong.json()["field"]) == (400, "decision")
    assert wrong.json()["detail"] == "decision: expected one of collapse, surge, buffer, got 'maybe'"
    assert long.json()["detail"] == "reason: expected `str` of length <= 2000"
    assert missing.status_code == 404
    async with world.client() as http:
        scars = (await http.get("/v1/scars")).json()
    assert [scar["decision"] for scar in scars["items"]] == ["collapse"]


async def test_score(world):
    async with world.client() as http:
        scored = await http.post("/v1/score", json={"a": {"text": "up"}, "b": {"text": "down"}})
        explained = await http.post("/v1/score?explain=1", json={"a": {"text": "up"}, "b": {"text": "down"}})
        neither = await http.post("/v1/score?explain=maybe", json={"a": {"text": "up"}, "b": {"text": "down"}})
        wrong = await http.post("/v1/score", json={"a": {"text": "up"}, "b": {"text": 1}})
        half = await http.post("/v1/score", json={"a": {"text": "up"}})
    assert "stages" not in scored.json()
    assert explained.json() == scored.json() | {
        "stages": [{"stage": "scan", "ran": True, "passed": True, "value": 0.9}]
    }
    assert (neither.status_code, neither.json()["field"]) == (400, "explain")
    assert scored.json()["why"] == ["up / down"]
    assert scored.json()["components"]["relatedness"] == 0.9
    assert wrong.json()["field"] == "b.text"
    assert half.json()["field"] == "b"
    assert world.vault.head == 0


async def test_search(world):
    async with world.client() as http:
        await http.post("/v1/geoids", json={"text": "the door is open"})
        found = await http.post("/v1/search", json={"text": "door", "relation": "contradicts", "k": 5})
        both = await http.post("/v1/search", json={"text": "door", "vector": [1.0]})
        none = await http.post("/v1/search", json={})
        many = await http.post("/v1/search", json={"text": "door", "k": 0})
        more = await http.post("/v1/search", json={"text": "door", "k": MOST_RESULTS + 1})
        other = await http.post("/v1/search", json={"text": "door", "relation": "likes"})
        bad = await http.post(
            "/v1/search", json={"text": "door", "filter": {"field": "data.text", "op": "like", "value": 1}}
        )
    assert [hit["geoid"]["text"] for hit in found.json()["items"]] == ["the door is open"]
    assert world.knowledge.asked == [
        ("search", {"text": "door", "vector": None, "relation": "contradicts", "k": 5, "filter": None})
    ]
    assert [each.json()["field"] for each in (both, none, many, more)] == ["text", "text", "k", "k"]
    assert other.json()["detail"] == "relation: expected one of contradicts, related, got 'likes'"
    assert (bad.status_code, bad.json()["code"], bad.json()["field"]) == (400, "bad_filter", "filter.op")


async def test_watches(world):
    watch = {"watch": "doors", "text": "the door is open", "kinds": ["contradicts"], "min_score": 0.5}
    async with world.client() as http:
        made = await http.post("/v1/watches", json=watch)
        listed = (await http.get("/v1/watches")).json()
        by_query = await http.delete("/v1/watches", params={"watch": "doors"})
        gone = await http.request("DELETE", "/v1/watches", json={"watch": "doors"})
        nameless = await http.delete("/v1/watches")
        kindless = await http.post("/v1/watches", json={**watch, "kinds": []})
        misnamed = await http.post("/v1/watches", json={**watch, "watch": "a b"})
    assert made.status_code == 201
    assert (made.json()["watch"], made.json()["channel"]) == ("doors", "watch:w-doors")
    assert [item["channel"] for item in listed["items"]] == ["watch:w-doors"]
    assert by_query.json() == {"watch": "doors"}
    assert gone.status_code == 404
    assert [each.json()["field"] for each in (nameless, kindless, misnamed)] == ["watch", "kinds", "watch"]


async def test_history_pages_through_a_channel(world):
    async with world.client() as http:
        for number in range(5):
            await http.post("/v1/geoids", json={"text": str(number)})
        first = (await http.get("/v1/history?channel=geoids&limit=2")).json()
        rest = (await http.get(f"/v1/history?channel=geoids&since=E1:{first['offset']}")).json()
        newest = (await http.get("/v1/history?channel=geoids&limit=1&reverse=true")).json()
        packed = await http.get("/v1/history?channel=geoids&limit=1", headers={"accept": "application/msgpack"})
    assert set(first) == {"events", "epoch", "offset", "more"}
    assert [event["data"]["text"] for event in first["events"]] == ["0", "1"]
    assert (first["epoch"], first["offset"], first["more"]) == ("E1", 2, True)
    assert first["events"][0]["op"] == "event"
    assert [event["offset"] for event in rest["events"]] == [3, 4, 5]
    assert rest["more"] is False
    assert [event["offset"] for event in newest["events"]] == [5]
    assert newest["offset"] == 5
    assert msgspec.msgpack.decode(packed.content)["events"][0]["data"]["text"] == "0"


@pytest.mark.parametrize(
    ("query", "code", "field"),
    [
        ("", "bad_request", "channel"),
        ("channel=nowhere", "bad_channel", "channel"),
        ("channel=geoids&since=E1:9", "bad_position", "since.offset"),
        ("channel=geoids&since=nine", "bad_position", "since"),
        ("channel=geoids&since=OTHER:1", "bad_position", "since"),
        ("channel=geoids&limit=100000", "bad_request", "limit"),
        ("channel=geoids&reverse=perhaps", "bad_request", "reverse"),
    ],
)
async def test_history_refuses_by_parameter(world, query, code, field):
    async with world.client() as http:
        answer = await http.get(f"/v1/history?{query}")
    assert answer.status_code == 400
    assert (answer.json()["code"], answer.json()["field"]) == (code, field)


async def test_newest_values(world):
    async with world.client() as http:
        early_stats = await http.get("/v1/stats")
        early_field = await http.get("/v1/field")
        world.hub.latest("stats", "stats.updated", b'{"rate":1.5}', offset=0)
        world.hub.latest("field", "field.updated", b'{"entropy":2.5}', offset=0)
        stats = await http.get("/v1/stats")
        field = await http.get("/v1/field")
    assert (early_stats.status_code, early_stats.json()["code"]) == (503, "unavailable")
    assert early_field.json()["stability"] == 1
    assert stats.json() == {"rate": 1.5}
    assert field.json() == {"entropy": 2.5}


async def test_usage_is_for_administrators(world):
    today = int(time.time() // 86_400)
    world.vault.used = [
        UsageRecord("ann", today - 40, 9, 9, 9),
        UsageRecord("ann", today, 3, 40, 10, 55),
        UsageRecord("bob", today, 1, 5, 2),
    ]
    async with world.client(headers={"authorization": "Bearer ann/publish"}) as http:
        refused = await http.get("/v1/usage")
    async with world.client(headers={"authorization": "Bearer root/admin"}) as http:
        report = (await http.get("/v1/usage")).json()
        short = (await http.get("/v1/usage?limit=1")).json()
        long = (await http.get("/v1/usage?days=60&principal=ann")).json()
        unknown = await http.get("/v1/usage?day=1")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    day = datetime.fromtimestamp(today * 86_400, UTC).date().isoformat()
    ann = {"principal": "ann", "day": day, "statements": 3, "text_bytes": 40, "tokens": 10, "bytes": 55}
    assert report["items"][0] == ann
    assert (len(report["items"]), report["more"]) == (2, False)
    assert short == {"items": [ann], "more": True}
    assert [row["statements"] for row in long["items"]] == [9, 3]
    assert (unknown.status_code, unknown.json()["field"]) == (400, "day")
