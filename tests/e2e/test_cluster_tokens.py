"""Tokens that are revoked through one edge, at the other. No engine is needed for that."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import OctKey

from tests.e2e.harness import handshake, peer, show, web
from tests.e2e.nodes import Cluster

pytestmark = [pytest.mark.anyio, pytest.mark.postgres, pytest.mark.redis]


SECRET = "a-secret-of-more-than-thirty-two-bytes-for-tests"
GUARDED = {
    "KIMERA_SECURITY__AUTH": "required",
    "KIMERA_SECURITY__JWT_SECRET": SECRET,
    "KIMERA_SECURITY__JWT_ALGORITHMS": '["HS256"]',
}


def token(subject: str, role: str, issued: int, **claims: Any) -> str:
    body = {"sub": subject, "aud": "kimera-stream", "exp": issued + 3600, "iat": issued, "roles": [role], **claims}
    return jwt.encode({"alg": "HS256"}, body, OctKey.import_key(SECRET))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        for name in ("guarded", "other"):
            made.start(name, "edge", wait=False, **GUARDED)
        made.ready("guarded", "other")
        yield made
    finally:
        made.close()
        for name, node in made.nodes.items():
            show(f"--- {name}", node.text)


async def test_a_token_revoked_through_one_edge_ends_its_connections_on_the_other(cluster: Cluster) -> None:
    guarded, other = (cluster.nodes[name] for name in ("guarded", "other"))
    now = int(time.time())
    root = {"authorization": f"Bearer {token('root', 'admin', now)}"}
    lost, kept = (token("anna", "subscribe", now - 100, jti=each) for each in ("lost", "kept"))
    bens = token("ben", "subscribe", now - 100)
    async with (
        web(guarded, headers=root) as desk,
        web(other, headers={"authorization": f"Bearer {lost}"}) as reading,
        peer(other, token=lost) as anna,
        peer(other, "msgpack", token=kept) as elsewhere,
        peer(other, token=bens) as ben,
        reading.stream("GET", "/v1/events?channel=geoids") as events,
    ):
        answer = await desk.post("/v1/revocations", json={"token": lost})
        assert (answer.status_code, answer.json()["kind"]) == (201, "jwt"), answer.text
        assert await anna.closed() == (4003, "token_revoked")
        async for _ in events.aiter_bytes():
            pass  # until it ends
        assert (await reading.get("/v1/geoids")).status_code == 401
        await elsewhere.done("ping")  # another token of the same principal
        await ben.done("ping")

        answer = await desk.post("/v1/revocations", json={"principal": "ben"})
        assert (answer.status_code, answer.json()["subject"]) == (201, "ben"), answer.text
        assert await ben.closed() == (4003, "token_revoked")
        await elsewhere.done("ping")

    # What was revoked stays so, at an edge that starts later too; a token that was issued since counts.
    late = cluster.start("late", "edge", **GUARDED)
    anew = token("ben", "subscribe", int(time.time()) + 2)  # the second of the revocation is over by then
    for edge in (guarded, other, late):
        for refused in (lost, bens):
            async with handshake(edge) as again:
                assert (await again.ask("connect", token=refused))["code"] == "unauthorized"
                assert await again.closed() == (4500, "unauthorized")
        async with peer(edge, token=kept), peer(edge, token=anew):
            pass
    assert all(each not in node.text for each in (lost, kept, bens) for node in (guarded, other, late))
