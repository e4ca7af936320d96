"""Who has lost a slice commits nothing for it, whenever it wakes up; and judging again writes nothing twice."""

from collections.abc import Callable, Iterator

import anyio
import pytest
from sqlalchemy import text

from kimera_stream.core.slices import shares, slice_of
from kimera_stream.core.vault.errors import LeaseLostError
from kimera_stream.engines.work import RequestId
from kimera_stream.infrastructure.database import Database, Query
from kimera_stream.protocol.errors import NotFoundError
from kimera_stream.protocol.objects import GeoidBody
from tests.engines.nodes import (
    LEASE,
    SLICES,
    Callers,
    Engine,
    Heard,
    database_settings,
    held_back,
    migrated_database,
    open_contradictions,
    scored,
    until,
    whole_log,
)
from tests.engines.world import ANNA, outcome, together

pytestmark = [pytest.mark.anyio, pytest.mark.postgres]

OPEN = GeoidBody(id="open", text="The door of hall 3 is open.")
CLOSED = GeoidBody(id="closed", text="The door of hall 3 is closed.")
OTHER = GeoidBody(id="other", text="Lunch is at noon.")


@pytest.fixture
def url() -> Iterator[str]:
    yield from migrated_database()


class Gate:
    """Holds the next look of an engine until it is opened, as if the process had been stopped there."""

    def __init__(self, engine: Engine) -> None:
        self.met, self.opened = anyio.Event(), anyio.Event()
        self._look = engine.engine.look
        engine.engine.look = self.look  # type: ignore[method-assign]

    async def look(self, *args, **how):
        detection = await self._look(*args, **how)
        self.met.set()
        await self.opened.wait()
        return detection


class MovingGate:
    """Holds an engine until it is opened, where it is about to move slices for which nothing was found."""

    def __init__(self, engine: Engine) -> None:
        self.met, self.opened = anyio.Event(), anyio.Event()
        self._advance = engine.store.advance
        engine.store.advance = self.advance  # type: ignore[method-assign]

    async def advance(self, *args):
        self.met.set()
        await self.opened.wait()
        await self._advance(*args)


async def takes_over(engine: Engine) -> None:
    """Until it owns everything."""
    while len(engine.keeper.owned) < SLICES:
        await engine.keeper.step()
        await anyio.sleep(LEASE / 10)


@pytest.mark.parametrize("said", [CLOSED, OTHER], ids=["something-found", "nothing-found"])
async def test_an_engine_that_wakes_up_without_its_leases_commits_nothing(url, said):
    heard = Heard()
    async with (
        Engine(url, "sleeper", heard).running(keep=False) as sleeper,
        Engine(url, "heir", heard).running(keep=False) as heir,
    ):
        await takes_over(sleeper)
        callers = Callers([sleeper])
        await callers.publish(OPEN)
        await scored(sleeper.store, 1)
        gate = Gate(sleeper)
        await callers.publish(said)
        await gate.met.wait()  # it knows what it would write, and sleeps
        progress = list(sleeper.moved)
        await takes_over(heir)
        await scored(heir.store, 2)
        expected = ["geoid.created", "geoid.created", *(["contradiction.found"] if said is CLOSED else [])]
        assert [entry.type for entry in await whole_log(heir.vault)] == expected
        gate.opened.set()
        await until(lambda: not sleeper.scorer.filled)
        assert sleeper.moved == progress
        assert [entry.type for entry in await whole_log(heir.vault)] == expected


