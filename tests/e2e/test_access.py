"""Who may do what, at every door: API keys and JSON Web Tokens, roles, origins, expiry, DNS rebinding."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest
from joserfc import jwt
from joserfc.jwk import OctKey
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from kimera_stream.api.auth import add_api_key, create_api_key, revoke_api_key
from tests.e2e.harness import Server, handshake, peer, show, until, web

pytestmark = pytest.mark.anyio

SECRET = "a-secret-of-more-than-thirty-two-bytes-for-tests"
ROLES = ("publish", "subscribe", "resolve", "admin")


def token(subject: str, *roles: str, seconds: float = 600, **claims: Any) -> str:
    body = {"sub": subject, "aud": "kimera-stream", "exp": int(time.time() + seconds), "roles": list(roles), **claims}
    return jwt.encode({"alg": "HS256"}, body, OctKey.import_key(SECRET))


@dataclass(frozen=True)
class Guarded:
    """A server that wants tokens, and an API key for each role."""

    server: Server
    keys: dict[str, str]
    file: Path

    async def accepts(self, key: str) -> bool:
        """Whether somebody who shows ``key`` is let in."""
        async with handshake(self.server) as client:
            return (await client.ask("connect", token=key))["op"] == "connected"


@pytest.fixture(scope="module")
def _guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    file = directory / "keys.jsonl"
    keys: dict[str, str] = {}
    for role in ROLES:
        keys[role], stored = create_api_key(f"{role}er", [role], expires=None, created=int(time.time()))  # type: ignore[list-item]
        add_api_key(file, stored)
    server = Server(
        directory / "data",
        KIMERA_SECURITY__AUTH="required",
        KIMERA_SECURITY__API_KEYS_FILE=str(file),
        KIMERA_SECURITY__JWT_SECRET=SECRET,
        KIMERA_SECURITY__JWT_ALGORITHMS='["HS256"]',
        KIMERA_SECURITY__JWT_LEEWAY="0",
        KIMERA_SECURITY__ALLOWED_ORIGINS='["https://app.example.com"]',
    )
    yield Guarded(server, keys, file)
    server.stop()


@pytest.fixture
def guarded(_guarded: Guarded) -> Iterator[Guarded]:
    before = len(_guarded.server.lines)
    yield _guarded
    show(*_guarded.server.lines[before:])


COMMANDS: list[tuple[str, dict[str, Any], str]] = [
    ("publish", {"geoid": {"text": "x"}}, "publish"),
    ("delete", {"geoid_id": "nobody"}, "publish"),
    ("resolve", {"contradiction_id": "none", "decision": "collapse"}, "resolve"),
    ("subscribe", {"channel": "geoids"}, "subscribe"),
    ("history", {"channel": "geoids", "limit": 1}, "subscribe"),
    ("presence", {"channel": "geoids"}, "subscribe"),
    ("ack", {"channel": "geoids", "offset": 0, "name": "c"}, "subscribe"),
    ("watch", {"watch": "w", "text": "t", "kinds": ["related"]}, "subscribe"),
    ("unwatch", {"watch": "w"}, "subscribe"),
]
REQUESTS: list[tuple[str, str, Any, str]] = [
    ("POST", "/v1/geoids", {"text": "x"}, "publish"),
    ("PATCH", "/v1/geoids/nobody", {"purpose": "x"}, "publish"),
    ("DELETE", "/v1/geoids/nobody", None, "publish"),
    ("GET", "/v1/geoids", None, "subscribe"),
    ("GET", "/v1/geoids/nobody", None, "subscribe"),
    ("GET", "/v1/geoids/nobody/contradictions", None, "subscribe"),
    ("GET", "/v1/contradictions", None, "subscribe"),
    ("POST", "/v1/contradictions/none/resolve", {"decision": "collapse"}, "resolve"),
    ("GET", "/v1/scars", None, "subscribe"),
    ("POST", "/v1/score", {"a": {"text": "x"}, "b": {"text": "y"}}, "subscribe"),
    ("POST", "/v1/search", {"text": "x", "relation": "related", "k": 1}, "subscribe"),
    ("GET", "/v1/history?channel=geoids", None, "subscribe"),
    ("GET", "/v1/watches", None, "subscribe"),
    ("GET", "/v1/field", None, "subscribe"),
]


@pytest.mark.parametrize("role", ROLES)
async def test_each_command_needs_its_role(guarded: Guarded, role: str) -> None:
    async with peer(guarded.server, token=guarded.keys[role]) as client:
        await client.done("ping")
        for op, fields, needed in COMMANDS:
            reply = await client.ask(op, **fields)
            allowed = role in (needed, "admin")
            assert (reply.get("code") == "forbidden") is not allowed, (op, reply)
        assert (await client.done("ping"))["op"] == "pong"


@pytest.mark.parametrize("role", ROLES)
async def test_each_request_needs_its_role(guarded: Guarded, role: str) -> None:
    headers = {"authorization": f"Bearer {guarded.keys[role]}"}
    async with web(guarded.server, headers=headers) as http:
        for method, path, body, needed in REQUESTS:
            response = await http.request(method, path, **({} if body is None else {"json": body}))
            if role in (needed, "admin"):
                assert response.status_code not in (401, 403), (method, path, response.text)
            else:
                assert (response.status_code, response.json()["code"]) == (403, "forbidden"), (method, path)


@pytest.mark.parametrize("header", [None, "Bearer nonsense", "Bearer kst_000000000000_" + "x" * 43, "Basic YTpi"])
async def test_requests_without_a_good_token(guarded: Guarded, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    async with web(guarded.server, headers=headers) as http:
        for method, path, body, _ in [*REQUESTS, ("GET", "/v1/events?channel=geoids", None, "")]:
            response = await http.request(method, path, **({} if body is None else {"json": body}))
            assert (response.status_code, response.json()["code"]) == (401, "unauthorized"), (method, path)
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert header is None or header.split()[1] not in response.text
        for path in ("/livez", "/readyz"):
            assert (await http.get(path)).status_code == 200


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "",
        "nonsense",
        "kst_000000000000_" + "x" * 43,
        token("late", "subscribe", seconds=-60),
        token("elsewhere", "subscribe", aud="another-service"),
        token("tampered", "subscribe")[:-4] + "AAAA",
        jwt.encode(
            {"alg": "HS512"},
            {"sub": "x", "aud": "kimera-stream", "exp": 4_000_000_000},
            OctKey.import_key(SECRET),
            algorithms=["HS512"],
        ),
    ],
)
async def test_connections_without_a_good_token(guarded: Guarded, bad: str | None) -> None:
    async with handshake(guarded.server) as client:
        reply = await client.ask("connect", **({} if bad is None else {"token": bad}))
        assert (reply["op"], reply["code"]) == ("error", "unauthorized")
        assert not bad or bad not in reply["message"]
        await client.ws.wait_closed()
        assert (client.ws.close_code, client.ws.close_reason) == (4500, "unauthorized")


async def test_a_token_without_a_role_is_forbidden(guarded: Guarded) -> None:
    async with handshake(guarded.server) as client:
        reply = await client.ask("connect", token=token("nobody"))
        assert reply["code"] == "forbidden"
        await client.ws.wait_closed()
        assert (client.ws.close_code, client.ws.close_reason) == (4502, "forbidden")


async def test_the_three_places_of_a_token(guarded: Guarded) -> None:
    key = guarded.keys["subscribe"]
    async with peer(guarded.server, token=key) as client:
        assert client.connected["op"] == "connected"
        assert "expires" not in client.connected
    options: dict[str, Any] = {"additional_headers": {"Authorization": f"Bearer {key}"}}
    async with peer(guarded.server, options=options) as client:
        await client.done("presence", channel="geoids")
    options = {"subprotocols": [f"kimera.token.{key}"]}
    async with peer(guarded.server, "msgpack", options=options) as client:
        assert client.ws.subprotocol == "kimera.v1.msgpack", "the token is never echoed"
        await client.done("presence", channel="geoids")
    assert all(key not in line for line in guarded.server.lines)


async def test_presence_tells_principals_apart(guarded: Guarded) -> None:
    async with (
        peer(guarded.server, token=token("anna", "subscribe")) as anna,
        peer(guarded.server, token=token("ben", "subscribe")) as ben,
    ):
        await anna.done("subscribe", channel="session:who")
        await ben.done("subscribe", channel="session:who")
        assert (await anna.done("presence", channel="session:who"))["principals"] == {"anna": 1, "ben": 1}
    # A cursor and a watch belong to one principal.
    async with peer(guarded.server, token=token("anna", "subscribe")) as anna:
        await anna.done("ack", channel="geoids", offset=0, name="mine")
        await anna.done("watch", watch="mine", text="something", kinds=["related"])
    async with peer(guarded.server, token=token("ben", "subscribe")) as ben:
        assert (await ben.ask("subscribe", channel="geoids", since={"cursor": "mine"}))["code"] == "not_found"
        assert (await ben.ask("unwatch", watch="mine"))["code"] == "not_found"


async def test_an_idempotency_key_belongs_to_one_principal(guarded: Guarded) -> None:
    async with peer(guarded.server, token=token("anna", "publish")) as anna:
        first = await anna.done("publish", geoid={"text": "Anna says this."}, key="same")
    async with peer(guarded.server, token=token("ben", "publish")) as ben:
        second = await ben.done("publish", geoid={"text": "Ben says that."}, key="same")
    assert not second["duplicate"]
    assert second["geoid"]["id"] != first["geoid"]["id"]


async def test_expiry_is_announced_and_then_closes(guarded: Guarded) -> None:
    expires = int(time.time() + 3)
    async with peer(guarded.server, token=token("short", "subscribe", exp=expires)) as client:
        assert client.connected["expires"] == expires
        assert (await client.push("expiring"))["expires"] == expires
        await client.ws.wait_closed()
        assert (client.ws.close_code, client.ws.close_reason) == (4003, "token_expired")


async def test_a_refresh_keeps_the_connection(guarded: Guarded) -> None:
    expires = int(time.time() + 3)
    async with peer(guarded.server, token=token("long", "subscribe", "publish", exp=expires)) as client:
        later = int(time.time() + 600)
        other = await client.ask("refresh", token=token("somebody", "subscribe"))
        assert other["code"] == "forbidden"
        assert (await client.ask("refresh", token="nonsense"))["code"] == "unauthorized"
        refreshed = await client.done("refresh", token=token("long", "subscribe", exp=later))
        assert refreshed["expires"] == later
        assert (await client.ask("publish", geoid={"text": "x"}))["code"] == "forbidden", (
            "the new token has fewer roles"
        )
        async with peer(guarded.server, token=token("witness", "subscribe", exp=expires + 1)) as witness:
            await witness.ws.wait_closed()  # the first token would have ended by now
            assert witness.ws.close_code == 4003
        await client.done("ping")


async def test_a_revoked_key_is_refused_soon(guarded: Guarded) -> None:
    key, stored = create_api_key("leaver", ["subscribe"], expires=None, created=int(time.time()))
    await anyio.to_thread.run_sync(add_api_key, guarded.file, stored)

    await until(lambda: guarded.accepts(key), every=0.1)
    await anyio.to_thread.run_sync(revoke_api_key, guarded.file, stored.id)

    async def refused() -> bool:
        return not await guarded.accepts(key)

    await until(refused, every=0.1)


async def test_a_key_that_is_taken_back_ends_what_it_let_in(guarded: Guarded) -> None:
    key, stored = create_api_key("leaver", ["subscribe"], expires=None, created=int(time.time()))
    changed, wider = create_api_key("climber", ["subscribe"], expires=None, created=int(time.time()))
    for each in (stored, wider):
        await anyio.to_thread.run_sync(add_api_key, guarded.file, each)

    await until(lambda: guarded.accepts(key), every=0.1)
    async with (
        peer(guarded.server, token=key) as leaver,
        peer(guarded.server, token=changed) as climber,
        peer(guarded.server, token=guarded.keys["subscribe"]) as stayer,
        web(guarded.server, headers={"authorization": f"Bearer {key}"}) as http,
        http.stream("GET", "/v1/events?channel=geoids") as events,
    ):
        await anyio.to_thread.run_sync(revoke_api_key, guarded.file, stored.id)
        assert await leaver.closed() == (4003, "token_revoked")
        async for _ in events.aiter_bytes():
            pass  # until it ends
        # A key with other roles is shown again, and counts for what it now allows.
        await anyio.to_thread.run_sync(revoke_api_key, guarded.file, wider.id)
        assert await climber.closed() == (4003, "token_revoked")
        await anyio.to_thread.run_sync(add_api_key, guarded.file, msgspec.structs.replace(wider, roles=["publish"]))
        await stayer.done("ping")


async def test_tokens_are_revoked_by_whoever_may(guarded: Guarded) -> None:
    mine = token("carl", "publish", iat=int(time.time()) - 5)
    key, stored = create_api_key("dora", ["subscribe"], expires=None, created=int(time.time()))
    await anyio.to_thread.run_sync(add_api_key, guarded.file, stored)

    await until(lambda: guarded.accepts(key), every=0.1)
    async with (
        web(guarded.server, headers={"authorization": f"Bearer {guarded.keys['admin']}"}) as admin,
        web(guarded.server, headers={"authorization": f"Bearer {mine}"}) as carl,
        peer(guarded.server, token=key) as dora,
    ):
        assert (await carl.post("/v1/revocations", json={"principal": "dora"})).status_code == 403
        for body in ({}, {"principal": "x", "token": "y"}, {"token": "nonsense"}, {"principal": ""}):
            assert (await admin.post("/v1/revocations", json=body)).status_code == 400, body

        async def lines() -> AsyncIterator[bytes]:
            yield b'{"text": "Said while the token counted."}\n'
            answer = await admin.post("/v1/revocations", json={"principal": "carl"})
            assert answer.status_code == 201, answer.text
            yield b'{"text": "Said afterwards."}\n'

        stream = {"content-type": "application/x-ndjson"}
        said = (await carl.post("/v1/geoids", content=lines(), headers=stream)).text.splitlines()
        assert [json.loads(line).get("code") for line in said] == [None, "unauthorized"], said
        assert (await carl.get("/v1/geoids")).status_code == 401

        answer = await admin.post("/v1/revocations", json={"token": stored.id})
        assert answer.json() | {"revoked_at": 0} == {"kind": "key", "subject": stored.id, "revoked_at": 0}
        assert await dora.closed() == (4003, "token_revoked")
        assert not await guarded.accepts(key)


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        (None, True),
        ("https://app.example.com", True),
        ("https://evil.example.com", False),
        ("https://app.example.com.evil.com", False),
        ("http://app.example.com", False),
        ("null", False),
    ],
)
async def test_pages_of_other_origins_are_refused(guarded: Guarded, origin: str | None, admitted: bool) -> None:
    headers = {"Authorization": f"Bearer {guarded.keys['subscribe']}"}
    async with handshake(guarded.server, origin=origin, additional_headers=headers) as client:
        if admitted:
            await client.done("connect")
        else:
            await client.ws.wait_closed()
            assert (client.ws.close_code, client.ws.close_reason) == (4505, "origin_refused")
    async with web(guarded.server) as http:
        response = await http.get("/v1/geoids", headers={**headers, **({"origin": origin} if origin else {})})
        assert (response.status_code == 200) is admitted, response.text


async def test_our_own_pages_may_connect(guarded: Guarded) -> None:
    headers = {"Authorization": f"Bearer {guarded.keys['subscribe']}"}
    async with handshake(guarded.server, origin=guarded.server.url, additional_headers=headers) as client:
        await client.done("connect")


@pytest.mark.parametrize("host", ["evil.example.com", "evil.example.com:8765", "127.0.0.1.evil.com", "10.0.0.7"])
async def test_open_access_is_for_loopback_names_only(server: Server, host: str) -> None:
    """A page that lets its own name resolve to 127.0.0.1 would otherwise be a page of ours (DNS rebinding)."""
    async with web(server, headers={"host": host}) as http:
        for method, path in (("GET", "/v1/geoids"), ("POST", "/v1/geoids"), ("GET", "/")):
            response = await http.request(method, path, headers={"origin": f"http://{host}"})
            assert response.status_code == 403, (path, response.text)
    where, _, port = server.address.partition(":")
    there = host if ":" in host else f"{host}:{port}"
    with pytest.raises(InvalidStatus) as refused:
        async with connect(
            f"ws://{there}/v1/stream", host=where, port=int(port), origin=Origin(f"http://{there}"), proxy=None
        ):
            pass
    assert refused.value.response.status_code == 403


async def test_open_access_refuses_other_pages(server: Server) -> None:
    async with handshake(server, origin="https://evil.example.com") as client:
        await client.ws.wait_closed()
        assert client.ws.close_code == 4505
    async with handshake(server, origin=server.url) as client:
        await client.done("connect")
