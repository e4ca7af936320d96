"""Watches, cursors, idempotency keys, sessions, usage, audit."""

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest
from sqlalchemy import null, update

from kimera_stream.core.interfaces import IdempotencyRecord, WriteBatch
from kimera_stream.core.kept import Revocation, UsageRecord
from kimera_stream.core.vault import schema
from kimera_stream.core.vault import vault as vault_module
from kimera_stream.core.vault.errors import DamagedVaultError
from kimera_stream.core.vault.records import SessionRecord
from kimera_stream.core.vault.retention import Retention
from kimera_stream.core.vault.tools import export, import_
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.database import Database, Query, Transaction
from kimera_stream.protocol.errors import LimitExceededError
from kimera_stream.protocol.objects import Watch

pytestmark = pytest.mark.anyio


@pytest.fixture
def restart(vault, url, make_settings):
    """Another vault on the same database."""

    async def open_again() -> SqlVault:
        again = SqlVault(url, make_settings())
        await again.start()
        return again

    return open_again


async def test_a_key_gives_its_first_result_within_the_window_and_over_a_restart(vault, samples, restart):
    record = IdempotencyRecord("ann", "k", b'{"offset":1}', 5_000)
    batch = samples.publish(0, "a")
    batch.idempotency.append(record)
    await vault.commit(batch)
    again = await restart()
    try:
        assert await again.idempotent("ann", "k", not_before=5_000) == record
        assert await again.idempotent("ann", "k", not_before=5_001) is None
        assert await again.idempotent("bob", "k", not_before=0) is None
        assert await again.idempotent("ann", "other", not_before=0) is None
    finally:
        await again.close()


async def test_a_first_result_that_was_changed_is_not_given_again(vault, samples, url, make_settings):
    batch = samples.publish(0, "a")
    batch.idempotency += [IdempotencyRecord("ann", name, b'{"offset":1}', 5_000) for name in ("k", "old", "well")]
    await vault.commit(batch)
    database = Database(url, make_settings())
    try:
        for changed in (
            update(schema.idempotency_key).where(schema.idempotency_key.c.key == "k").values(result=b'{"offset":7}'),
            update(schema.idempotency_key).where(schema.idempotency_key.c.key == "old").values(checksum=null()),
        ):
            await database.write(partial(Transaction.run, query=Query(changed)))
    finally:
        await database.close()
    with pytest.raises(DamagedVaultError, match=r"does not match its checksum.*db check"):
        await vault.idempotent("ann", "k", not_before=0)
    for name in ("old", "well"):  # written by an earlier version; not touched
        assert (await vault.idempotent("ann", name, not_before=0)).result == b'{"offset":1}'


async def test_an_expired_key_can_be_used_again(vault, samples):
    for at, head in ((1_000, 0), (9_000, 1)):
        batch = samples.publish(head, f"g{head}")
        batch.idempotency.append(IdempotencyRecord("ann", "k", b"%d" % head, at))
        await vault.commit(batch)
    assert (await vault.idempotent("ann", "k", not_before=0)).result == b"1"


async def test_expired_keys_are_purged_in_steps(vault, samples, clock, make_settings):
    batch = samples.publish(0, "a")
    batch.idempotency += [IdempotencyRecord("ann", f"k{i}", b"{}", clock.now - 400_000 + i) for i in range(10)]
    batch.idempotency.append(IdempotencyRecord("ann", "fresh", b"{}", clock.now))
    await vault.commit(batch)
    assert await vault.purge_idempotency(clock.now - 300_000, limit=4) == 4
    await Retention(vault, make_settings(), idempotency_window=300, clock=clock).run_once()
    assert await vault.idempotent("ann", "k9", not_before=0) is None
    assert await vault.idempotent("ann", "fresh", not_before=0) is not None


def _watch(**changes) -> Watch:
    fields = {"id": "w1", "watch": "door", "principal": "ann", "kinds": ["contradicts"], "created_at": 7}
    return Watch(**{**fields, **changes})


