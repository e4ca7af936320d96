"""Publishing, reading and changing geoids over HTTP."""

import anyio
import msgspec
import pytest

from kimera_stream.api.http import geoids

pytestmark = pytest.mark.anyio

PROBLEM = "application/problem+json"


async def test_publishing_one_statement_creates_it(world):
    async with world.client() as http:
        answer = await http.post("/v1/geoids", json={"text": "the door is open", "session_id": "s1"})
    assert answer.status_code == 201
    body = answer.json()
    assert set(body) == {"geoid", "offset", "contradictions", "duplicate"}
    assert body["offset"] == 1
    assert body["duplicate"] is False
    assert body["geoid"]["text"] == "the door is open"
    assert body["geoid"]["session_id"] == "s1"
    assert "vector" not in body["geoid"]
    assert answer.headers["location"] == f"/v1/geoids/{body['geoid']['id']}"
    assert world.vault.stored[body["geoid"]["id"]].geoid.text == "the door is open"


async def test_an_update_and_a_duplicate_answer_200(world):
    async with world.client() as http:
        await http.post("/v1/geoids", json={"id": "x", "text": "one"})
        updated = await http.post("/v1/geoids", json={"id": "x", "text": "two"})
        first = await http.post("/v1/geoids", json={"text": "three"}, headers={"idempotency-key": "k"})
        again = await http.post("/v1/geoids", json={"text": "three"}, headers={"idempotency-key": "k"})
    assert (updated.status_code, updated.json()["geoid"]["version"]) == (200, 2)
    assert (first.status_code, first.json()["duplicate"]) == (201, False)
    assert (again.status_code, again.json()["duplicate"]) == (200, True)
    assert again.json()["geoid"] == first.json()["geoid"]


async def test_messagepack_in_and_out(world):
    async with world.client() as http:
        answer = await http.post(
            "/v1/geoids",
            content=msgspec.msgpack.encode({"text": "packed"}),
            headers={"content-type": "application/msgpack", "accept": "application/msgpack"},
        )
        preferred = await http.get("/v1/geoids", headers={"accept": "application/msgpack;q=0.5, application/json"})
    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/msgpack"
    assert msgspec.msgpack.decode(answer.content)["geoid"]["text"] == "packed"
    assert preferred.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("content", "field", "words"),
    [
        (b'{"text": 5}', "text", "expected `str | null`, got `int`"),
        (b'{"text": "a", "colour": 1}', "colour", "unknown field"),
        (b'{"semantic_state": {"a": "b"}}', "semantic_state.a", "expected `float`"),
        (b'{"symbolic_state": {"a": [1]}}', "symbolic_state.a", "expected"),
        (b'{"semantic_state": {"a": NaN}}', None, "valid JSON"),
        (b'{"vector": [1, Infinity]}', None, "valid JSON"),
        (b'{"text": "a"', None, "truncated"),
        (b'{"text": "\xff"}', None, "UTF-8"),
        (b"5", None, "expected `object`"),
        (b"", None, "valid JSON"),
        (b"[" * 100_000, None, "nested too deeply"),
    ],
)
async def test_a_wrong_body_is_refused_by_field(world, content, field, words):
    async with world.client() as http:
        answer = await http.post("/v1/geoids", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == PROBLEM
    body = answer.json()
    assert body["code"] == "bad_request"
    assert body["type"] == "urn:kimera-stream:problem:bad_request"
    assert body["status"] == 400
    assert body["temporary"] is False
    assert words in body["detail"]
    assert body.get("field") == field
    assert not world.knowledge.calls


async def test_what_the_service_refuses_is_a_problem(world):
    async with world.client() as http:
        answer = await http.post("/v1/geoids", json={})
    assert answer.status_code == 400
    assert answer.json()["field"] == "geoid"
    assert world.metric("kimera_errors_total", door="http", code="bad_request") == 1


async def test_a_temporary_error_says_when_to_try_again(world, unavailable):
    world.vault.broken = unavailable
    async with world.client() as http:
        answer = await http.get("/v1/geoids/x")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    assert answer.json() | {"request_id": ""} == {
        "type": "urn:kimera-stream:problem:unavailable",
        "title": "Not available at present",
        "status": 503,
        "detail": "the database does not answer",
        "code": "unavailable",
        "temporary": True,
        "retry_after": 2.4,
        "request_id": "",
    }


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/json; charset=latin-1"]
)
async def test_other_content_types_are_refused(world, kind):
    async with world.client() as http:
        answer = await http.post("/v1/geoids", content=b'{"text": "a"}', headers={"content-type": kind})
    assert answer.status_code == 415
    assert answer.json()["code"] == "bad_request"
    assert "content-type" in answer.json()["detail"]


