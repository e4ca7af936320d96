"""Many timers, one task: connect timeouts, token expiries, heartbeats and stalls of all connections share one heap."""

import heapq
from collections.abc import Callable
from itertools import count

import anyio

_FEW = 64
"""Cancelled deadlines that are never worth clearing away."""


class Deadline:
    """A pending callback; ``cancel`` makes it do nothing."""

    __slots__ = ("_owner", "callback", "when")

    def __init__(self, when: float, callback: Callable[[], None], owner: "Deadlines") -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback
        self._owner = owner

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._owner.cancelled()


class Deadlines:
    """Calls back at given times, from the one task that runs ``run``. A callback must not block; what it raises ends ``run``.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Deadline]] = []
        self._numbers = count()
        self._cancelled = 0
        self._sleeping_until = float("inf")
        self._changed = anyio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, callback: Callable[[], None]) -> Deadline:
        """Call ``callback`` at ``when`` on the clock, or soon after."""
        deadline = Deadline(when, callback, self)
        heapq.heappush(self._heap, (when, next(self._numbers), deadline))
        if when < self._sleeping_until:
            self._changed.set()
        return deadline

    def cancelled(self) -> None:
        """One of them will do nothing. They are cleared away once they are the most: one may be of tomorrow, when a token
        expires, and connections come and go by the hundred a second.
        """
        self._cancelled += 1
        if self._cancelled > max(_FEW, len(self._heap) // 2):
            self._heap = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def fire(self) -> float:
        """Run what is due; returns the seconds until the next one (infinity: none)."""
        now = self._clock()
        while self._heap:
            when, _, deadline = self._heap[0]
            if deadline.callback is None:
                heapq.heappop(self._heap)
                self._cancelled -= 1
            elif when > now:
                return when - now
            else:
                heapq.heappop(self._heap)
                callback, deadline.callback = deadline.callback, None
                callback()
        return float("inf")

    async def run(self) -> None:
        while True:
            self._changed = anyio.Event()
            self._sleeping_until = float("inf")
            delay = self.fire()
            self._sleeping_until = self._clock() + delay
            with anyio.move_on_after(delay):
                await self._changed.wait()