async def test_watches_survive_a_restart_exactly(vault, restart, samples):
    full = _watch(
        text="the door is open",
        kinds=["contradicts", "related"],
        min_score=0.5,
        filter={"all": [{"field": "data.score", "op": "gte", "value": 0.8}]},
    )
    bare = _watch(id="w2", watch="by vector", kinds=["related"], created_at=8)
    await vault.save_watch(full, None)
    await vault.save_watch(bare, samples.vector(3))
    again = await restart()
    try:
        (first, none), (second, vector) = await again.watches()
    finally:
        await again.close()
    assert (first, none, second) == (full, None, bare)
    np.testing.assert_array_equal(vector, samples.vector(3))


async def test_a_watch_is_unique_per_principal_and_name(vault):
    first = await vault.save_watch(_watch(), None)
    again = await vault.save_watch(_watch(id="w9", text="new"), None)
    assert again == _watch(id=first.id, text="new"), "whoever made it first named its channel"
    await vault.save_watch(_watch(id="w3", principal="bob"), None)
    assert {watch.id: watch.text for watch, _ in await vault.watches()} == {first.id: "new", "w3": _watch().text}
    assert await vault.delete_watch("ann", "door") is True
    assert await vault.delete_watch("ann", "door") is False
    assert [watch.id for watch, _ in await vault.watches()] == ["w3"]


async def test_cursors_are_per_principal_name_and_channel(vault, restart):
    assert await vault.cursor("ann", "c", "geoids") is None
    await vault.save_cursor("ann", "c", "geoids", 4)
    await vault.save_cursor("ann", "c", "geoids", 9)
    await vault.save_cursor("ann", "c", "scars", 2)
    again = await restart()
    try:
        assert await again.cursor("ann", "c", "geoids") == 9
        assert await again.cursor("ann", "c", "scars") == 2
        assert await again.cursor("bob", "c", "geoids") is None
    finally:
        await again.close()


async def test_cursors_of_a_principal_are_bounded_and_those_it_has_still_move(vault, url, make_settings):
    strict = SqlVault(url, make_settings(max_cursors=2))
    await strict.start()
    try:
        for name in ("a", "b"):
            await strict.save_cursor("ann", name, "geoids", 1)
        with pytest.raises(LimitExceededError, match="at most 2"):
            await strict.save_cursor("ann", "c", "geoids", 1)
        await strict.save_cursor("ann", "b", "geoids", 2)
        await strict.save_cursor("bob", "c", "geoids", 3)
        assert await strict.cursor("ann", "b", "geoids") == 2
        assert await strict.cursor("ann", "c", "geoids") is None
    finally:
        await strict.close()


async def _kept(saves: Sequence[Callable[[], Awaitable[Any]]]) -> int:
    """How many of these were not refused, all done at once."""
    kept = 0

    async def save(one: Callable[[], Awaitable[Any]]) -> None:
        nonlocal kept
        with contextlib.suppress(LimitExceededError):
            await one()
            kept += 1

    async with anyio.create_task_group() as group:
        for one in saves:
            group.start_soon(save, one)
    return kept


async def test_what_a_principal_may_keep_is_counted_over_all_nodes(vault, url, make_settings):
    """Two nodes that give the last place away at the same moment give it to one."""
    nodes = [SqlVault(url, make_settings(max_cursors=1)) for _ in range(2)]
    for node in nodes:
        await node.start()
    try:
        for turn in range(20):
            who = f"ann-{turn}"
            assert (
                await _kept([partial(node.save_cursor, who, f"n{at}", "geoids", 1) for at, node in enumerate(nodes)])
                == 1
            )
            watches = [_watch(id=f"w{turn}-{at}", watch=f"n{at}", principal=who) for at in range(2)]
            saves = [
                partial(node.save_watch, watch, None, most=100, most_per_principal=1)
                for node, watch in zip(nodes, watches, strict=True)
            ]
            assert await _kept(saves) == 1
        for of, most in ((nodes[0], 20), (nodes[1], 21)):
            late = partial(of.save_watch, _watch(id="late", principal="late"), None, most=most, most_per_principal=1)
            assert await _kept([late]) == most - 20
        for node in nodes:  # one that is there is replaced, however many there are
            await node.save_watch(_watch(principal="late"), None, most=1, most_per_principal=1)
    finally:
        for node in nodes:
            await node.close()


