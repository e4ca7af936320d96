"""Several engines find what one finds that is told everything one after the other; whatever becomes of them meanwhile."""

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from kimera_stream.core.slices import lane_slice, shares
from kimera_stream.protocol.errors import NotFoundError
from kimera_stream.protocol.objects import GeoidBody
from tests.engines.nodes import (
    SLICES,
    Callers,
    Engine,
    Heard,
    Reference,
    migrated_database,
    open_contradictions,
    scored,
    statement,
    until,
    whole_log,
)
from tests.engines.world import ANNA

pytestmark = [pytest.mark.anyio, pytest.mark.postgres]


@pytest.fixture
def url() -> Iterator[str]:
    yield from migrated_database()


async def compared(url: str, tmp_path: Path, engine: Engine) -> list[str]:
    """Types of the log's entries, once the open contradictions are the reference's."""
    await scored(engine.store, await engine.vault.refresh())
    await scored(engine.store, await engine.vault.refresh())  # what was found last is in the log as well
    entries = await whole_log(engine.vault)
    found = await open_contradictions(engine.vault)
    reference = Reference(tmp_path / "reference.sqlite3")
    async with reference.running() as pipeline:
        await reference.retell(pipeline, entries)
        expected = await open_contradictions(reference.vault)
    assert found == expected
    versions: dict[str, int] = {}
    for entry in entries:
        if entry.type.startswith("geoid."):
            value = entry.value()
            if entry.type == "geoid.deleted":
                assert value["version"] == versions.pop(value["id"])
            else:
                assert value["version"] == versions.get(value["id"], 0) + 1, (
                    "an update was based on what had been replaced"
                )
                versions[value["id"]] = value["version"]
    return [entry.type for entry in entries]


async def test_two_engines_find_what_one_finds(url, tmp_path):
    heard = Heard()
    async with Engine(url, "one", heard).running() as one, Engine(url, "two", heard).running() as two:
        await until(lambda: one.keeper.owned and two.keeper.owned)
        callers = Callers([one, two])
        chance = random.Random(1)

        async def client(number: int) -> None:
            for turn in range(12):
                await callers.publish(statement(chance, f"c{number}-{turn}"), lane=f"s{number}")

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(client, number)
        types = await compared(url, tmp_path, one)
        assert types.count("geoid.created") == 72
        assert types.count("contradiction.found") > 50
        assert one.keeper.owned | two.keeper.owned == set(range(8))
        head = one.vault.head
        assert sorted(heard.by_offset) == list(range(1, head + 1))
        await until(lambda: one.scorer.position == head)
        assert one.observed == list(range(1, head + 1))


async def mixed(callers: Callers, chance: random.Random, number: int, turns: int) -> None:
    """Publishes, updates of everybody's statements, labels, deletions and resolutions."""
    lane = f"s{number}"
    for turn in range(turns):
        target = f"g{chance.randrange(24)}"
        match chance.randrange(10):
            case 0:
                await callers.delete(target, lane=lane)
            case 1:
                engine = callers.engines[0]
                page = await engine.vault.list_contradictions(after=0, limit=50, state="open")
                if page.items:
                    await callers.resolve(chance.choice(page.items).id, lane=lane)
            case 2:
                with suppress(NotFoundError):
                    await callers.publish(
                        GeoidBody(id=target, metadata={"turn": turn}), lane=lane, merge=True, must_exist=True
                    )
            case _:
                said = msgspec.structs.replace(statement(chance, target), metadata={"token": f"{number}:{turn}"})
                await callers.publish(said, lane=lane)


@pytest.mark.parametrize("seed", [2, 3])
async def test_updates_deletions_and_resolutions_end_where_a_serial_run_ends(url, tmp_path, seed):
    heard = Heard()
    async with Engine(url, "one", heard).running() as one, Engine(url, "two", heard).running() as two:
        callers = Callers([one, two])
        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(mixed, callers, random.Random(100 * seed + number), number, 15)
        # Which of the deletions above meet a statement depends on who came first.
        await callers.publish(statement(random.Random(seed), "surely-there"), lane="s0")
        await callers.delete("surely-there", lane="s0")
        types = await compared(url, tmp_path, one)
        assert {"geoid.updated", "geoid.deleted", "contradiction.found", "contradiction.dissolved"} <= set(types)


