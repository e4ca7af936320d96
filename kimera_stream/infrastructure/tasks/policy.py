"""When and how fast a failed service is started again."""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

OnFailure = Literal["restart", "escalate"]
"""restart: again after a backoff, within the budget. escalate: end the process."""
OnEnd = Literal["ignore", "restart", "escalate"]
"""What a clean return of ``run`` means: done (ignore), or as little expected as a crash."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter").

    The n-th delay is uniform in ``[floor, min(maximum, base * factor ** (n - 1))]`` seconds.
    """

    base: float = 0.1
    factor: float = 2.0
    maximum: float = 10.0
    floor: float = 0.01

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Seconds before the ``attempt``-th restart (1-based)."""
        ceiling = min(self.maximum, self.base * self.factor ** min(attempt - 1, 63))
        return rng.uniform(min(self.floor, ceiling), ceiling)


@dataclass(slots=True)
class Budget:
    """At most ``restarts`` restarts in any ``window`` seconds."""

    restarts: int = 5
    window: float = 60.0
    _times: deque[float] = field(default_factory=deque)

    def spend(self, now: float) -> bool:
        """Take one restart from the budget; False when it is used up."""
        while self._times and now - self._times[0] > self.window:
            self._times.popleft()
        if len(self._times) >= self.restarts:
            return False
        self._times.append(now)
        return True

    @property
    def spent(self) -> int:
        """Restarts counted in the current window as of the last ``spend``."""
        return len(self._times)

    def fresh(self) -> "Budget":
        """An unspent budget of the same size: a spec may be used by several supervisors."""
        return Budget(self.restarts, self.window)
