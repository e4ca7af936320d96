"""Leases, progress and the vault under the log's lock: what several nodes on one database rest on."""

import time
from collections.abc import AsyncIterator
from functools import partial

import anyio
import msgspec
import numpy as np
import pytest

from kimera_stream.core.columns import SlicedColumns
from kimera_stream.core.coverage import Node
from kimera_stream.core.groups import Within
from kimera_stream.core.interfaces import StoredGeoid, WriteBatch
from kimera_stream.core.slices import slice_of
from kimera_stream.core.vault.cluster import SqlCluster
from kimera_stream.core.vault.errors import DamagedVaultError, LeaseLostError
from kimera_stream.core.vault.locked import SqlLockedLog
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.database import Database
from kimera_stream.protocol.errors import BadRequestError, UnavailableError
from kimera_stream.protocol.log import LogEntry

pytestmark = pytest.mark.anyio
ONE, TWO = Node("one#1", "one", "engine"), Node("two#1", "two", "all")
LEASE = 60.0
GROUPED: tuple[Within, ...] = ("session", "agent", "principal")


@pytest.fixture
async def store(url: str, vault: SqlVault, make_settings) -> AsyncIterator[SqlCluster]:
    opened = SqlCluster(url, make_settings())
    await opened.open(4)
    yield opened
    await opened.close()


async def test_slices_begin_where_the_log_ends_and_their_number_stays(url, vault, samples, make_settings):
    await vault.commit(samples.publish(0, "a", "b"))
    store = SqlCluster(url, make_settings())
    try:
        await store.open(4)
        await store.open(4)
        coverage = await store.coverage(lease=LEASE)
        assert (coverage.head, coverage.scored, coverage.completeness) == (2, 2, 0.0)
        assert [each.number for each in coverage.slices] == [0, 1, 2, 3]
        with pytest.raises(BadRequestError, match="4 slices"):
            await store.open(8)
    finally:
        await store.close()


async def test_a_node_keeps_its_place_and_leaves_while_a_commit_lasts_too_long(store, monkeypatch):
    def refuse():
        raise UnavailableError("a commit hangs")

    monkeypatch.setattr(store.commits, "admit", refuse)
    await store.beat(ONE, lease=LEASE)
    got = await store.take(ONE.id, [0], lease=LEASE)
    await store.filled(ONE.id, {0: got[0].generation})
    await store.advance(ONE.id, {0: got[0].generation}, 0)
    await store.leave(ONE.id)
    coverage = await store.coverage(lease=LEASE)
    assert (coverage.nodes, coverage.completeness) == ((), 0.0)


async def test_a_slice_has_one_owner_at_a_time_and_a_generation_for_each(store):
    await store.beat(ONE, lease=LEASE)
    await store.beat(TWO, lease=LEASE)
    got = await store.take(ONE.id, [0, 1, 2], lease=LEASE)
    assert {number: each.generation for number, each in got.items()} == {0: 1, 1: 1, 2: 1}
    assert await store.take(TWO.id, [2], lease=LEASE) == {}
    assert set(await store.take(TWO.id, [2, 3], lease=LEASE)) == {3}
    await store.release(ONE.id, {2: 1, 1: 7})  # the second one is of another generation
    assert {n: each.generation for n, each in (await store.take(TWO.id, [1, 2], lease=LEASE)).items()} == {2: 3}
    coverage = await store.beat(ONE, lease=LEASE)
    assert [each.owner for each in coverage.slices] == [ONE.id, ONE.id, TWO.id, TWO.id]
    assert [(each.id, each.role) for each in coverage.nodes] == [(ONE.id, "engine"), (TWO.id, "all")]
    assert (coverage.completeness, [each.covered for each in coverage.slices]) == (0.0, [True] * 4)
    generations = {each.number: each.generation for each in coverage.slices}
    await store.filled(TWO.id, {1: generations[1], 2: generations[2], 3: generations[3]})  # the first one is another's
    assert [each.filled for each in (await store.coverage(lease=LEASE)).slices] == [False, False, True, True]
    await store.filled(ONE.id, {0: generations[0], 1: generations[1]})
    assert (await store.coverage(lease=LEASE)).completeness == 1.0
    await store.unfilled(ONE.id, {1: generations[1]})
    assert (await store.coverage(lease=LEASE)).completeness == 0.75, "it has to be filled again"
    await store.leave(ONE.id)
    coverage = await store.coverage(lease=LEASE)
    assert [each.covered for each in coverage.slices] == [False, False, True, True]
    assert all(0 < each.left <= LEASE for each in coverage.slices[2:])
    assert [each.id for each in coverage.nodes] == [TWO.id]


