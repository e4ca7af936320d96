"""The index: what is found, what is refused, what a scan sees while others write."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimera_stream import kernels
from kimera_stream.core.index import FlatIndex, LogPoint, SnapshotError
from kimera_stream.core.index.rows import columns_of
from kimera_stream.core.index.snapshot import SnapshotAbandonedError, save
from kimera_stream.core.interfaces import IndexService, StoredGeoid
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.errors import BadRequestError, LimitExceededError, UnavailableError
from kimera_stream.protocol.objects import Geoid, Scalar

DIM = 24


class DirectThreads:
    """Worker threads without limits; ``hold`` lets a test stop a scan at its start."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()

    async def run(self, purpose: str, fn: Callable[..., Any], *args: Any) -> Any:
        def call() -> Any:
            self.entered.set()
            assert self.go.wait(30)
            return fn(*args)

        return await anyio.to_thread.run_sync(call)


def unit(*values: float) -> np.ndarray:
    vector = np.zeros(DIM, np.float32)
    vector[: len(values)] = values
    return vector / np.linalg.norm(vector)


def random_unit(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def stored(
    id: str,
    vector: np.ndarray | None = None,
    *,
    text: str | None = None,
    symbols: dict[str, Scalar] | None = None,
    semantic: dict[str, float] | None = None,
) -> StoredGeoid:
    geoid = Geoid(
        id=id, version=1, text=text, semantic_state=semantic or {}, symbolic_state=symbols or {}, metadata={},
        entropy=0.0, created_at=0, updated_at=0, offset=1,
    )  # fmt: skip
    return StoredGeoid(geoid, vector, "someone")


def make(kernel: str = "auto", directory: Path | None = None, **performance: Any) -> FlatIndex:
    return FlatIndex(
        DIM,
        threads=DirectThreads(),
        performance=PerformanceSettings(scan_threads=2, **performance),
        scoring=ScoringSettings(kernel=kernel),
        directory=directory,
    )


@pytest.fixture(params=["compiled", "reference"])
def index(request: pytest.FixtureRequest) -> FlatIndex:
    if request.param == "compiled" and kernels.IMPLEMENTATION != "compiled":
        pytest.skip("the extension was not built")
    return make(request.param)


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def ids(index: FlatIndex, query: StoredGeoid, *, k: int = 10, min_relatedness: float = 0.35) -> list[str]:
    (found,) = await index.scan([query], k=k, min_relatedness=min_relatedness)
    return [candidate.geoid_id for candidate in found]


def test_it_is_an_index_service(index: FlatIndex) -> None:
    assert isinstance(index, IndexService)


@pytest.mark.anyio
async def test_an_empty_index_finds_nothing(index: FlatIndex) -> None:
    assert await index.scan([stored("q", unit(1))], k=5, min_relatedness=0.0) == [[]]
    assert await index.related(unit(1)[None], k=5) == [[]]
    assert await index.scan([], k=5, min_relatedness=0.0) == []


@pytest.mark.anyio
async def test_related_geoids_come_by_cosine_and_unrelated_ones_not_at_all(index: FlatIndex) -> None:
    index.put(stored("near", unit(1, 0.1)))
    index.put(stored("nearer", unit(1, 0.05)))
    index.put(stored("far", unit(0, 1)))
    (found,) = await index.scan([stored("q", unit(1))], k=10, min_relatedness=0.35)
    assert [c.geoid_id for c in found] == ["nearer", "near"]
    assert found[0].relatedness == pytest.approx(float(unit(1) @ unit(1, 0.05)), abs=1e-5)
    assert found[0].symbolic == 0


@pytest.mark.anyio
async def test_a_differing_negation_or_number_lifts_a_candidate(index: FlatIndex) -> None:
    index.put(stored("same", unit(1, 0.1), text="the bridge is open to 3 lanes"))
    index.put(stored("negated", unit(1, 0.2), text="the bridge isn't open to 3 lanes"))
    index.put(stored("number", unit(1, 0.3), text="the bridge is open to four lanes"))
    assert await ids(index, stored("q", unit(1), text="the bridge is open to three lanes")) == [
        "negated", "number", "same",
    ]  # fmt: skip


@pytest.mark.anyio
async def test_what_names_the_same_numbered_thing_is_found_among_many_alike(index: FlatIndex) -> None:
    for i in range(200):  # all of them nearer to the query than the one that speaks of the same valve
        index.put(stored(f"w{i}", unit(1, 0.5 if i == 123 else 0.001 * i), text=f"The valve W{i}-77 is open."))
    found = await ids(index, stored("q", unit(1), text="The valve W123-77 is closed."), k=16)
    assert found[0] == "w123"
    (candidates,) = await index.scan(
        [stored("q", unit(1), text="The valve W123-77 is closed.")], k=16, min_relatedness=0.3
    )
    assert [each.named for each in candidates] == [True] + [False] * 15
    elsewhere = await ids(index, stored("q", unit(1), text="The valve W999-77 is closed."), k=16)
    assert "w123" not in elsewhere


@pytest.mark.anyio
async def test_the_query_itself_is_left_out_unless_asked_for(index: FlatIndex) -> None:
    index.put(stored("a", unit(1)))
    (found,) = await index.scan([stored("a", unit(1))], k=5, min_relatedness=0.3, exclude_self=False)
    assert [c.geoid_id for c in found] == ["a"]
    assert await ids(index, stored("a", unit(1))) == []


@pytest.mark.anyio
async def test_an_update_is_found_at_its_new_place_only(index: FlatIndex) -> None:
    index.put(stored("a", unit(1)))
    index.put(stored("a", unit(0, 1)))
    assert index.size == 1
    assert await ids(index, stored("q", unit(1))) == []
    assert await ids(index, stored("q", unit(0, 1))) == ["a"]


@pytest.mark.anyio
async def test_a_removed_geoid_is_gone_and_its_slot_is_used_again(index: FlatIndex) -> None:
    index.put(stored("a", unit(1)))
    index.remove("a")
    index.remove("a")
    assert index.size == 0
    assert index.statistics.tombstones == 1
    assert await ids(index, stored("q", unit(1))) == []
    index.put(stored("b", unit(1)))
    assert index.statistics.tombstones == 0
    assert await ids(index, stored("q", unit(1))) == ["b"]


class TestSymbols:
    """The paragraph "Symbolic conflict" of the contract."""

    CASES = (
        ({"subject": "db-1", "status": "up"}, {"subject": "db-1", "status": "down"}, 1),
        ({"subject": "db-1", "status": "up"}, {"subject": "db-1", "status": "up"}, 0),
        ({"subject": "db-1", "status": "up"}, {"subject": "db-2", "status": "down"}, 0),
        ({"subject": "s", "n": 1}, {"subject": "s", "n": 1.0}, 0),
        ({"subject": "s", "n": 1}, {"subject": "s", "n": True}, 1),
        ({"subject": "s", "n": 0}, {"subject": "s", "n": False}, 1),
        ({"subject": "s", "n": 0}, {"subject": "s", "n": -0.0}, 0),
        ({"subject": "s", "n": "1"}, {"subject": "s", "n": 1}, 1),
        ({"subject": "s", "n": None}, {"subject": "s", "n": ""}, 1),
        ({"subject": "s", "n": "Up"}, {"subject": "s", "n": "up"}, 1),
        ({"subject": "s", "n": 2**53}, {"subject": "s", "n": 2**53 + 1}, 1),
        ({"subject": "s", "n": 10**400}, {"subject": "s", "n": 10**400}, 0),
        ({"subject": "s", "n": 10**400}, {"subject": "s", "n": 10**400 + 1}, 1),
        ({"subject": "s", "a": 1, "b": 2, "c": 3}, {"subject": "s", "a": 9, "b": 2, "c": 9}, 2),
        ({"subject": "s", "a": 1}, {"subject": "s", "b": 2}, 0),
        ({"subject": "s", "a": 1, "as_of": 5}, {"subject": "s", "a": 2, "as_of": 6}, 0),
        ({"subject": "s", "a": 1, "as_of": 5}, {"subject": "s", "a": 2, "as_of": 5}, 1),
        ({"subject": "s", "a": 1, "as_of": 5}, {"subject": "s", "a": 2}, 1),
        ({"subject": "s", "a": 1, "valid_to": 5}, {"subject": "s", "a": 2, "valid_from": 6}, 0),
        ({"subject": "s", "a": 1, "valid_to": 6}, {"subject": "s", "a": 2, "valid_from": 5, "valid_to": 9}, 1),
        ({"subject": "a long name of a subject", "a": "a long value, one"},
         {"subject": "a long name of a subject", "a": "a long value, two"}, 1),
        ({"subject": "a long name of a subject", "a": "a long value, one"},
         {"subject": "another long name, unlike it", "a": "a long value, two"}, 0),
        ({"subject": 0, "a": 1}, {"subject": 0, "a": 2}, 1),
        ({"subject": 0, "a": 1}, {"subject": 1, "a": 2}, 0),
    )  # fmt: skip

    @pytest.mark.anyio
    @pytest.mark.parametrize(("old", "new", "count"), CASES)
    async def test_equal_subjects_need_no_relatedness(
        self, index: FlatIndex, old: dict[str, Scalar], new: dict[str, Scalar], count: int
    ) -> None:
        index.put(stored("old", unit(0, 1), symbols=old))
        (found,) = await index.scan([stored("new", unit(1), symbols=new)], k=5, min_relatedness=0.35)
        assert [c.symbolic for c in found] == ([count] if count else [])

    @pytest.mark.anyio
    async def test_without_subjects_they_must_be_related(self, index: FlatIndex) -> None:
        index.put(stored("far", unit(0, 1), symbols={"status": "up"}))
        index.put(stored("near", unit(1, 0.5), symbols={"status": "up"}))
        (found,) = await index.scan([stored("q", unit(1), symbols={"status": "down"})], k=5, min_relatedness=0.35)
        assert [(c.geoid_id, c.symbolic) for c in found] == [("near", 1)]

    @pytest.mark.anyio
    async def test_oppositions_come_before_the_closest_texts(self, index: FlatIndex) -> None:
        for i in range(20):
            index.put(stored(f"close-{i}", unit(1, 0.01 * i), text="not that"))
        index.put(stored("opposed", unit(0, 1), symbols={"subject": "x", "on": True}))
        found = await ids(index, stored("q", unit(1), text="that", symbols={"subject": "x", "on": False}), k=3)
        assert found[0] == "opposed"
        assert len(found) == 3

    @pytest.mark.anyio
    async def test_states_without_vectors_are_matched_by_subject(self, index: FlatIndex) -> None:
        index.put(stored("a", None, symbols={"subject": "x", "on": True}))
        index.put(stored("b", None, symbols={"subject": "y", "on": True}))
        index.put(stored("c", None, symbols={"on": True}))
        index.put(stored("d", unit(1), symbols={"subject": "x", "on": True}))
        (found,) = await index.scan(
            [stored("q", None, symbols={"subject": "x", "on": False})], k=9, min_relatedness=0.3
        )
        assert [c.geoid_id for c in found] == ["a", "d", "c"] or [c.geoid_id for c in found] == ["d", "a", "c"]
        assert found[-1].fused < 0, "nothing says that c is about the same thing"
        assert await index.related(unit(1)[None], k=9) == [
            [c for c in (await index.related(unit(1)[None], k=9))[0] if c.geoid_id == "d"]
        ]

    @pytest.mark.anyio
    async def test_a_code_is_not_given_to_another_value_while_in_use(self, index: FlatIndex) -> None:
        first = {"subject": "s", "v": "a long value that is interned"}
        index.put(stored("a", None, symbols=first))
        index.put(stored("b", None, symbols=first))
        index.remove("a")
        assert await ids(index, stored("q", None, symbols={"subject": "s", "v": "another long value"})) == ["b"]
        assert await ids(index, stored("q", None, symbols=first)) == []
        index.remove("b")
        assert len(index._codes) == 0


@pytest.mark.anyio
async def test_a_full_index_refuses_but_still_takes_updates() -> None:
    index = make(max_geoids=2)
    index.put(stored("a", unit(1)))
    index.put(stored("b", unit(0, 1)))
    with pytest.raises(LimitExceededError, match="MAX_GEOIDS"):
        index.put(stored("c", unit(0, 0, 1)))
    index.put(stored("a", unit(0, 0, 1)))
    assert index.size == 2
    assert index.statistics.refused == 1


def test_bytes_are_bounded_too() -> None:
    index = make(max_index_bytes=20_000)
    put, refused = 0, 0
    for i in range(200):
        item = stored(f"g{i}", random_unit(i), text="said", symbols={"subject": f"s{i}", "state": "long value " * 20})
        if index.room().refusal(item) is None:
            index.put(item)
            put += 1
        else:
            with pytest.raises(LimitExceededError, match="MAX_INDEX_BYTES"):
                index.put(item)
            refused += 1
    assert put > 10
    assert refused > 100
    assert 15_000 < index.live_bytes <= 20_000
    statistics = index.statistics
    assert (statistics.full, statistics.max_bytes, statistics.live_bytes) == (True, 20_000, index.live_bytes)
    smaller = stored("g0", random_unit(0))
    assert index.room().refusal(smaller) is None
    index.put(smaller)
    index.put(stored("small", None))
    for i in range(200):
        index.remove(f"g{i}")
    index.remove("small")
    assert index.live_bytes == 0
    assert not index.statistics.full


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.integers(0, 40), st.booleans()), max_size=80),
    st.sampled_from(["refuse", "evict_oldest"]),
)
def test_what_is_not_refused_fits_and_the_bounds_hold(steps: list[tuple[int, bool, int, bool]], policy: str) -> None:
    index = make("reference", max_geoids=7, max_index_bytes=3_000, index_full=policy)
    for number, with_vector, length, removes in steps:
        if removes:
            index.remove(f"g{number}")
            continue
        item = stored(
            f"g{number}", random_unit(number) if with_vector else None,
            symbols={"subject": f"subject {number}", "state": "x" * length} if length else None,
        )  # fmt: skip
        if index.room().refusal(item) is None:
            index.put(item)
            assert f"g{number}" in index
        else:
            assert policy == "refuse"
        assert index.size <= 7
        assert index.live_bytes <= 3_000
        assert index.live_bytes <= index.bytes
    assert (index.statistics.evicted > 0) <= (policy == "evict_oldest")
    for number in range(13):
        index.remove(f"g{number}")
    assert index.live_bytes == 0


