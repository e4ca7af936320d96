"""Many timers, one task: connect timeouts, token expiries, heartbeats and stalls of all connections share one heap."""

import heapq
from collections.abc import Callable
from itertools import count

import anyio


class Deadline:
    """A pending callback; ``cancel`` makes it do nothing."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Deadlines:
    """Calls back at given times, from the one task that runs ``run``. A callback must not block; what it raises ends ``run``.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Deadline]] = []
        self._numbers = count()
        self._sleeping_until = float("inf")
        self._changed = anyio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, callback: Callable[[], None]) -> Deadline:
        """Call ``callback`` at ``when`` on the clock, or soon after."""
        deadline = Deadline(when, callback)
        heapq.heappush(self._heap, (when, next(self._numbers), deadline))
        if when < self._sleeping_until:
            self._changed.set()
        return deadline

    def fire(self) -> float:
        """Run what is due; returns the seconds until the next one (infinity: none)."""
        now = self._clock()
        while self._heap:
            when, _, deadline = self._heap[0]
            if deadline.callback is None:
                heapq.heappop(self._heap)
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