async def test_what_has_changed_hands_is_not_marked_by_its_former_owner(store):
    got = await store.take(ONE.id, [0, 1], lease=-1.0)
    leases = {number: each.generation for number, each in got.items()}
    taken = await store.take(TWO.id, [0], lease=LEASE)
    for mark in (store.filled, store.unfilled):
        await mark(ONE.id, leases)
        first = (await store.coverage(lease=LEASE)).slices[0]
        assert (first.owner, first.heir, first.filled) == (TWO.id, TWO.id, False), "it is to be filled by its new owner"
    await store.filled(TWO.id, {0: taken[0].generation})
    await store.unfilled(TWO.id, leases)  # of an earlier lease
    assert (await store.coverage(lease=LEASE)).slices[0].filled
    await store.take(ONE.id, [1], lease=LEASE)
    await store.filled(ONE.id, leases)  # of its own earlier lease
    assert not (await store.coverage(lease=LEASE)).slices[1].filled


async def test_an_expired_lease_can_be_taken_and_its_former_owner_moves_nothing(store):
    got = await store.take(ONE.id, [0, 1], lease=-1.0)
    leases = {number: each.generation for number, each in got.items()}
    expired = (await store.coverage(lease=LEASE)).slices[0]
    assert not expired.covered
    assert expired.left <= -1.0
    await store.advance(ONE.id, leases, 0)  # expired, and nobody has taken it
    assert set(await store.take(TWO.id, [0], lease=LEASE)) == {0}
    with pytest.raises(LeaseLostError) as lost:
        await store.advance(ONE.id, leases, 5)
    assert lost.value.numbers == (0,)
    assert [each.scored for each in (await store.coverage(lease=LEASE)).slices] == [0, 0, 0, 0]


async def test_a_slice_is_handed_to_the_node_that_is_ready_for_it(store):
    got = await store.take(ONE.id, [0, 1], lease=LEASE)
    await store.offer(TWO.id, [0, 1])
    assert [each.heir for each in (await store.coverage(lease=LEASE)).slices] == [TWO.id, TWO.id, None, None]
    await store.hand_over(ONE.id, {0: got[0].generation, 1: 99}, TWO.id, lease=LEASE)
    first, second, *_ = (await store.coverage(lease=LEASE)).slices
    assert (first.owner, first.generation, first.covered, first.heir) == (TWO.id, 2, True, None)
    assert (second.owner, second.generation) == (ONE.id, 1)  # another generation was named
    with pytest.raises(LeaseLostError):
        await store.advance(ONE.id, {0: 1}, 5)


async def test_progress_never_goes_back(store):
    got = await store.take(ONE.id, [0, 1], lease=LEASE)
    leases = {number: each.generation for number, each in got.items()}
    await store.advance(ONE.id, leases, 5)
    await store.advance(ONE.id, {0: leases[0]}, 3)
    assert [each.scored for each in (await store.coverage(lease=LEASE)).slices] == [5, 5, 0, 0]


async def test_a_duty_has_one_holder(store):
    assert await store.lead("relay", ONE.id, lease=LEASE)
    assert await store.lead("relay", ONE.id, lease=LEASE)
    assert not await store.lead("relay", TWO.id, lease=LEASE)
    await store.resign("relay", ONE.id)
    assert await store.lead("relay", TWO.id, lease=-1.0)
    assert await store.lead("relay", ONE.id, lease=LEASE)


