"""The field reaches every edge, and stays the newest there, whatever the bus loses and whoever leads."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import anyio
import msgspec
import pytest

from kimera_stream.api.nodes.announcing import Announcing
from kimera_stream.api.nodes.field import RemoteField
from kimera_stream.api.nodes.hearing import Hearing
from kimera_stream.core.interfaces import WriteBatch
from kimera_stream.engines.field import FieldDynamics
from kimera_stream.infrastructure.bus.memory import MemoryBroker, MemoryBus
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import FieldState

pytestmark = pytest.mark.anyio


def state(geoids: int, updated_at: int = 0) -> bytes:
    return msgspec.json.encode(
        FieldState(
            geoids=geoids, open_contradictions=0, entropy=0.0, temperature=0.0, activation=0.0, stability=1.0, clusters=[],
            updated_at=updated_at,
        )
    )  # fmt: skip


class Sink:
    """Takes what an edge tells its subscribers."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.changed = anyio.Event()

    def deliver(self, _entries: Any) -> None:
        raise AssertionError("a field is no entry")

    def latest(self, channel: str, _type: str, data: bytes, *, offset: int) -> None:
        assert channel == "field"
        self.told.append((offset, msgspec.json.decode(data)["geoids"]))
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(4):  # less than it takes until the shared value is looked at unasked
            while not condition():
                self.changed = anyio.Event()
                await self.changed.wait()


class Cluster:
    """An edge that hears, and engines that tell."""

    def __init__(self, group: anyio.abc.TaskGroup) -> None:
        self.broker = MemoryBroker()
        self.sink = Sink()
        self.edge = MemoryBus(self.broker, "edge")
        self.field = RemoteField(self.edge, self.sink)
        self._group = group

    async def serve(self, bus: MemoryBus) -> None:
        service = Service(ServiceSpec(bus.node, bus.serve))
        self._group.start_soon(bus.serve, service)
        await service.became_ready.wait()

    async def engine(self, name: str, leads: Callable[[], bool] = lambda: True) -> Announcing:
        bus = MemoryBus(self.broker, name)
        await self.serve(bus)
        return Announcing(bus, leads)

    async def listen(self) -> None:
        other = cast("Any", SimpleNamespace(lost=lambda: None, stale=lambda: None))
        hearing = Hearing(self.edge, other, other, other, other, self.field)
        self._group.start_soon(self.field.run)
        self._group.start_soon(hearing.run)
        await anyio.wait_all_tasks_blocked()


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    async with anyio.create_task_group() as group:
        made = Cluster(group)
        await made.serve(made.edge)
        yield made
        group.cancel_scope.cancel()


async def test_a_value_that_the_bus_lost_is_asked_for() -> None:
    async with cluster() as c:
        engine = await c.engine("one")
        await c.listen()
        engine.latest("field", "field.updated", state(1), offset=10)
        await c.sink.until(lambda: c.sink.told == [(10, 1)])
        c.broker.cut()
        engine.latest("field", "field.updated", state(2), offset=20)  # and then no more: nothing changes
        c.broker.mend()
        await c.sink.until(lambda: c.sink.told == [(10, 1), (20, 2)])
        assert c.field.state().geoids == 2


async def test_who_leads_next_tells_what_it_had_to_itself() -> None:
    async with cluster() as c:
        leads = False
        engine = await c.engine("one", lambda: leads)
        engine.latest("field", "field.updated", state(3), offset=30)
        await c.listen()
        with pytest.raises(UnavailableError):
            c.field.state()
        leads = True
        await engine.lead()
        await c.sink.until(lambda: c.sink.told == [(30, 3)])
        later = RemoteField(c.edge, Sink())
        await later.load()
        assert later.state().geoids == 3


async def test_an_engine_that_led_and_is_late_takes_nothing_back() -> None:
    async with cluster() as c:
        former, leader = await c.engine("former"), await c.engine("leader")
        await c.listen()
        leader.latest("field", "field.updated", state(5, 2_000), offset=50)
        former.latest("field", "field.updated", state(4, 9_000), offset=40)
        leader.latest("field", "field.updated", state(5, 1_000), offset=50)
        leader.latest("field", "field.updated", state(6, 3_000), offset=50)
        await c.sink.until(lambda: len(c.sink.told) == 2)
        await anyio.wait_all_tasks_blocked()
        assert c.sink.told == [(50, 5), (50, 6)]


async def test_a_clock_that_is_set_back_does_not_hide_what_a_field_comes_to() -> None:
    """A field calms down at one offset: its values there are told apart by when they were made."""
    now = 1_700_000_000.0
    async with cluster() as c:
        field = FieldDynamics(4, await c.engine("one"), interval=1.0, head=lambda: 7, clock=lambda: now)
        await c.listen()
        field.observe(WriteBatch(entries=[LogEntry(7, "geoid.created", 1, (), msgspec.Raw(b"{}"))]))
        assert field.emit()
        await c.sink.until(lambda: len(c.sink.told) == 1)
        excited = c.field.state()
        now -= 600
        field.forget("nothing")  # it has changed
        assert field.emit()
        await c.sink.until(lambda: len(c.sink.told) == 2)
        assert c.field.state().updated_at > excited.updated_at
