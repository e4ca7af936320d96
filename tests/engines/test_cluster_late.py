"""What engines decide without the verifier is read again, by whoever owns the slice by then."""

from collections.abc import Iterator
from types import SimpleNamespace

import anyio
import msgspec
import pytest

from kimera_stream.api.nodes.engine import Ownership
from kimera_stream.core.geoid import built
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import Detection, LogPage, StoredGeoid
from kimera_stream.engines.cluster import scorer
from kimera_stream.engines.cluster.late import LateWord
from kimera_stream.engines.cluster.owned import OwnedSlice
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Contradiction, GeoidBody
from tests.engines.heads import NAME, certain
from tests.engines.nodes import SLICES, Callers, Engine, Heard, held_back, migrated_database, scored, until, whole_log
from tests.engines.test_late import CLASH, Oracle
from tests.engines.world import ANNA, DIMENSION

pytestmark = [pytest.mark.anyio, pytest.mark.postgres]


@pytest.fixture
def url() -> Iterator[str]:
    yield from migrated_database()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "FIRST_LATE_PAUSE", 0.02)


async def contradictions(engine: Engine) -> list[Contradiction]:
    return (await engine.vault.list_contradictions(after=0, limit=99)).items


async def read_all(engine: Engine) -> None:
    await until(lambda: engine.scorer.numbers.filled == 8 and engine.scorer.numbers.unread == 0)


@pytest.mark.parametrize(("probability", "state"), [(0.9, "open"), (0.01, "dissolved")])
async def test_the_verifier_has_the_last_word_once_it_is_back(url, probability, state):
    oracle = Oracle(None)
    async with Engine(url, "one", Heard(), oracle).running() as one:
        callers = Callers([one])
        for text in CLASH:
            await callers.publish(GeoidBody(text=text))
        await scored(one.store, 2)
        [told] = await contradictions(one)
        assert told.provisional
        assert one.scorer.numbers.put_off == 1
        oracle.probability = probability
        await read_all(one)
        [word] = await contradictions(one)
        assert (word.id, word.state, word.provisional) == (told.id, state, False)
        assert all(each.unread is None for each in (await one.store.coverage(lease=1.0)).slices)
        assert one.scorer.numbers.confirmed == (state == "open")


@pytest.mark.parametrize(
    ("quick", "slow", "told", "last"),
    [
        (0.8, 0.9, [NAME], ["open"]),
        (0.8, 0.01, [NAME], ["dissolved"]),
        (0.1, 0.9, [], ["open"]),
    ],
    ids=["confirmed", "dissolved", "raised"],
)
async def test_the_verifier_has_the_last_word_on_what_the_pair_head_said(url, quick, slow, told, last):
    oracle = Oracle(None)
    async with Engine(url, "one", Heard(), oracle, head=certain(quick, DIMENSION)).running() as one:
        callers = Callers([one])
        for text in ("The door of hall 3 is open.", "The door of hall 3 was painted."):
            await callers.publish(GeoidBody(text=text))
        await scored(one.store, 2)
        assert [(each.model, each.provisional) for each in await contradictions(one)] == [(each, True) for each in told]
        oracle.probability = slow
        await read_all(one)
        assert [(each.state, each.provisional) for each in await contradictions(one)] == [
            (each, False) for each in last
        ]


async def test_an_heir_reads_what_the_former_owner_has_left(url):
    async with Engine(url, "one", Heard(), Oracle(None)).running() as one:
        callers = Callers([one])
        for text in CLASH:
            await callers.publish(GeoidBody(text=text))
        await scored(one.store, 2)
    heir = Engine(url, "two", Heard(), Oracle(0.9))
    async with heir.running():
        await read_all(heir)
        [word] = await contradictions(heir)
        assert (word.version, word.provisional, word.model) == (2, False, "oracle-1")
        types = [entry.type for entry in await whole_log(heir.vault)]
        assert types == ["geoid.created", "geoid.created", "contradiction.found", "contradiction.found"]


async def test_a_label_given_meanwhile_does_not_hide_a_statement_from_the_verifier(url):
    oracle = Oracle(None)
    async with Engine(url, "one", Heard(), oracle).running() as one:
        callers = Callers([one])
        for name, text in zip("ab", CLASH, strict=True):
            await callers.publish(GeoidBody(id=name, text=text))
        await scored(one.store, 2)
        await callers.publish(GeoidBody(id="b", metadata={"seen": True}), merge=True)
        assert await one.vault.trim(99) < 2  # what is still to be read stays in the log
        oracle.probability = 0.01
        await read_all(one)
        [word] = await contradictions(one)
        assert word.state == "dissolved"
        assert await one.vault.trim(99) >= 2