async def test_a_transaction_commits_what_it_planned_under_the_lock(vault, store, samples):
    got = await store.take(ONE.id, [0], lease=LEASE)
    seen: list[object] = []

    def plan(locked) -> WriteBatch:
        locked.hold(ONE.id, {0: got[0].generation})
        locked.advance([0], 2)
        seen.append((locked.head, locked.now, dict(locked.marks(["a", "z"]))))
        return samples.publish(locked.head, "a", "b")

    await vault.transact(plan)
    assert vault.head == 2
    batch = await vault.transact(plan_nothing)
    assert batch.entries == []
    assert seen[0][0::2] == (0, {})
    assert (await store.coverage(lease=LEASE)).slices[0].scored == 2
    assert (await vault.geoid("a")).stated == 1
    with pytest.raises(AssertionError):
        await vault.transact(fail)
    assert vault.head == 2


def plan_nothing(locked) -> WriteBatch:
    mark = locked.marks(["a"])["a"]
    assert (mark.version, mark.offset, mark.stated) == (1, 1, 1)
    return WriteBatch()


def fail(locked) -> WriteBatch:
    raise AssertionError("planning failed")


async def test_the_time_is_the_databases_and_never_before_the_newest_entry(vault, store):
    seen: list[int] = []

    def look(locked) -> WriteBatch:
        seen.append(locked.now)
        return WriteBatch()

    await vault.transact(look)
    assert abs(seen[0] - time.time() * 1000) < 60_000
    ahead = 9_000_000_000_000  # of a node whose clock is wrong
    await vault.commit(WriteBatch(entries=[LogEntry(1, "geoid.created", ahead, ("geoids",), msgspec.Raw(b"{}"))]))
    await vault.transact(look)
    assert seen[1] == ahead


async def test_a_transaction_without_its_lease_writes_nothing(vault, store, samples):
    got = await store.take(ONE.id, [0, 1], lease=-1.0)
    await store.take(TWO.id, [1], lease=LEASE)

    def plan(locked) -> WriteBatch:
        batch = samples.publish(locked.head, "a")
        locked.advance([0, 1], 1)
        locked.hold(ONE.id, {number: each.generation for number, each in got.items()})
        return batch

    with pytest.raises(LeaseLostError):
        await vault.transact(plan)
    assert await vault.refresh() == 0
    assert [each.scored for each in (await store.coverage(lease=LEASE)).slices] == [0, 0, 0, 0]


@pytest.mark.postgres
@pytest.mark.parametrize("shared", [True, False])
async def test_a_slice_does_not_change_hands_in_the_middle_of_a_commit_that_rests_on_it(
    postgres_url, make_settings, samples, shared
):
    """While one transaction holds the slice, its progress may move and its lease be renewed, but nobody takes it."""
    vault, database = SqlVault(postgres_url, make_settings()), Database(postgres_url, make_settings())
    store = SqlCluster(postgres_url, make_settings())
    await vault.start()
    await store.open(4)
    try:
        got = await store.take(ONE.id, [0], lease=-1.0)
        leases = {0: got[0].generation}
        async with database.transaction(write=True) as steps:
            await steps.step(lambda tx: SqlLockedLog(tx).hold(ONE.id, leases, shared=shared))
            assert await store.take(TWO.id, [0], lease=LEASE) == {}
            if shared:
                with anyio.fail_after(5):
                    await store.advance(ONE.id, leases, 3)
                    await store.beat(ONE, lease=-1.0)
        assert set(await store.take(TWO.id, [0], lease=LEASE)) == {0}
        with pytest.raises(LeaseLostError):
            await vault.transact(partial(hold_and_publish, leases=leases, shared=shared, samples=samples))
        assert await vault.refresh() == 0
    finally:
        await store.close()
        await database.close()
        await vault.close()


def hold_and_publish(locked, leases, shared, samples) -> WriteBatch:
    locked.hold(ONE.id, leases, shared=shared)
    return samples.publish(locked.head, "a")


