"""Connections that principals have on other edges: told of before somebody wants to know, and counted before somebody is refused."""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import anyio
import pytest

from kimera_stream.api.nodes import presence
from kimera_stream.api.nodes.presence import ConnectionsElsewhere
from kimera_stream.infrastructure.bus.memory import MemoryBroker, MemoryBus
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from kimera_stream.protocol.errors import OverloadedError

pytestmark = pytest.mark.anyio


class Edge:
    def __init__(self, broker: MemoryBroker, name: str) -> None:
        self.bus = MemoryBus(broker, name)
        self.here: Counter[str] = Counter()
        self.elsewhere = ConnectionsElsewhere(self.bus)


@contextlib.asynccontextmanager
async def serving(*edges: Edge) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        for edge in reversed(edges):  # the first hears of all others
            service = Service(ServiceSpec("bus", edge.bus.serve))
            group.start_soon(edge.bus.serve, service, name="serve")
            await service.became_ready.wait()
            edge.elsewhere.begin(edge.here)
            group.start_soon(edge.elsewhere.run, name="run")
        yield
        group.cancel_scope.cancel()


async def known(edge: Edge, principal: str, number: int) -> None:
    with anyio.fail_after(30):
        while edge.elsewhere.known(principal) != number:  # noqa: ASYNC110 - what is waited for sets no event
            await anyio.sleep(0.01)


@pytest.fixture
def edges(monkeypatch: pytest.MonkeyPatch) -> list[Edge]:
    monkeypatch.setattr(presence, "EVERY", 600.0)  # once, at the start
    monkeypatch.setattr(presence, "WITHIN", 60.0)
    broker = MemoryBroker()
    made = [Edge(broker, name) for name in ("one", "two", "three")]
    made[1].here.update(ann=3, bob=1)
    made[2].here.update(ann=2)
    return made


async def test_a_count_is_of_what_is_open_now(edges: list[Edge]) -> None:
    one, two, three = edges
    async with serving(*edges):
        await known(one, "ann", 5)
        assert (one.elsewhere.known("bob"), one.elsewhere.known("eve")) == (1, 0)
        del two.here["ann"]
        three.here["ann"] = 1
        assert one.elsewhere.known("ann") == 5
        assert await one.elsewhere.count("ann") == 1
        assert await one.elsewhere.count("eve") == 0


async def test_an_edge_that_does_not_answer_is_gone_and_one_without_time_is_not(
    edges: list[Edge], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = edges
    monkeypatch.setattr(presence, "WITHIN", 0.5)
    async with serving(*edges):
        await known(one, "ann", 5)

        async def silent(_question: bytes) -> bytes:
            await anyio.sleep_forever()
            raise AssertionError

        async def busy(_question: bytes) -> bytes:
            raise OverloadedError("too many questions", retry_after=1.0)

        two.bus.answer_with(presence.CONNECTIONS, silent)
        three.bus.answer_with(presence.CONNECTIONS, busy)
        assert await one.elsewhere.count("ann") == 2


async def test_all_who_wait_share_a_count_that_began_after_they_came(edges: list[Edge]) -> None:
    one, two, _ = edges
    async with serving(*edges):
        await known(one, "ann", 5)
        asked, answers = 0, anyio.Event()
        reached = anyio.Event()

        async def slow(_question: bytes) -> bytes:
            nonlocal asked
            asked += 1
            told = two.here["ann"]
            reached.set()
            await answers.wait()
            return presence._encode(told)

        two.bus.answer_with(presence.CONNECTIONS, slow)
        found: list[int] = []

        async def count() -> None:
            found.append(await one.elsewhere.count("ann"))

        async with anyio.create_task_group() as group:
            group.start_soon(count)
            await reached.wait()
            two.here["ann"] = 1  # after the first was answered, before the others ask
            for _ in range(50):
                group.start_soon(count)
            await anyio.wait_all_tasks_blocked()
            answers.set()
        assert found == [5] + [3] * 50
        assert asked == 2