async def test_a_label_that_is_read_with_its_statement_does_not_hide_it_either(url):
    """Something after both is to be read as well."""
    oracle = Oracle(None)
    async with Engine(url, "one", Heard(), oracle).running() as one:
        callers = Callers([one])
        for name, text in zip("ab", CLASH, strict=True):
            await callers.publish(GeoidBody(id=name, text=text))
        await callers.publish(GeoidBody(id="b", metadata={"seen": True}), merge=True)
        await callers.publish(GeoidBody(id="c", text="The door of hall 3 is open today."))
        await scored(one.store, await one.vault.refresh())
        assert {(each.a, each.b) for each in await contradictions(one)} == {("a", "b"), ("b", "c")}
        assert all(each.provisional for each in await contradictions(one))
        oracle.probability = 0.9
        await read_all(one)
        assert not any(each.provisional for each in await contradictions(one))


async def test_what_is_given_back_while_the_verifier_reads_is_left_to_the_heir(url, monkeypatch):
    """Its geoids are gone from the engine before the lease is: the verifier has read nothing of them."""
    steps, step = [], LateWord.step

    async def counted(*args):
        steps.append(args)
        return await step(*args)

    monkeypatch.setattr(LateWord, "step", counted)
    oracle = Oracle(None)
    async with Engine(url, "one", Heard(), oracle).running(keep=False) as one:
        while len(one.keeper.owned) < SLICES:
            await one.keeper.step()
        callers = Callers([one])
        for text in ("The door of hall 3 is open.", "The door of hall 3 is blue."):  # which the rules let pass
            await callers.publish(GeoidBody(text=text))
        await scored(one.store, 2)
        assert not await contradictions(one)
        one.engine.look, reading, look_on = held_back(one.engine.look)  # type: ignore[method-assign]
        one.store.leave, _, leave_on = held_back(one.store.leave)  # type: ignore[method-assign]
        await reading.wait()
        oracle.probability = 0.9
        async with anyio.create_task_group() as group:
            group.start_soon(one.keeper.leave)
            await until(lambda: not one.scorer.filled)
            before = len(steps)
            look_on.set()
            await until(lambda: len(steps) > before)
            leave_on.set()
    heir = Engine(url, "two", Heard(), Oracle(0.9))
    async with heir.running():
        await read_all(heir)
        [word] = await contradictions(heir)
        assert (word.state, word.provisional) == ("open", False)


async def test_a_scorer_that_is_begun_again_still_knows_what_is_to_be_read(url):
    one, ownership = Engine(url, "one", Heard(), oracle := Oracle(None)), Ownership()
    await one.open()

    async def serve(scope: anyio.CancelScope) -> None:
        with scope:
            await ownership.add(one.scorer)
            await one.scorer.run()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(one.pipeline.run)
            group.start_soon(serve, first := anyio.CancelScope())
            await ownership.gain(await one.store.take(one.node.id, range(SLICES), lease=60.0))
            for text in CLASH:
                await one.pipeline.publish(GeoidBody(text=text), principal=ANNA)
            await scored(one.store, 2)
            [told] = await contradictions(one)
            assert told.provisional
            first.cancel()
            oracle.probability = 0.9
            group.start_soon(serve, anyio.CancelScope())
            await anyio.wait_all_tasks_blocked()
            await read_all(one)
            [word] = await contradictions(one)
            assert (word.id, word.state, word.provisional) == (told.id, "open", False)
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await one.vault.close()
            await one.store.close()


async def test_what_another_engine_said_is_read_and_not_what_this_one_remembers():
    """A slice that was handed over may be further than this engine has read the log."""
    former, newer = stored("b", 2), stored("b", 5)
    entry = LogEntry(5, "geoid.updated", 1, ("geoids",), msgspec.Raw(b'{"id":"b"}'))
    looked: list[StoredGeoid] = []

    class Vault:
        async def read(self, *_args, **_how):
            return LogPage([entry], 5, more=False)

        async def geoids(self, ids):
            return {"b": newer}

        async def contradictions_of(self, *_args, **_how):
            return []

    class Look:
        async def look(self, fresh, **_how):
            looked.extend(fresh)
            return Detection([[] for _ in fresh], [False for _ in fresh])

    cache = GeoidCache(Vault(), 1_000_000)
    cache.put(former)
    late = LateWord(Vault(), SimpleNamespace(view=lambda group: None), cache, Look())  # type: ignore[arg-type]
    step = await late.step({0: OwnedSlice(generation=1, position=5, unread=3, last_unread=5, filled=True)})
    assert step is not None
    assert (step.upto, looked) == (5, [newer])


def stored(geoid_id: str, offset: int) -> StoredGeoid:
    body = GeoidBody(text="The door is open.")
    geoid = built(body, geoid_id=geoid_id, session_id=None, now=1, offset=offset, previous=None)
    return StoredGeoid(geoid, None, "p", 0, offset)
