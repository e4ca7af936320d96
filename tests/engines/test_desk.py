"""Work from the bus reaches the pipeline in order and once at a time; what is not decided here is left to the next owner."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from kimera_stream.core.coverage import SliceState
from kimera_stream.core.interfaces import PublishResult
from kimera_stream.core.vault.errors import LeaseLostError
from kimera_stream.engines.cluster import wire
from kimera_stream.engines.cluster.desk import Desk
from kimera_stream.engines.retrying import NotBegunError
from kimera_stream.engines.work import RequestId
from kimera_stream.infrastructure.bus.interface import Bus, Message, replies
from kimera_stream.infrastructure.bus.memory import MemoryBroker, MemoryBus
from kimera_stream.infrastructure.settings import BusSettings
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from kimera_stream.protocol.errors import InternalError, NotFoundError, OperationalError, UnavailableError
from kimera_stream.protocol.objects import Geoid, GeoidBody
from tests.e2e.harness import until
from tests.engines.world import World

pytestmark = pytest.mark.anyio

SETTINGS = BusSettings(claim_after=0.05)
PARTITION = 3


class Pipeline:
    """Commits when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, RequestId]] = []
        self.outcomes: dict[str, OperationalError] = {}
        self.go = anyio.Event()
        self.changed = anyio.Event()

    async def publish(self, body: GeoidBody, *, request: RequestId, **_fields: Any) -> PublishResult:
        assert body.text is not None
        self.asked.append((body.text, request))
        self.changed.set()
        await self.go.wait()
        if body.text in self.outcomes:
            raise self.outcomes.pop(body.text)
        geoid = Geoid(
            id=body.text, version=1, semantic_state={}, symbolic_state={}, metadata={}, entropy=0.0, created_at=1,
            updated_at=1, offset=len(self.asked),
        )  # fmt: skip
        return PublishResult(geoid, geoid.offset, [], duplicate=False)

    async def until(self, count: int) -> None:
        with anyio.fail_after(10):
            while len(self.asked) < count:
                self.changed = anyio.Event()
                await self.changed.wait()


def owned(generation: int) -> SliceState:
    return SliceState(PARTITION, "engine", generation, True, 0)


class Scene:
    """An edge's bus and an engine's desk on one broker."""

    def __init__(self, broker: MemoryBroker, edge: Bus, engine: Bus, most: int, pipeline: Any = None) -> None:
        self.broker = broker
        self.edge = edge
        self.pipeline = Pipeline()
        self.unwritable: OperationalError | None = None
        self.desk = Desk(engine, pipeline or self.pipeline, most=most, forget_after=60.0, admit_write=self._admit_write)

    def _admit_write(self) -> None:
        if self.unwritable is not None:
            raise self.unwritable

    async def add(
        self,
        text: str,
        request: str | None = None,
        age: float = 0.0,
        after: str | None = None,
        turn: int = 0,
        principal: str = "ann",
        **fields: Any,
    ) -> None:
        asked = wire.PublishRequest(
            at=int(1000 * (time.time() - age)),
            after=after,
            turn=turn,
            principal=principal,
            body=GeoidBody(text=text),
            **fields,
        )
        await self.edge.add(PARTITION, request or f"r-{text}", wire.encode(asked), of=principal)

    async def answers(self, follower: Any, count: int) -> list[wire.Answer]:
        found: list[wire.Answer] = []
        with anyio.fail_after(10):
            while len(found) < count:
                for each in await follower.receive():
                    if isinstance(each, Message):
                        found += wire.decode_answers(each.payload)
        return found

    async def all_done(self) -> None:
        async def empty() -> bool:
            return await self.edge.depth(PARTITION) == 0

        await until(empty)


@asynccontextmanager
async def scene(most: int = 100, pipeline: Any = None, settings: BusSettings = SETTINGS) -> AsyncIterator[Scene]:
    broker = MemoryBroker()
    edge, engine = MemoryBus(broker, "edge", settings), MemoryBus(broker, "engine", settings)
    async with anyio.create_task_group() as group:
        for bus in (edge, engine):
            service = Service(ServiceSpec("bus", bus.serve))
            group.start_soon(bus.serve, service)
            await service.became_ready.wait()
        made = Scene(broker, edge, engine, most, pipeline)
        group.start_soon(made.desk.run)
        await made.desk.gain({PARTITION: owned(1)})
        yield made
        group.cancel_scope.cancel()


async def test_work_is_carried_out_in_order_answered_and_let_go() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        for text in "abc":
            await made.add(text)
        await made.pipeline.until(3)
        assert made.pipeline.asked == [(text, RequestId(f"r-{text}", PARTITION, 1)) for text in "abc"]
        assert await made.edge.depth(PARTITION) == 3, "it stays on the bus until it is answered"
        made.pipeline.go.set()
        answers = await made.answers(follower, 3)
        assert [answer.request for answer in answers] == ["r-a", "r-b", "r-c"]
        assert all(isinstance(answer, wire.Committed) for answer in answers)
        await made.all_done()


