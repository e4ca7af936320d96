"""How long to wait before the next attempt."""

from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with jitter: between half and all of ``min(cap, base * 2**attempt)`` seconds.

    Half of the delay is kept so that a refused server is never hammered; the other half is spread so that clients
    that were dropped together do not come back together.
    """

    base: float = 0.2
    cap: float = 10.0
    steady: float = 10.0
    """Seconds a connection must have lasted before the next loss starts again from ``base``."""
    random: Random = field(default_factory=Random, repr=False, compare=False)

    def delay(self, attempt: int, hint: float | None = None) -> float:
        """Seconds to wait before retry number ``attempt`` (0 for the first); as long as the server says, where that is longer
        and no more than ``cap``."""
        ceiling = min(self.cap, self.base * 2.0 ** min(attempt, 32))
        delay = ceiling * (0.5 + 0.5 * self.random.random())
        return delay if hint is None else max(delay, min(hint, self.cap))
