"""Who owns which slice as nodes come, go and do not hear the end of what they did; and who leads."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import msgspec
import pytest

from kimera_stream.core.coverage import Coverage, Node, SliceState
from kimera_stream.core.interfaces import WriteBatch
from kimera_stream.core.slices import shares
from kimera_stream.core.vault.cluster import SqlCluster
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.engines.cluster import keeper as keeping
from kimera_stream.engines.cluster import leader as leading
from kimera_stream.engines.cluster.keeper import CoverageKeeper
from kimera_stream.engines.cluster.leader import Leader, Relay
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.log import LogEntry
from tests.engines.nodes import Heard, database_settings, until

pytestmark = pytest.mark.anyio
SLICES = 8


@pytest.fixture
async def vault(tmp_path: Path) -> AsyncIterator[SqlVault]:
    opened = SqlVault(f"sqlite+aiosqlite:///{tmp_path / 'vault.sqlite3'}", database_settings())
    await opened.start()
    yield opened
    await opened.close()


@pytest.fixture
async def store(vault: SqlVault, tmp_path: Path) -> AsyncIterator[SqlCluster]:
    opened = SqlCluster(f"sqlite+aiosqlite:///{tmp_path / 'vault.sqlite3'}", database_settings())
    await opened.open(SLICES)
    yield opened
    await opened.close()


class Owner:
    """A keeper, and what it says of its slices."""

    def __init__(self, store: SqlCluster, name: str, role: str = "engine", lease: float = 60.0) -> None:
        self.slices: dict[int, int] = {}
        self.said: list[tuple[str, list[int]]] = []
        self.in_contact = True
        self.now = 0.0
        self.keeper = CoverageKeeper(
            store,
            Node(f"{name}#1", name, role),  # type: ignore[arg-type]
            slices=SLICES,
            lease=lease,
            gain=self.gain,
            lose=self.lose,
            in_contact=lambda: self.in_contact,
            monotonic=lambda: self.now,
        )

    async def gain(self, slices: Mapping[int, SliceState]) -> None:
        self.said.append(("gain", sorted(slices)))
        self.slices |= {number: state.generation for number, state in slices.items()}

    async def lose(self, numbers: Sequence[int]) -> None:
        self.said.append(("lose", sorted(numbers)))
        for number in numbers:
            del self.slices[number]


async def settle(*owners: Owner) -> None:
    for _ in range(3):
        for owner in owners:
            await owner.keeper.step()


async def test_slices_are_shared_evenly_as_engines_come_and_go(store):
    one, two, three = (Owner(store, name) for name in ("one", "two", "three"))
    await settle(one)
    assert len(one.slices) == SLICES
    await settle(one, two)
    assert [len(one.slices), len(two.slices)] == [4, 4]
    await settle(one, two, three)
    assert sorted(len(each.slices) for each in (one, two, three)) == [2, 3, 3]
    await two.keeper.leave()
    assert not two.slices
    await settle(one, three)
    assert [len(one.slices), len(three.slices)] == [4, 4]
    for owner in (one, three):
        assert owner.slices == dict(owner.keeper.leases)
    coverage = await store.coverage(lease=60.0)
    assert coverage.completeness == 1.0
    assert {each.number: each.generation for each in coverage.slices} == one.slices | three.slices


async def test_a_silent_engine_is_replaced_and_learns_of_it(store):
    silent, heir = Owner(store, "silent", lease=0.2), Owner(store, "heir", lease=0.2)
    await settle(silent)
    await anyio.sleep(0.3)
    await heir.keeper.step()
    assert len(heir.slices) == SLICES
    await silent.keeper.step()
    assert silent.slices == {}
    assert silent.said == [("gain", list(range(SLICES))), ("lose", list(range(SLICES)))]


async def test_a_slice_stays_where_it_is_until_its_heir_is_ready(store):
    one, two = Owner(store, "one"), Owner(store, "two")
    asked: list[list[int]] = []
    ready: list[int] = []

    def prepare(numbers):
        asked.append(sorted(numbers))
        return list(ready)

    two.keeper.prepare_with(prepare)
    await settle(one)
    await settle(two, one)
    assert (len(one.slices), len(two.slices)) == (SLICES, 0)
    wanted = asked[-1]
    assert len(wanted) == 4
    ready += wanted[:1]
    await settle(two, one)
    await two.keeper.step()
    assert sorted(two.slices) == ready
    assert ("lose", ready) in one.said
    assert asked[-1] == wanted[1:]
    ready += wanted[1:]
    await settle(two, one)
    await two.keeper.step()
    assert sorted(two.slices) == wanted
    assert (await store.coverage(lease=60.0)).completeness == 1.0


async def test_an_engine_that_no_work_reaches_passes_its_slices_on_and_gets_them_back(store):
    one, two = Owner(store, "one"), Owner(store, "two")
    await settle(one, two, one)
    before = dict(one.slices)
    one.in_contact = False
    one.now += 30.0
    await settle(one, two)
    assert one.slices == before  # a lease has not passed yet
    one.now += 31.0
    await settle(one, two)
    assert (len(one.slices), len(two.slices)) == (0, SLICES)
    two.in_contact = False
    two.now += 61.0
    await settle(two, one, two)
    assert (len(one.slices), len(two.slices)) == (4, 4)  # nobody is better off
    one.in_contact = two.in_contact = True
    await settle(one, two)
    assert (await store.coverage(lease=60.0)).completeness == 1.0
    assert (len(one.slices), len(two.slices)) == (4, 4)


async def test_an_engine_that_is_to_stop_hands_its_slices_to_those_that_are_ready_for_them(store):
    one, two = Owner(store, "one"), Owner(store, "two")
    ready: list[int] = []
    two.keeper.prepare_with(lambda numbers: [number for number in numbers if number in ready])
    await settle(one)
    ready += range(SLICES)
    await settle(two, one)
    generations = dict(one.slices)
    ready.clear()
    async with anyio.create_task_group() as group:
        retired = anyio.Event()

        async def retire() -> None:
            await one.keeper.retire()
            retired.set()

        group.start_soon(retire)
        await anyio.wait_all_tasks_blocked()
        await settle(one, two)
        assert one.slices == generations  # nobody is ready yet, so they stay covered
        assert not retired.is_set()
        ready += list(generations)[:1]
        await settle(two, one)
        assert one.slices == {number: each for number, each in generations.items() if number not in ready}
        assert (await store.coverage(lease=60.0)).completeness == 1.0
        ready += generations
        await settle(two, one, two)
        await retired.wait()
    assert one.slices == {}
    # Handed over, not given back and taken: that would have been two generations.
    assert {number: two.slices[number] for number in generations} == {n: each + 1 for n, each in generations.items()}
    assert (await store.coverage(lease=60.0)).completeness == 1.0
    assert len(two.slices) == SLICES


async def test_an_engine_that_is_alone_or_with_others_that_are_to_stop_waits_for_nobody(store):
    one, two = Owner(store, "one"), Owner(store, "two")
    await settle(one)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(one.keeper.retire)
            await anyio.wait_all_tasks_blocked()
            await one.keeper.step()
    assert len(one.slices) == SLICES
    await two.keeper.step()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(two.keeper.retire)
            await anyio.wait_all_tasks_blocked()
            await two.keeper.step()


async def test_what_is_no_longer_filled_is_not_said_of_slices_that_another_has_taken_meanwhile(store, monkeypatch):
    one, here = Owner(store, "one"), set(range(SLICES))
    one.keeper.prepare_with(lambda numbers: numbers, lambda: here)
    await settle(one)
    assert (await store.coverage(lease=60.0)).completeness == 1.0
    beat = store.beat

    async def beat_and_lose(node: Node, *, lease: float) -> Coverage:
        found = await beat(node, lease=-1.0)
        await store.take("two#1", range(SLICES), lease=60.0)
        return found

    monkeypatch.setattr(store, "beat", beat_and_lose)
    here.clear()
    await one.keeper.step()
    coverage = await store.coverage(lease=60.0)
    assert {each.owner for each in coverage.slices} == {each.heir for each in coverage.slices} == {"two#1"}
    assert coverage.completeness == 0.0


class Scripted:
    """A store that finds things as it is told, one after the other."""

    def __init__(self, *found: Coverage) -> None:
        self._found = list(found)
        self.offered: list[int] = []
        self.wanted: list[set[int]] = []
        """What was to be taken, by beat."""
        self.all_told = anyio.Event()

    async def beat(self, node: Node, *, lease: float) -> Coverage:
        found = self._found.pop(0)
        self.wanted.append(set())
        if not self._found:
            self.all_told.set()
        return found

    async def take(self, node_id: str, numbers: Sequence[int], *, lease: float) -> dict[int, SliceState]:
        self.wanted[-1] |= set(numbers)
        return {}

    async def offer(self, node_id: str, numbers: Sequence[int]) -> None:
        self.offered += numbers


ME, SILENT, STEADY = (Node(f"{name}#1", name, "engine") for name in ("me", "silent", "steady"))


def seen(silent: float, steady: float = 60.0, nodes: tuple[Node, ...] = (ME, SILENT, STEADY)) -> Coverage:
    """What a beat finds where every engine has its share, and so much is left of the leases of two of them."""
    left = {ME.id: 60.0, SILENT.id: silent, STEADY.id: steady}
    given = shares([ME.id, SILENT.id, STEADY.id], SLICES)
    owner = {number: node_id for node_id, numbers in given.items() for number in numbers}
    states = (SliceState(n, owner[n], 1, left[owner[n]] >= 0, 0, left=left[owner[n]]) for n in range(SLICES))
    return Coverage(0, 0, tuple(states), nodes)


def scripted(store: Scripted, lease: float, prepare, monotonic=time.monotonic) -> CoverageKeeper:
    async def nothing(slices) -> None:
        pass

    keeper = CoverageKeeper(
        store,  # type: ignore[arg-type]
        ME,
        slices=SLICES,
        lease=lease,
        gain=nothing,
        lose=nothing,
        monotonic=monotonic,
    )
    keeper.prepare_with(prepare)
    return keeper


async def test_what_would_be_ours_is_made_ready_when_its_owner_has_been_silent_for_half_a_lease():
    asked: list[set[int]] = []

    def prepare(numbers):
        asked.append(set(numbers))
        return numbers

    store = Scripted(seen(31.0), seen(29.0), seen(29.0, 29.0), seen(59.0))
    keeper = scripted(store, 60.0, prepare)
    for _ in range(4):
        await keeper.step()
    before = shares([ME.id, SILENT.id, STEADY.id], SLICES)
    after = shares([ME.id, STEADY.id], SLICES)
    assert asked[0] == asked[3] == set()
    assert asked[1] == before[SILENT.id] & after[ME.id] != set()
    assert asked[2] == before[SILENT.id] | before[STEADY.id]
    assert store.offered == [], "nobody is to hand anything over"


async def test_who_could_not_reach_the_database_either_keeps_its_slices_when_it_beats_soon_after():
    now, given = [0.0], shares([ME.id, SILENT.id, STEADY.id], SLICES)
    alone = seen(-10.0, -10.0, nodes=(ME,))
    states = [replace(each, owner=None) if each.owner == STEADY.id else each for each in alone.slices]
    store = Scripted(seen(60.0), alone, replace(alone, slices=tuple(states)), alone, seen(60.0), alone)
    keeper = scripted(store, 60.0, lambda numbers: [], lambda: now[0])
    for at in (0.0, 70.0, 85.0, 101.0, 110.0, 111.0):
        now[0] = at
        await keeper.step()
    others = given[SILENT.id] | given[STEADY.id]
    assert store.wanted == [
        set(),
        set(),  # the first word after 70 seconds: nobody else can have been heard of
        given[STEADY.id],  # given back, and so nobody's
        others,  # silent for half a lease more
        set(),
        others,  # the database was there all the time, and they are silent
    ]


async def test_an_engine_that_beats_seldom_takes_slices_all_the_same():
    now, given = [0.0], shares([ME.id, SILENT.id, STEADY.id], SLICES)
    alone = seen(-10.0, -10.0, nodes=(ME,))
    store = Scripted(seen(60.0), alone, alone)
    keeper = scripted(store, 60.0, lambda numbers: [], lambda: now[0])
    for at in (0.0, 70.0, 140.0):
        now[0] = at
        await keeper.step()
    assert store.wanted == [set(), set(), given[SILENT.id] | given[STEADY.id]]


@pytest.mark.parametrize(("left", "then"), [(20_000.2, 19_999.9), (0.2, -0.1)])
async def test_an_engine_that_becomes_suspect_or_loses_its_lease_is_looked_at_when_it_does(monkeypatch, left, then):
    monkeypatch.setattr(keeping, "LONGEST_BEAT", 10_000.0)
    store = Scripted(seen(left), seen(then, nodes=(ME, STEADY)))
    keeper = scripted(store, 40_000.0, lambda numbers: [])
    async with anyio.create_task_group() as group:
        group.start_soon(keeper.run)
        with anyio.fail_after(10):
            await store.all_told.wait()
        group.cancel_scope.cancel()


async def test_an_edge_beats_and_owns_nothing(store):
    edge = Owner(store, "edge", role="edge")
    coverage = await edge.keeper.step()
    assert [node.name for node in (await edge.keeper.step()).nodes] == ["edge"]
    assert coverage.completeness == 0.0
    assert edge.said == []


class Deaf:
    """A store whose answers to some calls get lost after they were carried out."""

    def __init__(self, store: SqlCluster) -> None:
        self._store = store
        self.deaf: set[str] = set()

    def __getattr__(self, name: str):
        call = getattr(self._store, name)

        async def called(*args, **how):
            result = await call(*args, **how)
            if name in self.deaf:
                self.deaf.discard(name)
                raise UnavailableError("the connection was lost during a commit")
            return result

        return called


async def test_what_was_taken_without_hearing_of_it_is_begun_at_the_next_beat(store):
    deaf = Deaf(store)
    owner = Owner(deaf, "one")
    deaf.deaf = {"take"}
    with pytest.raises(UnavailableError):
        await owner.keeper.step()
    assert owner.slices == {}
    await owner.keeper.step()
    assert len(owner.slices) == SLICES
    assert owner.slices == dict(owner.keeper.leases)


async def test_what_could_not_be_handed_over_is_given_back_at_the_next_beat(store):
    class Failing(Deaf):
        async def hand_over(self, *args, **how):
            if "hand_over" in self.deaf:
                self.deaf.discard("hand_over")
                raise UnavailableError("no connection")
            await self._store.hand_over(*args, **how)

    failing = Failing(store)
    one, two = Owner(failing, "one"), Owner(store, "two")
    await settle(one)
    await two.keeper.step()
    failing.deaf = {"hand_over"}
    with pytest.raises(UnavailableError):
        await one.keeper.step()
    await settle(one, two)
    assert [len(one.slices), len(two.slices)] == [4, 4]
    assert (await store.coverage(lease=60.0)).completeness == 1.0


async def test_one_node_leads_and_another_follows_when_it_goes(store):
    began: list[str] = []

    def leader(name: str) -> Leader:
        async def duty() -> None:
            began.append(name)
            await anyio.sleep_forever()

        return Leader(store, name, lease=0.3, duties=[duty])

    first, second = leader("first"), leader("second")
    async with anyio.create_task_group() as group:
        async with anyio.create_task_group() as firsts:
            firsts.start_soon(first.run)
            await until(lambda: first.leads and began == ["first"])
            group.start_soon(second.run)
            await anyio.sleep(0.2)
            assert not second.leads
            firsts.cancel_scope.cancel()
        await until(lambda: second.leads and len(began) == 2)
        group.cancel_scope.cancel()
    assert began == ["first", "second"]


def entry(offset: int) -> LogEntry:
    return LogEntry(offset, "geoid.created", offset, ("geoids",), msgspec.Raw(b'{"id":"x"}'))


async def commit(vault: SqlVault, *offsets: int) -> list[LogEntry]:
    entries = [entry(offset) for offset in offsets]
    await vault.commit(WriteBatch(entries=entries))
    return entries


async def test_what_its_committer_did_not_announce_is_announced_once(vault):
    heard, now, leads = Heard(), [0.0], [True]
    relay = Relay(vault, heard, leads=lambda: leads[0], lease=5.0, grace=1.0, monotonic=lambda: now[0])
    entries = await commit(vault, 1, 2, 3, 4)
    relay.heard(entries[1:3])  # the first and the last are missing
    assert await relay.step() == 0
    now[0] = 2.0
    assert await relay.step() == 2
    assert sorted(heard.by_offset) == [1, 4]
    await commit(vault, 5)
    now[0] = 2.5
    assert await relay.step() == 0  # its committer still has time
    relay.heard([entry(5)])
    now[0] = 9.0
    assert await relay.step() == 0


async def test_of_much_behind_a_missing_one_some_is_forgotten_and_announced_again(vault, monkeypatch):
    monkeypatch.setattr(leading, "MOST_BEYOND", 3)
    heard, now = Heard(), [0.0]
    relay = Relay(vault, heard, leads=lambda: True, lease=5.0, grace=1.0, monotonic=lambda: now[0])
    entries = await commit(vault, *range(1, 11))
    relay.heard(entries[1:])
    assert len(relay._beyond) == 3
    await relay.step()
    now[0] = 2.0
    assert await relay.step() == 7
    assert sorted(heard.by_offset) == [1, 5, 6, 7, 8, 9, 10]
    assert relay._beyond == set()
    relay.heard(await commit(vault, 11, 12))
    assert relay._beyond == set()
    await relay.step()
    now[0] = 4.0
    assert await relay.step() == 0


async def test_of_many_heads_of_the_log_those_between_come_with_the_next(vault, monkeypatch):
    monkeypatch.setattr(leading, "MOST_HEADS", 2)
    heard, now = Heard(), [0.0]
    relay = Relay(vault, heard, leads=lambda: True, lease=5.0, grace=10.0, monotonic=lambda: now[0])
    for offset in range(1, 6):
        await commit(vault, offset)
        await relay.step()
        assert len(relay._heads) <= 2
        now[0] += 1.0
    now[0] = 12.0
    assert await relay.step() == 2
    await relay.step()
    now[0] = 30.0
    assert await relay.step() == 3
    assert sorted(heard.by_offset) == [1, 2, 3, 4, 5]


async def test_a_follower_remembers_what_is_missing_until_it_leads(vault):
    heard, now, leads = Heard(), [0.0], [False]
    relay = Relay(vault, heard, leads=lambda: leads[0], lease=5.0, grace=1.0, monotonic=lambda: now[0])
    await commit(vault, 1)
    await relay.step()
    now[0] = 4.0
    assert await relay.step() == 0
    leads[0] = True
    assert await relay.step() == 1
    leads[0] = False
    await commit(vault, 2)
    await relay.step()
    now[0] = 30.0
    assert await relay.step() == 0  # long gone: everybody has read the database by now
    leads[0] = True
    assert await relay.step() == 0
