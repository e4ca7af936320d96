"""How long an edge waits for engines: as long as they get on with what it waits for.

A burst takes its time, and everything in it is answered; where nothing has moved for a while, the answer is ``unavailable``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio


@dataclass(frozen=True, slots=True)
class Patience:
    """Args:
    within: Seconds without movement that are waited at most.
    at_most: Seconds that are waited in all, whatever moves.
    clock: Monotonic seconds.
    """

    within: float
    at_most: float
    clock: Callable[[], float] = time.monotonic

    async def wait(self, event: anyio.Event, moved_at: Callable[[], float], *, since: float) -> None:
        """Wait for ``event``.

        Args:
            moved_at: Clock time when what leads to the event last moved.
            since: Clock time from which the caller waits.

        Raises:
            TimeoutError: nothing moves any more, or it takes too long.
        """
        while not event.is_set():
            until = min(max(since, moved_at()) + self.within, since + self.at_most)
            left = until - self.clock()
            if left <= 0:
                raise TimeoutError
            with anyio.move_on_after(left):
                await event.wait()