async def test_what_is_added_again_meanwhile_is_done_once() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        for text in "aab":
            await made.add(text)
        await made.pipeline.until(2)
        made.pipeline.go.set()
        answers = await made.answers(follower, 2)
        assert [answer.request for answer in answers] == ["r-a", "r-b"]
        await made.all_done()
        assert [text for text, _ in made.pipeline.asked] == ["a", "b"]


async def test_a_refusal_is_an_answer() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        made.pipeline.go.set()
        made.pipeline.outcomes["a"] = NotFoundError("no such thing", field="id")
        await made.add("a")
        (answer,) = await made.answers(follower, 1)
        assert isinstance(answer, wire.Refused)
        error = answer.error()
        assert (type(error), error.message, error.field) == (NotFoundError, "no such thing", "id")
        await made.all_done()
        await made.edge.add(PARTITION, "r-broken", b"\xc1")
        (answer,) = await made.answers(follower, 1)
        assert isinstance(answer, wire.Refused)
        assert answer.code == "internal"


async def test_what_was_refused_is_not_done_by_another_copy_of_it() -> None:
    """The bus had lost its contact, or its data, and the edge has added it once more."""
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        made.pipeline.go.set()
        made.pipeline.outcomes["a"] = NotFoundError("no such thing", field="id")
        await made.add("a")
        refused = await made.answers(follower, 1)
        await made.add("a", turn=1)
        assert await made.answers(follower, 1) == refused
        assert [text for text, _ in made.pipeline.asked] == ["a"]
        await made.all_done()


async def test_while_nothing_can_be_written_what_is_new_is_refused_and_what_may_be_done_waits() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        made.unwritable = UnavailableError("a commit hangs", retry_after=1.0)
        await made.add("new")
        (refused,) = await made.answers(follower, 1)
        assert isinstance(refused, wire.Refused)
        assert (refused.code, refused.error().retry_after) == ("unavailable", 1.0)
        await made.add("old", turn=1)
        await made.pipeline.until(1)
        made.pipeline.go.set()
        (answer,) = await made.answers(follower, 1)
        assert (type(answer), answer.request) == (wire.Committed, "r-old")
        await made.add("old")  # as by a bus that forgot that it had handed this out; its edge may not have heard of it
        (answer,) = await made.answers(follower, 1)
        assert (type(answer), answer.request) == (wire.Committed, "r-old")
        await made.all_done()


@pytest.mark.parametrize("error", [LeaseLostError.of([PARTITION]), InternalError("crashed")])
async def test_what_is_not_decided_here_comes_again(error: OperationalError) -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        made.pipeline.go.set()
        made.pipeline.outcomes["a"] = error
        await made.add("a")
        (answer,) = await made.answers(follower, 1)
        assert isinstance(answer, wire.Committed)
        assert [text for text, _ in made.pipeline.asked] == ["a", "a"]


async def test_what_crashes_the_pipeline_twice_is_refused() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        made.pipeline.outcomes["a"] = InternalError("crashed")
        await made.add("a")
        await made.pipeline.until(1)
        made.pipeline.go.set()
        await until(lambda: not made.pipeline.outcomes)
        made.pipeline.outcomes["a"] = InternalError("crashed")
        (answer,) = await made.answers(follower, 1)
        assert isinstance(answer, wire.Refused)
        assert answer.code == "internal"


async def test_what_only_waits_while_the_pipeline_crashes_comes_again_however_often() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        await made.add("a")
        for count in range(1, 4):
            await made.pipeline.until(count)
            made.pipeline.outcomes["a"] = NotBegunError("another one was under way")
            made.pipeline.go.set()
            made.pipeline.go = anyio.Event()
        await made.pipeline.until(4)
        made.pipeline.go.set()
        (answer,) = await made.answers(follower, 1)
        assert isinstance(answer, wire.Committed)


async def test_nothing_overtakes_what_the_bus_has_lost() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        await made.add("a")
        await made.pipeline.until(1)
        await made.add("c", after="r-b", turn=4)
        await made.add("d", after="r-c")
        early = await made.answers(follower, 2)
        assert early == [wire.Early(request="r-c", turn=4), wire.Early(request="r-d", turn=0)]
        await made.add("b", after="r-a")
        await made.add("c", after="r-b", turn=5)
        await made.pipeline.until(3)
        made.pipeline.go.set()
        assert len(await made.answers(follower, 3)) == 3
        await made.add("d", after="r-c", turn=1)  # what it comes after is done
        (answer,) = await made.answers(follower, 1)
        assert isinstance(answer, wire.Committed)
        assert [text for text, _ in made.pipeline.asked] == ["a", "b", "c", "d"]
        await made.all_done()


