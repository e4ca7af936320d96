"""Which edges connections are sent to: those that are there and take some; and what is made of a bus that is full."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import anyio
import pytest

from kimera_stream.api.nodes import rebalancing
from kimera_stream.api.nodes.field import RemoteField
from kimera_stream.api.nodes.rebalancing import Rebalancing
from kimera_stream.api.nodes.stats import NodeStats
from kimera_stream.core.interfaces import EventSink
from kimera_stream.infrastructure.bus.memory import MemoryBroker, MemoryBus
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from kimera_stream.protocol.errors import OverloadedError, UnavailableError

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def buses(*nodes: str) -> AsyncIterator[list[MemoryBus]]:
    broker = MemoryBroker()
    made = [MemoryBus(broker, node) for node in nodes]
    async with anyio.create_task_group() as group:
        for bus in made:
            service = Service(ServiceSpec(bus.node, bus.serve))
            group.start_soon(bus.serve, service)
            await service.became_ready.wait()
        yield made
        group.cancel_scope.cancel()


async def test_nothing_is_sent_to_an_edge_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "EVERY", 0.001)
    async with buses("east", "west") as (east, west):
        there: int | None = 0
        looks, moved = 0, []
        looked = anyio.Event()

        def move(count: int) -> None:
            nonlocal looks
            moved.append(count)
            looks += 1
            looked.set()

        async def a_look() -> int:
            """What the next whole look does."""
            nonlocal looked
            for _ in range(2):
                looked = anyio.Event()
                with anyio.fail_after(10):
                    await looked.wait()
            return moved[-1]

        async with anyio.create_task_group() as group:
            group.start_soon(Rebalancing(east, count=lambda: 100, move=move, above=0.2).run)
            assert await a_look() == 0, "there is no other edge"
            group.start_soon(Rebalancing(west, count=lambda: there, move=lambda _: None, above=0.2).run)
            await a_look()
            assert await a_look() == 5
            there = None
            await a_look()
            assert await a_look() == 0
            group.cancel_scope.cancel()


@pytest.mark.parametrize("error", [OverloadedError("the bus is full"), UnavailableError("the bus is away")])
async def test_a_bus_that_refuses_ends_nothing_that_only_asks_who_shares_what(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(rebalancing, "EVERY", 0.001)
    looked = anyio.Event()

    async def refuse(_space: str, _key: str) -> dict[str, bytes]:
        raise error

    def move(count: int) -> None:
        assert count == 0
        looked.set()

    async with buses("east") as (east,):
        monkeypatch.setattr(east, "gather", refuse)
        field = RemoteField(east, cast("EventSink", None))
        await field.load()
        told = SimpleNamespace(_bus=east, _engines={"west": {"geoids": 1}})
        await NodeStats._ask_engines(cast("NodeStats", told))
        assert told._engines == {"west": {"geoids": 1}}
        async with anyio.create_task_group() as group:
            group.start_soon(Rebalancing(east, count=lambda: 100, move=move, above=0.2).run)
            with anyio.fail_after(10):
                await looked.wait()
            group.cancel_scope.cancel()
