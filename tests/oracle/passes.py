"""Tokens that are revoked while a run goes on: whoever came in by one is sent away, at every door, and nobody comes in by it again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import anyio
from joserfc import jwt
from joserfc.jwk import OctKey

from tests.oracle.wire import Gone, Web

SECRET = "what the oracle signs its tokens with, and nobody else does"
SETTINGS = {"KIMERA_SECURITY__JWT_SECRET": SECRET, "KIMERA_SECURITY__JWT_ALGORITHMS": '["HS256"]'}
"""Who shows no token is let in all the same; who shows one has it checked."""
EXPIRES = 4_000_000_000
"""Unix seconds. Tokens say nothing of when they were issued: what is revoked stays so wherever the clock jumps to."""
TRIES = 40


@dataclass
class Pass:
    """A token, whose principal has no other."""

    principal: str
    token: str


@dataclass
class Passes:
    """What guests come in by: one at a time, a new one after each revocation.

    Attributes:
        asked: Tokens that the server was asked to revoke.
        revoked: What it said that it has revoked, in order.
    """

    seed: int
    asked: set[str] = field(default_factory=set)
    revoked: list[Pass] = field(default_factory=list)
    count: int = 0
    current: Pass = field(init=False)

    def __post_init__(self) -> None:
        self.issue()

    def issue(self) -> None:
        """A new one for a new principal."""
        self.count += 1
        principal = f"guest-{self.seed}-{self.count}"
        claims = {"sub": principal, "aud": "kimera-stream", "exp": EXPIRES, "roles": ["subscribe"]}
        self.current = Pass(principal, jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(SECRET)))

    async def revoke(self, url: str, rng: Random) -> None:
        """Ask a node, until it says that it has done so."""
        given = self.current
        self.asked.add(given.token)
        body = rng.choice([{"token": given.token}, {"principal": given.principal}])
        async with Web(url) as web:
            while True:
                try:
                    status, _ = await web.ask("POST", "/v1/revocations", json=body)
                except Gone:
                    status = 0
                if status == 201:
                    break
                await anyio.sleep(0.1)
        self.revoked.append(given)

    async def look(self, urls: Sequence[str], given: Sequence[Pass]) -> list[str]:
        """Show revoked ones to every node: each has to refuse them."""
        wrong: list[str] = []
        for url in urls:
            async with Web(url) as web:
                for each in given:
                    status = await _shown(web, each.token)
                    if status != 401:
                        wrong.append(f"{url}: the token of {each.principal} was revoked and is answered with {status}")
        return wrong


async def _shown(web: Web, token: str) -> int:
    for _ in range(TRIES):
        try:
            status, _ = await web.ask(
                "GET", "/v1/geoids", params={"limit": 1}, headers={"authorization": f"Bearer {token}"}
            )
        except Gone:
            status = 503
        if status not in (429, 503):
            return status
        await anyio.sleep(0.1)
    return status
