"""Worker threads are limited per purpose and in all; memory, queues and growth are watched."""

import ctypes
import threading

import anyio
import pytest
from anyio import to_thread
from prometheus_client import CollectorRegistry, generate_latest

from kimera_stream.infrastructure.resources import (
    LEAK_WINDOW,
    RELEASE_INTERVAL,
    RELEASE_STEP,
    Resources,
    Sample,
    grows_steadily,
    release_free_memory,
    resident_memory,
)
from kimera_stream.infrastructure.settings import PerformanceSettings
from kimera_stream.infrastructure.tasks import ServiceSpec, Supervisor
from kimera_stream.protocol.errors import OverloadedError

pytestmark = pytest.mark.anyio


def make(**settings: object) -> Resources:
    return Resources(PerformanceSettings(**settings), CollectorRegistry())  # type: ignore[arg-type]


async def test_a_purpose_never_has_more_threads_than_its_limit() -> None:
    resources = make()
    lock, running, peak = threading.Lock(), 0, 0
    gate = threading.Event()

    def work() -> int:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
            if running == 2:
                gate.set()
        gate.wait(5)
        with lock:
            running -= 1
        return threading.get_ident()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(resources.run, "score", work)
    assert peak == 2


async def test_run_passes_arguments_results_and_errors() -> None:
    resources = make()
    assert await resources.run("io", lambda a, b: a + b, 2, 3) == 5
    with pytest.raises(ZeroDivisionError):
        await resources.run("io", lambda: 1 // 0)


async def test_memory_above_the_limit_empties_caches_and_refuses_new_work() -> None:
    resources = make(max_memory=1 << 20)  # any process is above it
    emptied = anyio.Event()
    resources.memory.watch_cache("cache", lambda: 5, emptied.set)
    resources.memory.admit()
    with anyio.fail_after(10):
        async with Supervisor([ServiceSpec("resources", resources.serve)]) as supervisor:
            supervisor.begin()
            await emptied.wait()
            with pytest.raises(OverloadedError, match="bytes in use"):
                resources.memory.admit()


async def test_queue_depths_are_metrics() -> None:
    registry = CollectorRegistry()
    resources = Resources(PerformanceSettings(), registry)  # type: ignore[call-arg]
    resources.watch_queue("intake", lambda: 7)
    assert resources.queues == {"intake": 7}
    assert b'kimera_queue_depth{queue="intake"} 7.0' in await to_thread.run_sync(generate_latest, registry)


def test_steady_growth_is_reported_once_per_window() -> None:
    registry = CollectorRegistry()
    resources = Resources(PerformanceSettings(), registry)  # type: ignore[call-arg]
    for i in range(LEAK_WINDOW):
        resources.observe(Sample(memory=1000, own=900, descriptors=10 + i, threads=3, tasks=5))
    assert registry.get_sample_value("kimera_leak_reports_total", {"what": "descriptors"}) == 1
    assert registry.get_sample_value("kimera_leak_reports_total", {"what": "memory"}) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1] * 30, False),
        (list(range(100, 130)), True),
        ([100, 130] * 15, False),
        ([1, 2], False),
        (list(range(1000, 1030)), False),
    ],
)
def test_growth_means_every_third_above_the_last(values: list[int], expected: bool) -> None:
    assert grows_steadily(values) is expected


async def test_the_watching_service_measures_the_loop() -> None:
    registry = CollectorRegistry()
    resources = Resources(PerformanceSettings(), registry)  # type: ignore[call-arg]
    with anyio.fail_after(10):
        async with Supervisor([ServiceSpec("resources", resources.serve)]) as supervisor:
            supervisor.begin()
            await supervisor.ready()
            while not await to_thread.run_sync(registry.get_sample_value, "kimera_event_loop_lag_seconds_count"):  # noqa: ASYNC110 - polls a metric
                await anyio.sleep(0.01)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library does not give memory back")
def test_freed_memory_is_given_back() -> None:
    # Small blocks of the C library's heap, freed but for the newest: nothing at the end of the heap can be cut off.
    blocks = [ctypes.create_string_buffer(65_536) for _ in range(1_600)]
    for block in blocks:
        ctypes.memset(block, 1, 65_536)
    full = resident_memory()
    del blocks[:-1], block
    assert release_free_memory() < full - (50 << 20)


def test_memory_is_given_back_after_a_burst_at_once_and_after_slow_growth_once_in_a_while() -> None:
    resources = make()
    assert resources.should_release(50 << 20, now=0.0), "what the start has freed"
    resources.released(100_000_000, now=0.0)
    assert not resources.should_release(101_000_000, now=RELEASE_INTERVAL - 1)
    assert resources.should_release(100_000_001 + RELEASE_STEP, now=1.0)
    assert resources.should_release(101_000_000, now=RELEASE_INTERVAL)
    assert not resources.should_release(100_100_000, now=10 * RELEASE_INTERVAL)