@pytest.mark.parametrize("moment", ["prepared", "regained"])
async def test_a_step_of_a_former_tenure_does_not_end_the_next_one(url, moment):
    """An engine hangs, loses its slices, gets some back, and only then learns that its last step was refused."""
    heard = Heard()
    async with (
        Engine(url, "sleeper", heard).running(keep=False) as sleeper,
        Engine(url, "heir", heard).running(keep=False) as heir,
    ):
        await takes_over(sleeper)
        callers = Callers([sleeper])
        for number in range(16):
            await callers.publish(GeoidBody(symbolic_state={"subject": f"t{number}", "n": 0}))
        await scored(sleeper.store, 16)
        gate = MovingGate(sleeper)
        await callers.publish(OTHER)
        await gate.met.wait()
        await takes_over(heir)
        await scored(heir.store, 17)

        async def both(holds: Callable[[], object]) -> None:
            while not holds():
                await sleeper.keeper.step()
                await heir.keeper.step()
                await anyio.sleep(LEASE / 20)

        await sleeper.keeper.step()  # knows that all is lost, and prepares its share
        assert not sleeper.keeper.owned
        if moment == "prepared":
            coverage = sleeper.keeper.coverage
            assert coverage is not None
            share = shares([node.id for node in coverage.nodes], SLICES)[sleeper.node.id]
            assert len(share) == SLICES / 2
            await until(lambda: sleeper.scorer.prepare(share) == share)
        else:
            await both(lambda: sleeper.keeper.owned)
        refused = len(sleeper.losses)
        gate.opened.set()
        await until(lambda: len(sleeper.losses) > refused)
        await both(lambda: len(sleeper.keeper.owned) == len(heir.keeper.owned) == SLICES / 2)
        await until(lambda: sleeper.scorer.filled == sleeper.keeper.owned)
        callers.engines.append(heir)
        done = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(both, done.is_set)
            for number in range(16):
                await callers.publish(GeoidBody(symbolic_state={"subject": f"t{number}", "n": 1}))
            await scored(heir.store, callers.acked[-1].offset)
            done.set()
        assert len(await open_contradictions(heir.vault)) == 16


async def test_work_of_a_partition_that_is_gone_is_left_to_its_new_owner(url):
    heard = Heard()
    async with (
        Engine(url, "sleeper", heard).running(keep=False) as sleeper,
        Engine(url, "heir", heard).running(keep=False) as heir,
    ):
        await takes_over(sleeper)
        await takes_over(heir)
        assert sleeper.keeper.owned == set(range(SLICES))  # it has not heard of it
        result = await outcome(sleeper.pipeline.publish(OPEN, principal=ANNA, request=RequestId("r", 3)))
        assert isinstance(result, LeaseLostError)
        deleted = await outcome(sleeper.pipeline.delete("open", principal=ANNA, request=RequestId("d", 3)))
        assert isinstance(deleted, LeaseLostError)
        assert await heir.vault.refresh() == 0
        again = await heir.pipeline.publish(OPEN, principal=ANNA, request=RequestId("r", 3))
        assert again.offset == 1
        await sleeper.keeper.step()
        assert sleeper.keeper.owned.isdisjoint(heir.keeper.owned)


async def test_work_of_a_former_ownership_is_left_to_come_again(url):
    heard = Heard()
    async with Engine(url, "one", heard).running(keep=False) as one:
        await takes_over(one)
        generation = one.keeper.leases[3]
        publishing = [
            one.pipeline.publish(body, principal=ANNA, request=RequestId(body.id, 3, of))
            for body, of in ((OPEN, generation - 1), (CLOSED, generation), (OTHER, None))
        ]
        stale, new, any_one = await together(*publishing)
        assert isinstance(stale, LeaseLostError)
        assert new.geoid.id == "closed"
        assert any_one.geoid.id == "other"
        assert [entry.value()["id"] for entry in (await whole_log(one.vault))[:2]] == ["closed", "other"]


async def test_judging_everything_again_writes_nothing_twice(url):
    heard = Heard()
    async with Engine(url, "one", heard).running() as one:
        callers = Callers([one])
        for body in (OPEN, CLOSED, GeoidBody(id="third", text="The door of hall 3 is not open."), OTHER):
            await callers.publish(body)
        await callers.publish(GeoidBody(id="closed", text="The door of hall 3 is wide open."))
        await scored(one.store, await one.vault.refresh())
        await one.keeper.leave()
        head = await one.vault.refresh()
        before = await open_contradictions(one.vault)
    assert before
    database = Database(url, database_settings())
    await database.write(lambda tx: tx.run(Query(text("UPDATE slice SET scored = 0"))))
    await database.close()
    async with Engine(url, "two", heard).running() as two:
        await scored(two.store, head)
        assert await two.vault.refresh() == head
        assert await open_contradictions(two.vault) == before