async def test_nothing_overtakes_what_was_left_undone_or_begun_under_another_ownership() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        made.pipeline.outcomes["a"] = LeaseLostError.of([PARTITION])
        await made.add("a")
        await made.pipeline.until(1)
        made.pipeline.go.set()
        await until(lambda: not made.desk.waiting)
        await made.add("b", after="r-a")
        early, answer = await made.answers(follower, 2)
        assert early == wire.Early(request="r-b", turn=0)
        assert answer.request == "r-a", "it came again"
        await made.desk.lose([PARTITION])
        await made.desk.gain({PARTITION: owned(3)})
        await made.add("b", after="r-a")
        await made.add("c")
        early, answer = await made.answers(follower, 2)
        assert early == wire.Early(request="r-b", turn=0)
        assert made.pipeline.asked[-1] == ("c", RequestId("r-c", PARTITION, 3))


async def test_no_more_than_its_measure_is_under_way() -> None:
    async with scene(most=1) as made, made.edge.follow(replies("edge")) as follower:
        await made.add("a")
        await made.pipeline.until(1)
        await made.add("b")
        await anyio.wait_all_tasks_blocked()
        assert made.desk.waiting == 1
        made.pipeline.go.set()
        assert len(await made.answers(follower, 2)) == 2


async def until_waiting(made: Scene, count: int) -> None:
    """Until so much is under way, and the pipeline has taken what it can of it."""

    async def there() -> bool:
        return made.desk.waiting >= count

    await until(there)
    await anyio.wait_all_tasks_blocked()


async def said(world: World, made: Scene) -> list[str]:
    """What is in the log once all that waits has been done."""
    assert world.encoder.gate is not None
    world.encoder.gate.set()
    await made.all_done()
    return [json.loads(bytes(entry.data))["text"] for entry in world.sink.entries if entry.type == "geoid.created"]


async def test_among_what_was_taken_urgent_work_goes_first_and_principals_take_turns() -> None:
    """As far as sessions keep their order: what comes later in one waits for what came before, however urgent."""
    world = World()
    world.encoder.gate = anyio.Event()
    async with world.running(), scene(pipeline=world.pipeline) as made:
        await made.add("in hand")
        await until_waiting(made, 1)
        for number in range(4):
            await made.add(f"greedy {number}", principal="greedy", session_id=f"s{number % 2}")
        await made.add("greedy, urgent", principal="greedy", session_id="s1", priority=9)
        await made.add("idle", principal="cyd", priority=0)
        await made.add("ben", principal="ben")
        await made.add("urgent", principal="dan", priority=9)
        await until_waiting(made, 9)
        order = await said(world, made)
    assert order[:2] == ["in hand", "urgent"]
    assert order.index("ben") <= 3, "behind one of the greedy principal's, not behind all of them"
    assert order.index("greedy, urgent") > order.index("greedy 3")
    assert order.index("idle") == 7, "one pick in eight is for the least urgent"


async def test_what_an_engine_has_not_taken_waits_in_the_order_in_which_it_came() -> None:
    """However urgent: a partition is a queue. So no principal may fill it (``Bus.add``)."""
    world = World()
    world.encoder.gate = anyio.Event()
    one_by_one = BusSettings(claim_after=60.0, work_batch=1)
    async with world.running(), scene(most=1, pipeline=world.pipeline, settings=one_by_one) as made:
        for text, priority in (("in hand", 5), ("first", 0), ("second", 9)):
            await made.add(text, principal=text, priority=priority)
        await until_waiting(made, 1)
        assert await said(world, made) == ["in hand", "first", "second"]


async def test_a_stop_finishes_what_was_taken_and_leaves_the_rest() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        made.pipeline.outcomes["b"] = UnavailableError("the server is stopping")
        for text in "ab":
            await made.add(text)
        await made.pipeline.until(2)
        async with anyio.create_task_group() as group:
            group.start_soon(made.desk.drain)
            await anyio.wait_all_tasks_blocked()
            await made.add("c")
            made.pipeline.go.set()
        (answer,) = await made.answers(follower, 1)
        assert answer.request == "r-a"
        assert await made.edge.depth(PARTITION) == 2, "the next owner does what was given up, and what came since"


async def test_work_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async with scene() as made, made.edge.follow(replies("edge")) as follower:
        await made.add("old", age=61.0)
        (answer,) = await made.answers(follower, 1)
        assert isinstance(answer, wire.Refused)
        assert answer.error().temporary
        assert made.pipeline.asked == []
        await made.all_done()