def test_one_that_never_fits_is_refused_whatever_the_policy() -> None:
    index = make(max_index_bytes=2_000, index_full="evict_oldest")
    index.put(stored("a", unit(1)))
    refusal = index.room().refusal(stored("b", symbols={"n": "x" * 3_000}))
    assert refusal is not None
    assert "MAX_INDEX_BYTES" in refusal.message
    assert "a" in index


def test_places_are_kept_for_the_others_of_a_group() -> None:
    index = make(max_geoids=3)
    index.put(stored("a", unit(1)))
    room = index.room()
    answers = [room.refusal(stored(id, unit(1))) is None for id in ("b", "a", "c", "d")]
    assert answers == [True, True, True, False]


@pytest.mark.anyio
async def test_a_full_index_drops_the_one_untouched_for_longest_where_told_to() -> None:
    evicted: list[str] = []
    index = FlatIndex(
        DIM, threads=DirectThreads(), performance=PerformanceSettings(max_geoids=2, index_full="evict_oldest"),
        scoring=ScoringSettings(), on_evict=evicted.append,
    )  # fmt: skip
    index.put(stored("a", unit(1)))
    index.put(stored("b", unit(1)))
    index.put(stored("a", unit(1)))
    index.put(stored("c", unit(1)))
    assert evicted == ["b"]
    assert sorted(await ids(index, stored("q", unit(1)))) == ["a", "c"]
    assert index.statistics.evicted == 1


