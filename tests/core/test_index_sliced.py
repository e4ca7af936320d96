"""Slices of the index filled many geoids at a time are as if each had been put."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest

from kimera_stream.core.columns import SlicedColumns
from kimera_stream.core.geoid import built
from kimera_stream.core.index import SlicedIndex
from kimera_stream.core.index.rows import columns_of
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.objects import GeoidBody

pytestmark = pytest.mark.anyio
T = TypeVar("T")
DIMENSION, SLICES = 32, 4


class SameThread:
    async def run(self, purpose: str, fn: Callable[..., T], *args: Any) -> T:
        return fn(*args)


def index(within: str = "all", **performance: Any) -> SlicedIndex:
    return SlicedIndex(
        DIMENSION,
        SLICES,
        threads=SameThread(),
        performance=PerformanceSettings(**performance),
        scoring=ScoringSettings(compare_within=within),
    )


def stored(number: int, session: str | None = None) -> StoredGeoid:
    row = np.random.default_rng(number).standard_normal(DIMENSION).astype(np.float32)
    body = GeoidBody(vector=[1.0], symbolic_state={"n": number % 5}, session_id=session)
    geoid = built(body, geoid_id=f"g{number}", session_id=None, now=1, offset=1, previous=None)
    return StoredGeoid(geoid, row / np.linalg.norm(row), "ann")


def of_slice(held: SlicedIndex, number: int, geoids: Sequence[StoredGeoid]) -> SlicedColumns:
    chosen = [each for each in geoids if held.slice_of(each.geoid.id) == number]
    zeros = np.zeros(len(chosen), np.int64)
    return SlicedColumns(
        columns_of(chosen, DIMENSION), zeros + number, zeros, [each.geoid.session_id for each in chosen]
    )


@pytest.mark.parametrize("within", ["all", "session"])
async def test_what_is_filled_is_found_as_if_it_had_been_put(within: str) -> None:
    geoids = [stored(n, [None, "s1", "s2"][n % 3]) for n in range(300)]
    filled, put = index(within), index(within)
    filled.open(range(SLICES))
    put.open(range(SLICES))
    for number in range(SLICES):
        assert await filled.fill(number, of_slice(filled, number, geoids)) == 0
    for each in geoids:
        put.put(each)
    assert filled.size == put.size == 300
    queries = [stored(1_000 + n, [None, "s1", "s2"][n % 3]) for n in range(9)]
    hits = [await each.scan(queries, k=9, min_relatedness=-1.0) for each in (filled, put)]
    assert hits[0] == hits[1]


async def test_a_slice_that_is_not_here_takes_nothing() -> None:
    held = index()
    held.open([1])
    assert await held.fill(0, of_slice(held, 0, [stored(n) for n in range(20)])) == 0
    assert held.size == 0


async def test_what_a_full_slice_has_no_room_for_is_counted_and_the_rest_keeps_its_group() -> None:
    held = index("session", max_geoids=20, index_full="refuse")  # five to a slice
    held.open([2])
    geoids = [each for each in (stored(n, "s1") for n in range(100)) if held.slice_of(each.geoid.id) == 2]
    assert await held.fill(2, of_slice(held, 2, geoids)) == len(geoids) - 5
    assert held.size == 5
    mine, others = await held.scan([stored(999, "s1"), stored(999, "s2")], k=99, min_relatedness=-1.0)
    assert {each.geoid_id for each in mine} == {each.geoid.id for each in geoids[:5]}
    assert others == []
