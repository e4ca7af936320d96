"""Small stand-ins for ``asyncio.Queue`` and ``asyncio.Event``, of which uvicorn gives every connection one or two.

Those hold deques from the start, about 760 bytes each; an idle connection has no use for them. Only what
``WebSocketsSansIOProtocol`` calls is here, for one consumer.
"""

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class SlimQueue(Generic[T]):
    """Unbounded and for a single getter; uvicorn stops reading from the peer while it holds anything."""

    __slots__ = ("_getter", "_items")

    def __init__(self) -> None:
        self._items: deque[T] | None = None
        self._getter: asyncio.Future[None] | None = None

    def empty(self) -> bool:
        return not self._items

    def put_nowait(self, item: T) -> None:
        if self._items is None:
            self._items = deque()
        self._items.append(item)
        if self._getter is not None and not self._getter.done():
            self._getter.set_result(None)

    async def get(self) -> T:
        while not self._items:
            self._getter = asyncio.get_running_loop().create_future()
            try:
                await self._getter
            finally:
                self._getter = None
        item = self._items.popleft()
        if not self._items:
            self._items = None
        return item


class SlimEvent:
    """Set to begin with."""

    __slots__ = ("_future", "_set")

    def __init__(self) -> None:
        self._set = True
        self._future: asyncio.Future[None] | None = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
        self._future = None

    def clear(self) -> None:
        self._set = False

    async def wait(self) -> None:
        while not self._set:
            if self._future is None:
                self._future = asyncio.get_running_loop().create_future()
            # Several may wait for the one future, so none of them may cancel it.
            await asyncio.shield(self._future)
