"""What was decided without the verifier, and its later word on it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.core.interfaces import OutcomeUnknownError, WriteBatch
from kimera_stream.engines import late
from kimera_stream.engines.backlog import CHANNEL, MOST_RANGES, OWNER, Backlog
from kimera_stream.engines.late import LateReader
from kimera_stream.engines.pair_head import PairHead
from kimera_stream.protocol.errors import ConflictError, UnavailableError
from kimera_stream.protocol.objects import Contradiction, GeoidBody
from tests.engines.heads import NAME, certain
from tests.engines.world import ANNA, DIMENSION, MemoryVault, World

pytestmark = pytest.mark.anyio

CLASH = ("The door of hall 3 is open.", "The door of hall 3 is closed.")
HIDDEN = ("The server room door of hall 3 is open.", "Nobody can get into the server room door of hall 3.")


class Oracle:
    """A verifier that gives every pair one probability; None: it is away."""

    name = "oracle-1"

    def __init__(self, probability: float | None) -> None:
        self.probability = probability
        self.asked: list[tuple[str, str]] = []

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        await anyio.lowlevel.checkpoint()
        if self.probability is None:
            raise UnavailableError("verifier: out of order")
        self.asked += pairs
        return np.full(len(pairs), self.probability, dtype=np.float32)


def world(oracle: Oracle, head: PairHead | None = None) -> World:
    made = World(verifier=oracle, head=head, scoring={"min_relatedness": 0.2})
    made.late_by = 1_000.0
    return made


async def say(made: World, *texts: str) -> None:
    for text in texts:
        await made.pipeline.publish(GeoidBody(text=text), principal=ANNA)


@asynccontextmanager
async def reading(made: World, backlog: Backlog | None = None) -> AsyncIterator[None]:
    """The late reader at work; the block ends when nothing is left to read."""
    used = made.backlog if backlog is None else backlog
    async with anyio.create_task_group() as group:
        group.start_soon(LateReader(made.vault, used, made.pipeline.reread).run)  # type: ignore[arg-type]
        yield
        with anyio.fail_after(20):
            while used.numbers.pending or (not group.cancel_scope.cancel_called and await unsettled(made)):
                await anyio.wait_all_tasks_blocked()
                await anyio.sleep(0.001)
        group.cancel_scope.cancel()


async def unsettled(made: World) -> bool:
    cursors = made.vault.cursors
    since = cursors.get((OWNER, "unread-from", CHANNEL))
    return since is not None and since != cursors.get((OWNER, "read-again", CHANNEL))


def found(made: World) -> list[Contradiction]:
    return list(made.vault.contradictions.values())


async def test_who_waited_too_long_is_decided_by_the_rules_and_confirmed_later() -> None:
    made = world(oracle := Oracle(0.9))
    async with made.running():
        await say(made, *CLASH)
        [told] = found(made)
        assert (told.provisional, told.model, told.version) == (True, "rules-1", 1)
        assert oracle.asked == []
        assert made.backlog.numbers.put_off == 1
        async with reading(made):
            pass
        [word] = found(made)
    assert (word.id, word.version, word.provisional, word.model, word.score) == (told.id, 2, False, "oracle-1", 0.9)
    assert word.offset > told.offset
    assert made.vault.types() == ["geoid.created", "geoid.created", "contradiction.found", "contradiction.found"]
    assert oracle.asked == [CLASH]
    assert made.backlog.numbers.confirmed == 1


async def test_what_the_verifier_does_not_confirm_is_dissolved() -> None:
    made = world(Oracle(0.01))
    async with made.running():
        await say(made, *CLASH)
        async with reading(made):
            pass
    [word] = found(made)
    assert (word.state, word.provisional) == ("dissolved", False)
    assert made.vault.types()[-1] == "contradiction.dissolved"
    assert made.backlog.numbers.dissolved == 1


@pytest.mark.parametrize(
    ("texts", "probability", "expected"),
    [(CLASH, 0.9, (1, 0, 0)), (CLASH, 0.01, (0, 1, 0)), (HIDDEN, 0.95, (0, 0, 1))],
    ids=["confirmed", "dissolved", "found"],
)
async def test_a_word_that_is_planned_again_is_counted_once(
    texts: tuple[str, str], probability: float, expected: tuple[int, int, int]
) -> None:
    made = world(Oracle(probability))
    async with made.running():
        await say(made, *texts)
        made.vault.faults = [ConflictError("the log has moved on")] * 2
        async with reading(made):
            pass
    numbers = made.backlog.numbers
    assert made.vault.faults == []
    assert (numbers.confirmed, numbers.dissolved, numbers.found) == expected
    assert numbers.read == numbers.put_off


async def test_what_was_committed_without_anybody_knowing_is_read_later_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = world(Oracle(0.9))
    commit = made.vault.commit

    async def lost_answer(batch: WriteBatch) -> None:
        monkeypatch.undo()
        await commit(batch)
        raise OutcomeUnknownError("the connection was lost")

    async with made.running():
        async with reading(made):
            await say(made, *CLASH)
            with anyio.fail_after(20):
                while made.backlog.numbers.pending:  # the reader has begun
                    await anyio.wait_all_tasks_blocked()
                    await anyio.sleep(0.001)
            monkeypatch.setattr(made.vault, "commit", lost_answer)
            with pytest.raises(OutcomeUnknownError):
                await say(made, "The door of hall 3 is not open.")
            made.late_by = 0.0
            await say(made, "The lift stands still.")
        words = found(made)
    assert len(words) > 1
    assert {(word.provisional, word.model) for word in words} == {(False, "oracle-1")}


async def test_what_the_rules_missed_is_found_later() -> None:
    made = world(Oracle(0.95))
    async with made.running():
        await say(made, *HIDDEN)
        assert found(made) == []
        async with reading(made):
            pass
    [word] = found(made)
    assert (word.version, word.provisional, word.state) == (1, False, "open")
    assert [made.vault.stored[word.a].geoid.text, made.vault.stored[word.b].geoid.text] == list(HIDDEN)
    assert made.backlog.numbers.found == 1


@pytest.mark.parametrize(
    ("quick", "slow", "told", "last"),
    [
        (0.8, 0.9, [NAME], "open"),
        (0.8, 0.01, [NAME], "dissolved"),
        (0.1, 0.9, [], "open"),
        (0.1, 0.01, [], None),
    ],
    ids=["confirmed", "dissolved", "raised", "neither"],
)
async def test_what_the_pair_head_said_is_confirmed_dissolved_or_raised_later(
    quick: float, slow: float, told: list[str], last: str | None
) -> None:
    made = world(oracle := Oracle(slow), certain(quick, DIMENSION))
    async with made.running():
        await say(made, *HIDDEN)
        assert [(each.model, each.provisional) for each in found(made)] == [(name, True) for name in told]
        assert oracle.asked == []
        async with reading(made):
            pass
    assert set(oracle.asked) == {HIDDEN}
    assert [(word.state, word.provisional) for word in found(made)] == ([] if last is None else [(last, False)])
    assert (
        made.vault.types()[2:]
        == {
            "open": ["contradiction.found"] * (1 + len(told)),
            "dissolved": ["contradiction.found", "contradiction.dissolved"],
            None: [],
        }[last]
    )
    if last == "open":
        assert [(word.model, word.version, word.score) for word in found(made)] == [("oracle-1", 1 + len(told), slow)]


async def test_a_restart_takes_up_what_was_left() -> None:
    made = world(Oracle(0.9))
    async with made.running():
        await say(made, *CLASH)
        reborn = Backlog(made.vault)
        await reborn.load()
        assert reborn.numbers.pending >= 1
        async with reading(made, reborn):
            pass
        [word] = found(made)
        assert not word.provisional
        after = Backlog(made.vault)
        await after.load()
        assert after.numbers.pending == 0


async def test_while_the_verifier_is_away_statements_are_kept_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "FIRST_PAUSE", 0.001)
    made = world(oracle := Oracle(None))
    made.late_by = 0.0
    async with made.running():
        await say(made, *CLASH)
        [told] = found(made)
        assert told.provisional
        async with reading(made):
            await anyio.wait_all_tasks_blocked()
            assert found(made) == [told]
            oracle.probability = 0.9
        [word] = found(made)
    assert (word.provisional, word.model) == (False, "oracle-1")


async def test_a_statement_that_cannot_be_read_again_is_passed_over() -> None:
    made = world(Oracle(0.9))
    look = made.engine.look

    async def broken(fresh: Any, *, hurried: bool = False) -> Any:
        if not hurried and any(stored.geoid.text == "poison" for stored in fresh):
            raise ZeroDivisionError("a defect")
        return await look(fresh, hurried=hurried)

    made.engine.look = broken  # type: ignore[method-assign]
    async with made.running():
        await say(made, CLASH[0], "poison", CLASH[1])
        await made.pipeline.publish(GeoidBody(text="poison", symbolic_state={"a": 1}), principal=ANNA)
        made.backlog.committed(made.vault.head, 1)
        await made.backlog.put_off_entries(1, made.vault.head)
        made.backlog.committed(made.vault.head, 1)
        async with reading(made):
            pass
    [word] = [each for each in found(made) if {each.a_text, each.b_text} == set(CLASH)]
    assert (word.version, word.provisional) == (2, False)
    assert made.crashes == []


async def test_nothing_is_read_before_it_is_committed() -> None:
    made = world(Oracle(0.9))
    async with made.running(), reading(made):
        await say(made, CLASH[0])
        made.vault.gate = gate = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(say, made, CLASH[1])
            await anyio.wait_all_tasks_blocked()
            assert made.backlog.numbers.pending > 0
            gate.set()
    [word] = found(made)
    assert (word.version, word.provisional) == (2, False)


async def test_what_was_not_committed_after_all_is_not_waited_for() -> None:
    made = world(Oracle(0.9))
    async with made.running():
        await say(made, CLASH[0])
        made.vault.faults = [UnavailableError("disk full")]
        with pytest.raises(UnavailableError):
            await say(made, CLASH[1])
        assert made.backlog.numbers.pending == 0
        assert made.backlog.numbers.put_off == 0
        await say(made, CLASH[1])
        async with reading(made):
            pass
    [word] = found(made)
    assert (word.version, word.provisional) == (2, False)


async def test_what_a_person_has_resolved_meanwhile_stays_resolved() -> None:
    made = world(Oracle(0.9))
    async with made.running():
        await say(made, *CLASH)
        [told] = found(made)
        await made.pipeline.resolve(told.id, "collapse", None, principal=ANNA)
        async with reading(made):
            pass
    assert [each.state for each in found(made)] == ["resolved"]
    assert made.vault.types()[-1] == "scar.formed"


async def test_who_was_not_late_is_read_at_once_and_nothing_is_put_off() -> None:
    made = world(oracle := Oracle(0.9))
    made.late_by = 0.0
    async with made.running():
        await say(made, *CLASH)
    [word] = found(made)
    assert (word.provisional, word.version, oracle.asked) == (False, 1, [CLASH])
    assert made.backlog.numbers.put_off == 0
    assert made.vault.cursors == {}


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 4), st.integers(1, 5)),
            st.tuples(st.just("done"), st.integers(0, 60), st.just(0)),
            st.tuples(st.just("crash"), st.just(0), st.just(0)),
        ),
        max_size=30,
    )
)
def test_no_offset_is_forgotten_whatever_happens(steps: list[tuple[str, int, int]]) -> None:
    class Store(MemoryVault):
        offset = 0

        @property
        def head(self) -> int:
            return self.offset

    async def play() -> None:
        store = Store()
        backlog = Backlog(store)
        owed: set[int] = set()
        for step, first, second in steps:
            if step == "put":
                begin = store.head + first
                store.offset = begin + second - 1
                await backlog.put_off_entries(begin, store.offset)
                backlog.committed(store.offset, 1)
                owed |= set(range(begin, store.offset + 1))
            elif step == "done":
                await backlog.done(first)
                owed = {offset for offset in owed if offset > first}
            else:
                backlog = Backlog(store)
                await backlog.load()
            held = {offset for low, high in backlog._ranges for offset in range(low, high + 1)}
            assert owed <= held
            assert len(backlog._ranges) <= MOST_RANGES
            assert owed or step == "crash" or not held or held == owed

    anyio.run(play)
