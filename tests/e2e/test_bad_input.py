"""Each bad input is answered with its error, over each door and in each encoding, and the server works on."""

import json
import math
from typing import Any

import httpx
import msgspec
import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Peer, Server, handshake, peer, web
from tests.postgres import url_of

pytestmark = pytest.mark.anyio

ENCODINGS = ["json", "msgpack"]
DIMENSION = 384

BAD_GEOIDS: dict[str, tuple[Any, str, str, int]] = {
    # name: geoid, code, what the message names, HTTP status
    "nothing stated": ({}, "bad_request", "text", 400),
    "unknown field": ({"text": "a", "colour": "red"}, "bad_request", "colour", 400),
    "text is a number": ({"text": 7}, "bad_request", "text", 400),
    "vector is text": ({"vector": "abc"}, "bad_request", "vector", 400),
    "vector with text": ({"vector": [0.1, "b"]}, "bad_request", "vector", 400),
    "state is a list": ({"symbolic_state": [1]}, "bad_request", "symbolic_state", 400),
    "state with a list": ({"symbolic_state": {"a": [1]}}, "bad_request", "symbolic_state.a", 400),
    "weight is text": ({"semantic_state": {"a": "heavy"}}, "bad_request", "semantic_state.a", 400),
    "negative weight": ({"semantic_state": {"a": -1.0}}, "bad_request", "semantic_state", 400),
    "blank text": ({"text": "  "}, "bad_request", "text", 400),
    "bad id": ({"text": "a", "id": "a b"}, "bad_request", "id", 400),
    "oversized text": ({"text": "x" * 8193}, "too_large", "text", 413),
    "too many keys": ({"symbolic_state": {f"k{i}": 1 for i in range(257)}}, "limit_exceeded", "symbolic_state", 403),
    "too many weights": ({"semantic_state": {f"k{i}": 1.0 for i in range(257)}}, "limit_exceeded", "256", 403),
    "vector of wrong dimension": ({"vector": [0.5] * (DIMENSION - 1)}, "bad_request", str(DIMENSION), 400),
    "vector without direction": ({"vector": [0.0] * DIMENSION}, "bad_request", "vector", 400),
}


async def works(client: Peer) -> None:
    """The connection still takes commands, and the server still publishes."""
    pong = await client.done("ping")
    published = await client.publish(symbolic_state={"probe": "x"})
    assert published["offset"] > pong["offset"] - 1


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_bad_statements_over_websocket(server: Server, encoding: str) -> None:
    async with peer(server, encoding) as client:
        head = (await client.done("ping"))["offset"]
        for name, (geoid, code, named, _) in BAD_GEOIDS.items():
            reply = await client.ask("publish", geoid=geoid)
            assert (reply["op"], reply["code"], reply["temporary"]) == ("error", code, False), (name, reply)
            assert named in reply["message"], (name, reply)
        assert (await client.done("ping"))["offset"] == head, "a refused statement left something in the log"
        await works(client)


