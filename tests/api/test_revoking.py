"""Which tokens a revocation is about, and what happens while the vault is away."""

import base64
import json
from typing import Any

import anyio
import pytest

from kimera_stream.api.auth import revoking
from kimera_stream.api.auth.revoking import Revocations, Revoking, digest_of, subject_of
from kimera_stream.core.access import ALL_ROLES, Principal
from kimera_stream.core.kept import FORGIVEN_MS, Revocation
from kimera_stream.protocol.errors import UnavailableError

pytestmark = pytest.mark.anyio


def jwt_of(**claims: Any) -> str:
    head, body = (
        base64.urlsafe_b64encode(json.dumps(each).encode()).rstrip(b"=").decode() for each in ({"alg": "x"}, claims)
    )
    return f"{head}.{body}.c2lnbmF0dXJl"


def test_a_token_is_named_without_its_secret():
    key = "kst_0123456789ab_" + "s" * 43
    assert subject_of(key) == subject_of("0123456789ab") == ("key", "0123456789ab", None)
    token = jwt_of(sub="ann", exp=1_700_000_000)
    kind, subject, expires = subject_of(token)
    assert (kind, expires) == ("jwt", 1_700_000_000_000)
    # Another way to write the signature is no other token.
    assert subject == digest_of(token) == digest_of(token[:-1] + "V")
    assert subject != digest_of(jwt_of(sub="ann", exp=1_700_000_001))


@pytest.mark.parametrize("exp", [None, "soon", -1, 1e300, [1]])
def test_an_expiry_that_cannot_be_read_is_none(exp):
    assert subject_of(jwt_of(exp=exp))[2] is None


def test_claims_that_are_nested_too_deep_are_not_read():
    claims = b'{"a":' + b"[" * 2_500 + b"]" * 2_500 + b"}"
    token = f"e30.{base64.urlsafe_b64encode(claims).rstrip(b'=').decode()}.c2ln"
    assert subject_of(token) == ("jwt", digest_of(token), None)


@pytest.mark.parametrize(
    "token", ["", "a.b", "a.b.c.d", "a b.c.d", "0123456789AB", "kst_0123456789ab_short", "a." + "b" * 9_000 + ".c"]
)
def test_what_is_no_token(token):
    with pytest.raises(ValueError, match="expected an API key"):
        subject_of(token)


def test_a_principal_loses_what_was_issued_so_far():
    known = Revocations()
    known.add(Revocation(7, "principal", "ann", 5_500))

    def covers(issued: int | None, *, credential: str = "jwt:x", id: str = "ann") -> bool:
        return known.cover(Principal(id, ALL_ROLES, None, credential, issued))

    assert covers(None)
    assert covers(5)  # the second is not over: it may have been issued before
    assert not covers(6)
    assert not covers(5, id="ben")
    assert not covers(None, credential="")  # nothing was shown
    known.add(Revocation(3, "principal", "ann", 1_000))  # heard late
    assert covers(5)
    known.add(Revocation(8, "key", "x", 1))
    assert not covers(6)
    assert covers(6, credential="key:x", id="ben")


def test_what_has_ended_by_itself_is_forgotten():
    known = Revocations()
    known.add(Revocation(1, "jwt", "short", 1_000, 5_000))
    known.add(Revocation(2, "jwt", "long", 1_000, 6_000))
    known.add(Revocation(3, "key", "x", 1_000))
    known.add(Revocation(4, "principal", "ann", 1_000))
    known.forget(5_001)
    covered = [
        known.cover(Principal(id, ALL_ROLES, None, credential, 0))
        for id, credential in (("ben", "jwt:short"), ("ben", "jwt:long"), ("ben", "key:x"), ("ann", "jwt:other"))
    ]
    assert covered == [False, True, True, True]
    assert len(known) == 3


class Store:
    """A vault that can be away."""

    def __init__(self) -> None:
        self.kept: list[Revocation] = []
        self.away = False

    async def revoke(self, kind: Any, subject: str, *, by: str, expires_at: int | None = None) -> Revocation:
        await anyio.lowlevel.checkpoint()
        self.kept.append(Revocation(len(self.kept) + 1, kind, subject, 1))
        return self.kept[-1]

    async def revocations(self, *, after: int, limit: int) -> list[Revocation]:
        await anyio.lowlevel.checkpoint()
        if self.away:
            raise UnavailableError("away")
        return [each for each in self.kept if each.id > after][:limit]


async def test_others_are_heard_of_though_one_was_made_here(monkeypatch):
    """The id of the own one is greater than that of one that was made elsewhere a moment ago."""
    monkeypatch.setattr(revoking, "EVERY", 0.001)
    monkeypatch.setattr(revoking, "PAGE", 2)
    store, known, told, looks = Store(), Revocations(), anyio.Event(), 0
    principals = [Principal(str(n), ALL_ROLES, None, "jwt:x", 0) for n in range(6)]

    async def look() -> bool:
        nonlocal looks
        await anyio.lowlevel.checkpoint()
        looks += 1
        if looks == 3:
            store.away = False
        return False

    def recheck() -> None:
        if all(known.cover(each) for each in principals):
            told.set()

    here = Revoking(store, known, look=look, changed=lambda: None)
    await here.load(recheck)
    for n in range(5):
        await store.revoke("principal", str(n), by="elsewhere")
    await here.revoke("principal", "5", by="ann")
    assert [known.cover(each) for each in principals] == [False] * 5 + [True]
    store.away = True  # for three looks
    async with anyio.create_task_group() as group:
        group.start_soon(here.run)
        with anyio.fail_after(10):
            await told.wait()
        group.cancel_scope.cancel()
    assert looks >= 3


async def test_a_node_begins_once_it_has_heard_of_all_and_then_lets_go_of_what_is_over(monkeypatch):
    monkeypatch.setattr(revoking, "EVERY", 0.001)
    store, known, refused = Store(), Revocations(), 0
    now = 1_700_000_000
    store.kept = [
        Revocation(1, "jwt", "over", 1, now * 1000 - FORGIVEN_MS - 1),
        Revocation(2, "jwt", "not yet", 1, now * 1000 - FORGIVEN_MS),
    ]
    reading = store.revocations

    async def refusing(*, after: int, limit: int) -> list[Revocation]:
        nonlocal refused
        refused += 1
        store.away = refused <= 10  # more often than a service is started again
        return await reading(after=after, limit=limit)

    looked = anyio.Event()

    async def look() -> bool:
        await anyio.lowlevel.checkpoint()
        if len(known) == 1:
            looked.set()
        return False

    monkeypatch.setattr(store, "revocations", refusing)
    here = Revoking(store, known, look=look, changed=lambda: None, clock=lambda: now)
    await here.load(lambda: None)
    assert (refused, len(known)) == (11, 2)
    async with anyio.create_task_group() as group:
        group.start_soon(here.run)
        with anyio.fail_after(10):
            await looked.wait()
        group.cancel_scope.cancel()
    assert known.cover(Principal("ben", ALL_ROLES, None, "jwt:not yet", 0))
