"""Scans among the statements of one group: the exact top k of the group, whatever else is there."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.core.geoid import built
from kimera_stream.core.groups import group_of
from kimera_stream.core.index import FlatIndex
from kimera_stream.core.index.groups import Groups, number_of
from kimera_stream.core.index.restore import regroup
from kimera_stream.core.index.snapshot import LogPoint
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.objects import GeoidBody

pytestmark = pytest.mark.anyio
T = TypeVar("T")
DIMENSION = 32


class SameThread:
    async def run(self, purpose: str, fn: Callable[..., T], *args: Any) -> T:
        return fn(*args)


def index(within: str, **scoring: Any) -> FlatIndex:
    return FlatIndex(
        DIMENSION,
        threads=SameThread(),
        performance=PerformanceSettings(),
        scoring=ScoringSettings(compare_within=within, **scoring),
    )


def stored(
    number: int, session: str | None, *, agent: str | None = None, who: str = "ann", **state: Any
) -> StoredGeoid:
    row = np.random.default_rng(number).standard_normal(DIMENSION).astype(np.float32)
    body = GeoidBody(vector=[1.0], symbolic_state=state, session_id=session, originator_agent_id=agent)
    geoid = built(body, geoid_id=f"g{number}", session_id=None, now=1, offset=1, previous=None)
    return StoredGeoid(geoid, row / np.linalg.norm(row), who)


async def found(held: FlatIndex, *queries: StoredGeoid, k: int = 5, **how: Any) -> list[list[str]]:
    return [[each.geoid_id for each in hits] for hits in await held.scan(queries, k=k, min_relatedness=-1.0, **how)]


CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize("device", ["kernel", "torch-cpu", pytest.param("cuda", marks=CUDA)])
async def test_every_query_finds_the_best_of_its_own_group(device: str) -> None:
    held, every = index("session", scan_device=device), index("all")
    geoids = [stored(n, [None, "s1", "s2"][n % 3]) for n in range(400)]
    for each in geoids:
        held.put(each)
        every.put(each)
    queries = [stored(1_000 + n, [None, "s1", "s2", "nobody"][n % 4]) for n in range(12)]
    hits = await found(held, *queries, k=7)
    ranked = await found(every, *queries, k=400)
    for query, mine, order in zip(queries, hits, ranked, strict=True):
        group = {each.geoid.id for each in geoids if each.geoid.session_id == query.geoid.session_id}
        assert mine == [each for each in order if each in group][:7]
    assert await found(held, *queries, k=7, everywhere=True) == [order[:7] for order in ranked]


async def test_oppositions_outside_of_the_group_are_not_found() -> None:
    held = index("agent")
    held.put(stored(1, None, agent="a", subject="db", status="up"))
    held.put(stored(2, None, agent="b", subject="db", status="up"))
    assert await found(held, stored(3, None, agent="b", subject="db", status="down"), k=1) == [["g2"]]


async def test_a_geoid_goes_where_its_newest_version_is_and_slots_are_used_again() -> None:
    held = index("session")
    for n in range(50):
        held.put(stored(n, "s1"))
    held.put(stored(7, "s2"))
    for n in range(40):
        if n != 7:
            held.remove(f"g{n}")
    for n in range(100, 139):
        held.put(stored(n, "s3"))
    assert await found(held, stored(999, "s2")) == [["g7"]]
    (third,) = await found(held, stored(999, "s3"), k=99)
    assert set(third) == {f"g{n}" for n in range(100, 139)}
    (first,) = await found(held, stored(999, "s1"), k=99)
    assert set(first) == {f"g{n}" for n in range(40, 50)}


@pytest.mark.allow_blocking
async def test_a_snapshot_is_told_the_groups_again(tmp_path: Any) -> None:
    held, again = index("principal"), index("principal")
    for n in range(30):
        held.put(stored(n, None, who=f"p{n % 2}"))
    await held.save(tmp_path / "snapshot", model="m", point=LogPoint("E", 1))
    await again.load(tmp_path / "snapshot", model="m", epoch="E")

    async def pages() -> Any:
        yield [(f"g{n}", f"p{n % 2}") for n in range(30)]
        yield [("gone", "p0")]

    await regroup(again, pages())
    (mine,) = await found(again, stored(99, None, who="p1"), k=99)
    assert set(mine) == {f"g{n}" for n in range(30) if n % 2}


@given(st.lists(st.tuples(st.integers(0, 20_000), st.sampled_from([None, "a", "b"]))))
def test_the_number_of_a_slot_is_that_of_its_last_group(writes: list[tuple[int, str | None]]) -> None:
    groups, model = Groups("session"), dict(writes)
    for slot, group in writes:
        groups.note(slot, group)
    assert all(groups.numbers[slot] == number_of(group) for slot, group in model.items())
    assert len(groups.numbers) % 64 == 0


def test_what_makes_a_group() -> None:
    one = stored(1, "s", agent="a", who="p")
    assert [group_of(one, within) for within in ("all", "session", "agent", "principal")] == [None, "s", "a", "p"]