async def test_a_watch_of_another_node_holds_for_the_next_publish(url):
    heard = Heard()
    async with Engine(url, "one", heard).running() as one, Engine(url, "two", heard).running() as two:
        callers = Callers([one, two])
        await callers.publish(OTHER)
        watch = await one.pipeline.watch(
            "doors",
            principal=ANNA,
            text="The door of hall 3",
            vector=None,
            kinds=["related"],
            min_score=0.3,
            filter=None,
        )
        for lane in map(str, range(12)):  # through either engine
            await callers.publish(GeoidBody(text=f"The door of hall 3 is open: {lane}"), lane=lane)
        await two.pipeline.unwatch("doors", principal=ANNA) if two.watches.owner(watch.id) else None
        entries = await whole_log(one.vault)
        matched = [entry for entry in entries if entry.type == "watch.matched"]
        assert len(matched) == 12
        for entry in matched:
            assert entry.channels == (f"watch:{watch.id}",)
            assert entry.value()["geoid"]["offset"] < entry.offset


async def test_a_request_that_comes_again_is_no_repetition_of_its_key(url):
    """The bus may bring a request twice, and a client may repeat its key: only the second is told that it does."""
    heard = Heard()
    async with Engine(url, "one", heard).running(keep=False) as one:
        await takes_over(one)
        first, repeated = RequestId("first", 3), RequestId("repeated", 3)

        async def publish(*requests: RequestId) -> list[bool]:
            results = await together(
                *(one.pipeline.publish(OPEN, principal=ANNA, key="k", request=request) for request in requests)
            )
            assert {result.offset for result in results} == {1}
            return [result.duplicate for result in results]

        assert await publish(first, first, repeated) == [False, False, True]
        assert await publish(repeated, first, first) == [True, False, False]


async def test_a_request_without_a_key_that_comes_again_is_carried_out_once(url):
    """An intake that was begun anew brings again what the pipeline still has."""
    heard = Heard()
    async with Engine(url, "one", heard).running(keep=False) as one:
        await takes_over(one)
        request, nameless = RequestId("r", 3), GeoidBody(text="The door of hall 3 is open.")
        results = await together(*(one.pipeline.publish(nameless, principal=ANNA, request=request) for _ in range(3)))
        assert {result.geoid.id for result in results} == {results[0].geoid.id}
        assert not any(result.duplicate for result in results)
        assert [entry.type for entry in await whole_log(one.vault)] == ["geoid.created"]


async def test_a_key_that_is_repeated_while_the_first_is_under_way_is_said_once(url):
    """Nothing else than the key tells that the statements are one: it names no id, and each comes as a request of its own."""
    async with Engine(url, "one", Heard()).running(keep=False) as one:
        await takes_over(one)
        nameless, requests = GeoidBody(text="The door of hall 3 is open."), [RequestId(each, 3) for each in "abc"]
        results = await together(
            *(one.pipeline.publish(nameless, principal=ANNA, key="k", request=request) for request in requests)
        )
        assert {result.geoid.id for result in results} == {results[0].geoid.id}
        assert [result.duplicate for result in results] == [False, True, True]
        assert [entry.type for entry in await whole_log(one.vault)] == ["geoid.created"]