async def test_writers_wait_for_each_other_instead_of_losing_a_race(url, vault, store, samples, make_settings):
    other = SqlVault(url, make_settings())
    await other.start()
    try:

        async def write(to: SqlVault, name: str) -> None:
            for number in range(8):
                await to.transact(partial(publish, name=f"{name}{number}"))

        def publish(locked, name: str) -> WriteBatch:
            return samples.publish(locked.head, name)

        async with anyio.create_task_group() as group:
            group.start_soon(write, vault, "a")
            group.start_soon(write, other, "b")
        assert await vault.refresh() == 16
        assert len((await vault.read(None, after=0, limit=99)).entries) == 16
    finally:
        await other.close()


async def scanned(vault: SqlVault, within: Within = "all", batch: int = 7) -> list[SlicedColumns]:
    return [page async for page in vault.scan_slices([1, 3], slices=4, batch=batch, dimension=8, within=within)]


async def test_the_geoids_of_a_slice_are_those_that_hash_to_it(vault, store, samples):
    names = [f"g{number}" for number in range(40)]
    await vault.commit(samples.publish(0, *names, symbolic_state={"k": 1}))
    pages = await scanned(vault)
    expected = [name for name in names if slice_of(name, 4) in (1, 3)]
    assert [id_ for page in pages for id_ in page.columns.ids] == expected
    assert [int(each) for page in pages for each in page.numbers] == [slice_of(name, 4) for name in expected]
    (page,) = await scanned(vault, batch=99)
    offsets = [names.index(name) + 1 for name in expected]
    np.testing.assert_array_equal(page.columns.vectors, np.stack([samples.vector(offset) for offset in offsets]))
    assert list(page.columns.symbols) == [{"k": 1}] * len(expected)
    assert list(page.columns.texts) == [f"statement {name}" for name in expected]
    assert page.stated.tolist() == offsets
    with pytest.raises(DamagedVaultError):
        [each async for each in vault.scan_slices([1], slices=4, batch=99, dimension=9, within="all")]


async def test_a_scan_of_slices_tells_when_each_was_stated_and_what_it_is_compared_within(vault, store, samples):
    mine = [name for name in map("g{}".format, range(40)) if slice_of(name, 4) == 1][:3]
    await vault.commit(samples.publish(0, *mine, session_id="s", originator_agent_id="a", principal="ann"))
    labelled = samples.geoid(mine[0], 4, version=2, metadata={"label": "x"})
    changed = samples.geoid(mine[1], 5, version=2, text="something else")
    await vault.commit(
        WriteBatch(
            entries=[samples.entry(each.offset, each, "geoid.updated") for each in (labelled, changed)],
            geoids=[
                StoredGeoid(labelled, samples.vector(1), "bob", stated=1),
                StoredGeoid(changed, samples.vector(5), "bob", stated=5),
            ],
        )
    )
    (page,) = await scanned(vault, batch=99)
    assert list(zip(page.columns.ids, page.stated.tolist(), strict=True)) == [(mine[2], 3), (mine[0], 1), (mine[1], 5)]
    assert list(page.groups) == [None, None, None]
    kept = page.kept(page.stated <= 3)
    assert (kept.columns.ids, kept.stated.tolist(), len(kept.groups)) == ([mine[2], mine[0]], [3, 1], 2)
    groups = {within: [list(page.groups) for page in await scanned(vault, within, 99)] for within in GROUPED}
    assert groups == {
        "session": [["s", None, None]],
        "agent": [["a", None, None]],
        "principal": [["ann", "bob", "bob"]],
    }


async def test_the_watches_have_a_generation_that_grows_with_every_change(vault, store, samples):
    before = (await store.coverage(lease=LEASE)).watch_generation
    assert not await vault.delete_watch("p", "none")
    generations: list[int] = []

    def look(locked) -> WriteBatch:
        generations.append(locked.watch_generation)
        return WriteBatch()

    await vault.transact(look)
    assert generations == [before + 1]
