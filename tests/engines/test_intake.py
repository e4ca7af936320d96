"""The intake: first in, first out per lane; urgent first, yet nobody starves; bounded; nothing lost."""

from collections import defaultdict
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kimera_stream.engines.intake import PATIENCE, Intake, Ticket
from kimera_stream.protocol.errors import BadRequestError, OverloadedError, UnavailableError

LANES = [(principal, session) for principal in ("anna", "ben", "cy") for session in ("", "s1", "s2")]


def ticket(principal: str = "anna", session: str = "", *, priority: int = 5, cost: int = 1) -> Ticket[Any]:
    return Ticket((principal, session), priority=priority, cost=cost, admitted_at=0.0)


def taken_now(
    intake: Intake, limit: int, *, heavy_limit: int = 10_000, heavy: Any = lambda _: False
) -> list[Ticket[Any]]:
    """``take`` where there is work: it does not wait then."""
    step = intake.take(limit, heavy_limit=heavy_limit, heavy=heavy)
    try:
        step.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("take waited although there was work")


class IntakeMachine(RuleBasedStateMachine):
    """Against a plain model: what is waiting per lane, in order."""

    @initialize(max_items=st.integers(1, 40), max_bytes=st.integers(1, 400))
    def begin(self, max_items: int, max_bytes: int) -> None:
        self.max_items, self.max_bytes = max_items, max_bytes
        self.intake = Intake(max_items, max_bytes)
        self.waiting: dict[tuple[str, str], list[Ticket[Any]]] = defaultdict(list)
        self.unfinished: list[Ticket[Any]] = []
        self.closed = False

    @property
    def held(self) -> list[Ticket[Any]]:
        return [each for lane in self.waiting.values() for each in lane] + self.unfinished

    @rule(lane=st.sampled_from(LANES), priority=st.integers(0, 9), cost=st.integers(1, 120))
    def admit(self, lane: tuple[str, str], priority: int, cost: int) -> None:
        made = ticket(*lane, priority=priority, cost=cost)
        size = sum(each.cost for each in self.held)
        if self.closed:
            with pytest.raises(UnavailableError):
                self.intake.admit(made)
        elif len(self.held) >= self.max_items or (self.held and size + cost > self.max_bytes):
            with pytest.raises(OverloadedError) as refused:
                self.intake.admit(made)
            assert refused.value.retry_after
        else:
            self.intake.admit(made)
            self.waiting[lane].append(made)

    @precondition(lambda self: any(self.waiting.values()))
    @rule(limit=st.integers(1, 12), heavy_limit=st.integers(1, 4), modulus=st.integers(1, 3))
    def take(self, limit: int, heavy_limit: int, modulus: int) -> None:
        def heavy(each: Ticket[Any]) -> bool:
            return each.cost % modulus == 0

        total = sum(len(lane) for lane in self.waiting.values())
        found = taken_now(self.intake, limit, heavy_limit=heavy_limit, heavy=heavy)
        assert 1 <= len(found) <= min(limit, total)
        assert sum(heavy(each) for each in found) <= heavy_limit
        if len(found) < min(limit, total):
            assert sum(heavy(each) for each in found) == heavy_limit, "it stopped although there was room"
        for each in found:
            assert self.waiting[each.lane].pop(0) is each, "a lane was overtaken in itself"
        self.unfinished += found

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.unfinished) - 1))
        self.intake.finished(self.unfinished.pop(place))

    @rule()
    def close(self) -> None:
        self.intake.close()
        self.closed = True

    @rule()
    def abandon(self) -> None:
        rest = [each for lane in self.waiting.values() for each in lane]
        assert self.intake.abandon(UnavailableError("stopping")) == len(rest)
        assert all(each.finished for each in rest)
        self.waiting.clear()

    @invariant()
    def counts_are_right(self) -> None:
        statistics = self.intake.statistics
        assert statistics.items == len(self.held) <= self.max_items
        assert statistics.bytes == sum(each.cost for each in self.held)
        assert statistics.bytes <= self.max_bytes or statistics.items == 1
        assert statistics.lanes == sum(1 for lane in self.waiting.values() if lane)
        assert self.intake._idle.is_set() is not bool(self.held)

    def teardown(self) -> None:
        while any(self.waiting.values()):  # nothing is lost: all of it comes out
            self.take(12, 4, 2)


