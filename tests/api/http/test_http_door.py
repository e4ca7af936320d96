"""What holds for every operation: who may, wrong methods and paths, defects, origins, readiness, metrics."""

import gc
import socket

import anyio
import pytest
import structlog
from starlette.responses import Response
from structlog.testing import capture_logs

from kimera_stream.api.http.protocol import ABORT, UNREAD_TIMEOUT, KimeraHttpProtocol
from tests.api.http.conftest import until
from tests.garbage import uncollected

pytestmark = pytest.mark.anyio

READS = ["/v1/geoids", "/v1/contradictions", "/v1/scars", "/v1/stats", "/v1/field", "/v1/watches"]


# -- who may -----------------------------------------------------------------------------------------------------------


async def test_a_token_is_needed_where_required(world):
    world.authenticator.required = True
    async with world.client() as http:
        none = await http.get("/v1/geoids")
        bad = await http.get("/v1/geoids", headers={"authorization": "Bearer bad"})
        basic = await http.get("/v1/geoids", headers={"authorization": "Basic dTpw"})
        twice = await http.get(
            "/v1/geoids", headers=[("authorization", "Bearer a/admin"), ("authorization", "Bearer b/admin")]
        )
        good = await http.get("/v1/geoids", headers={"authorization": "Bearer reader/subscribe"})
    for refused in (none, bad, basic, twice):
        assert refused.status_code == 401
        assert refused.json()["code"] == "unauthorized"
        assert refused.headers["www-authenticate"].startswith("Bearer")
    assert good.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/v1/geoids", "subscribe"),
        ("GET", "/v1/history?channel=geoids", "subscribe"),
        ("POST", "/v1/search", "subscribe"),
        ("POST", "/v1/geoids", "publish"),
        ("PATCH", "/v1/geoids/x", "publish"),
        ("DELETE", "/v1/geoids/x", "publish"),
        ("POST", "/v1/contradictions/c/resolve", "resolve"),
    ],
)
async def test_each_operation_needs_its_role(world, method, path, role):
    others = "+".join({"subscribe", "publish", "resolve"} - {role})
    async with world.client() as http:
        without = await http.request(method, path, headers={"authorization": f"Bearer x/{others}"})
        having = await http.request(method, path, headers={"authorization": f"Bearer x/{role}"})
        admin = await http.request(method, path, headers={"authorization": "Bearer x/admin"})
    assert (without.status_code, without.json()["code"]) == (403, "forbidden")
    assert role in without.json()["detail"]
    assert having.status_code != 403
    assert admin.status_code != 403