async def test_a_cursor_that_another_node_makes_at_the_same_moment_is_moved(vault, url, make_settings):
    nodes = [SqlVault(url, make_settings(max_cursors=1)) for _ in range(2)]
    for node in nodes:
        await node.start()
    try:
        for turn in range(20):
            assert await _kept([partial(node.save_cursor, f"ann-{turn}", "c", "geoids", 1) for node in nodes]) == 2
    finally:
        for node in nodes:
            await node.close()


async def test_a_cursor_means_nothing_in_another_epoch(vault, url, samples, tmp_path, make_settings):
    await vault.commit(samples.publish(0, "a"))
    await vault.save_cursor("ann", "c", "geoids", 1)
    target = f"sqlite:///{tmp_path / 'other.sqlite3'}"
    await export(url, tmp_path / "dump.gz")
    await import_(tmp_path / "dump.gz", target)
    other = SqlVault(target, make_settings())
    await other.start()
    try:
        assert other.epoch != vault.epoch
        assert await other.cursor("ann", "c", "geoids") is None
    finally:
        await other.close()


async def test_sessions_and_usage_are_counted_by_commits(vault, samples, clock):
    await vault.commit(samples.publish(0, "a", "b", session_id="s1", text="ü"))
    clock.now += 86_400_000
    await vault.commit(samples.publish(2, "c", session_id="s1", text="xyz"))
    await vault.commit(samples.publish(3, "d", session_id="s2", principal="bob", text=None))
    day = clock.now // 86_400_000
    assert await vault.session("s1") == SessionRecord("s1", "ann", 3, clock.now - 86_400_000, clock.now)
    assert await vault.session("unknown") is None
    assert {s.id for s in await vault.recent_sessions(since=clock.now, limit=9)} == {"s1", "s2"}
    assert await vault.usage() == [
        UsageRecord("ann", day - 1, 2, 4, 14, 4),
        UsageRecord("ann", day, 1, 3, 7, 3),
        UsageRecord("bob", day, 1, 0, 7),
    ]
    assert await vault.purge_sessions(clock.now, limit=10) == 0
    assert await vault.purge_sessions(clock.now + 1, limit=1) == 1


async def test_bytes_of_all_that_was_said_are_counted(vault, samples, clock):
    said = {"semantic_state": {"heat": 0.5}, "symbolic_state": {"door": "auf"}, "metadata": {"von": ["ü", 1]}}
    batch = samples.publish(0, "a", "b", "c", text="ü", **said)
    batch.geoids[1] = replace(batch.geoids[1], own_vector=True, tokens=0)
    await vault.commit(batch)
    await vault.commit(samples.publish(3, "d", principal="bob", text=None, symbolic_state={"door": "zu"}))
    day = clock.now // 86_400_000
    stated = len('{"heat":0.5}') + len('{"door":"auf"}') + len('{"von":["ü",1]}'.encode())
    assert await vault.usage() == [
        UsageRecord("ann", day, 3, 6, 14, 3 * (2 + stated) + 4 * batch.geoids[1].vector.size),
        UsageRecord("bob", day, 1, 0, 7, len('{"door":"zu"}')),
    ]


async def test_the_records_of_quiet_sessions_are_dropped_and_their_geoids_stay(vault, samples, clock, make_settings):
    await vault.commit(samples.publish(0, "a", session_id="old"))
    clock.now += 10_000
    await vault.commit(samples.publish(1, "b", "c", session_id="new", originator_agent_id="bot"))
    await Retention(vault, make_settings(retention_sessions=0.0), clock=clock).run_once()
    assert await vault.session("old") is not None
    await Retention(vault, make_settings(retention_sessions=5.0), clock=clock).run_once()
    assert await vault.session("old") is None
    assert await vault.session("new") is not None
    assert await vault.geoid("a") is not None
    said = await vault.last_said(["new", "old", "unknown"], limit=5)
    assert said == {"new": [("c", "bot", 1003), ("b", "bot", 1002)], "old": [("a", None, 1001)], "unknown": []}
    assert await vault.last_said(["new"], limit=1) == {"new": [("c", "bot", 1003)]}