TestIntake = IntakeMachine.TestCase
TestIntake.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.sampled_from(LANES), st.integers(0, 9)), min_size=1, max_size=80))
def test_the_least_urgent_waits_its_bounded_turn(arrivals: list[tuple[tuple[str, str], int]]) -> None:
    """One pick in ``PATIENCE`` goes to the least urgent head; the others to the most urgent."""
    intake = Intake(1_000, 10**9)
    waiting: dict[tuple[str, str], list[Ticket[Any]]] = defaultdict(list)
    for lane, priority in arrivals:
        made = ticket(*lane, priority=priority)
        intake.admit(made)
        waiting[lane].append(made)
    for pick in range(1, len(arrivals) + 1):
        heads = [lane[0].priority for lane in waiting.values() if lane]
        (found,) = taken_now(intake, 1)
        assert found.priority == (min(heads) if pick % PATIENCE == 0 else max(heads))
        waiting[found.lane].pop(0)


def test_equally_urgent_principals_take_turns_however_many_sessions_they_have() -> None:
    intake = Intake(1_000, 10**9)
    for n in range(30):
        for session in ("s1", "s2", "s3"):
            intake.admit(ticket("greedy", session))
        if n < 10:
            intake.admit(ticket("modest"))
    order = [each.lane[0] for each in taken_now(intake, 20)]
    assert order == ["greedy", "modest"] * 10
    sessions = [each.lane[1] for each in taken_now(intake, 9)]
    assert sorted(sessions) == ["s1"] * 3 + ["s2"] * 3 + ["s3"] * 3


def test_one_that_is_larger_than_all_room_is_taken_alone() -> None:
    intake = Intake(10, 100)
    large = ticket(cost=500)
    intake.admit(large)
    with pytest.raises(OverloadedError):
        intake.admit(ticket())
    taken_now(intake, 1)
    with pytest.raises(OverloadedError):  # taken is not finished
        intake.admit(ticket())
    intake.finished(large)
    intake.admit(ticket())


@pytest.mark.anyio
async def test_take_waits_for_work_and_survives_being_cancelled() -> None:
    intake = Intake(10, 100)
    found: list[Ticket[Any]] = []

    async def take() -> None:
        found.extend(await intake.take(5, heavy_limit=5, heavy=lambda _: False))

    async with anyio.create_task_group() as group:
        group.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert not found
    async with anyio.create_task_group() as group:
        group.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        made = ticket()
        intake.admit(made)
    assert found == [made]


@pytest.mark.anyio
async def test_idle_is_when_everything_is_answered() -> None:
    intake = Intake(10, 100)
    await intake.idle()
    one, two = ticket(), ticket()
    intake.admit(one)
    intake.admit(two)
    reached = anyio.Event()

    async def wait() -> None:
        await intake.idle()
        reached.set()

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        intake.finished(taken_now(intake, 1)[0])
        await anyio.wait_all_tasks_blocked()
        assert not reached.is_set()
        intake.finished(taken_now(intake, 1)[0])
        await reached.wait()


@pytest.mark.anyio
async def test_the_first_answer_counts_and_every_waiter_gets_its_own_error() -> None:
    made = ticket()
    made.refuse(BadRequestError("text: expected text", field="text", retry_after=2.0))
    made.answer("too late")
    errors = []
    for _ in range(2):
        with pytest.raises(BadRequestError) as refused:
            await made.outcome()
        errors.append(refused.value)
    assert errors[0] is not errors[1]
    assert (errors[1].field, errors[1].retry_after) == ("text", 2.0)
    other = ticket()
    other.answer("done")
    other.refuse(BadRequestError("too late"))
    assert await other.outcome() == "done"