@pytest.mark.parametrize("path", ["/health", "/metrics"])
async def test_operators_pages_need_a_token_from_elsewhere_only(world, path):
    world.authenticator.required = True
    async with world.client() as http:
        assert (await http.get(path)).status_code == 200
        assert (await http.get(path, headers={"x-forwarded-for": "9.9.9.9"})).status_code == 401
    async with world.client(peer="10.1.2.3") as http:
        assert (await http.get(path)).status_code == 401
        assert (await http.get(path, headers={"authorization": "Bearer prometheus/subscribe"})).status_code == 200
        assert (await http.get("/livez")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/stats", "/v1/geoids/x", "/v1/contradictions/c", "/v1/watches"])
async def test_unknown_parameters_are_refused_everywhere(world, path):
    async with world.client() as http:
        answer = await http.get(path, params={"colour": "red"})
        probe = await http.get("/livez", params={"colour": "red"})
    assert (answer.status_code, answer.json()["field"]) == (400, "colour")
    assert "unknown parameter" in answer.json()["detail"]
    assert probe.status_code == 200


# -- wrong paths, methods and defects ----------------------------------------------------------------------------------


async def test_unknown_paths_and_methods_are_problems(world):
    async with world.client() as http:
        path = await http.get("/v2/geoids")
        method = await http.put("/v1/geoids/x", json={})
        options = await http.options("/v1/geoids/x")
    assert (path.status_code, path.json()["code"]) == (404, "not_found")
    assert path.headers["content-type"] == "application/problem+json"
    assert method.status_code == 405
    assert method.headers["content-type"] == "application/problem+json"
    assert method.headers["allow"] == "DELETE, GET, HEAD, OPTIONS, PATCH"
    assert options.status_code == 204
    assert options.headers["allow"] == method.headers["allow"]
    for problem in (path, method):
        assert problem.json()["request_id"] == problem.headers["x-request-id"]


@pytest.mark.parametrize("given", ["1.0", "1e2", "+1", "1_0", "", "null"])
async def test_integers_are_written_as_such(world, given):
    async with world.client() as http:
        answer = await http.get("/v1/history", params={"channel": "geoids", "limit": given})
        page = await http.get("/v1/geoids", params={"after": given})
        good = await http.get("/v1/history", params={"channel": "geoids", "limit": "10"})
    assert (answer.status_code, answer.json()["field"]) == (400, "limit")
    assert answer.json()["detail"] == f"limit: expected `int`, got {given!r}"
    assert (page.status_code, page.json()["field"]) == (400, "after")
    assert good.status_code == 200


async def test_a_defect_is_logged_once_and_nothing_of_it_is_told(world):
    world.vault.broken = ZeroDivisionError("a secret of the inside")
    async with world.client() as http:
        with capture_logs() as logs:
            answer = await http.get("/v1/geoids/x", headers={"x-request-id": "r-1"})
    assert answer.status_code == 500
    body = answer.json()
    assert (body["code"], body["temporary"], body["request_id"]) == ("internal", True, "r-1")
    assert "secret" not in answer.text
    assert "ZeroDivision" not in answer.text
    errors = [entry for entry in logs if entry["log_level"] == "error"]
    assert [(entry["event"], entry["route"]) for entry in errors] == [("request failed", "/v1/geoids/{id}")]
    assert errors[0]["exc_info"]
    assert world.metric("kimera_defects_total", door="http") == 1
    assert world.metric("kimera_errors_total", door="http", code="internal") == 1


async def test_a_defect_in_the_middle_of_a_stream_breaks_the_response_off(world):
    world.knowledge.fail["b"] = [ZeroDivisionError("a secret of the inside")]
    head = (
        b"POST /v1/geoids HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/x-ndjson\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    received = b""
    async with world.serving(), await anyio.connect_tcp("127.0.0.1", world.port) as stream:
        await stream.send(head + b'e\r\n{"text": "a"}\n\r\n')
        while b"offset" not in received:
            received += await stream.receive()
        await stream.send(b'e\r\n{"text": "b"}\n\r\n')
        with anyio.fail_after(10):
            async for chunk in stream:
                received += chunk
    assert b"secret" not in received
    assert not received.endswith(b"0\r\n\r\n")
    assert world.metric("kimera_defects_total", door="http") == 1


async def test_request_ids(world):
    async with world.client() as http:
        made = await http.get("/livez")
        another = await http.get("/livez")
        given = await http.get("/livez", headers={"x-request-id": "trace-7"})
        odd = await http.get("/livez", headers={"x-request-id": 'a"b<script>'})
        problem = await http.get("/v1/geoids/x", headers={"x-request-id": "trace-8"})
    assert made.headers["x-request-id"] != another.headers["x-request-id"]
    assert given.headers["x-request-id"] == "trace-7"
    assert "<" not in odd.headers["x-request-id"]
    assert problem.json()["request_id"] == "trace-8"
    assert structlog.contextvars.get_contextvars() == {}


async def test_requests_are_counted_by_route_and_not_by_path(world):
    async with world.client() as http:
        for name in ("x", "y", "z"):
            await http.get(f"/v1/geoids/{name}")
        await http.get("/nowhere/at/all")
        await http.request("BREW", "/livez")
    assert world.metric("kimera_http_requests_total", method="GET", route="/v1/geoids/{id}", status="404") == 3
    assert world.metric("kimera_http_requests_total", method="GET", route="unmatched", status="404") == 1
    assert world.metric("kimera_http_requests_total", method="other", route="/livez", status="405") == 1
    assert world.metric("kimera_http_request_seconds_count", method="GET", route="/v1/geoids/{id}") == 3
    assert world.metric("kimera_http_requests_open") == 0


# -- pages of other origins ----------------------------------------------------------------------------------------------


async def test_other_origins_are_refused_and_allowed_ones_get_what_they_need(make_world):
    world = make_world(security={"allowed_origins": ["https://app.example.com"]})
    friend, stranger = {"origin": "https://app.example.com"}, {"origin": "https://evil.example.com"}
    async with world.client() as http:
        refused = await http.post("/v1/geoids", json={"text": "a"}, headers=stranger)
        allowed = await http.get("/v1/geoids", headers=friend)
        own = await http.get("/v1/geoids", headers={"origin": "http://127.0.0.1:8765"})
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        preflight = await http.options("/v1/geoids", headers={**friend, **asked})
        refused_preflight = await http.options("/v1/geoids", headers={**stranger, **asked})
        problem = await http.get("/v1/geoids/nobody", headers=friend)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert "access-control-allow-origin" not in refused.headers
    assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "Origin" in allowed.headers["vary"]
    assert own.status_code == 200
    assert preflight.status_code == 204
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "idempotency-key" in preflight.headers["access-control-allow-headers"]
    assert refused_preflight.status_code == 403
    assert problem.headers["access-control-allow-origin"] == "https://app.example.com"
    assert not world.knowledge.calls


async def test_an_open_server_is_not_called_by_a_name_of_the_outside(world):
    async with world.client() as http:
        rebound = await http.get("/v1/geoids", headers={"host": "evil.example.com:8765"})
        local = await http.get("/v1/geoids", headers={"host": "localhost:8765"})
        world.authenticator.required = True
    assert (rebound.status_code, rebound.json()["field"]) == (403, "host")
    assert local.status_code == 200
    async with world.client() as http:  # with tokens the name does not matter: a page has none
        guarded = await http.get(
            "/v1/geoids", headers={"host": "kimera.example.com", "authorization": "Bearer a/admin"}
        )
    assert guarded.status_code == 200


# -- life ------------------------------------------------------------------------------------------------------------------


async def test_before_it_has_loaded_the_door_answers_for_itself_and_refuses_the_rest(world):
    services, world.door.services = world.door.services, None
    world.state.ready = False
    world.state.services = {"vault": "ready", "index": "starting: 120,000 of 500,000 geoids"}
    async with world.client() as http:
        live = await http.get("/livez")
        ready = await http.get("/readyz")
        early = await http.post("/v1/geoids", json={"text": "a"})
        health = await http.get("/health")
        documents = await http.get("/openapi.json")
        world.door.services = services
        world.state.ready = True
        later = await http.get("/readyz")
    assert live.status_code == 200
    assert ready.status_code == 503
    assert ready.headers["retry-after"] == "1"
    assert ready.json() == {"ready": False, "draining": False, "services": dict(world.state.services)}
    assert (early.status_code, early.json()["code"], early.json()["temporary"]) == (503, "unavailable", True)
    assert "120,000 of 500,000" in early.json()["detail"]
    assert (health.status_code, health.json()["status"]) == (503, "starting")
    assert documents.status_code == 200
    assert (later.status_code, later.json()["ready"]) == (200, True)


async def test_a_draining_server_is_not_ready_and_takes_nothing_new(world):
    world.state.draining = True
    async with world.client() as http:
        ready = await http.get("/readyz")
        refused = await http.post("/v1/geoids", json={"text": "a"})
        live = await http.get("/livez")
        health = await http.get("/health")
    assert (ready.status_code, ready.json()["draining"]) == (503, True)
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert live.status_code == 200
    assert health.json()["status"] == "stopping"
    assert not world.knowledge.calls


async def test_health_tells_of_every_part(world):
    async with world.client() as http:
        well = await http.get("/health")
        world.checks["vault"].ok = False
        world.checks["vault"].error = "no answer within 2 s"
        unwell = await http.get("/health")
    assert well.status_code == 200
    body = well.json()
    assert (body["status"], body["node"], body["version"], body["epoch"], body["offset"]) == (
        "ok",
        "n1",
        "1.2.3",
        "E1",
        0,
    )
    assert body["checks"] == {"vault": {"ok": True, "latency": 0.001}}
    assert body["versions"] == {"python": "3"}
    assert unwell.status_code == 503
    assert (unwell.json()["status"], unwell.json()["checks"]["vault"]["error"]) == ("degraded", "no answer within 2 s")


async def test_metrics_in_both_formats(world, make_world):
    async with world.client() as http:
        await http.get("/livez")
        plain = await http.get("/metrics")
        open_metrics = await http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert plain.headers["content-type"].startswith("text/plain")
    assert 'kimera_http_requests_total{method="GET",route="/livez",status="200"} 1.0' in plain.text
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")
    async with make_world(telemetry={"metrics": False}).client() as http:
        assert (await http.get("/metrics")).status_code == 404


@pytest.mark.parametrize("path", READS)
async def test_head_answers_like_get_without_a_body(world, path):
    world.hub.latest("stats", "stats.updated", b"{}", offset=0)
    async with world.serving() as http:
        got, head = await http.get(path), await http.head(path)
    assert head.status_code == got.status_code == 200
    assert head.content == b""


# -- what the protocol class rests on --------------------------------------------------------------------------------------


async def test_the_application_can_drop_a_connection(world):
    dropped = anyio.Event()

    async def application(scope, receive, send):
        scope["extensions"][ABORT]()
        while (await receive())["type"] != "http.disconnect":
            pass
        dropped.set()

    world.app = lambda: application
    async with world.serving(), await anyio.connect_tcp("127.0.0.1", world.port) as stream:
        await stream.send(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        with anyio.fail_after(10):
            await dropped.wait()
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the operating system has no such timeout")
async def test_a_peer_that_takes_nothing_is_dropped_by_the_operating_system(world):
    seen: list[int] = []

    async def application(scope, receive, send):
        sock = scope["extensions"][ABORT].__self__.get_extra_info("socket")
        seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        await Response()(scope, receive, send)

    world.app = lambda: application
    async with world.serving() as http:
        await http.get("/")
    assert seen == [UNREAD_TIMEOUT * 1000]


async def test_closed_connections_leave_nothing_for_the_collector_of_garbage(world):
    def left() -> int:
        return sum(isinstance(each, KimeraHttpProtocol) for each in gc.get_objects())

    async with world.serving():
        with uncollected():
            before = left()
            for _ in range(5):
                async with await anyio.connect_tcp("127.0.0.1", world.port) as peer:
                    await peer.send(b"GET /v1/geoids HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
                    assert b"".join([part async for part in peer]).startswith(b"HTTP/1.1 200")
            await until(lambda: not world.server.server_state.connections)
            await anyio.wait_all_tasks_blocked()
            assert left() == before