async def test_bad_statements_over_http(server: Server, http: httpx.AsyncClient) -> None:
    head = (await http.get("/health")).json()["offset"]
    for name, (geoid, code, named, status) in BAD_GEOIDS.items():
        for content, kind in (
            (msgspec.json.encode(geoid), "application/json"),
            (msgspec.msgpack.encode(geoid), "application/msgpack"),
        ):
            response = await http.post("/v1/geoids", content=content, headers={"content-type": kind})
            assert response.status_code == status, (name, kind, response.text)
            assert response.headers["content-type"] == "application/problem+json"
            problem = response.json()
            assert problem["code"] == code, (name, problem)
            assert named in problem["detail"], (name, problem)
    health = (await http.get("/health")).json()
    assert (health["status"], health["offset"]) == ("ok", head)


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_bad_commands(server: Server, encoding: str) -> None:
    async with peer(server, encoding) as client:
        pong = await client.done("ping")
        ahead = {"epoch": pong["epoch"], "offset": pong["offset"] + 1_000_000}
        deep: Any = {"field": "type", "op": "exists"}
        for _ in range(9):
            deep = {"not": deep}
        bad: list[tuple[str, dict[str, Any], str]] = [
            ("shout", {}, "unknown_op"),
            ("publish", {}, "bad_request"),
            ("publish", {"geoid": {"text": "a"}, "priority": 10}, "bad_request"),
            ("publish", {"geoid": {"text": "a"}, "key": ""}, "bad_request"),
            ("publish", {"geoid": {"text": "a"}, "key": "a\0b"}, "bad_request"),
            ("publish", {"geoid": {"text": "a"}, "extra": 1}, "bad_request"),
            ("subscribe", {"channel": "rumours"}, "bad_channel"),
            ("subscribe", {"channel": "geoid:"}, "bad_channel"),
            ("subscribe", {"channel": "session:" + "x" * 300}, "bad_channel"),
            ("subscribe", {"channel": 5}, "bad_request"),
            ("subscribe", {"channel": "geoids", "since": ahead}, "bad_position"),
            ("subscribe", {"channel": "geoids", "since": {"offset": 1}}, "bad_request"),
            ("subscribe", {"channel": "geoids", "since": {"cursor": "never-made"}}, "not_found"),
            ("subscribe", {"channel": "geoids", "since": {"cursor": "a\0b"}}, "not_found"),
            ("subscribe", {"channel": "geoids", "filter": {"field": "data.score"}}, "bad_filter"),
            ("subscribe", {"channel": "geoids", "filter": {"field": "a", "op": "like", "value": 1}}, "bad_filter"),
            ("subscribe", {"channel": "geoids", "filter": {"all": "x"}}, "bad_filter"),
            ("subscribe", {"channel": "geoids", "filter": deep}, "bad_filter"),
            (
                "subscribe",
                {"channel": "geoids", "filter": {"any": [{"field": "a", "op": "exists"}] * 64}},
                "bad_filter",
            ),
            ("unsubscribe", {"channel": "scars"}, "not_subscribed"),
            ("delete", {"geoid_id": "bad-input-nobody"}, "not_found"),
            ("resolve", {"contradiction_id": "bad-input-none", "decision": "collapse"}, "not_found"),
            ("resolve", {"contradiction_id": "", "decision": "collapse"}, "bad_request"),
            ("resolve", {"contradiction_id": "x", "decision": "ignore"}, "bad_request"),
            ("resolve", {"contradiction_id": "x", "decision": "surge", "reason": "a\0b"}, "bad_request"),
            ("history", {"channel": "geoids", "limit": 1001}, "bad_request"),
            ("history", {"channel": "geoids", "limit": 0}, "bad_request"),
            ("history", {"channel": "geoids", "limit": 1, "since": ahead}, "bad_position"),
            ("history", {"channel": "weather", "limit": 1}, "bad_channel"),
            ("presence", {"channel": "weather"}, "bad_channel"),
            ("ack", {"channel": "geoids", "offset": -1, "name": "c"}, "bad_request"),
            ("watch", {"watch": "w", "kinds": ["related"]}, "bad_request"),
            ("watch", {"watch": "w", "text": "a", "kinds": []}, "bad_request"),
            ("watch", {"watch": "w", "text": "a", "kinds": ["agrees"]}, "bad_request"),
            ("watch", {"watch": "w", "text": "a", "kinds": ["related"], "min_score": 2}, "bad_request"),
            ("watch", {"watch": "w", "text": "a", "kinds": ["related"], "filter": {"no": 1}}, "bad_filter"),
            ("unwatch", {"watch": "bad-input-none"}, "not_found"),
            ("unwatch", {"watch": ""}, "bad_request"),
            ("delete", {"geoid_id": ""}, "bad_request"),
            ("connect", {}, "conflict"),
        ]
        for op, fields, code in bad:
            reply = await client.ask(op, **fields)
            assert (reply["op"], reply.get("code")) == ("error", code), (op, fields, reply)
            assert len(reply["message"]) > 10
        await client.done("subscribe", channel="geoids")
        assert (await client.ask("subscribe", channel="geoids"))["code"] == "already_subscribed"
        await works(client)


