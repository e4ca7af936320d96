"""Ten thousand watches asked of one new statement, beside one scan of an index of ten thousand statements.

``pytest bench/test_watches.py --benchmark-group-by=func`` prints both; the first has to be the faster one.
"""

from typing import Any

import anyio
import numpy as np
import pytest

from bench.kernel import DIM, clustered
from kimera_stream.core.index.flat import FlatIndex
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.engines.watches import WatchRegistry
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.objects import Geoid, Watch

N = 10_000


class Nothing:
    """The vault and the engine of watches that find nothing to judge."""

    threshold = 0.5

    async def save_watch(self, watch: Watch, vector: Any, **most: int) -> None:
        return

    async def judge_pairs(self, pairs: Any) -> list[Any]:
        return []


class Here:
    """Threads that are this one: what is compared is the work, not the way to it."""

    async def run(self, purpose: str, fn: Any, *args: Any) -> Any:
        return fn(*args)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return clustered(np.random.default_rng(0), N + 1)


def stored(number: int, vector: np.ndarray) -> StoredGeoid:
    geoid = Geoid(
        id=f"g{number}", version=1, text="x", semantic_state={}, symbolic_state={}, metadata={}, entropy=0.0,
        created_at=1, updated_at=1, offset=number + 1,
    )  # fmt: skip
    return StoredGeoid(geoid, vector, "bench")


def test_ten_thousand_watches(benchmark: Any, rows: np.ndarray) -> None:
    nothing: Any = Nothing()
    registry = WatchRegistry(nothing, nothing, min_relatedness=0.9, filter_nodes=64, filter_depth=8)

    async def keep() -> None:
        for number in range(N):
            watch = Watch(
                id=f"w{number}", watch=f"w{number % 1000}", principal=f"p{number // 1000}", text="x",
                kinds=["related", "contradicts"], min_score=0.9, created_at=1,
            )  # fmt: skip
            await registry.add(watch, rows[number])

    anyio.run(keep)
    fresh = stored(N, rows[N])
    found = benchmark(lambda: anyio_free(registry.matches(fresh, [])))
    assert isinstance(found, list)


def test_one_scan_of_ten_thousand_statements(benchmark: Any, rows: np.ndarray) -> None:
    here: Any = Here()
    index = FlatIndex(DIM, threads=here, performance=PerformanceSettings(scan_threads=1), scoring=ScoringSettings())
    for number in range(N):
        index.put(stored(number, rows[number]))
    fresh = stored(N, rows[N])
    (found,) = benchmark(lambda: anyio_free(index.scan([fresh], k=64, min_relatedness=0.35)))
    assert len(found) <= 64


def anyio_free(coroutine: Any) -> Any:
    """Run what awaits nothing to its end."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited for something")
