"""Standing queries: what fires them, who owns them, and that they outlive the process."""

from typing import Any

import anyio
import numpy as np
import pytest

from kimera_stream.core.access import Principal
from kimera_stream.engines import watches as module
from kimera_stream.engines.cluster.watchlist import WatchList
from kimera_stream.protocol.errors import BadFilterError, BadRequestError, LimitExceededError, NotFoundError
from kimera_stream.protocol.objects import GeoidBody, Watch
from tests.engines.world import ANNA, BEN, World

pytestmark = pytest.mark.anyio

TEXT = "The lift in tower nine works."
SAME = "The lift in tower nine works today."
AGAINST = "The lift in tower nine does not work."
OTHER = "Sugar beets are sown in spring."


async def watch(world: World, name: str = "lift", *, principal: Principal = ANNA, **changes: Any) -> Watch:
    fields: dict[str, Any] = {
        "text": TEXT,
        "vector": None,
        "kinds": ["related", "contradicts"],
        "min_score": None,
        "filter": None,
    }
    return await world.pipeline.watch(name, principal=principal, **{**fields, **changes})


def matches(world: World, watch: Watch) -> list[tuple[str, str]]:
    return [
        (entry.value()["kind"], entry.value()["geoid"]["text"])
        for entry in world.vault.log
        if f"watch:{watch.id}" in entry.channels
    ]


async def publish(world: World, text: str, **fields: Any) -> None:
    await world.pipeline.publish(GeoidBody(text=text, **fields), principal=BEN)


async def test_related_and_contradicting_statements_fire_others_do_not() -> None:
    world = World()
    async with world.running():
        made = await watch(world)
        for text in (OTHER, SAME, AGAINST):
            await publish(world, text)
    found = matches(world, made)
    assert ("related", SAME) in found
    assert ("contradicts", AGAINST) in found
    assert ("contradicts", SAME) not in found
    assert all(text != OTHER for _, text in found)
    for entry in world.vault.log:
        if entry.type == "watch.matched":
            assert entry.channels == (f"watch:{made.id}",), "it shows on its own channel alone"
            assert entry.value()["watch"] == "lift"


async def test_a_match_names_the_contradiction_where_the_statement_is_stored_too() -> None:
    world = World()
    async with world.running():
        await publish(world, TEXT, id="stored")
        made = await watch(world, kinds=["contradicts"])
        await publish(world, AGAINST)
    (entry,) = [each for each in world.vault.log if each.type == "watch.matched"]
    assert f"watch:{made.id}" in entry.channels
    assert entry.value()["contradiction"]["a"] == "stored"


async def test_only_kinds_that_were_asked_for_at_the_score_that_was_asked_for() -> None:
    world = World()
    async with world.running():
        related = await watch(world, "related", kinds=["related"])
        strict = await watch(world, "strict", kinds=["related"], min_score=0.999)
        loose = await watch(world, "loose", kinds=["related"], min_score=0.01)
        never = await watch(world, "never", kinds=["contradicts"], min_score=1.0)
        for text in (SAME, AGAINST, OTHER, TEXT):
            await publish(world, text)
    assert {kind for kind, _ in matches(world, related)} == {"related"}
    assert matches(world, strict) == [("related", TEXT)]
    assert {text for _, text in matches(world, loose)} >= {SAME, AGAINST, TEXT}
    assert matches(world, never) == []


async def test_filters_see_the_statement() -> None:
    world = World()
    condition = {"field": "data.metadata.floor", "op": "gte", "value": 3}
    created = {"field": "type", "op": "eq", "value": "geoid.created"}
    async with world.running():
        made = await watch(world, kinds=["related"], filter=condition)
        new = await watch(world, "new", kinds=["related"], filter=created)
        await publish(world, SAME, metadata={"floor": 2})
        await publish(world, TEXT, metadata={"floor": 3}, id="up")
        await publish(world, SAME, metadata={"floor": 4}, id="up")
    assert matches(world, made) == [("related", TEXT), ("related", SAME)]
    assert matches(world, new) == [("related", SAME), ("related", TEXT)], "an update is no creation"


async def test_a_label_fires_nothing_again() -> None:
    world = World()
    async with world.running():
        made = await watch(world, kinds=["related"])
        await publish(world, SAME, id="one")
        await publish(world, SAME, id="one", purpose="labelled")
    assert matches(world, made) == [("related", SAME)]


async def test_a_name_belongs_to_its_principal_and_can_be_given_anew() -> None:
    world = World()
    async with world.running() as pipeline:
        mine, bens = await watch(world), await watch(world, principal=BEN)
        assert mine.id != bens.id
        anew = await watch(world, text=OTHER, kinds=["related"])
        assert anew.id == mine.id
        assert [each.text for each in await pipeline.watches(principal=ANNA)] == [OTHER]
        await publish(world, SAME)
        await publish(world, OTHER)
        assert matches(world, mine) == [("related", OTHER)]
        await pipeline.unwatch("lift", principal=ANNA)
        with pytest.raises(NotFoundError):
            await pipeline.unwatch("lift", principal=ANNA)
        assert await pipeline.watches(principal=ANNA) == []
        assert len(await pipeline.watches(principal=BEN)) == 1
        assert world.watches.owner(bens.id) == "ben"
        assert world.watches.owner(mine.id) is None


