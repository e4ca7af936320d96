"""The scan under pytest-benchmark (``make bench``). ``python -m bench.kernel`` compares it with the limit and with others."""

from typing import Any

import numpy as np
import pytest

from bench.kernel import DIM, clustered, symbols_for
from kimera_stream import kernels
from kimera_stream.kernels import Queries, Segment, Weights, bitmap

N = 100_000


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return clustered(np.random.default_rng(0), N)


@pytest.fixture(scope="module")
def coded(rows: np.ndarray) -> Segment:
    codes, grades, _ = kernels.quantize(rows)
    return Segment(0, N, codes=codes, grades=grades, **symbols_for(np.random.default_rng(1), N, 0.5))


@pytest.mark.parametrize("variant", kernels.variants() or ["numpy"])
@pytest.mark.parametrize("m", [1, 32])
@pytest.mark.parametrize("form", ["float32", "8-bit"])
def test_scan(benchmark: Any, rows: np.ndarray, coded: Segment, variant: str, m: int, form: str) -> None:
    kernel = kernels.load("reference") if variant == "numpy" else kernels.load("compiled", variant=variant)
    view = kernel.view([coded if form == "8-bit" else Segment(0, N, exact=rows)])
    live, queries, weights = bitmap(np.ones(N, bool)), Queries.build(rows[:m].copy()), Weights(min_related=0.35)
    hits = benchmark(kernel.scan, view, live, queries, weights, k=64)
    assert hits.slots[:, 0].tolist() == list(range(m))
    benchmark.extra_info["rows per second per query"] = round(N * m / benchmark.stats["min"]) if benchmark.stats else 0


def test_watches(benchmark: Any, rows: np.ndarray) -> None:
    kernel = kernels.load()
    thresholds = np.full(N, 0.9, np.float32)
    indices, _ = benchmark(kernel.match, rows[7].copy(), rows, thresholds)
    assert 7 in indices


def test_pair_head(benchmark: Any, rows: np.ndarray) -> None:
    kernel = kernels.load()
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((32, 2 * DIM + 4)).astype(np.float32)
    arguments = (rows[:64].copy(), np.zeros((64, 4), np.float32), w1, np.zeros(32, np.float32), w1[:, 0].copy(), 0.0)
    assert benchmark(kernel.pair_head, rows[99].copy(), *arguments).shape == (64,)
