"""Several ways to do one thing, in order of preference. A way that keeps failing is left alone for a while, then tried again."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog
from purgatory import AsyncCircuitBreakerFactory
from purgatory.domain.model import OpenedState

from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)
T = TypeVar("T")

THRESHOLD = 3
"""Failures in a row that open the breaker."""
SECONDS = 15.0
"""Until a way that was left alone is tried once more."""


@dataclass(frozen=True, slots=True)
class WayNumbers:
    """``state``: closed (in use), opened (left alone), half-opened (being tried). Totals since the start."""

    state: str
    used: int
    failed: int


class Failover:
    """Runs the first way that works.

    Args:
        what: For the log.
        names: One per way, the preferred first.
        threshold: Failures in a row after which a way is left alone.
        seconds: For how long.
    """

    def __init__(
        self, what: str, names: Sequence[str], *, threshold: int = THRESHOLD, seconds: float = SECONDS
    ) -> None:
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names: expected at least one, each once, got {list(names)}")
        self._what = what
        self._names = list(names)
        self._seconds = seconds
        self._breakers = AsyncCircuitBreakerFactory(
            default_threshold=threshold,
            default_ttl=seconds,
            # A cancelled call and a defect say nothing about the way; a caller's own mistake neither.
            exclude=[(BaseException, lambda error: not isinstance(error, UnavailableError))],
        )
        self._used = dict.fromkeys(self._names, 0)
        self._failed = dict.fromkeys(self._names, 0)
        self._states = dict.fromkeys(self._names, "closed")

    @property
    def numbers(self) -> dict[str, WayNumbers]:
        """By name, the preferred first."""
        return {name: WayNumbers(self._states[name], self._used[name], self._failed[name]) for name in self._names}

    def returning(self, name: str) -> bool:
        """Whether the way that runs is tried again after it was left alone: what it held may be dead, and is best made anew."""
        return self._states[name] == "half-opened"

    async def run(self, *ways: Callable[[], Awaitable[T]]) -> T:
        """The result of the first way that works; ``ways`` are in the order of the names.

        Raises:
            UnavailableError: none works at present; the last one's error.
        """
        last: UnavailableError | None = None
        for name, way in zip(self._names, ways, strict=True):
            breaker = await self._breakers.get_breaker(name)
            try:
                async with breaker:
                    self._states[name] = breaker.context.state
                    result = await way()
            except OpenedState:
                self._states[name] = breaker.context.state
                continue
            except UnavailableError as error:
                self._failed[name] += 1
                self._note(name, breaker.context.state)
                last = error
                continue
            self._used[name] += 1
            self._note(name, breaker.context.state)
            return result
        raise last or UnavailableError(
            f"{self._what}: it keeps failing and is left alone for a while", retry_after=self._seconds
        )

    def _note(self, name: str, state: str) -> None:
        before, self._states[name] = self._states[name], state
        if before == "closed" and state == "opened":
            log.warning("left alone after repeated failures", what=self._what, way=name, seconds=self._seconds)
        elif before != "closed" and state == "closed":
            log.info("works again", what=self._what, way=name)