@pytest.mark.parametrize("seed", [4, 5])
async def test_nothing_is_lost_when_engines_come_and_die(url, tmp_path, seed):
    """Each acked statement is there once, and every contradiction is found, though engines vanish without a word."""
    heard = Heard()
    chance = random.Random(seed)
    async with Engine(url, "steady", heard).running() as steady:
        callers = Callers([steady])
        done = anyio.Event()

        async def come_and_die() -> None:
            for life in itertools.count():
                if done.is_set() or (life >= 3 and callers.tried_again):
                    return
                engine = Engine(url, f"mortal{life}", heard)
                async with engine.running():
                    callers.engines.append(engine)
                    await until(lambda mortal=engine: mortal.keeper.owned or done.is_set())
                    with anyio.move_on_after(chance.uniform(0.05, 0.8)):
                        await done.wait()
                    callers.engines.remove(engine)

        async def client(number: int) -> None:
            for again in range(0, 1000, 10):  # one round, unless no engine has died over a request so far
                await mixed(callers, random.Random(100 * seed + number + again), number + again, 25)
                if callers.tried_again:
                    return

        async with anyio.create_task_group() as group:
            group.start_soon(come_and_die)
            async with anyio.create_task_group() as clients:
                for number in range(5):
                    clients.start_soon(client, number)
            done.set()
        await compared(url, tmp_path, steady)
        offsets = [result.offset for result in callers.acked]
        assert len(set(offsets)) == len(offsets)
        by_offset = {entry.offset: entry.value() for entry in await whole_log(steady.vault)}
        for result in callers.acked:
            assert by_offset[result.offset]["id"] == result.geoid.id
        assert callers.tried_again
        entries = await steady.vault.read("geoids", after=0, limit=10_000)
        made = Counter(
            entry.value()["metadata"].get("token") for entry in entries.entries if entry.type != "geoid.deleted"
        )
        assert all(count == 1 for token, count in made.items() if token), "a request was done twice"


async def test_a_slice_changes_hands_without_a_gap(url, tmp_path):
    """Statements that come while the new engine fills, between that and the hand-over, and after it."""
    heard = Heard()
    async with Engine(url, "one", heard, lease=600.0).running(keep=False) as one:
        await one.keeper.step()
        callers, chance = Callers([one]), random.Random(6)
        counter = itertools.count()

        async def say(count: int) -> None:
            """On a lane of the first engine: the second one has not begun yet with what it is handed."""
            lanes = (str(number) for number in itertools.count())
            lane = next(each for each in lanes if lane_slice(ANNA.id, each, SLICES) in one.keeper.owned)
            for _ in range(count):
                await callers.publish(statement(chance, f"g{next(counter)}"), lane=lane)

        await say(30)
        await scored(one.store, await one.vault.refresh())
        async with Engine(url, "two", heard, lease=600.0).running(keep=False) as two:
            async with anyio.create_task_group() as group:
                group.start_soon(say, 10)
                await two.keeper.step()  # its share is known, and is prepared
            await until(lambda: len(two.scorer.prepare(two_share(two))) == 4)
            await say(10)
            await two.keeper.step()  # offered
            await one.keeper.step()  # handed over
            await say(10)
            assert (await one.store.coverage(lease=600.0)).completeness == 1.0
            before = two.index.open_slices
            await two.keeper.step()  # begun
            assert two.scorer.filled == before == two.keeper.owned
            callers.engines.append(two)
            await say(20)
            await compared(url, tmp_path, one)


