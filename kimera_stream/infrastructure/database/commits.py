"""How long the write under way has lasted, and that new ones are refused while it lasts too long.

A disk that takes seconds over an fsync cannot be hurried, and whoever is behind it has to wait. What comes new is told so at once
instead of waiting in a line that only grows; what was accepted keeps its place, and reads have connections of their own.
"""

import time
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kimera_stream.infrastructure.database.failures import RETRY_AFTER
from kimera_stream.protocol.errors import UnavailableError

_FREE: Final = float("inf")


class CommitWatch:
    """Watches the one writer. Belongs to the event loop's thread.

    Args:
        within: Seconds that a write may last.
        clock: Monotonic seconds.
    """

    def __init__(self, within: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._within = within
        self._clock = clock
        self._began = _FREE
        self.refused = 0
        """Writes that were refused, in all."""

    def began(self) -> None:
        """A write has the writer's connection."""
        self._began = self._clock()

    def ended(self) -> None:
        """It has let go of it, however it went."""
        self._began = _FREE

    @property
    def lasting(self) -> float:
        """Seconds since the write under way began; 0 where there is none."""
        return max(0.0, self._clock() - self._began)

    @property
    def trouble(self) -> str:
        """What is wrong, in words for a person; empty if nothing is."""
        if self.lasting <= self._within:
            return ""
        return (
            f"a commit lasts longer than {self._within:g} s (KIMERA_DATABASE__COMMIT_WITHIN): new writes are refused until it "
            "ends; look at the disk of the database"
        )

    def admit(self) -> None:
        """Let a new write in.

        Raises:
            UnavailableError: the one under way lasts too long; nothing was written.
        """
        if self._clock() - self._began > self._within:
            self.refused += 1
            raise UnavailableError(self.trouble, retry_after=RETRY_AFTER)


class CommitCollector(Collector):
    """Gives what ``CommitWatch`` sees as metrics, read when they are asked for.

    Args:
        registry: Where it registers itself.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._watched: dict[str, CommitWatch] = {}
        registry.register(self)

    def add(self, writer: str, commits: CommitWatch) -> None:
        """Give the numbers of one more writer, under that label."""
        self._watched[writer] = commits

    def collect(self) -> Iterator[Metric]:
        lasting = GaugeMetricFamily(
            "kimera_commit_lasting_seconds",
            "For how long the write under way has lasted; 0: there is none",
            labels=["writer"],
        )
        refused = CounterMetricFamily(
            "kimera_slow_commit_refusals", "Writes refused because a commit lasted too long", labels=["writer"]
        )
        for writer, commits in self._watched.items():
            lasting.add_metric([writer], commits.lasting)
            refused.add_metric([writer], commits.refused)
        yield lasting
        yield refused