@pytest.mark.parametrize(
    "vector", [np.ones(DIM + 1, np.float32), np.full(DIM, np.nan, np.float32), np.zeros(DIM, np.float32),
               np.full(DIM, np.inf, np.float32)],
)  # fmt: skip
def test_a_vector_that_cannot_be_is_refused_and_nothing_changes(index: FlatIndex, vector: np.ndarray) -> None:
    index.put(stored("a", unit(1)))
    with pytest.raises(BadRequestError, match="vector: expected"):
        index.put(stored("a", vector))
    assert index.size == 1
    assert index.statistics.tombstones == 0


@pytest.mark.anyio
async def test_a_scan_sees_the_index_as_it_was_when_it_started() -> None:
    index = make()
    threads = index._threads
    assert isinstance(threads, DirectThreads)
    index.put(stored("stays", unit(1)))
    index.put(stored("moves", unit(1, 0.2)))
    index.put(stored("goes", unit(1, 0.3)))
    threads.go.clear()
    threads.entered.clear()
    found: list[str] = []

    async def scan() -> None:
        found.extend(await ids(index, stored("q", unit(1))))

    async with anyio.create_task_group() as group:
        group.start_soon(scan)
        await anyio.to_thread.run_sync(threads.entered.wait, 30)
        index.put(stored("moves", unit(0, 1)))
        index.remove("goes")
        for i in range(50):
            index.put(stored(f"new-{i}", unit(1, 0.001 * i)))
        assert index.statistics.tombstones == 2, "slots that the scan can see are not reused"
        threads.go.set()
    assert found == ["stays", "moves"], "the deleted one is left out of the answer, no new one is in it"
    index.put(stored("late", unit(1)))
    assert index.statistics.tombstones == 1


