"""What resolving costs: a running singleton (budget: 10 microseconds), and a request scope with one service in it."""

import asyncio
from typing import Any

import pytest

from kimera_stream.infrastructure.container import Container, Services

pytest.importorskip("pytest_benchmark")


class Clock:
    pass


class Store:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock


class Handler:
    def __init__(self, store: Store) -> None:
        self.store = store


def built() -> Services:
    services = Services()
    services.add(Clock, factory=Clock)
    services.add(Store, factory=Store)
    services.add(Handler, factory=Handler, lifetime="request")
    for index in range(50):
        key = type(f"Part{index}", (), {})
        services.add(key, factory=key)
    return services


def test_warm_singleton(benchmark: Any) -> None:
    async def start() -> Container:
        container = built().build()
        await container.start()
        return container

    container = asyncio.run(start())
    benchmark(container.get, Store)


def test_request_scope(benchmark: Any) -> None:
    rounds = 1_000

    async def requests() -> None:
        async with built().build() as container:
            await container.start()
            for _ in range(rounds):
                async with container.request() as request:
                    await request.get(Handler)

    benchmark.extra_info["requests_per_call"] = rounds
    benchmark.pedantic(lambda: asyncio.run(requests()), rounds=5)


def test_build_and_start(benchmark: Any) -> None:
    async def once() -> None:
        async with built().build() as container:
            await container.start()

    benchmark.pedantic(lambda: asyncio.run(once()), rounds=5)
