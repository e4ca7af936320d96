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

from kimera_stream.infrastructure.memory import MemoryGuard, memory_in_use
from kimera_stream.infrastructure.settings import PerformanceSettings
from kimera_stream.infrastructure.tasks import Service
from kimera_stream.infrastructure.tasks.native import task_count

log = structlog.get_logger(__name__)
T = TypeVar("T")
Purpose = Literal["encode", "score", "io"]

LIMITS: dict[Purpose, int] = {"encode": 1, "score": 2, "io": 4}
"""Threads per purpose. One encoder thread: torch parallelises inside; two of them would only fight for the processors."""

LAG_INTERVAL = 0.1
SAMPLE_INTERVAL = 5.0
MEMORY_INTERVAL = 0.5
"""Seconds between two looks at memory that has a limit."""
EMPTY_INTERVAL = 5.0
"""Seconds at least between two times that caches are emptied: they would be filled again."""
RELEASE_STEP = 128 << 20
"""Bytes of growth after which freed memory is given back: models free large buffers that the C library would keep (measured:
2.0 GB resident after 15,000 statements were verified, 0.93 GB once given back)."""
RELEASE_SHARE, RELEASE_INTERVAL = 0.002, 120.0
"""And a smaller growth, as a share of what was left last time, and the seconds at least between two of these: while what lives stays the same, the heaps of
the threads go on growing, a little with each burst, around holes that are not used again. Takes 0.3 ms with 15 MB to give back, 11 to 43 ms with 270 MB."""
LEAK_WINDOW = 120
"""Samples looked at for a leak: ten minutes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the process held at one moment; ``memory`` is resident, ``own`` of it what is no page of a file."""

    memory: int
    own: int
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
        self._troubles: list[Callable[[], str]] = [lambda: self.memory.trouble]
        self._samples: deque[Sample] = deque(maxlen=LEAK_WINDOW)
        self.sample = Sample(0, 0, 0, 0, 0)
        """The newest; zeros before the first."""
        self.memory = MemoryGuard(settings.max_memory, registry)
        self._after_release = 0
        self._released_at = float("-inf")
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
            ("kimera_tasks", lambda: self.sample.tasks, "Tasks on the event loop at the newest look"),
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

    # -- queues ----------------------------------------------------------------------------------------------------

    def watch_queue(self, name: str, depth: Callable[[], int]) -> None:
        """Report the depth of a queue as a metric and in ``queues``."""
        self._queues[name] = depth
        self._queue_depth.labels(name).set_function(depth)

    @property
    def queues(self) -> dict[str, int]:
        return {name: depth() for name, depth in self._queues.items()}

    # -- what is wrong -----------------------------------------------------------------------------------------------

    def watch_trouble(self, trouble: Callable[[], str]) -> None:
        """Report what it says in ``alerts`` while it says something: words for a person."""
        self._troubles.append(trouble)

    @property
    def alerts(self) -> list[str]:
        """What is wrong at present."""
        return [told for trouble in self._troubles if (told := trouble())]

    # -- the watching service ----------------------------------------------------------------------------------------

    async def serve(self, service: Service) -> None:
        """Measure loop lag, take samples and look after memory until cancelled."""
        service.ready()
        async with anyio.create_task_group() as group:
            group.start_soon(self._measure_lag, name="resources:loop-lag")
            group.start_soon(self._sample, name="resources:samples")
            if self._settings.max_memory:
                group.start_soon(self._look_after_memory, service, name="resources:memory")

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
            (memory, own), descriptors = await self.run("io", lambda: (memory_in_use(), open_descriptors()))
            self.observe(Sample(memory, own, descriptors, threading.active_count(), task_count()))
            if self.should_release(memory, anyio.current_time()):
                self.released(await self.run("io", release_free_memory), anyio.current_time())
            await anyio.sleep(SAMPLE_INTERVAL)

    def released(self, left: int, now: float) -> None:
        """Freed memory was given back; ``left`` is resident."""
        self._after_release, self._released_at = left, now

    def should_release(self, memory: int, now: float) -> bool:
        """Whether so much has been added to what was left last time that freed memory may be among it."""
        grown = memory - self._after_release
        rested = now - self._released_at >= RELEASE_INTERVAL
        return grown > RELEASE_STEP or (rested and grown > RELEASE_SHARE * self._after_release)

    async def _look_after_memory(self, service: Service) -> None:
        emptied_at = float("-inf")
        while True:
            _, own = await self.run("io", memory_in_use)
            if self.memory.observe(own) and anyio.current_time() - emptied_at >= EMPTY_INTERVAL:
                emptied_at = anyio.current_time()
                emptied = self.memory.empty_caches()
                await self.run("io", release_free_memory)
                _, left = await self.run("io", memory_in_use)
                log.info("caches emptied for memory", emptied=emptied, given_back=max(0, own - left))
                self.memory.observe(left)
            if service.detail != self.memory.trouble:
                service.progress(self.memory.trouble)
            await anyio.sleep(MEMORY_INTERVAL)

    def observe(self, sample: Sample) -> None:
        """Take one sample into account; a steady growth over the whole window is logged and counted once per window."""
        self.sample = sample
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


_DESCRIPTORS = Path("/proc/self/fd")


def resident_memory() -> int:
    """Resident bytes of this process (Linux), its peak elsewhere."""
    return memory_in_use()[0]


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
