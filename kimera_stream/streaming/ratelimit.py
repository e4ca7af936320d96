"""How fast a connection may send commands."""


class TokenBucket:
    """``rate`` tokens a second flow into a bucket of ``burst``; it starts full.

    Args:
        now: Monotonic seconds, as in every later call.
    """

    __slots__ = ("_burst", "_level", "_rate", "_seen")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._seen = now

    def take(self, now: float) -> float:
        """Take one token: 0 if there was one, otherwise the seconds until there will be."""
        self._level = min(self._burst, self._level + (now - self._seen) * self._rate)
        self._seen = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / self._rate