async def test_slices_count_as_covered_once_they_are_filled(url):
    async with Engine(url, "one", Heard(), lease=600.0).running() as one:
        await until(lambda: one.scorer.filled == one.keeper.owned == frozenset(range(SLICES)))
        await Callers([one]).publish(statement(random.Random(1), "g"))
        await wholly_covered(one)
    gate = anyio.Event()
    two = Engine(url, "two", Heard(), lease=600.0)
    scan = two.vault.scan_slices

    async def scan_later(*args: Any, **how: Any) -> AsyncIterator[Any]:
        await gate.wait()
        async for page in scan(*args, **how):
            yield page

    two.vault.scan_slices = scan_later  # type: ignore[method-assign]
    async with two.running(keep=False):
        await two.store.leave(one.node.id)
        await two.keeper.step()
        await two.keeper.step()
        coverage = await two.store.coverage(lease=600.0)
        assert (coverage.completeness, all(each.covered for each in coverage.slices)) == (0.0, True)
        gate.set()
        async with anyio.create_task_group() as group:
            group.start_soon(two.keeper.run)
            await wholly_covered(two)
            assert len(two.scorer.filled) == SLICES
            group.cancel_scope.cancel()


async def wholly_covered(engine: Engine) -> None:
    with anyio.fail_after(10):
        while (await engine.store.coverage(lease=600.0)).completeness < 1.0:  # noqa: ASYNC110 - the database tells nobody
            await anyio.sleep(0.02)


async def test_what_changes_hands_while_it_is_made_ready_is_not_begun_anew(url, tmp_path):
    heard = Heard()
    async with Engine(url, "one", heard, lease=600.0).running(keep=False) as one:
        await one.keeper.step()
        callers, chance = Callers([one]), random.Random(7)
        for number in range(40):
            await callers.publish(statement(chance, f"g{number}"), lane=str(number))
        async with Engine(url, "two", heard, lease=600.0).running(keep=False) as two:
            read, scans, go_on = two.vault.scan_slices, list[tuple[int, ...]](), anyio.Event()

            async def held_up(numbers, **how):
                scans.append(tuple(numbers))
                async for page in read(numbers, **{**how, "batch": 10}):
                    yield page
                    await go_on.wait()

            two.vault.scan_slices = held_up
            await two.keeper.step()
            await until(lambda: scans and two.index.size)
            callers.engines = [two]
            await one.keeper.leave()
            await two.keeper.step()
            share = set(scans[0])
            assert share < two.keeper.owned == set(range(SLICES))
            assert two.scorer.filled == frozenset()
            async with anyio.create_task_group() as group:
                # The first engine commits nothing more; what the new owner commits meanwhile is compared all the same.
                group.start_soon(callers.publish, statement(chance, "meanwhile"))
                await until(lambda: two.vault.head > one.vault.head)
                go_on.set()
            await until(lambda: len(two.scorer.filled) == SLICES)
            assert [set(scan) for scan in scans] == [share, set(range(SLICES)) - share]
            await compared(url, tmp_path, two)


def two_share(engine: Engine) -> frozenset[int]:
    coverage = engine.keeper.coverage
    assert coverage is not None
    return shares([node.id for node in coverage.nodes], SLICES)[engine.node.id]


async def test_a_request_that_comes_twice_is_done_once(url):
    heard = Heard()
    async with Engine(url, "one", heard).running() as one:
        callers = Callers([one])
        results: list[object] = []

        async def again(pipeline, request):
            rain = GeoidBody(text="It rains.")
            results.append(await pipeline.publish(rain, principal=ANNA, key="k", request=request))
            results.append(await pipeline.publish(rain, principal=ANNA, key="k", request=request))
            return results[-1]

        await callers.call("", again)
        first, second = results
        assert (first.geoid.id, first.offset, first.duplicate) == (second.geoid.id, second.offset, second.duplicate)
        third = await callers.publish(GeoidBody(text="It pours."), key="k")
        assert (third.geoid.text, third.duplicate) == ("It rains.", True)
        assert one.vault.head == 1