@pytest.mark.anyio
async def test_many_chunks_are_scanned_and_addressed(monkeypatch: pytest.MonkeyPatch) -> None:
    index = make()
    n = 40_000
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((n, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for i in range(n):
        index.put(stored(f"g{i}", vectors[i]))
        if i % 2_000 == 0:
            await anyio.lowlevel.checkpoint()
    for i in (0, 16_383, 16_384, 39_999):
        (found,) = await index.related(vectors[i][None], k=10)
        best = np.argsort(-(vectors @ vectors[i]), kind="stable")[:10]
        assert [c.geoid_id for c in found] == [f"g{j}" for j in best]


@pytest.mark.anyio
@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "update", "remove"]), st.integers(0, 12), st.integers(0, 10**6), st.booleans()
        ),
        max_size=60,
    )
)
async def test_it_holds_what_a_dictionary_would(steps: list[tuple[str, int, int, bool]]) -> None:
    index = make()
    model: dict[str, StoredGeoid] = {}
    for action, name, seed, with_vector in steps:
        id = f"g{name}"
        if action == "remove":
            index.remove(id)
            model.pop(id, None)
        else:
            item = stored(
                id, random_unit(seed) if with_vector else None, symbols={"subject": id, "a long key": f"value {seed}"}
            )
            index.put(item)
            model[id] = item
    assert index.size == len(model)
    for id, item in model.items():
        other = {"subject": id, "a long key": "something else"}
        assert await ids(index, stored("q", None, symbols=other)) == [id]
        assert await ids(index, stored("q", None, symbols=item.geoid.symbolic_state)) == []
    with_vectors = [id for id, item in model.items() if item.vector is not None]
    (found,) = await index.related(random_unit(1)[None], k=100)
    assert sorted(c.geoid_id for c in found) == sorted(with_vectors)
    for candidate in found:
        exact = float(np.asarray(model[candidate.geoid_id].vector) @ random_unit(1))
        assert candidate.relatedness == pytest.approx(exact, abs=1e-5)