async def test_malformed_json_over_websocket(server: Server) -> None:
    async with peer(server) as client:
        for text in ("{", "[]", "null", '"ping"', "{'op':'ping'}", '{"op":"ping"}', '{"op":"ping","id":0}', ""):
            await client.ws.send(text)
            reply = await client.reply(None)
            assert reply["code"] == "bad_request", (text, reply)
        await client.ws.send('{"op":"ping","id":77,"id2":1}')
        assert (await client.reply(77))["code"] == "bad_request"
        await works(client)


async def test_malformed_msgpack_over_websocket(server: Server) -> None:
    async with peer(server, "msgpack") as client:
        for data in (b"", b"\xc1", b"\x81\xa2op", msgspec.msgpack.encode([1]), msgspec.msgpack.encode({"op": "ping"})):
            await client.ws.send(data)
            reply = await client.reply(None)
            assert reply["code"] == "bad_request", (data, reply)
        await works(client)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
async def test_numbers_that_are_not_finite_in_msgpack(server: Server, http: httpx.AsyncClient, number: float) -> None:
    bad: list[dict[str, Any]] = [
        {"vector": [number] + [0.1] * (DIMENSION - 1)},
        {"semantic_state": {"heat": number}},
        {"symbolic_state": {"heat": number}},
        {"text": "warm", "metadata": {"deep": [{"heat": number}]}},
    ]
    async with peer(server, "msgpack") as client:
        for geoid in bad:
            reply = await client.ask("publish", geoid=geoid)
            assert (reply["op"], reply["code"]) == ("error", "bad_request"), (geoid, reply)
            response = await http.post(
                "/v1/geoids", content=msgspec.msgpack.encode(geoid), headers={"content-type": "application/msgpack"}
            )
            assert (response.status_code, response.json()["code"]) == (400, "bad_request"), response.text
        await works(client)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
async def test_numbers_that_are_not_finite_in_json(server: Server, http: httpx.AsyncClient, literal: str) -> None:
    async with peer(server) as client:
        for where in ('{"semantic_state":{"a":%s}}', '{"symbolic_state":{"a":%s}}', '{"text":"a","metadata":{"a":%s}}'):
            body = where % literal
            await client.ws.send('{"op":"publish","id":900,"geoid":%s}' % body)  # noqa: UP031
            while not (client.replies[900] or client.replies[None]):
                await client.receive()
            reply = (client.replies[900] or client.replies[None]).pop()
            assert (reply["op"], reply["code"]) == ("error", "bad_request"), (body, reply)
            response = await http.post("/v1/geoids", content=body, headers={"content-type": "application/json"})
            assert (response.status_code, response.json()["code"]) == (400, "bad_request"), response.text
            line = await http.post("/v1/geoids", content=body, headers={"content-type": "application/x-ndjson"})
            assert line.json()["code"] == "bad_request", line.text
        await works(client)


