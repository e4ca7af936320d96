"""Worker threads by purpose, and a watch over memory, descriptors, tasks, queues and the event loop's lag."""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
import anyio.to_thread
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kimera_stream.infrastructure.settings import PerformanceSettings
from kimera_stream.infrastructure.tasks import Service
from kimera_stream.infrastructure.tasks.native import task_count
from kimera_stream.protocol.errors import OverloadedError

log = structlog.get_logger(__name__)
T = TypeVar("T")
Purpose = Literal["encode", "score", "io"]

LIMITS: dict[Purpose, int] = {"encode": 1, "score": 2, "io": 4}
"""Threads per purpose. One encoder thread: torch parallelises inside; two of them would only fight for the processors."""

LAG_INTERVAL = 0.1
SAMPLE_INTERVAL = 5.0
RELEASE_STEP = 128 << 20
"""Bytes of growth after which freed memory is given back: models free large buffers that the C library would keep (measured:
2.0 GB resident after 15,000 statements were verified, 0.93 GB once given back)."""
LEAK_WINDOW = 120
"""Samples looked at for a leak: ten minutes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the process held at one moment."""

    memory: int
    descriptors: int
    threads: int
    tasks: int


class Resources:
    """The one owner of worker threads, and the observer of what the process holds.

    Args:
        settings: ``performance`` group.
        registry: Where the gauges and the lag histogram go.
    """

    def __init__(self, settings: PerformanceSettings, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._total = anyio.CapacityLimiter(settings.threads)
        self._limiters = {
            purpose: anyio.CapacityLimiter(min(limit, settings.threads)) for purpose, limit in LIMITS.items()
        }
        self._queues: dict[str, Callable[[], int]] = {}
        self._samples: deque[Sample] = deque(maxlen=LEAK_WINDOW)
        self._memory = 0
        self._after_release = 0
        self.loop_lag = 0.0
        """Newest measured lag of the event loop, seconds."""
        self._lag = Histogram(
            "kimera_event_loop_lag_seconds",
            "How late a timer fired",
            registry=registry,
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
        )
        self._leaks = Counter("kimera_leak_reports_total", "Reports of steady growth", ["what"], registry=registry)
        for name, read, unit in (
            ("kimera_resident_memory_bytes", resident_memory, "Resident memory"),
            ("kimera_open_descriptors", open_descriptors, "Open file descriptors"),
            ("kimera_threads", threading.active_count, "Threads"),
        ):
            Gauge(name, unit, registry=registry).set_function(read)
        self._queue_depth = Gauge("kimera_queue_depth", "Items waiting, by queue", ["queue"], registry=registry)
        self._threads_busy = Gauge(
            "kimera_worker_threads_busy", "Busy threads by purpose", ["purpose"], registry=registry
        )
        for purpose, limiter in self._limiters.items():
            self._threads_busy.labels(purpose).set_function(partial(getattr, limiter, "borrowed_tokens"))

    # -- threads ---------------------------------------------------------------------------------------------------

    async def run(self, purpose: Purpose, fn: Callable[..., T], *args: Any) -> T:
        """Run ``fn(*args)`` in a worker thread. A cancelled caller waits until the thread is done with it."""
        owner = object()  # one task may run several calls at once through a group; each counts for itself
        limiter = self._limiters[purpose]
        await limiter.acquire_on_behalf_of(owner)
        try:
            return await anyio.to_thread.run_sync(fn, *args, limiter=self._total)
        finally:
            limiter.release_on_behalf_of(owner)

    # -- memory and queues -----------------------------------------------------------------------------------------

    def watch_queue(self, name: str, depth: Callable[[], int]) -> None:
        """Report the depth of a queue as a metric and in ``queues``."""
        self._queues[name] = depth
        self._queue_depth.labels(name).set_function(depth)

    @property
    def queues(self) -> dict[str, int]:
        return {name: depth() for name, depth in self._queues.items()}

    @property
    def memory(self) -> int:
        """Resident bytes at the newest sample; 0 before the first."""
        return self._memory

    def admit(self) -> None:
        """Refuse new work above the memory limit.

        Raises:
            OverloadedError: ``KIMERA_PERFORMANCE__MAX_MEMORY`` is set and resident memory is above it.
        """
        limit = self._settings.max_memory
        if limit and self._memory > limit:
            raise OverloadedError(
                f"memory: {self._memory} bytes in use, above the limit of {limit}; try again later", retry_after=5.0
            )

    # -- the watching service ----------------------------------------------------------------------------------------

    async def serve(self, service: Service) -> None:
        """Measure loop lag and take samples until cancelled."""
        service.ready()
        async with anyio.create_task_group() as group:
            group.start_soon(self._measure_lag, name="resources:loop-lag")
            group.start_soon(self._sample, name="resources:samples")

    async def _measure_lag(self) -> None:
        while True:
            due = anyio.current_time() + LAG_INTERVAL
            await anyio.sleep(LAG_INTERVAL)
            self.loop_lag = max(0.0, anyio.current_time() - due)
            self._lag.observe(self.loop_lag)
            if self.loop_lag > self._settings.loop_lag_warning:
                log.warning("event loop lagged", seconds=round(self.loop_lag, 3))

    async def _sample(self) -> None:
        while True:
            memory, descriptors = await self.run("io", lambda: (resident_memory(), open_descriptors()))
            self.observe(Sample(memory, descriptors, threading.active_count(), task_count()))
            if memory - self._after_release > RELEASE_STEP:
                self._after_release = await self.run("io", release_free_memory)
            await anyio.sleep(SAMPLE_INTERVAL)

    def observe(self, sample: Sample) -> None:
        """Take one sample into account; a steady growth over the whole window is logged and counted once per window."""
        self._memory = sample.memory
        self._samples.append(sample)
        if len(self._samples) < LEAK_WINDOW:
            return
        window = list(self._samples)
        for what in ("memory", "descriptors", "threads", "tasks"):
            values = [getattr(each, what) for each in window]
            if grows_steadily(values):
                self._leaks.labels(what).inc()
                log.warning("steady growth, possibly a leak", what=what, first=values[0], last=values[-1])
                self._samples.clear()


def grows_steadily(values: list[int], *, thirds: int = 3, least: float = 0.05) -> bool:
    """Whether each third of ``values`` lies wholly above the one before, by at least ``least`` of the first in all."""
    size = len(values) // thirds
    if size == 0:
        return False
    parts = [values[i * size : (i + 1) * size] for i in range(thirds)]
    climbing = all(min(later) > max(earlier) for earlier, later in pairwise(parts))
    return climbing and values[-1] - values[0] > least * max(values[0], 1)


_STATM = Path("/proc/self/statm")
_DESCRIPTORS = Path("/proc/self/fd")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_memory() -> int:
    """Resident bytes of this process (Linux), its peak elsewhere."""
    try:
        return int(_STATM.read_bytes().split()[1]) * _PAGE
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_free_memory() -> int:
    """Give memory that was freed back to the system, where the C library can (glibc); returns the resident bytes then."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return resident_memory()


def open_descriptors() -> int:
    """File descriptors of this process; 0 where the system does not tell."""
    try:
        return len(os.listdir(_DESCRIPTORS))  # noqa: PTH208 - counts without building paths
    except FileNotFoundError:
        return 0