class TestSnapshot:
    @staticmethod
    def fill(index: FlatIndex) -> None:
        for i in range(300):
            index.put(stored(f"g{i}", random_unit(i), text=f"number {i} is not here",
                             symbols={"subject": f"s{i % 50}", "state": f"a long value {i % 7}"}))  # fmt: skip
        for i in range(0, 300, 3):
            index.remove(f"g{i}")
        index.put(stored("bare", None, symbols={"subject": "s1", "state": "a long value 999"}))
        index.put(stored("g1", random_unit(4242), text="moved"))

    @pytest.mark.anyio
    @pytest.mark.parametrize("mapped", [False, True])
    async def test_it_comes_back_as_it_was_and_can_be_written_on(self, tmp_path: Path, mapped: bool) -> None:
        where = tmp_path / "rows" if mapped else None
        index, again = make(directory=where), make(directory=where)
        self.fill(index)
        path = tmp_path / "index.snapshot"
        saved = await index.save(path, model="m", point=LogPoint("e", 77))
        assert (saved.point, saved.geoids, saved.bytes) == (LogPoint("e", 77), index.size, path.stat().st_size)
        assert await again.load(path, model="m", epoch="e") == (saved, {})
        assert again.live_bytes == index.live_bytes
        again.put(stored("new", random_unit(9)))
        again.put(stored("g2", random_unit(10)))
        index.put(stored("new", random_unit(9)))
        index.put(stored("g2", random_unit(10)))
        again.remove("g4")
        index.remove("g4")
        assert again.size == index.size
        queries = [
            stored(
                "q", random_unit(i), text="number 5 is here", symbols={"subject": f"s{i}", "state": "a long value 3"}
            )
            for i in range(40)
        ]
        for query in queries:
            expected = await index.scan([query], k=20, min_relatedness=0.1)
            found = await again.scan([query], k=20, min_relatedness=0.1)
            assert {(c.geoid_id, round(c.fused, 5)) for c in found[0]} == {
                (c.geoid_id, round(c.fused, 5)) for c in expected[0]
            }
        assert (await again.save(path, model="m", point=LogPoint("e", 78))).geoids == index.size

    @pytest.mark.anyio
    async def test_there_may_be_none(self, tmp_path: Path) -> None:
        with pytest.raises(SnapshotError) as caught:
            await make().load(tmp_path / "nothing", model="m", epoch="e")
        assert caught.value.reason == "missing"

    @pytest.mark.anyio
    async def test_one_of_another_encoder_or_log_is_foreign(self, tmp_path: Path) -> None:
        index = make()
        self.fill(index)
        path = tmp_path / "snapshot"
        await index.save(path, model="m", point=LogPoint("e", 1))
        for model, epoch in (("other", "e"), ("m", "other")):
            with pytest.raises(SnapshotError) as caught:
                await make().load(path, model=model, epoch=epoch)
            assert caught.value.reason == "foreign"
        path.write_bytes(b"x" * 10_000)
        with pytest.raises(SnapshotError) as caught:
            await make().load(path, model="m", epoch="e")
        assert caught.value.reason == "foreign"

    @pytest.mark.anyio
    async def test_damage_anywhere_is_found_and_the_index_stays_empty(self, tmp_path: Path) -> None:
        index = make()
        self.fill(index)
        path = tmp_path / "snapshot"
        await index.save(path, model="m", point=LogPoint("e", 1))
        whole = path.read_bytes()
        positions = [i for i in range(0, len(whole), 997) if whole[i] != 0]
        assert len(positions) > 20
        for position in positions:
            broken = bytearray(whole)
            broken[position] ^= 0x10
            path.write_bytes(broken)
            other = make()
            with pytest.raises(SnapshotError) as caught:
                await other.load(path, model="m", epoch="e")
            assert caught.value.reason in ("damaged", "foreign")
            assert other.size == 0
        for length in (0, 10, 5000, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(SnapshotError):
                await make().load(path, model="m", epoch="e")

    @pytest.mark.anyio
    async def test_it_is_of_the_moment_it_was_asked_for(self, tmp_path: Path) -> None:
        index = make()
        threads = index._threads
        assert isinstance(threads, DirectThreads)
        self.fill(index)
        size = index.size
        threads.go.clear()
        threads.entered.clear()
        path = tmp_path / "snapshot"
        async with anyio.create_task_group() as group:
            group.start_soon(partial(index.save, path, model="m", point=LogPoint("e", 1)))
            await anyio.to_thread.run_sync(threads.entered.wait, 30)
            for i in range(300, 400):
                index.put(stored(f"g{i}", random_unit(i)))
            for i in range(50):
                index.remove(f"g{i}")
            threads.go.set()
        again = make()
        assert (await again.load(path, model="m", epoch="e"))[0].geoids == size
        assert "g49" in again
        assert "g300" not in again

    @pytest.mark.anyio
    async def test_freed_slots_that_are_written_meanwhile_do_not_spoil_it(self, tmp_path: Path) -> None:
        """Slots that were free before it began are not held back: what is in them changes while the file is written."""
        index = make()
        self.fill(index)
        size = index.size
        seeds = iter(range(1_000, 10_000))

        def put_between_sections() -> bool:
            seed = next(seeds)
            index.put(stored(f"late-{seed}", random_unit(seed), text="late", symbols={"late": f"a late value {seed}"}))
            return True

        path = tmp_path / "snapshot"
        with index.frozen() as state:
            await save(
                path, state, threads=index._threads, dimension=DIM, model="m", point=LogPoint("e", 1),
                keep_going=put_between_sections,
            )  # fmt: skip
        again = make()
        assert (await again.load(path, model="m", epoch="e"))[0].geoids == size
        assert index.size > size

    @pytest.mark.anyio
    async def test_given_up_it_leaves_the_former_one(self, tmp_path: Path) -> None:
        index, path = make(), tmp_path / "snapshot"
        self.fill(index)
        await index.save(path, model="m", point=LogPoint("e", 1))
        before = path.read_bytes()
        answers = iter([True, True, False])
        with index.frozen() as state, pytest.raises(SnapshotAbandonedError):
            await save(
                path, state, threads=index._threads, dimension=DIM, model="m", point=LogPoint("e", 2),
                keep_going=lambda: next(answers),
            )  # fmt: skip
        assert path.read_bytes() == before
        assert names_in(tmp_path) == [path.name]

    @pytest.mark.anyio
    async def test_a_disk_nearly_full_is_left_to_the_log(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kimera_stream.core.index.snapshot.RESERVE", 1 << 62)
        with pytest.raises(UnavailableError, match="No space left"):
            await make().save(tmp_path / "snapshot", model="m", point=LogPoint("e", 1))
        assert names_in(tmp_path) == []

    @pytest.mark.anyio
    async def test_which_is_oldest_survives_and_is_needed_by_the_policy(self, tmp_path: Path) -> None:
        path = tmp_path / "snapshot"
        index = make(max_geoids=4, index_full="evict_oldest")
        for i in (3, 1, 2, 0):
            index.put(stored(f"g{i}", random_unit(i)))
        index.put(stored("g3", random_unit(33)))
        await index.save(path, model="m", point=LogPoint("e", 1))
        again = make(max_geoids=4, index_full="evict_oldest")
        await again.load(path, model="m", epoch="e")
        again.put(stored("new", random_unit(5)))
        again.put(stored("newer", random_unit(6)))
        assert [i for i in range(4) if f"g{i}" in again] == [0, 3]
        other = make()
        await other.load(path, model="m", epoch="e")
        await other.save(path, model="m", point=LogPoint("e", 1))
        with pytest.raises(SnapshotError) as caught:
            await make(index_full="evict_oldest").load(path, model="m", epoch="e")
        assert caught.value.reason == "foreign"


def _drawn(rng: np.random.Generator, ids: list[int]) -> list[StoredGeoid]:
    """Geoids of all kinds: with and without vector, text, symbols that are interned, semantic keys; some rows not of unit length."""
    drawn = []
    for number in ids:
        vector = random_unit(int(rng.integers(1 << 30))) * np.float32(rng.choice([1.0, 3.0]))
        symbols: dict[str, Scalar] = {
            "subject": f"a long name {number}",
            "pressure": int(rng.integers(3)),
            "as_of": None,
        }
        drawn.append(
            stored(
                f"g{number}",
                vector if rng.random() < 0.8 else None,
                text=rng.choice(["no 5", "Über fünf", "two of 3"]) if rng.random() < 0.9 else None,
                symbols=symbols if rng.random() < 0.4 else None,
                semantic={"joy": 0.5, "fear": 1.0} if rng.random() < 0.3 else None,
            )
        )
    return drawn


@pytest.mark.anyio
@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize(
    "policy", [{}, {"index_full": "evict_oldest"}, {"max_geoids": 2_300, "index_full": "evict_oldest"}]
)
async def test_many_put_together_are_what_they_are_one_by_one(kernel: str, policy: dict[str, Any]) -> None:
    """With updates, removals between, more than a chunk, and a bound that is met on the way."""
    rng = np.random.default_rng(1)
    together, apart = make(kernel, **policy), make(kernel, **policy)
    batches = [list(range(900)), list(range(500, 1_400)), list(range(1_300, 2_600)), list(range(100, 160))]
    for batch in batches:
        drawn = _drawn(rng, batch)
        together.put_many(columns_of(drawn, DIM))
        for each in drawn:
            apart.put(each)
        for gone in (f"g{number}" for number in batch[::9]):
            together.remove(gone)
            apart.remove(gone)
    queries = _drawn(rng, list(range(0, 2_600, 40)))
    assert {name: name in together for name in apart._by_id} == dict.fromkeys(apart._by_id, True)
    assert (together.size, together.live_bytes) == (apart.size, apart.live_bytes)
    one = await together.scan(queries, k=20, min_relatedness=0.2)
    other = await apart.scan(queries, k=20, min_relatedness=0.2)
    for mine, theirs in zip(one, other, strict=True):
        assert [hit.fused for hit in mine] == pytest.approx([hit.fused for hit in theirs], abs=1e-6)
        assert {hit.geoid_id for hit in mine[:10]} == {hit.geoid_id for hit in theirs[:10]}
    if policy:
        assert [together._ids[slot] for slot in together._age or ()] == [apart._ids[slot] for slot in apart._age or ()]
    together.clear()
    assert together.live_bytes == 0


def test_of_many_with_one_bad_vector_none_is_put() -> None:
    index = make()
    for bad in (np.full(DIM, np.nan, np.float32), np.zeros(DIM, np.float32), np.full(DIM, np.inf, np.float32)):
        with pytest.raises(BadRequestError, match="vector"):
            index.put_many(columns_of([stored("a", unit(1)), stored("b", bad)], DIM))
    with pytest.raises(BadRequestError, match=f"expected {DIM} numbers"):
        index.put_many(columns_of([stored("a", np.ones(3, np.float32))], 3))
    assert index.size == 0
    assert index.live_bytes == 0


def test_many_that_do_not_fit_are_put_as_far_as_they_do() -> None:
    index = make(max_geoids=3)
    with pytest.raises(LimitExceededError):
        index.put_many(columns_of([stored(f"g{i}", unit(1, i)) for i in range(5)], DIM))
    assert [f"g{i}" in index for i in range(5)] == [True, True, True, False, False]


@pytest.mark.anyio
async def test_memory_is_bounded_as_documented(tmp_path: Path) -> None:
    index = FlatIndex(
        384, threads=DirectThreads(), performance=PerformanceSettings(), scoring=ScoringSettings(), directory=tmp_path
    )
    n = 16_384
    rng = np.random.default_rng(0)

    for start in range(0, n, 1024):
        rows = rng.standard_normal((1024, 384), np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        await index.reserve(1024)
        index.put_many(columns_of([stored(f"{start + i:026d}", row) for i, row in enumerate(rows)], 384))
    assert index.size == n
    assert index.bytes / n < 1.5 * 385
    assert index.mapped_bytes == n * 384 * 4
