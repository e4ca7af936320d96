"""Work that an edge gives to engines gets its answer, whatever the bus loses."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from prometheus_client import CollectorRegistry

from kimera_stream.core.access import ALL_ROLES, Principal
from kimera_stream.core.coverage import Coverage, SliceState
from kimera_stream.core.slices import lane_slice
from kimera_stream.engines.cluster.errands import TOGETHER, Errands
from kimera_stream.engines.cluster.patience import Patience
from kimera_stream.engines.cluster.remote import RemoteKnowledge
from kimera_stream.engines.cluster.scored import Scored
from kimera_stream.engines.cluster.wire import (
    DeleteRequest,
    Early,
    Progress,
    Refused,
    Removed,
    decode_request,
    encode,
)
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.infrastructure.settings import BusSettings
from kimera_stream.protocol.errors import NotFoundError, OverloadedError, UnavailableError

pytestmark = pytest.mark.anyio

SETTINGS = BusSettings(retry_after=0.05)
LANE = ("ann", "session")
PATIENT = Patience(60.0, 600.0)


class LossyBus:
    """``add`` and ``depth`` of a bus that may be away, full, or forget."""

    node = "edge"

    def __init__(self) -> None:
        self.added: list[tuple[str, bytes]] = []
        self.away = False
        self.full: set[int] = set()
        self.waiting = 0
        self.changed = anyio.Event()

    async def add(self, partition: int, request: str, payload: bytes, *, of: str) -> None:
        assert of == decode_request(payload).principal
        assert 0 <= partition < SETTINGS.slices
        await anyio.lowlevel.checkpoint()
        self.changed.set()
        if self.away:
            raise UnavailableError("away")
        if partition in self.full:
            raise OverloadedError("full", retry_after=1.0)
        self.added.append((request, payload))

    async def depth(self, partition: int) -> int:
        if self.away:
            raise UnavailableError("away")
        return self.waiting

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(10):
            while not condition():
                self.changed = anyio.Event()
                await self.changed.wait()


@asynccontextmanager
async def errands(bus: LossyBus, **limits: int) -> AsyncIterator[Errands]:
    made = Errands(bus, SETTINGS, **{"max_items": 100, "max_bytes": 10_000, "at_most": 100.0, **limits})  # type: ignore[arg-type]
    async with anyio.create_task_group() as group:
        group.start_soon(made.run)
        yield made
        group.cancel_scope.cancel()


def deletion(geoid_id: str) -> DeleteRequest:
    return DeleteRequest(at=0, principal="ann", geoid_id=geoid_id)


async def ask(made: Errands, geoid_id: str, results: dict[str, Any]) -> None:
    results[geoid_id] = await made.send(LANE, deletion(geoid_id))


async def test_an_answer_goes_to_who_waits_for_it() -> None:
    bus, results = LossyBus(), {}
    async with errands(bus) as made, anyio.create_task_group() as group:
        for name in ("a", "b"):
            group.start_soon(ask, made, name, results)
        await bus.until(lambda: len(bus.added) == 2)
        (first, payload), (second, _) = bus.added
        assert decode_request(payload) == deletion("a"), "in order"
        made.heard([Removed(request=second, offset=2), Removed(request="of somebody gone", offset=9)])
        made.heard([Removed(request=first, offset=1), Removed(request=first, offset=1)])
    assert {name: answer.offset for name, answer in results.items()} == {"a": 1, "b": 2}
    assert made.numbers.waiting == made.numbers.waiting_bytes == 0


async def test_a_refusal_is_raised_as_it_was_there() -> None:
    bus = LossyBus()
    async with errands(bus) as made, anyio.create_task_group() as group:

        async def refused() -> None:
            with pytest.raises(NotFoundError, match="no such thing") as error:
                await made.send(LANE, deletion("a"))
            assert error.value.field == "geoid_id"

        group.start_soon(refused)
        await bus.until(lambda: bool(bus.added))
        made.heard([Refused.of(bus.added[0][0], NotFoundError("no such thing", field="geoid_id"))])


@pytest.mark.parametrize("how", ["told", "found out"])
async def test_what_the_bus_lost_is_added_again_under_the_same_name(how: str) -> None:
    bus, results = LossyBus(), {}
    async with errands(bus) as made, anyio.create_task_group() as group:
        bus.waiting = 1
        for name in ("a", "b"):
            group.start_soon(ask, made, name, results)
        await bus.until(lambda: len(bus.added) == 2)
        if how == "told":
            made.lost()
        else:
            bus.waiting = 0
        names = {request for request, _ in bus.added}

        def times(request: str) -> int:
            return sum(each == request for each, _ in bus.added)

        await bus.until(lambda: all(times(request) >= 2 for request in names))
        assert {request for request, _ in bus.added} == names
        made.heard([Removed(request=request, offset=1) for request, _ in bus.added[:2]])
    assert results.keys() == {"a", "b"}
    assert made.numbers.added_again >= 2


def placed(bus: LossyBus, begin: int = 0) -> list[tuple[str, str | None, int]]:
    """What was added: the geoid, the one that it may not overtake, and how often it had been added before."""
    name = {request: _geoid_of(payload) for request, payload in bus.added}
    asked = [decode_request(payload) for _, payload in bus.added[begin:]]
    return [(_geoid_of(encode(each)), None if each.after is None else name[each.after], each.turn) for each in asked]


def _geoid_of(payload: bytes) -> str:
    asked = decode_request(payload)
    assert isinstance(asked, DeleteRequest)
    return asked.geoid_id


@asynccontextmanager
async def three_and_one(bus: LossyBus, results: dict[str, Any]) -> AsyncIterator[tuple[Errands, TaskGroup]]:
    """a, b and c of one lane and x of another have been added, and nobody has answered."""
    bus.waiting = 1
    async with errands(bus) as made, anyio.create_task_group() as group:
        for name in ("a", "b", "c"):
            group.start_soon(ask, made, name, results)
        group.start_soon(made.send, ("ann", "another session"), deletion("x"))
        await bus.until(lambda: len(bus.added) == 4)
        yield made, group


async def test_each_names_the_one_before_it_that_has_no_answer() -> None:
    bus, results = LossyBus(), {}
    async with three_and_one(bus, results) as (made, group):
        assert placed(bus) == [("a", None, 0), ("b", "a", 0), ("c", "b", 0), ("x", None, 0)]
        made.heard([Removed(request=bus.added[1][0], offset=1)])
        bus.full = {lane_slice(*LANE, SETTINGS.slices)}
        with pytest.raises(OverloadedError):
            await made.send(LANE, deletion("refused"))
        bus.full = set()
        group.start_soon(ask, made, "d", results)
        await bus.until(lambda: len(bus.added) == 5)
        made.heard([Removed(request=request, offset=1) for request, _ in bus.added])
        await anyio.wait_all_tasks_blocked()
        group.start_soon(ask, made, "e", results)
        await bus.until(lambda: len(bus.added) == 6)
        assert placed(bus, 4) == [("d", "c", 0), ("e", None, 0)]
        made.heard([Removed(request=bus.added[5][0], offset=1)])


async def test_what_is_sent_back_is_added_again_with_its_lane_and_before_what_comes_later() -> None:
    bus, results = LossyBus(), {}
    async with three_and_one(bus, results) as (made, group):
        a, b, c = (request for request, _ in bus.added[:3])
        made.heard([Early(request=b, turn=0)])
        group.start_soon(ask, made, "d", results)
        made.heard([Early(request=c, turn=0)])  # the copy that was added first: that is known
        await bus.until(lambda: len(bus.added) >= 8)
        assert placed(bus, 4) == [("a", None, 1), ("b", "a", 1), ("c", "b", 1), ("d", "c", 0)]
        made.heard([Removed(request=a, offset=1), Early(request=b, turn=1)])
        await bus.until(lambda: len(bus.added) >= 11)
        assert placed(bus, 8) == [("b", None, 2), ("c", "b", 2), ("d", "c", 1)]
        made.heard([Removed(request=request, offset=1) for request, _ in bus.added])
    assert results.keys() == {"a", "b", "c", "d"}
    assert made.numbers.added_again == 6


async def test_what_waits_in_its_partition_is_left_alone() -> None:
    bus, results = LossyBus(), {}
    bus.waiting = 1
    looked = 0
    depth = bus.depth

    async def counted(partition: int) -> int:
        nonlocal looked
        looked += 1
        bus.changed.set()
        return await depth(partition)

    bus.depth = counted  # type: ignore[method-assign]
    async with errands(bus) as made, anyio.create_task_group() as group:
        group.start_soon(ask, made, "a", results)
        await bus.until(lambda: looked >= 3)
        assert len(bus.added) == 1
        made.heard([Removed(request=bus.added[0][0], offset=1)])


async def test_without_the_bus_work_waits_and_goes_in_order_when_it_is_back() -> None:
    bus, results = LossyBus(), {}
    bus.away = True
    async with errands(bus) as made, anyio.create_task_group() as group:
        for name in ("a", "b", "c"):
            group.start_soon(ask, made, name, results)
        await bus.until(lambda: made.numbers.waiting == 3)
        bus.away = False
        group.start_soon(ask, made, "d", results)  # which comes when the bus is back, and others are still held
        await bus.until(lambda: len(bus.added) >= 4)
        assert [decode_request(payload).geoid_id for _, payload in bus.added[:4]] == ["a", "b", "c", "d"]  # type: ignore[union-attr]
        made.heard([Removed(request=request, offset=1) for request, _ in bus.added[:4]])
    assert results.keys() == {"a", "b", "c", "d"}


async def test_a_full_partition_holds_up_no_other() -> None:
    bus, results = LossyBus(), {}
    bus.away = True
    other = next(
        ("ann", f"s{n}")
        for n in range(99)
        if lane_slice("ann", f"s{n}", SETTINGS.slices) != lane_slice(*LANE, SETTINGS.slices)
    )
    async with errands(bus, max_items=1_000, max_bytes=1_000_000) as made, anyio.create_task_group() as group:
        for number in range(2 * TOGETHER):
            group.start_soon(ask, made, f"a{number}", results)
        await bus.until(lambda: made.numbers.waiting == 2 * TOGETHER)
        group.start_soon(made.send, other, deletion("b"))
        await bus.until(lambda: made.numbers.waiting == 2 * TOGETHER + 1)
        bus.full = {lane_slice(*LANE, SETTINGS.slices)}
        bus.away = False
        await bus.until(lambda: len(bus.added) == 1)
        bus.full = set()
        await bus.until(lambda: len(bus.added) == 2 * TOGETHER + 1)
        assert [each for each, _, _ in placed(bus)] == ["b", *(f"a{number}" for number in range(2 * TOGETHER))]
        made.heard([Removed(request=request, offset=1) for request, _ in bus.added])


async def test_too_much_is_refused_here_and_there() -> None:
    bus, results = LossyBus(), {}
    async with errands(bus, max_items=1) as made, anyio.create_task_group() as group:
        bus.full = {lane_slice(*LANE, SETTINGS.slices)}
        with pytest.raises(OverloadedError, match="full"):
            await made.send(LANE, deletion("a"))
        assert made.numbers.waiting == 0
        bus.full = set()
        group.start_soon(ask, made, "a", results)
        await bus.until(lambda: bool(bus.added))
        with pytest.raises(OverloadedError, match="waiting already"):
            await made.send(LANE, deletion("b"))
        made.close()
        with pytest.raises(UnavailableError, match="stopping"):
            await made.send(LANE, deletion("c"))
        made.heard([Removed(request=bus.added[0][0], offset=1)])


async def test_one_principal_leaves_as_much_room_as_it_takes() -> None:
    bus = LossyBus()
    async with errands(bus, max_items=12) as made, anyio.create_task_group() as group:

        async def send(principal: str, number: int) -> None:
            request = DeleteRequest(at=0, principal=principal, geoid_id=f"{principal}-{number}")
            await made.send((principal, f"session-{number}"), request)

        async def fill(principal: str, room: int) -> None:
            for number in range(room):
                group.start_soon(send, principal, number)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(OverloadedError, match=f"{room} of them") as refused:
                await send(principal, room)
            assert refused.value.retry_after

        await fill("greedy", 6)
        await fill("ben", 3)
        await fill("cyd", 2)
        made.heard([Removed(request=request, offset=1) for request, _ in bus.added[:6]])  # the greedy one's
        await anyio.wait_all_tasks_blocked()
        group.start_soon(send, "ben", 3)
        await anyio.wait_all_tasks_blocked()
        assert made.numbers.waiting == 6
        made.heard([Removed(request=request, offset=1) for request, _ in bus.added])
    assert made.numbers.waiting == made.numbers.waiting_bytes == 0


async def test_nor_does_one_principal_take_the_bytes_of_others() -> None:
    bus = LossyBus()
    size = len(encode(deletion("x" * 100)))
    async with errands(bus, max_bytes=4 * size) as made, anyio.create_task_group() as group:
        for lane in ((*LANE,), ("ann", "other")):
            group.start_soon(made.send, lane, deletion("x" * 100))
        await bus.until(lambda: len(bus.added) == 2)
        with pytest.raises(OverloadedError):
            await made.send(("ann", "third"), deletion("x" * 100))
        group.start_soon(made.send, ("ben", ""), DeleteRequest(at=0, principal="ben", geoid_id="x" * 100))
        await bus.until(lambda: len(bus.added) == 3)
        made.heard([Removed(request=request, offset=1) for request, _ in bus.added])


def coverage(*scored: int, head: int = 100) -> Coverage:
    slices = tuple(SliceState(number, "engine", 1, True, offset) for number, offset in enumerate(scored))
    return Coverage(head, 0, slices, ())


async def test_an_answer_waits_for_every_slice() -> None:
    state = [coverage(5, 5)]

    async def read() -> Coverage:
        return state[0]

    made = Scored(read, poll=60.0, patience=PATIENT)
    made.heard(Progress(scored={0: 9, 1: 9}, head=40))
    assert made.upto == 0, "how many slices there are is not known yet"
    await made.look()
    assert made.upto == 9
    reached: list[int] = []

    async def wait(offset: int) -> None:
        await made.reached(offset, since=time.monotonic())
        reached.append(offset)

    async with anyio.create_task_group() as group:
        for offset in (30, 9, 20, 10):
            group.start_soon(wait, offset)
        await anyio.wait_all_tasks_blocked()
        assert reached == [9]
        made.heard(Progress(scored={0: 25}, head=40))
        await anyio.wait_all_tasks_blocked()
        assert reached == [9], "one slice is not all"
        made.heard(Progress(scored={1: 20}, head=40))
        made.heard(Progress(scored={1: 7}, head=40))  # told late: nothing goes back
        await anyio.wait_all_tasks_blocked()
        assert sorted(reached) == [9, 10, 20]
        made.heard(Progress(scored={0: 30, 1: 31}, head=40))
    assert sorted(reached) == [9, 10, 20, 30]
    assert made.head == 100, "as the database said"


async def test_what_the_bus_does_not_say_the_database_does() -> None:
    state = [coverage(0, 0)]

    async def read() -> Coverage:
        await anyio.lowlevel.checkpoint()
        return state[0]

    made = Scored(read, poll=0.005, patience=PATIENT)
    async with anyio.create_task_group() as group:
        group.start_soon(made.run)
        with anyio.fail_after(10):
            state[0] = coverage(4, 4)
            await made.reached(4, since=time.monotonic())
        group.cancel_scope.cancel()


async def test_what_gets_on_is_waited_for_and_what_stands_still_is_not() -> None:
    now = [100.0]
    moved = [0.0]
    patience = Patience(5.0, 12.0, clock=lambda: now[0])
    event = anyio.Event()

    async def waits(since: float) -> bool:
        """Whether it is still waited for."""
        with anyio.move_on_after(0.01):
            await patience.wait(event, lambda: moved[0], since=since)
            return False
        return True

    assert await waits(since=96.0)
    with pytest.raises(TimeoutError):
        await waits(since=95.0)
    moved[0] = 96.0
    assert await waits(since=95.0), "something has moved since"
    moved[0] = 99.0
    with pytest.raises(TimeoutError):
        await waits(since=88.0)  # in all it has taken too long
    event.set()
    assert not await waits(since=0.0), "what is there is there, however late"


async def test_an_engine_that_stands_still_is_not_waited_for() -> None:
    bus = LossyBus()
    bus.waiting = 1
    made = Errands(
        bus,
        BusSettings(answer_within=0.05),
        max_items=9,
        max_bytes=9_999,
        at_most=100.0,  # type: ignore[arg-type]
    )
    with pytest.raises(TimeoutError):
        await made.send(LANE, deletion("a"))
    assert made.numbers.waiting == 0
    scored = Scored(_nothing_scored, poll=60.0, patience=Patience(0.05, 100.0))
    await scored.look()
    with pytest.raises(TimeoutError):
        await scored.reached(1, since=time.monotonic())


async def _nothing_scored() -> Coverage:
    return coverage(0, 0)


async def test_what_is_asked_in_order_reaches_the_bus_in_order_however_the_coverage_stands() -> None:
    bus, asked = LossyBus(), 0

    async def read() -> Coverage:
        nonlocal asked
        asked += 1
        await anyio.sleep(0.01 / asked)  # the later one is answered first
        return state

    made = Errands(bus, SETTINGS, max_items=100, max_bytes=10_000, at_most=100.0)  # type: ignore[arg-type]
    scored = Scored(read, poll=60.0, patience=PATIENT)
    knowledge: Any = RemoteKnowledge(
        bus, None, made, scored, None, SETTINGS, None, PipelineMetrics(CollectorRegistry())
    )  # type: ignore[arg-type]
    uncovered = SliceState(0, "engine", 1, False, 0)
    ann = Principal("ann", ALL_ROLES)
    for slices in ((), (uncovered, SliceState(1, "engine", 1, True, 0))):
        state = Coverage(0, 0, slices, ())
        scored.newest = state if slices else None
        bus.added.clear()
        async with anyio.create_task_group() as group:
            for name in ("a", "b", "c"):
                group.start_soon(partial(knowledge.delete, name, principal=ann))
            await bus.until(lambda: len(bus.added) == 3)
            assert [decode_request(payload).geoid_id for _, payload in bus.added] == ["a", "b", "c"]  # type: ignore[union-attr]
            made.heard([Removed(request=request, offset=1) for request, _ in bus.added])
    state = Coverage(0, 0, (uncovered,), ())
    await scored.look()
    async with anyio.create_task_group() as group:
        group.start_soon(partial(knowledge.delete, "d", principal=ann))  # an engine may be starting
        await bus.until(lambda: len(bus.added) == 4)
        made.heard([Removed(request=bus.added[3][0], offset=1)])
    scored._uncovered_since = time.monotonic() - SETTINGS.lease - 1
    with pytest.raises(UnavailableError, match="no engine"):
        await knowledge.delete("e", principal=ann)
    state = coverage(0)
    await scored.look()
    assert scored.uncovered_for == 0.0


async def test_a_stop_refuses_what_no_engine_has_answered_in_its_time() -> None:
    bus, refused = LossyBus(), []
    bus.waiting = 1
    made = Errands(bus, SETTINGS, max_items=100, max_bytes=10_000, at_most=100.0)  # type: ignore[arg-type]
    scored = Scored(_nothing_scored, poll=60.0, patience=PATIENT)
    knowledge: Any = RemoteKnowledge(
        bus, None, made, scored, None, SETTINGS, None, PipelineMetrics(CollectorRegistry())
    )  # type: ignore[arg-type]

    async def delete(name: str) -> None:
        try:
            await knowledge.delete(name, principal=Principal("ann", ALL_ROLES))
        except UnavailableError as error:
            refused.append((name, error.message))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for name in ("answered", "not answered"):
                group.start_soon(delete, name.replace(" ", "-"))
            await bus.until(lambda: len(bus.added) == 2)
            with anyio.move_on_after(0.05) as time_is_over:
                async with anyio.create_task_group() as stopping:
                    stopping.start_soon(knowledge.drain)
                    made.heard([Removed(request=bus.added[0][0], offset=1)])
    assert time_is_over.cancelled_caught
    ((name, message),) = refused
    assert name == "not-answered"
    assert "stopped before this was done" in message
    with anyio.fail_after(10):
        await knowledge.drain()