async def test_a_compressed_body_is_refused(world):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    async with world.client() as http:
        answer = await http.post("/v1/geoids", content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 415


async def test_a_large_body_is_refused_by_its_declared_and_by_its_real_length(make_world):
    world = make_world(api={"max_body_bytes": 1024})

    async def chunks():
        for _ in range(3):
            yield b" " * 500

    async with world.client() as http:
        declared = await http.post("/v1/geoids", json={"text": "x" * 2000})
        streamed = await http.post("/v1/geoids", content=chunks(), headers={"content-type": "application/json"})
        fitting = await http.post("/v1/geoids", json={"text": "x" * 900})
    assert [declared.status_code, streamed.status_code, fitting.status_code] == [413, 413, 201]
    assert declared.json()["code"] == "too_large"
    assert "1024" in declared.json()["detail"]


async def test_several_statements_are_worked_on_together_and_answered_in_order(world):
    world.knowledge.gate = anyio.Event()
    answers = []
    items = [{"text": "a"}, {"colour": 1}, {"geoid": {"text": "b"}, "key": "k", "priority": 7}, {"text": "c"}]

    async with world.client() as http, anyio.create_task_group() as group:

        async def post():
            answers.append(await http.post("/v1/geoids", json=items))

        group.start_soon(post)
        while world.knowledge.under_way < 3:
            await anyio.lowlevel.checkpoint()
        world.knowledge.gate.set()
    (answer,) = answers
    assert answer.status_code == 200
    first, refused, keyed, last = answer.json()
    assert [each["geoid"]["text"] for each in (first, keyed, last)] == ["a", "b", "c"]
    assert (refused["code"], refused["field"]) == ("bad_request", "[1].colour")
    assert [(call["key"], call["priority"]) for call in world.knowledge.calls] == [(None, 5), ("k", 7), (None, 5)]


async def test_no_more_statements_are_taken_at_once_than_answers_can_be_kept(world, monkeypatch):
    monkeypatch.setattr(geoids, "MOST_AT_ONCE", 3)
    async with world.client() as http:
        taken = await http.post("/v1/geoids", json=[{"text": "a"}] * 3)
        refused = await http.post("/v1/geoids", json=[{"text": "a"}] * 4)
    assert (taken.status_code, len(taken.json())) == (200, 3)
    assert (refused.status_code, refused.json()["code"]) == (413, "too_large")
    assert "at most 3 statements; send more as application/x-ndjson" in refused.json()["detail"]
    assert len(world.knowledge.calls) == 3, "nothing of it is published"


async def test_several_statements_as_messagepack(world):
    async with world.client() as http:
        answer = await http.post(
            "/v1/geoids",
            content=msgspec.msgpack.encode([{"text": "a"}, {"text": "b"}]),
            headers={"content-type": "application/msgpack"},
        )
        empty = await http.post("/v1/geoids", json=[])
    assert [each["geoid"]["text"] for each in answer.json()] == ["a", "b"]
    assert empty.json() == []


@pytest.mark.parametrize(
    "request_",
    [
        {"json": [{"text": "a"}]},
        {"content": b'{"text": "a"}\n', "headers": {"content-type": "application/x-ndjson"}},
    ],
)
async def test_the_idempotency_header_is_for_one(world, request_):
    request_ = {**request_, "headers": {**request_.get("headers", {}), "idempotency-key": "k"}}
    async with world.client() as http:
        answer = await http.post("/v1/geoids", **request_)
    assert (answer.status_code, answer.json()["field"]) == (400, "idempotency-key")


async def test_an_overlong_idempotency_key_is_refused(world):
    async with world.client() as http:
        answer = await http.post("/v1/geoids", json={"text": "a"}, headers={"idempotency-key": "k" * 256})
    assert answer.json()["field"] == "idempotency-key"


async def test_lists_page_by_offset(world):
    async with world.client() as http:
        for number in range(5):
            await http.post(
                "/v1/geoids", json={"text": str(number), "session_id": "even" if number % 2 == 0 else "odd"}
            )
        first = (await http.get("/v1/geoids", params={"limit": 2})).json()
        second = (await http.get("/v1/geoids", params={"limit": 2, "after": first["next"]})).json()
        third = (await http.get("/v1/geoids", params={"limit": 2, "after": second["next"]})).json()
        odd = (await http.get("/v1/geoids", params={"session_id": "odd"})).json()
    assert [item["text"] for page in (first, second, third) for item in page["items"]] == list("01234")
    assert third["next"] is None
    assert [item["text"] for item in odd["items"]] == ["1", "3"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=ten", "limit"),
        ("after=-1", "after"),
        ("colour=red", "colour"),
        ("limit=1&limit=2", "limit"),
        ("session_id=a%20b", "session_id"),
    ],
)
async def test_a_wrong_query_is_refused_by_parameter(world, query, field):
    async with world.client() as http:
        answer = await http.get(f"/v1/geoids?{query}")
    assert answer.status_code == 400
    assert answer.json()["field"] == field
    assert answer.json()["detail"].startswith(field)