async def test_invalid_utf8(server: Server, http: httpx.AsyncClient) -> None:
    body = b'{"text":"caf\xff"}'
    response = await http.post("/v1/geoids", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert "UTF-8" in response.json()["detail"]
    lines = body + b'\n{"text":"the line after it is fine"}\n'
    response = await http.post("/v1/geoids", content=lines, headers={"content-type": "application/x-ndjson"})
    first, second = (json.loads(line) for line in response.text.splitlines())
    assert (first["code"], first["line"]) == ("bad_request", 1)
    assert second["geoid"]["text"] == "the line after it is fine"

    packed = b"\x83\xa2op\xa7publish\xa2id\x09\xa5geoid\x81\xa4text\xa2\xff\xfe"
    async with peer(server, "msgpack") as client:
        await client.ws.send(packed)
        while not (client.replies[9] or client.replies[None]):
            await client.receive()
        assert (client.replies[9] or client.replies[None])[0]["code"] == "bad_request"
        await works(client)

    async with peer(server) as client:  # in a text frame it is the RFC's to end the connection
        await client.ws.send(b'{"op":"ping","id":2,"x":"\xff"}', text=True)
        await client.ws.wait_closed()
        assert client.ws.close_code == 1007
    async with peer(server) as client:
        await works(client)


async def test_wrong_kind_of_frame_ends_the_connection(server: Server) -> None:
    async with peer(server) as client:
        await client.ws.send(b"\x80")
        await client.ws.wait_closed()
        assert client.ws.close_code == 1003


async def test_oversized_command(server: Server) -> None:
    async with peer(server) as client:
        reply = await client.ask("publish", geoid={"text": "a", "metadata": {"filler": "x" * 70_000}})
        assert (reply["op"], reply["code"]) == ("error", "too_large")
        await works(client)
        await client.ws.send("x" * 1_000_000)
        await client.ws.wait_closed()
        assert client.ws.close_code == 1009


async def test_the_same_id_twice_in_flight(server: Server) -> None:
    async with peer(server) as client:
        command = client.encode({"op": "publish", "id": 500, "geoid": {"symbolic_state": {"twice": "in flight"}}})
        await client.ws.send(command)
        await client.ws.send(command)
        while len(client.replies[500]) < 2:
            await client.receive()
        kinds = sorted((each["op"], each.get("code")) for each in client.replies[500])
        assert kinds == [("error", "conflict"), ("published", None)]
        client.replies[500].clear()
        await client.ws.send(command)  # once answered, the id is free
        assert (await client.reply(500))["op"] == "published"


async def test_first_command_must_be_connect(server: Server) -> None:
    async with handshake(server) as client:
        reply = await client.ask("ping")
        assert reply["code"] == "bad_request"
        await client.ws.wait_closed()
        assert (client.ws.close_code, client.ws.close_reason) == (4501, "protocol_violation")


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_unknown_field_of_the_client_is_refused(server: Server, encoding: str) -> None:
    async with handshake(server, encoding) as client:
        reply = await client.ask("connect", client={"name": "probe", "version": "1", "colour": "red"})
        assert (reply["op"], reply["code"]) == ("error", "bad_request"), reply
        assert "client.colour" in reply["message"], reply
        connected = await client.done("connect", client={"name": "probe", "version": "1"})
        assert connected["op"] == "connected"


async def test_truncated_ndjson_line(server: Server, http: httpx.AsyncClient) -> None:
    content = b'{"symbolic_state":{"ndjson":"whole"}}\n{"symbolic_state":{"ndjson":"cut o'
    response = await http.post("/v1/geoids", content=content, headers={"content-type": "application/x-ndjson"})
    whole, cut = (json.loads(line) for line in response.text.splitlines())
    assert whole["geoid"]["symbolic_state"] == {"ndjson": "whole"}
    assert (cut["code"], cut["line"]) == ("bad_request", 2)
    assert (await http.get("/readyz")).status_code == 200


async def test_a_line_cut_off_with_its_connection_is_not_published(server: Server, http: httpx.AsyncClient) -> None:
    """The body never ends: what was in the unfinished line must not count as said."""
    import anyio

    stream = await anyio.connect_tcp(*server.address.split(":"))  # type: ignore[arg-type]
    head = f"POST /v1/geoids HTTP/1.1\r\nHost: {server.address}\r\nContent-Type: application/x-ndjson\r\n"
    part = b'{"id":"cut-whole","text":"a whole line"}\n{"id":"cut-off","text":"a whole line but for its end"}'
    await stream.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(part), part))
    seen = b""
    while b"cut-whole" not in seen:
        seen += await stream.receive()
    await stream.aclose()
    async with peer(server) as client:
        await works(client)
    assert (await http.get("/v1/geoids/cut-whole")).status_code == 200
    assert (await http.get("/v1/geoids/cut-off")).status_code == 404