async def test_usage_of_one_principal(vault, samples, clock):
    await vault.commit(samples.publish(0, "a"))
    await vault.commit(samples.publish(1, "b", principal="bob"))
    day = clock.now // 86_400_000
    assert [row.principal for row in await vault.usage(since_day=day)] == ["ann", "bob"]
    assert [row.principal for row in await vault.usage(since_day=day, principal="bob")] == ["bob"]
    assert [row.principal for row in await vault.usage(since_day=day, limit=1)] == ["ann"]
    assert await vault.usage(since_day=day + 1, principal="bob") == []


async def test_audit_entries_are_kept_in_order(vault):
    await vault.commit(WriteBatch(audit=[(10, "ann", "resolve", "c1"), (11, "bob", "delete", "g1")]))
    assert vault.head == 0
    assert await vault.audit() == [(10, "ann", "resolve", "c1"), (11, "bob", "delete", "g1")]
    assert await vault.audit(since=11) == [(11, "bob", "delete", "g1")]


async def test_the_encoder_of_the_vectors_is_remembered(vault, restart):
    assert vault.encoder is None
    await vault.record_encoder("minilm/1")
    again = await restart()
    try:
        assert (vault.encoder, again.encoder) == ("minilm/1", "minilm/1")
    finally:
        await again.close()


async def test_a_later_word_on_the_same_tokens_takes_the_place_of_an_earlier_one(vault, clock):
    first = await vault.revoke("principal", "ann", by="root")
    other = await vault.revoke("key", "ann", by="root")
    clock.now += 5
    again = await vault.revoke("principal", "ann", by="root")
    assert again == Revocation(again.id, "principal", "ann", first.revoked_at + 5)
    # Whoever has heard of the first two hears of the third: ids only grow.
    assert await vault.revocations(after=other.id, limit=9) == [again]
    assert await vault.revocations(after=0, limit=9) == [other, again]
    assert await vault.revocations(after=0, limit=1) == [other]
    assert [each[1:] for each in await vault.audit()] == [
        ("root", "revoke:principal", "ann"),
        ("root", "revoke:key", "ann"),
        ("root", "revoke:principal", "ann"),
    ]


async def test_revocations_are_bounded_and_go_with_the_tokens(vault, clock, monkeypatch):
    monkeypatch.setattr(vault_module, "MOST_REVOCATIONS", 2)
    short = await vault.revoke("jwt", "short", by="root", expires_at=clock.now)
    assert short.expires_at == clock.now
    assert await vault.revocations(after=0, limit=9) == [short]
    await vault.revoke("principal", "ann", by="root")
    with pytest.raises(LimitExceededError, match="revoke whole principals"):
        await vault.revoke("principal", "ben", by="root")
    await vault.revoke("principal", "ann", by="root")  # takes no place
    assert len(await vault.revocations(after=0, limit=9)) == 2
    clock.now += 3_600_000
    await vault.revoke("principal", "ben", by="root")
    assert [each.subject for each in await vault.revocations(after=0, limit=9)] == ["ann", "ben"]


async def test_a_copy_of_the_vault_refuses_what_was_revoked(vault, url, tmp_path, make_settings):
    made = await vault.revoke("principal", "ann", by="root")
    await export(url, tmp_path / "all.gz")
    copy = f"sqlite+aiosqlite:///{tmp_path / 'copy.sqlite3'}"
    await import_(tmp_path / "all.gz", copy)
    again = SqlVault(copy, make_settings())
    await again.start()
    try:
        (kept,) = await again.revocations(after=0, limit=9)
        assert (kept.kind, kept.subject, kept.revoked_at) == (made.kind, made.subject, made.revoked_at)
    finally:
        await again.close()
