"""Reading ahead: the next page is on its way while one is worked on."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import anyio

from kimera_stream.protocol.errors import KimeraError

T = TypeVar("T")


async def ahead(source: AsyncIterator[T], work: Callable[[T], Awaitable[bool]]) -> bool:
    """Do ``work`` with every item of ``source``, fetching the next one meanwhile, until it returns False; whether it never did.
    The first error ends it."""
    send, receive = anyio.create_memory_object_stream[T](1)
    failure: KimeraError | None = None  # raised from outside of the task group, which would wrap it

    async def fetch() -> None:
        nonlocal failure
        async with send:
            try:
                async for item in source:
                    await send.send(item)
            except KimeraError as error:
                failure = error

    whole = True
    async with anyio.create_task_group() as group, receive:
        group.start_soon(fetch, name="ahead:fetch")
        try:
            async for item in receive:
                if not await work(item):
                    whole = False
                    group.cancel_scope.cancel()
                    break
        except KimeraError as error:
            failure = error
            group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return whole