async def test_bad_requests_over_http(server: Server, http: httpx.AsyncClient) -> None:
    json_type = {"content-type": "application/json"}
    epoch = (await http.get("/health")).json()["epoch"]
    bad: list[tuple[str, str, dict[str, Any], int, str]] = [
        ("POST", "/v1/geoids", {"content": b"{", "headers": json_type}, 400, "bad_request"),
        ("POST", "/v1/geoids", {"content": b"", "headers": json_type}, 400, "bad_request"),
        ("POST", "/v1/geoids", {"content": b"a=b", "headers": {"content-type": "text/plain"}}, 415, "bad_request"),
        ("PATCH", "/v1/geoids/bad-input-nobody", {"json": {"purpose": "x"}}, 404, "not_found"),
        ("DELETE", "/v1/geoids/bad-input-nobody", {}, 404, "not_found"),
        ("GET", "/v1/geoids/bad-input-nobody", {}, 404, "not_found"),
        ("GET", "/v1/geoids?limit=0", {}, 400, "bad_request"),
        ("GET", "/v1/geoids?limit=many", {}, 400, "bad_request"),
        ("GET", "/v1/contradictions?state=lost", {}, 400, "bad_request"),
        ("GET", "/v1/contradictions/bad-input-none", {}, 404, "not_found"),
        ("POST", "/v1/contradictions/bad-input-none/resolve", {"json": {"decision": "collapse"}}, 404, "not_found"),
        ("POST", "/v1/contradictions/x/resolve", {"json": {"decision": "shrug"}}, 400, "bad_request"),
        ("POST", "/v1/score", {"json": {"a": {"text": "x"}}}, 400, "bad_request"),
        ("POST", "/v1/search", {"json": {"relation": "related", "k": 3}}, 400, "bad_request"),
        ("POST", "/v1/search", {"json": {"text": "x", "relation": "related", "k": 0}}, 400, "bad_request"),
        (
            "POST",
            "/v1/search",
            {"json": {"text": "x", "relation": "related", "k": 3, "filter": {"some": []}}},
            400,
            "bad_filter",
        ),
        ("GET", "/v1/events?channel=rumours", {}, 400, "bad_channel"),
        ("GET", f"/v1/events?channel=geoids&since={epoch}:9999999999", {}, 400, "bad_position"),
        ("GET", "/v1/events?channel=geoids&since=yesterday", {}, 400, "bad_position"),
        ("GET", "/v1/events?channel=geoids&filter=%7B", {}, 400, "bad_filter"),
        ("GET", f"/v1/history?channel=geoids&since={epoch}:9999999999", {}, 400, "bad_position"),
        ("GET", "/v1/nowhere", {}, 404, "not_found"),
        ("PUT", "/v1/geoids", {}, 405, "bad_request"),
    ]
    for method, path, request, status, code in bad:
        response = await http.request(method, path, **request)
        assert (response.status_code, response.json()["code"]) == (status, code), (method, path, response.text)
    assert (await http.get("/readyz")).status_code == 200


@pytest.mark.postgres
async def test_postgresql_is_not_harmed_by_what_it_cannot_hold(start_server: StartServer, database: str) -> None:
    server = start_server(KIMERA_DATABASE__URL=url_of(database))
    async with peer(server) as client:
        for _ in range(8):  # the service used to restart each time, and after five of them the process ended
            reply = await client.ask("publish", geoid={"text": "a"}, key="a\0b")
            assert (reply["code"], reply["field"]) == ("bad_request", "key")
            reply = await client.ask("subscribe", channel="geoids", since={"cursor": "a\0b"})
            assert reply["code"] == "not_found"
        await works(client)
    async with web(server) as http:
        assert (await http.get("/v1/usage", params={"principal": "a\0b"})).status_code == 400
    assert server.errors() == []
    server.stop()


async def test_only_unknown_subprotocols_are_refused(server: Server) -> None:
    from websockets.asyncio.client import connect
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus) as refused:
        async with connect(server.ws_url, subprotocols=["graphql-ws"]):  # type: ignore[list-item]
            pass
    assert refused.value.response.status_code == 400
