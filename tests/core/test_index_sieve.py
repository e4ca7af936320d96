"""The index with a sieve: the same answers from a part of the rows, whatever is written, and recall that is watched."""

from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from kimera_stream.core.index import FlatIndex, LogPoint, sifting
from kimera_stream.core.index import flat as flat_module
from kimera_stream.core.interfaces import Candidate, StoredGeoid
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from tests.core.test_index import DirectThreads, stored

pytestmark = pytest.mark.anyio
DIM = 48
N = 4000


def make(kernel: str = "auto", directory: Path | None = None, **performance: Any) -> FlatIndex:
    return FlatIndex(
        DIM, threads=DirectThreads(), performance=PerformanceSettings(scan_threads=2, **performance),
        scoring=ScoringSettings(kernel=kernel), directory=directory,
    )  # fmt: skip


def near(seed: int, n: int) -> np.ndarray:
    """Unit vectors around 40 topics, the axes of unequal weight as those of sentences are."""
    rng = np.random.default_rng(11)
    scale = (1 / np.sqrt(1 + np.arange(DIM))).astype(np.float32)
    centres = scale * rng.standard_normal((40, DIM)).astype(np.float32)
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 40, n)] + 0.7 * scale * rng.standard_normal((n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def statement(i: int, vector: np.ndarray | None, *, name: str | None = None) -> StoredGeoid:
    symbols: dict[str, Any] = {}
    if i % 10 == 0:
        symbols = {"state": f"a long value {i % 7}"} | ({"subject": f"s{i % 300}"} if i % 20 else {})
    return stored(name or f"g{i}", vector, text=f"{'not ' if i % 3 else ''}{i % 5 + 2} of them", symbols=symbols)


def fill(index: FlatIndex) -> np.ndarray:
    vectors = near(1, N)
    for i in range(N):
        index.put(statement(i, vectors[i]))
    index.put(stored("bare", None, symbols={"subject": "s10", "state": "nothing like it"}))
    return vectors


async def both(
    sieved: FlatIndex, plain: FlatIndex, query: StoredGeoid, k: int = 20
) -> tuple[list[Candidate], list[Candidate]]:
    await anyio.lowlevel.checkpoint()  # the tests' threads are none: without it a loop of scans is one callback
    (found,), (exact,) = [await each.scan([query], k=k, min_relatedness=0.3) for each in (sieved, plain)]
    return found, exact


def recall(pairs: list[tuple[list[Candidate], list[Candidate]]]) -> float:
    shares = [
        len({c.geoid_id for c in found} & {c.geoid_id for c in exact}) / len(exact) for found, exact in pairs if exact
    ]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
async def test_it_finds_what_the_exact_scan_finds_from_fewer_rows(kernel: str) -> None:
    sieved, plain = make(kernel), make(kernel)
    vectors = fill(sieved)
    fill(plain)
    statistics = await sieved.make_sieve()
    assert statistics.sieved == N
    assert statistics.sieve_bytes > 0
    pairs = []
    for i in range(0, 240, 2):
        query = stored(f"g{i}", vectors[i], text="4 of them", symbols={"subject": f"s{i}", "state": "a long value 3"})
        found, exact = await both(sieved, plain, query)
        assert [c.geoid_id for c in found if c.symbolic] == [c.geoid_id for c in exact if c.symbolic], "never missed"
        assert f"g{i}" not in {c.geoid_id for c in found}
        ranks = [c.fused for c in found]
        assert ranks == sorted(ranks, reverse=True)
        pairs.append((found, exact))
    assert recall(pairs) >= 0.99
    assert sieved.statistics.recall is not None
    assert sieved.statistics.recall >= 0.99
    assert sieved.statistics.read is not None
    assert 0 < sieved.statistics.read < 0.6


async def test_blocks_of_queries_get_what_each_gets_alone() -> None:
    index = make()
    vectors = fill(index)
    await index.make_sieve()
    queries = [statement(i, vectors[i]) for i in range(9)] + [stored("none", None, symbols={"state": "x"})]
    together = await index.scan(queries, k=15, min_relatedness=0.3)
    for query, found in zip(queries, together, strict=True):
        (alone,) = await index.scan([query], k=15, min_relatedness=0.3)
        assert {c.geoid_id for c in alone} == {c.geoid_id for c in found}


async def test_what_is_written_later_is_seen_at_once() -> None:
    sieved, plain = make(), make()
    vectors = fill(sieved)
    fill(plain)
    await sieved.make_sieve()
    other = near(2, 600)
    for index in (sieved, plain):
        for i in range(300):
            index.put(statement(i, other[i]))  # updates: the old row must not be found any more
            index.remove(f"g{1000 + i}")
            index.put(statement(i, other[300 + i], name=f"new-{i}"))  # takes slots that the sieve knows as others
    pairs = [await both(sieved, plain, statement(i, other[i], name="asked")) for i in range(0, 600, 10)]
    pairs += [await both(sieved, plain, statement(i, vectors[i], name="asked")) for i in range(1000, 1300, 10)]
    for found, _ in pairs:
        names = [c.geoid_id for c in found]
        assert len(set(names)) == len(names)
        assert not {f"g{i}" for i in range(1000, 1300)} & set(names)
    assert recall(pairs) >= 0.99
    before = sieved.statistics
    after = await sieved.make_sieve()
    assert before.sieved == N
    assert after.sieved == N
    assert after.cells == before.cells, "the rows that stayed keep their cells"
    pairs = [await both(sieved, plain, statement(i, other[i], name="asked")) for i in range(0, 600, 10)]
    assert recall(pairs) >= 0.99


async def test_what_changes_while_it_is_made_is_kept() -> None:
    sieved, plain = make(index_full="evict_oldest"), make()
    vectors = fill(sieved)
    fill(plain)
    other = near(3, 400)

    def change(index: FlatIndex, i: int) -> None:
        index.put(statement(i, other[i], name=f"new-{i}"))
        index.remove(f"g{3000 + i}")
        index.put(statement(2000 + i, vectors[0]))

    async def changes() -> None:
        for i in range(400):
            change(sieved, i)
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(partial(sieved.make_sieve))
        group.start_soon(changes)
    for i in range(400):
        change(plain, i)
    pairs = [await both(sieved, plain, statement(i, other[i], name="asked")) for i in range(0, 400, 10)]
    pairs.append(await both(sieved, plain, statement(1, vectors[0], name="asked"), k=450))
    assert recall(pairs) >= 0.99
    assert not any(c.geoid_id in {f"g{3000 + i}" for i in range(400)} for found, _ in pairs for c in found)


async def test_the_service_makes_it_from_a_size_on_and_again_as_the_index_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flat_module, "_CHANGES", 100)
    index = make(sieve_from=2000)
    vectors = near(1, N)
    made: list[int] = []
    once = anyio.Event()
    again = anyio.Event()
    make_sieve = index.make_sieve

    async def watched(**options: Any) -> Any:
        statistics = await make_sieve(**options)
        made.append(statistics.sieved)
        (once if len(made) == 1 else again).set()
        return statistics

    monkeypatch.setattr(index, "make_sieve", watched)
    async with anyio.create_task_group() as group:
        group.start_soon(index.keep_sieve)
        for i in range(1999):
            index.put(statement(i, vectors[i]))
        await anyio.lowlevel.checkpoint()
        assert index.statistics.sieved == 0, "below that every scan is exact"
        for i in range(1999, 2100):
            index.put(statement(i, vectors[i]))
        with anyio.fail_after(60):
            await once.wait()
            for i in range(2100, 2400):
                index.put(statement(i, vectors[i]))
            await again.wait()
        group.cancel_scope.cancel()
    assert made[0] >= 2000
    assert made[1] > made[0]


async def test_recall_that_falls_short_lets_more_through_and_ends_in_exact_scans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sifting, "CHECK_EVERY", 1)
    index, plain = make(), make()
    for each in (index, plain):
        fill(each)
        await anyio.lowlevel.checkpoint()
    await index.make_sieve()
    sifted = index._sifted
    assert sifted is not None
    sifted.row_slack = sifted.cell_slack = 0.01
    rng = np.random.default_rng(0)
    for i in range(1500):
        vector = rng.standard_normal(DIM).astype(np.float32)  # like nothing that it was calibrated with
        query = statement(i, vector / np.linalg.norm(vector), name="asked")
        found, exact = await both(index, plain, query)
        assert {c.geoid_id for c in found} == {c.geoid_id for c in exact}, "a checked query gets the exact answer"
        if not sifted.is_trusted or (sifted.recall or 0) >= 0.99:
            break
    assert sifted.row_slack > 0.05
    sifted.row_slack = 1.0
    assert index.statistics.sieved == 0
    for i in range(20):
        found, exact = await both(index, plain, statement(i, near(5, 1)[0], name="asked"))
        assert found == exact