async def test_they_are_read_back_from_the_vault() -> None:
    world = World()
    async with world.running():
        made = await watch(world, filter={"field": "data.text", "op": "exists"})
    again = World()
    again.watches._vault = world.vault  # type: ignore[assignment]
    await again.watches.load()
    async with again.running():
        await publish(again, AGAINST)
    assert ("contradicts", AGAINST) in matches(again, made)


async def test_what_cannot_be_watched_is_refused_and_not_kept() -> None:
    world = World()
    async with world.running() as pipeline:
        for changes in (
            {"text": None},
            {"text": TEXT, "vector": [0.1] * 128},
            {"text": " "},
            {"text": None, "vector": [1.0]},
            {"kinds": []},
            {"kinds": ["agrees"]},
            {"text": None, "vector": [0.1] * 128, "kinds": ["contradicts"]},
        ):
            with pytest.raises(BadRequestError):
                await watch(world, **changes)
        for name in ("", "n" * 129):
            with pytest.raises(BadRequestError):
                await watch(world, name)
        with pytest.raises(BadFilterError):
            await watch(world, filter={"field": "x"})
        assert await pipeline.watches(principal=ANNA) == []
        assert world.vault.kept_watches == {}
        by_vector = await watch(world, text=None, vector=[0.1] * 128, kinds=["related"])
        assert by_vector.text is None


async def test_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WATCHES_PER_PRINCIPAL", 2)
    monkeypatch.setattr(module, "MOST_WATCHES", 3)
    world = World()
    async with world.running():
        for name in ("one", "two"):
            await watch(world, name)
        with pytest.raises(LimitExceededError):
            await watch(world, "three")
        await watch(world, "two", text=OTHER)  # replacing takes no room
        await watch(world, "one", principal=BEN)
        with pytest.raises(LimitExceededError):
            await watch(world, "two", principal=BEN)


@pytest.mark.parametrize("few", [1, 8, 256])
def test_the_quick_way_reaches_whom_the_plain_way_reaches(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(module, "_FEW", few)
    rng = np.random.default_rng(few)
    for count in (0, 1, 63, 700):
        rows = rng.standard_normal((count, 96)).astype(np.float32)
        rows[count // 2 :] += 3 * rng.standard_normal(96).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        thresholds = rng.uniform(-0.2, 0.9, count).astype(np.float32)
        asked = module._Rows(rows, thresholds)
        for vector in [*rows[:3], *rows[-3:]]:
            cosines = rows @ vector
            clear = np.abs(cosines - thresholds) > 1e-5  # where rounding decides, either is right
            places, found = asked.reached(vector)
            assert places.tolist() == sorted(places.tolist())
            assert (set(places.tolist()) ^ set(np.flatnonzero(cosines >= thresholds).tolist())) <= set(
                np.flatnonzero(~clear).tolist()
            )
            assert found == pytest.approx(cosines[places], abs=1e-5)
        assert asked.reached(np.eye(96, dtype=np.float32)[0])[0].dtype == np.int64


def dawdling(read: Any) -> tuple[Any, anyio.Event]:
    """``read``, the first answer of which comes once the event is set, however late that is; and the event."""
    answered = anyio.Event()
    times = 0

    async def late() -> Any:
        nonlocal times
        times += 1
        first, found = times == 1, await read()
        if first:
            await answered.wait()
        return found

    return late, answered


async def test_a_watch_is_not_forgotten_for_a_reading_that_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    async with world.running():
        early = await watch(world, "early")
        read, answered = dawdling(world.vault.watches)
        monkeypatch.setattr(world.vault, "watches", read)
        async with anyio.create_task_group() as group:
            group.start_soon(world.watches.load)
            await anyio.wait_all_tasks_blocked()
            kept = Watch(id="of-another", watch="other", principal="ben", kinds=["related"], created_at=1, text=OTHER)
            await world.vault.save_watch(kept, None)
            group.start_soon(world.watches.load)
            await anyio.wait_all_tasks_blocked()
            answered.set()
        assert world.watches.owner(early.id) == ANNA.id
        assert world.watches.owner("of-another") == "ben", (
            "nothing would have matched it until some watch changes again"
        )


async def test_an_edge_remembers_no_watch_for_a_reading_that_comes_late() -> None:
    gone = Watch(id="gone", watch="gone", principal="ben", kinds=["related"], created_at=1, text=OTHER)
    stored: list[tuple[Watch, None]] = [(gone, None)]
    readings = 0

    async def stored_now() -> list[tuple[Watch, None]]:
        nonlocal readings
        readings += 1
        return list(stored)

    read, answered = dawdling(stored_now)
    known = WatchList(read)
    async with anyio.create_task_group() as group:
        group.start_soon(known.load)
        await anyio.wait_all_tasks_blocked()
        stored.clear()
        for _ in range(10):
            group.start_soon(known.load)
        await anyio.wait_all_tasks_blocked()
        answered.set()
    assert known.owner("gone") is None
    assert readings == 2, "those who waited share one"