async def test_an_engine_that_hears_late_of_its_own_commit_knows_what_came_after_it(url):
    """It is held up between the commit of a statement and its end, while another engine replaces that statement."""
    heard = Heard()
    async with Engine(url, "one", heard).running() as one, Engine(url, "two", heard).running() as two:
        await until(lambda: len(one.scorer.filled) == len(two.scorer.filled) == SLICES // 2)
        through = {engine: next(each for each in range(SLICES) if each in engine.keeper.owned) for engine in (one, two)}
        name = next(each for each in map(str, range(100)) if slice_of(each, SLICES) in one.keeper.owned)
        committed, go_on = anyio.Event(), anyio.Event()
        transact = one.vault.transact

        async def hold(write):
            batch = await transact(write)
            if any(stored.geoid.id == name for stored in batch.geoids):
                committed.set()
                await go_on.wait()
            return batch

        async def publish(engine: Engine, body: GeoidBody) -> None:
            request = RequestId(f"{body.text}", through[engine])
            await engine.pipeline.publish(body, principal=ANNA, request=request)

        one.vault.transact = hold  # type: ignore[method-assign]
        async with anyio.create_task_group() as group:
            group.start_soon(publish, one, GeoidBody(id=name, text="Lunch is at noon."))
            await committed.wait()
            await publish(two, GeoidBody(id=name, text="The door of hall 3 is open."))
            await until(lambda: one.scorer.position >= 2)
            go_on.set()
        await publish(two, GeoidBody(id="newer", text="The door of hall 3 is closed."))
        await scored(one.store, 3)
        assert list(await open_contradictions(one.vault)) == [(name, "newer")]


@pytest.mark.parametrize("first", ["said", "deleted"])
async def test_an_engine_that_hears_of_its_own_commit_while_it_reads_what_came_after_it_goes_by_that(url, first):
    """It is held up between the commit and its end, and hears of it while its scorer loads what another engine made of it since."""
    heard = Heard()
    async with Engine(url, "one", heard).running() as one, Engine(url, "two", heard).running() as two:
        await until(lambda: len(one.scorer.filled) == len(two.scorer.filled) == SLICES // 2)
        through = {engine: next(each for each in range(SLICES) if each in engine.keeper.owned) for engine in (one, two)}
        mine = [each for each in map(str, range(100)) if slice_of(each, SLICES) in one.keeper.owned]
        name, other = mine[:2]

        async def publish(engine: Engine, body: GeoidBody) -> None:
            request = RequestId(f"{body.id}: {body.text}", through[engine])
            await engine.pipeline.publish(body, principal=ANNA, request=request)

        async def act() -> None:
            if first == "said":
                await publish(one, GeoidBody(id=name, text="Dinner is at eight."))
            else:
                await one.pipeline.delete(name, principal=ANNA, request=RequestId("d", through[one]))

        await publish(one, GeoidBody(id=name, text="Lunch is at noon."))
        await publish(two, GeoidBody(id=other, text="The door of hall 3 is closed."))
        await until(lambda: one.scorer.position >= 2)
        committed, told, go_on, reading, read_on = (anyio.Event() for _ in range(5))
        transact, geoids, read = one.vault.transact, one.vault.geoids, one.vault.read

        async def hold(write):
            batch = await transact(write)
            if any(entry.type.startswith("geoid.") for entry in batch.entries):
                committed.set()
                await told.wait()
            return batch

        async def hold_read(ids):
            found = await geoids(ids)
            if name in found and found[name].geoid.offset == 4:
                reading.set()
                await read_on.wait()
            return found

        async def read_both(channel, **how):
            await go_on.wait()
            return await read(channel, **how)

        one.vault.transact, one.vault.geoids = hold, hold_read  # type: ignore[method-assign]
        one.vault.read = read_both  # type: ignore[method-assign]
        async with anyio.create_task_group() as group:
            group.start_soon(act)
            await committed.wait()
            await publish(two, GeoidBody(id=name, text="The door of hall 3 is open."))
            go_on.set()
            await reading.wait()
            told.set()
            await anyio.wait_all_tasks_blocked()
            one.vault.transact = transact  # type: ignore[method-assign]
        read_on.set()
        await publish(two, GeoidBody(id="newer", text="The door of hall 3 is closed."))
        await scored(one.store, await one.vault.refresh())
        assert set(await open_contradictions(one.vault)) == {(other, name), (name, "newer")}


async def test_what_is_handed_over_in_the_middle_of_a_step_is_not_taken_for_scored(url):
    """Its geoids are gone from the engine before the lease is, and nothing is contradicted by what is not there."""
    heard = Heard()
    async with (
        Engine(url, "one", heard).running(keep=False) as one,
        Engine(url, "heir", heard).running(keep=False) as heir,
    ):
        await takes_over(one)
        share = shares([one.node.id, heir.node.id], SLICES)[heir.node.id]
        name = next(each for each in map(str, range(100)) if slice_of(each, SLICES) in share)
        callers = Callers([one])
        await callers.publish(GeoidBody(id=name, text=OPEN.text))
        await scored(one.store, 1)
        await heir.keeper.step()
        await until(lambda: heir.scorer.prepare(share) == share)
        await heir.keeper.step()  # offers

        one.engine.look, read, look_on = held_back(one.engine.look)  # type: ignore[method-assign]
        one.store.hand_over, _, hand_on = held_back(one.store.hand_over)  # type: ignore[method-assign]
        await callers.publish(CLOSED)
        await read.wait()
        async with anyio.create_task_group() as group:
            group.start_soon(one.keeper.step)
            await until(lambda: one.scorer.filled.isdisjoint(share))
            moved = len(one.moved)
            look_on.set()
            await until(lambda: len(one.moved) > moved)
            hand_on.set()
        await heir.keeper.step()
        assert heir.keeper.owned == share
        await scored(heir.store, 2)
        assert set(await open_contradictions(heir.vault)) == {(name, "closed")}


async def test_what_was_refused_is_not_done_when_it_comes_again(url):
    """Another copy is on the bus, or the engine has died between its answer and letting go of the work; by now it could be done."""
    heard = Heard()
    async with (
        Engine(url, "one", heard).running(keep=False) as one,
        Engine(url, "heir", heard).running(keep=False) as heir,
    ):
        await takes_over(one)

        async def outcomes(engine: Engine) -> list[type]:
            changed = engine.pipeline.publish(CLOSED, principal=ANNA, must_exist=True, request=RequestId("update", 3))
            deleted = engine.pipeline.delete("closed", principal=ANNA, request=RequestId("delete", 3))
            resolved = engine.pipeline.resolve("c", "collapse", None, principal=ANNA, request=RequestId("resolve", 3))
            return [type(await outcome(each)) for each in (changed, deleted, resolved)]

        assert await outcomes(one) == [NotFoundError] * 3
        await one.pipeline.publish(CLOSED, principal=ANNA, request=RequestId("create", 3))
        assert await outcomes(one) == [NotFoundError] * 3
        await takes_over(heir)
        assert await outcomes(heir) == [NotFoundError] * 3
        assert [entry.type for entry in await whole_log(heir.vault)] == ["geoid.created"]


async def test_a_repeated_key_keeps_its_place_in_its_lane_whatever_becomes_of_the_first(url):
    """The first came through a partition that is gone, and is left to its new owner; the second through one that is not."""
    heard = Heard()
    async with Engine(url, "one", heard).running(keep=False) as one:
        await takes_over(one)
        gone = RequestId("first", 3, one.keeper.leases[3] - 1)
        first, second, behind = await together(
            one.pipeline.publish(OPEN, principal=ANNA, key="k", request=gone),
            one.pipeline.publish(OPEN, principal=ANNA, session_id="s", key="k", request=RequestId("second", 5)),
            one.pipeline.publish(OTHER, principal=ANNA, session_id="s", request=RequestId("behind", 5)),
        )
        assert isinstance(first, LeaseLostError)
        assert (second.offset, second.duplicate, behind.offset) == (1, False, 2)


async def test_a_watch_that_is_made_through_two_engines_has_one_channel(url):
    """Neither has heard of the other's yet."""
    heard = Heard()
    async with Engine(url, "one", heard).running() as one, Engine(url, "two", heard).running() as two:
        made = [
            await engine.pipeline.watch(
                "doors", principal=ANNA, text=text, vector=None, kinds=["related"], min_score=0.3, filter=None
            )
            for engine, text in ((one, "The door of hall 3"), (two, "The gate of hall 3"))
        ]
        assert made[0].id == made[1].id
        ((kept, _),) = await one.vault.watches()
        assert (kept.id, kept.text) == (made[0].id, "The gate of hall 3")
