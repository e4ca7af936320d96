"""The match of a watch names the contradiction, whoever owns the slices, as on one node."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import numpy.typing as npt
import pytest

from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.core.slices import lane_slice
from kimera_stream.engines.pipeline import Pipeline
from kimera_stream.engines.work import RequestId
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.log import LogEntry
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
    until,
    whole_log,
)
from tests.engines.world import ANNA, together

pytestmark = [pytest.mark.anyio, pytest.mark.postgres]

OPEN = "The door of hall 3 is open."
CLOSED = "The door of hall 3 is closed."


@pytest.fixture
def url() -> Iterator[str]:
    yield from migrated_database()


async def stand(pipeline: Pipeline, name: str, *kinds: Any) -> None:
    await pipeline.watch(name, principal=ANNA, text=OPEN, vector=None, kinds=list(kinds), min_score=None, filter=None)


def named(entries: list[LogEntry]) -> list[tuple[str, str, tuple[str, str] | None]]:
    """(kind, statement, pair that is named) of every match, in order."""
    found = []
    for entry in entries:
        if entry.type == "watch.matched":
            value = entry.value()
            clash = value.get("contradiction")
            found.append((value["kind"], value["geoid"]["id"], None if clash is None else (clash["a"], clash["b"])))
            assert clash is None or clash["offset"] < entry.offset, "told before it is named"
    return found


SAID = [
    GeoidBody(id="elsewhere", text="The roof of hall 5 is dry."),
    GeoidBody(id="before", text=CLOSED),  # nobody says the same as the watch yet
    GeoidBody(id="one", text=OPEN),
    GeoidBody(id="against", text=CLOSED),
    GeoidBody(id="against", text=CLOSED, metadata={"seen": 1}),  # a label
    GeoidBody(id="two", text="The door of hall 3 is closed today."),
    GeoidBody(id="one", text="The door of hall 3 is painted green."),  # nobody says it any more
    GeoidBody(id="after", text=CLOSED),
]


async def test_the_match_names_what_one_node_would_name(url: str, tmp_path: Path) -> None:
    heard = Heard()
    reference = Reference(tmp_path / "reference.sqlite3")
    async with (
        Engine(url, "one", heard).running() as one,
        Engine(url, "two", heard).running() as two,
        reference.running() as alone,
    ):
        callers = Callers([one, two])
        with anyio.fail_after(60):
            await callers.publish(GeoidBody(id="first", text="Sugar beets are sown in spring."))
            await alone.publish(GeoidBody(id="first", text="Sugar beets are sown in spring."), principal=ANNA)
            for pipeline in (one.pipeline, alone):
                await stand(pipeline, "both", "contradicts", "related")
                await stand(pipeline, "clash", "contradicts")
            for number, body in enumerate(SAID):
                await callers.publish(body, lane=str(number))  # through either engine
                await alone.publish(body, principal=ANNA)
                await scored(one.store, await one.vault.refresh())
        expected = named(await whole_log(reference.vault))
        assert {clash for kind, id_, clash in expected if kind == "contradicts" and id_ == "against"} == {
            ("one", "against")
        }
        assert {clash for kind, id_, clash in expected if kind == "contradicts" and id_ in ("before", "after")} == {
            None
        }
        assert named(await whole_log(one.vault)) == expected
        assert await open_contradictions(one.vault) == await open_contradictions(reference.vault)


async def test_what_has_changed_since_it_was_judged_is_judged_again(url: str) -> None:
    """Between the look and the lock another engine changes the statement that the match would name."""
    heard = Heard()
    async with Engine(url, "one", heard).running() as one, Engine(url, "two", heard).running() as two:
        callers = Callers([one, two])
        looks: list[list[str]] = []

        def interrupted(engine: Engine, other: Engine) -> Any:
            judge = engine.watches.contradicted

            async def contradicted(fresh: StoredGeoid, others: Sequence[StoredGeoid]) -> Any:
                found = await judge(fresh, others)
                looks.append([older.geoid.id for older, _ in found])
                if len(looks) == 1:
                    green = GeoidBody(id="one", text="The door of hall 3 is painted green.")
                    lanes = (str(n) for n in range(99))
                    lane = next(each for each in lanes if lane_slice(ANNA.id, each, SLICES) in other.keeper.owned)
                    await callers.publish(green, lane=lane)
                return found

            return contradicted

        with anyio.fail_after(60):
            await until(lambda: one.keeper.owned and two.keeper.owned)
            await callers.publish(GeoidBody(id="one", text=OPEN))
            await stand(one.pipeline, "clash", "contradicts")
            for engine, other in ((one, two), (two, one)):
                engine.watches.contradicted = interrupted(engine, other)  # type: ignore[method-assign]
            await callers.publish(GeoidBody(id="against", text=CLOSED))
            await scored(one.store, await one.vault.refresh())
        assert looks == [["one"], []]
        assert named(await whole_log(one.vault)) == [("contradicts", "against", None)]
        assert await open_contradictions(one.vault) == {}


async def test_the_match_names_what_another_engine_has_said_since_this_one_has_read_the_log(url: str) -> None:
    heard = Heard()
    async with Engine(url, "one", heard).running() as one, Engine(url, "two", heard).running() as two:
        await until(lambda: len(one.scorer.filled) == len(two.scorer.filled) == SLICES // 2)
        through = {engine: next(each for each in range(SLICES) if each in engine.keeper.owned) for engine in (one, two)}

        async def publish(engine: Engine, name: str, text: str) -> None:
            request = RequestId(f"{name}: {text}", through[engine])
            await engine.pipeline.publish(GeoidBody(id=name, text=text), principal=ANNA, request=request)

        await publish(one, "one", "Sugar beets are sown in spring.")
        await stand(one.pipeline, "clash", "contradicts")
        await until(lambda: one.scorer.position == 1)
        read, go_on = one.vault.read, anyio.Event()

        async def read_later(channel: str | None, **how: Any) -> Any:
            await go_on.wait()
            return await read(channel, **how)

        one.vault.read = read_later  # type: ignore[method-assign]
        await publish(two, "one", OPEN)
        await publish(one, "against", CLOSED)
        go_on.set()
        await scored(one.store, await one.vault.refresh())
        assert named(await whole_log(one.vault)) == [("contradicts", "against", ("one", "against"))]


async def test_watches_that_come_and_go_all_the_time_keep_nothing_from_being_said(url: str) -> None:
    """Each time that one engine prepares something, another one has changed a watch before it is committed."""
    heard = Heard()
    async with Engine(url, "one", heard).running() as one, Engine(url, "two", heard).running() as two:
        await until(lambda: len(one.scorer.filled) == len(two.scorer.filled) == SLICES // 2)
        partition = min(one.keeper.owned)
        look, looks = one.watches.matches, 0

        async def interrupted(*args: Any) -> Any:
            nonlocal looks
            found = await look(*args)
            looks += 1
            await stand(two.pipeline, f"other {looks}", "contradicts")
            return found

        async def publish(name: str, text: str) -> None:
            request = RequestId(name, partition)
            await one.pipeline.publish(GeoidBody(id=name, text=text), principal=ANNA, request=request)

        with anyio.fail_after(20):
            await publish("one", OPEN)
            one.watches.matches = interrupted  # type: ignore[method-assign]
            for number in range(3):
                before = looks
                await stand(two.pipeline, f"clash {number}", "contradicts")
                await publish(f"against-{number}", CLOSED)
                assert looks - before <= 2
        matched = [entry.value() for entry in await whole_log(one.vault) if entry.type == "watch.matched"]
        for number in range(3):  # what was made before a statement was sent holds for it
            assert {match["watch"] for match in matched if match["geoid"]["id"] == f"against-{number}"} >= {
                f"clash {each}" for each in range(number + 1)
            }


class Oracle:
    """A verifier that gives every pair one probability; None: it is away."""

    name = "oracle-1"

    def __init__(self) -> None:
        self.probability: float | None = None

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        await anyio.lowlevel.checkpoint()
        if self.probability is None:
            raise UnavailableError("verifier: out of order")
        return np.full(len(pairs), self.probability, dtype=np.float32)


async def test_what_the_verifier_could_not_read_in_time_is_left_to_the_slices(url: str) -> None:
    """It is back when the slice is scored: what had been written with the match would stay provisional for ever."""
    oracle = Oracle()
    async with Engine(url, "one", Heard(), oracle).running() as one:
        judge = one.watches.contradicted

        async def back_afterwards(fresh: StoredGeoid, others: Sequence[StoredGeoid]) -> Any:
            found = await judge(fresh, others)
            oracle.probability = 0.95
            return found

        one.watches.contradicted = back_afterwards  # type: ignore[method-assign]
        callers = Callers([one])
        with anyio.fail_after(60):
            await until(lambda: one.keeper.owned)
            await callers.publish(GeoidBody(id="one", text=OPEN))
            await stand(one.pipeline, "clash", "contradicts")
            await callers.publish(GeoidBody(id="other", text="Sugar beets are sown in spring."))  # the watch is known
            await callers.publish(GeoidBody(id="against", text=CLOSED))
            await scored(one.store, await one.vault.refresh())
        log = await whole_log(one.vault)
        words = [entry.value() for entry in log if entry.type == "contradiction.found"]
        assert [(word["a"], word["b"], word.get("provisional", False)) for word in words] == [("one", "against", False)]
        assert named(log) == [("contradicts", "against", None)]


async def test_what_came_again_keeps_nothing_from_being_written_that_contradicts_it(url):
    """It is there already, under another id than it is prepared with: nothing may rest on that."""
    async with Engine(url, "one", Heard()).running() as one:
        await until(lambda: len(one.keeper.owned) == SLICES)
        await stand(one.pipeline, "doors", "contradicts")
        said, again = RequestId("said", 0), RequestId("against", 0)
        first = await one.pipeline.publish(GeoidBody(text=OPEN), principal=ANNA, request=said)
        with anyio.fail_after(5):
            repeated, against = await together(
                one.pipeline.publish(GeoidBody(text=OPEN), principal=ANNA, request=said),
                one.pipeline.publish(GeoidBody(id="against", text=CLOSED), principal=ANNA, request=again),
            )
        assert repeated.geoid.id == first.geoid.id
        assert against.geoid.id == "against"
        assert named(await whole_log(one.vault)) == [("contradicts", "against", (first.geoid.id, "against"))]