async def test_reading_one_geoid_with_and_without_its_vector(world):
    async with world.client() as http:
        await http.post("/v1/geoids", json={"id": "v", "text": "a", "vector": [0.6, 0.8]})
        plain = (await http.get("/v1/geoids/v")).json()
        full = (await http.get("/v1/geoids/v?vector=true")).json()
        missing = await http.get("/v1/geoids/nobody")
        impossible = await http.get("/v1/geoids/a%20b")
    assert "vector" not in plain
    assert full["vector"] == pytest.approx([0.6, 0.8])
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert impossible.status_code == 404


async def test_patch_merges_into_what_exists(world):
    async with world.client() as http:
        await http.post("/v1/geoids", json={"id": "p", "text": "a"})
        patched = await http.patch("/v1/geoids/p", json={"metadata": {"n": 1}})
        missing = await http.patch("/v1/geoids/q", json={"text": "b"})
        other = await http.patch("/v1/geoids/p", json={"id": "q", "text": "b"})
        for nothing in ({}, {"id": "p"}):
            empty = await http.patch("/v1/geoids/p", json=nothing)
            assert (empty.status_code, empty.json()["code"]) == (400, "bad_request")
            assert "at least one" in empty.json()["detail"]
    assert patched.status_code == 200
    assert (patched.json()["geoid"]["text"], patched.json()["geoid"]["version"]) == ("a", 2)
    assert world.knowledge.calls[1]["merge"] is True
    assert missing.status_code == 404
    assert (other.status_code, other.json()["field"]) == (400, "id")


async def test_delete(world):
    async with world.client() as http:
        await http.post("/v1/geoids", json={"id": "d", "text": "a"})
        deleted = await http.delete("/v1/geoids/d")
        again = await http.delete("/v1/geoids/d")
    assert deleted.json() == {"geoid_id": "d", "offset": 2}
    assert again.status_code == 404


async def test_contradictions_of_a_geoid(world, make_contradiction):
    world.vault.contradictions = {"c1": make_contradiction("c1", 3)}
    async with world.client() as http:
        await http.post("/v1/geoids", json={"id": "lonely", "text": "x"})
        found = (await http.get("/v1/geoids/a/contradictions")).json()
        none = (await http.get("/v1/geoids/lonely/contradictions")).json()
        missing = await http.get("/v1/geoids/nobody/contradictions")
    assert [item["id"] for item in found["items"]] == ["c1"]
    assert none == {"items": [], "next": None}
    assert missing.status_code == 404


async def test_a_client_that_leaves_in_the_middle_of_its_body_publishes_nothing(world, eventually):
    head = (
        b"POST /v1/geoids HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 40\r\n\r\n"
    )
    gone = {"method": "POST", "route": "/v1/geoids", "status": "gone"}
    async with world.serving():
        async with await anyio.connect_tcp("127.0.0.1", world.port) as stream:
            await stream.send(head + b'{"text": "cut')
            await eventually(lambda: world.metric("kimera_http_requests_open") == 1)
        await eventually(lambda: world.metric("kimera_http_requests_total", **gone) == 1)
    assert not world.knowledge.calls


async def test_the_server_is_well_after_every_bad_request(world):
    async with world.serving() as http:
        for content in (b"{", b"\xff", b"[1", b'{"a":1}'):
            await http.post("/v1/geoids", content=content, headers={"content-type": "application/json"})
        async with await anyio.connect_tcp("127.0.0.1", world.port) as stream:
            await stream.send(b"NOT HTTP AT ALL\r\n\r\n")
            assert b"400" in await stream.receive()
        answer = await http.post("/v1/geoids", json={"text": "well"})
    assert answer.status_code == 201
