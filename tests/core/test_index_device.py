"""The scan through torch: the same hits as the kernel's, in step with what is put, and the kernel where the device fails.

Everything runs on the processor as a torch device, and once more on a GPU where there is one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimera_stream.core.index import FlatIndex, LogPoint, device
from kimera_stream.core.interfaces import Candidate, StoredGeoid
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.objects import Geoid, Scalar
from tests.pretended_cuda import PretendedCuda, pretended_cuda

__all__ = ["pretended_cuda"]

DIM = 24
HAS_CUDA = torch.cuda.is_available()

pytestmark = pytest.mark.anyio

DEVICES = [
    "torch-cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not HAS_CUDA, reason="there is no CUDA device")]),
]


class WorkerThreads:
    async def run(self, purpose: str, fn: Callable[..., Any], *args: Any) -> Any:
        return await anyio.to_thread.run_sync(fn, *args)


def make(scan_device: str, *, device_bytes: int = 0, **performance: Any) -> FlatIndex:
    return FlatIndex(
        DIM,
        threads=WorkerThreads(),
        performance=PerformanceSettings(scan_threads=1, **performance),
        scoring=ScoringSettings(scan_device=scan_device, device_bytes=device_bytes),
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "BLOCK_CHUNKS", 2)


def random_unit(seed: int) -> np.ndarray:
    """Around one of a few directions, so that there is much to be related to."""
    rng = np.random.default_rng(seed)
    vector = np.random.default_rng(seed % 7).standard_normal(DIM) + 0.7 * rng.standard_normal(DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


TEXTS = [None, "it is open", "it is not open", "there are 3 of them", "there are 4 of them", "never 3"]


def statement(number: int, seed: int) -> StoredGeoid:
    symbols: dict[str, Scalar] = {}
    if seed % 3 == 0:
        symbols = {"subject": f"s{seed % 5}", "state": seed % 4}
    elif seed % 3 == 1:
        symbols = {"state": f"a long value {seed % 4}"}
    geoid = Geoid(
        id=f"g{number}", version=1, text=TEXTS[seed % len(TEXTS)], semantic_state={}, symbolic_state=symbols, metadata={},
        entropy=0.0, created_at=0, updated_at=0, offset=1,
    )  # fmt: skip
    return StoredGeoid(geoid, None if seed % 11 == 0 else random_unit(seed), "someone")


def assert_same(found: list[list[Candidate]], expected: list[list[Candidate]]) -> None:
    """The same in the same order, but for ties within the precision of float32 sums."""
    for mine, theirs in zip(found, expected, strict=True):
        assert [each.fused for each in mine] == pytest.approx([each.fused for each in theirs], abs=2e-5)
        by_id = {each.geoid_id: each for each in theirs}
        strangers = [each for each in mine if each.geoid_id not in by_id]
        assert all(abs(each.fused - theirs[-1].fused) < 2e-5 for each in strangers), "only at the end, among equals"
        for each in mine:
            if (other := by_id.get(each.geoid_id)) is not None:
                assert each.symbolic == other.symbolic
                assert each.relatedness == pytest.approx(other.relatedness, abs=2e-5)


async def compare(tried: FlatIndex, plain: FlatIndex, queries: list[StoredGeoid], *, k: int = 20) -> None:
    for least in (0.35, -1.0):
        found = await tried.scan(queries, k=k, min_relatedness=least)
        assert_same(found, await plain.scan(queries, k=k, min_relatedness=least))
    vectors = np.stack([each.vector for each in queries if each.vector is not None])
    assert_same(await tried.related(vectors, k=k), await plain.related(vectors, k=k))
    assert tried.statistics.device_trouble is None


@pytest.mark.parametrize("kind", DEVICES)
async def test_an_empty_index_finds_nothing(kind: str) -> None:
    index = make(kind)
    assert await index.scan([statement(1, 5)], k=5, min_relatedness=0.0) == [[]]
    assert index.statistics.device == kind


@pytest.mark.parametrize("kind", DEVICES)
async def test_it_finds_what_the_kernel_finds_over_many_blocks(kind: str) -> None:
    tried, plain = make(kind), make("kernel")
    for n in range(9_500):
        item = statement(n, n)
        tried.put(item)
        plain.put(item)
        if n % 1_000 == 0:
            await anyio.lowlevel.checkpoint()
    queries = [statement(10_000 + n, 31 * n + 7) for n in range(40)]
    queries.append(statement(5, 5))  # one that is stored: it is not compared with itself
    await compare(tried, plain, queries)
    assert tried.statistics.device_bytes == 3 * 2 * 2048 * (2 * DIM + 4)
    assert plain.statistics.device_bytes == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", DEVICES)
@given(
    steps=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 300), st.sampled_from("ppprs")), max_size=60),
    query=st.integers(0, 300),
)
async def test_it_keeps_in_step(kind: str, steps: list[tuple[int, int, str]], query: int) -> None:
    tried, plain = (
        make(kind, max_geoids=12, index_full="evict_oldest"),
        make("kernel", max_geoids=12, index_full="evict_oldest"),
    )
    asked = [statement(99, query), statement(98, 1)]
    for number, seed, what in [*steps, (0, 0, "s")]:
        if what == "p":
            tried.put(statement(number, seed))
            plain.put(statement(number, seed))
        elif what == "r":
            tried.remove(f"g{number}")
            plain.remove(f"g{number}")
        else:
            await compare(tried, plain, asked, k=5)


@pytest.mark.parametrize("kind", DEVICES)
async def test_what_is_freed_during_a_scan_and_written_after_it_is_seen(kind: str) -> None:
    index, plain = make(kind), make("kernel")
    for n in range(50):
        index.put(statement(n, n))
        plain.put(statement(n, n))
    async with anyio.create_task_group() as group:
        for n in range(50, 90):
            group.start_soon(lambda: index.scan([statement(99, 4)], k=5, min_relatedness=0.0))
            await anyio.lowlevel.checkpoint()
            index.put(statement(n - 40, n))
            plain.put(statement(n - 40, n))
    await compare(index, plain, [statement(99, 4), statement(98, 5)])


@pytest.mark.parametrize("kind", DEVICES)
async def test_a_snapshot_is_taken_over(kind: str, tmp_path: Path) -> None:
    index, again, plain = make(kind), make(kind), make("kernel")
    for n in range(300):
        index.put(statement(n, n))
        plain.put(statement(n, n))
    await index.save(tmp_path / "s", model="m", point=LogPoint("e", 1))
    await again.load(tmp_path / "s", model="m", epoch="e")
    for each in (again, plain):
        each.put(statement(7, 70))
        each.remove("g8")
    await again.prepare()
    assert again.statistics.device_bytes > 0
    await compare(again, plain, [statement(99, 4), statement(98, 5)])
    again.clear()
    assert await again.scan([statement(1, 5)], k=5, min_relatedness=0.0) == [[]]


async def assert_the_kernel_took_over(index: FlatIndex, why: str, *, seeds: range = range(9_000)) -> None:
    plain = make("kernel")
    for n in seeds:
        plain.put(statement(n, n))
        if n % 1_000 == 0:
            await anyio.lowlevel.checkpoint()
    queries = [statement(99_999, 4), statement(99_998, 5)]
    found = await index.scan(queries, k=9, min_relatedness=0.35)
    assert found == await plain.scan(queries, k=9, min_relatedness=0.35)
    statistics = index.statistics
    assert why in (statistics.device_trouble or "")
    assert statistics.device_bytes == 0
    index.put(statement(100_000, 4))
    assert index._slots.published is None, "nothing is noted for a device that is not used"
    index.clear()
    assert index._slots.published is None
    assert await index.scan(queries, k=9, min_relatedness=0.35) == [[], []]


async def filled(**options: Any) -> FlatIndex:
    index = make("torch-cpu", **options)
    for n in range(9_000):
        index.put(statement(n, n))
        if n % 1_000 == 0:
            await anyio.lowlevel.checkpoint()
    return index


async def test_more_than_it_may_take_goes_to_the_kernel() -> None:
    await assert_the_kernel_took_over(await filled(device_bytes=500_000), "KIMERA_SCORING__DEVICE_BYTES")


async def test_a_device_without_memory_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(device._Block):
        made = 0

        def __init__(self, *args: Any) -> None:
            Full.made += 1
            if Full.made == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB.\nand much more")
            super().__init__(*args)

    monkeypatch.setattr(device, "_Block", Full)
    await assert_the_kernel_took_over(
        await filled(), "OutOfMemoryError: CUDA out of memory. Tried to allocate 96.00 MiB."
    )


async def test_memory_that_a_scan_lacks_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    index = await filled()
    await index.prepare()
    assert index.statistics.device_bytes > 0

    def lacking(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device.DeviceScan, "_live", lacking)
    await assert_the_kernel_took_over(index, "OutOfMemoryError")


async def test_only_the_share_of_memory_that_is_set_is_taken_though_nothing_else_uses_the_device(
    pretended_cuda: PretendedCuda,
) -> None:
    index = FlatIndex(
        DIM,
        threads=WorkerThreads(),
        performance=PerformanceSettings(scan_threads=1),
        scoring=ScoringSettings(scan_device="cuda"),
        memory_fraction=0.25,
    )
    await index.scan([statement(1, 5)], k=5, min_relatedness=0.0)
    assert pretended_cuda.fractions == [0.25]


async def test_a_device_that_fails_when_it_is_opened_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(_fraction: float) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", dead)
    made = device.DeviceScan("cuda", DIM, memory_fraction=0.5)
    assert not made.prepare()
    assert made.trouble is not None
    assert "no kernel image" in made.trouble


async def test_a_defect_is_not_taken_for_a_device_in_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    index = make("torch-cpu")
    index.put(statement(1, 1))

    def wrong(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(device.DeviceScan, "_nearest", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        await index.scan([statement(2, 2)], k=1, min_relatedness=0.0)
    assert index.statistics.device_trouble is None


@pytest.mark.skipif(HAS_CUDA, reason="there is a CUDA device")
async def test_without_a_gpu_the_kernel_scans() -> None:
    index = make("cuda")
    for n in range(100):
        index.put(statement(n, n))
    await assert_the_kernel_took_over(index, "no CUDA device", seeds=range(100))