async def test_it_starts_anew_after_a_snapshot(tmp_path: Path) -> None:
    index, again = make(), make()
    vectors = fill(index)
    await index.make_sieve()
    await index.save(tmp_path / "s", model="m", point=LogPoint("e", 1))
    await again.load(tmp_path / "s", model="m", epoch="e")
    assert again.statistics.sieved == 0
    assert (await again.make_sieve()).sieved == N
    for i in range(20):
        found, exact = await both(again, index, statement(i, vectors[i]))
        assert {c.geoid_id for c in found} == {c.geoid_id for c in exact}


async def test_an_index_without_vectors_has_none() -> None:
    index = make()
    index.put(stored("bare", None, symbols={"state": "x"}))
    assert (await index.make_sieve()).sieved == 0
    (found,) = await index.scan([stored("q", None, symbols={"state": "y"})], k=3, min_relatedness=0.3)
    assert [c.geoid_id for c in found] == ["bare"]


async def test_a_block_that_an_exact_pass_answers_sooner_does_not_go_through_the_sieve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = make()
    vectors = fill(index)
    times = iter([1.0, 2.0, 2.0, 1.0])  # four queries: the sieve is sooner; eight: the exact pass
    monkeypatch.setattr(sifting, "_seconds", lambda _run: next(times))
    await index.make_sieve()
    through: list[int] = []
    ask = sifting.sift_rows

    def watched(*given: Any) -> Any:
        through.append(len(given[3]))
        return ask(*given)

    monkeypatch.setattr(sifting, "sift_rows", watched)
    for size in (1, 4, 5, 40):
        queries = [statement(i, vectors[i], name=f"asked-{i}") for i in range(size)]
        found = await index.scan(queries, k=20, min_relatedness=0.3)
        assert len(found) == size
    assert through == [1, 4]


@pytest.mark.parametrize("alike", [False, True], ids=["nothing related", "all the same"])
async def test_statements_without_relatives_can_be_calibrated_with(alike: bool) -> None:
    index = make()
    vectors = np.eye(DIM, dtype=np.float32)
    for i in range(2 * DIM):
        index.put(stored(f"g{i}", vectors[0] if alike else vectors[i % DIM] * (-1 if i < DIM else 1), text="words"))
    statistics = await index.make_sieve()
    assert statistics.sieved == 2 * DIM
    ((best, *_),) = await index.scan([stored("new", vectors[0], text="words")], k=5, min_relatedness=0.3)
    assert best.relatedness == pytest.approx(1, abs=1e-3)
