"""Every variant of the scan that this machine can run, against the numpy reference and against plain definitions."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimera_stream import kernels
from kimera_stream.kernels import Hits, Kernel, Queries, Record, Segment, Weights, bitmap, build_record

VARIANTS = kernels.variants() or ("numpy",)
DIMS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 130, 200, 384])


def load(variant: str, threads: int = 1) -> Kernel:
    if variant == "numpy":
        return kernels.load("reference")
    return kernels.load("compiled", variant=variant, threads=threads)


def unit_rows(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    rows = rng.standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).astype(np.float32)


def signatures(rng: np.random.Generator, n: int) -> np.ndarray:
    """Signatures of texts: what is named by a number has numbers."""
    numbers = rng.integers(0, 3, n)
    named = np.where(numbers > 0, rng.integers(0, 3, n), 0) << 15
    return (rng.integers(0, 4, n) << 30 | named | numbers).astype(np.uint32)


def random_record(rng: np.random.Generator) -> Record:
    if rng.random() < 0.2:
        return kernels.EMPTY_RECORD
    keys = rng.integers(1, 2**64, 6, dtype=np.uint64).tolist() if rng.random() < 0.1 else [k << 60 for k in range(6)]
    symbols = [(keys[i], int(rng.integers(1, 4))) for i in rng.permutation(6)[: rng.integers(0, 6)]]
    return build_record(
        symbols,
        subject=int(rng.integers(0, 4)),
        moment=int(rng.integers(0, 3)),
        window=None if rng.random() < 0.7 else (int(rng.integers(-5, 5)), int(rng.integers(0, 9))),
        layers=rng.integers(1, 9, rng.integers(0, 5)).astype(np.uint64).tolist(),
    )


def random_segment(rng: np.random.Generator, base: int, n: int, dim: int, form: str, symbols: bool) -> Segment:
    exact = unit_rows(rng, n, dim) if form != "none" else None
    codes = grades = None
    if form == "codes" or form == "both":
        assert exact is not None
        codes, grades, _ = kernels.quantize(exact)
    columns: dict[str, np.ndarray] = {}
    if symbols:
        records = [random_record(rng) for _ in range(n)]
        words, starts = [0], []
        for record in records:
            starts.append(len(words) if record.words else 0)
            words += record.words
        columns = {
            "text": signatures(rng, n),
            "keys": np.array([r.keys | r.subject for r in records], np.uint64),
            "layers": np.array([r.layers for r in records], np.uint64),
            "record": np.array(starts, np.uint32),
            "pool": np.array(words, np.uint64),
        }
    return Segment(base, n, codes=codes, grades=grades, exact=None if form == "codes" else exact, **columns)


def assert_same(found: Hits, expected: Hits, slack: float = 2e-5) -> None:
    """The same scores at every rank, and the same slots except where scores tie within rounding."""
    assert found.counts.tolist() == expected.counts.tolist()
    np.testing.assert_allclose(found.fused, expected.fused, atol=slack)
    for i in range(len(found.counts)):
        n = int(found.counts[i])
        assert len(set(found.slots[i, :n].tolist())) == n
        assert (found.slots[i, n:] == -1).all()
        own = dict(zip(expected.slots[i, :n].tolist(), range(n), strict=True))
        worst = float(expected.fused[i, n - 1]) if n else 0.0
        for slot, fused, cosine, opposed in zip(
            found.slots[i, :n].tolist(), found.fused[i], found.cosine[i], found.opposed[i], strict=False
        ):
            if slot not in own:
                assert fused <= worst + slack, "a hit that the reference lacks may only tie with its last"
                continue
            assert fused == pytest.approx(expected.fused[i, own[slot]], abs=slack)
            assert cosine == pytest.approx(expected.cosine[i, own[slot]], abs=slack)
            assert opposed == expected.opposed[i, own[slot]]


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    dim=DIMS,
    sizes=st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 130, 200]), min_size=1, max_size=3),
    form=st.sampled_from(["exact", "codes", "both", "mixed"]),
    m=st.sampled_from([1, 2, 3, 16, 17, 33, 40]),
    k=st.sampled_from([1, 3, 10, 500]),
    symbols=st.booleans(),
    l1=st.sampled_from([0.0, 0.0, 0.3]),
    layer=st.sampled_from([0.0, 0.25]),
    min_related=st.sampled_from([-2.0, 0.0, 0.2]),
    threshold=st.sampled_from([float("-inf"), 0.1]),
    alive=st.sampled_from([0.0, 0.5, 1.0]),
    select=st.booleans(),
    rescore=st.booleans(),
)
def test_every_variant_finds_what_the_reference_finds(
    variant: str, seed: int, dim: int, sizes: list[int], form: str, m: int, k: int, symbols: bool, l1: float,
    layer: float, min_related: float, threshold: float, alive: float, select: bool, rescore: bool,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    segments, base = [], 0
    for i, size in enumerate(sizes):
        kind = ("both", "none", "exact")[i % 3] if form == "mixed" else form
        segments.append(random_segment(rng, base, size, dim, kind, symbols))
        base += -(-size // 64) * 64 + 64
    queries = Queries.build(
        unit_rows(rng, m, dim),
        has_vector=(rng.random(m) < 0.8).tolist(),
        text=signatures(rng, m).tolist(),
        records=[random_record(rng) for _ in range(m)],
        exclude=rng.integers(-1, base, m).tolist(),
    )
    live = bitmap(rng.random(base) < alive)
    weights = Weights(min_related=min_related, threshold=threshold, flag=0.5, layer=layer, l1=l1)
    arguments = {
        "k": k, "margin": 0.0, "rescore": rescore and (l1 == 0.0),
        "select": rng.integers(0, 3, len(segments)).astype(np.uint8) if select else None,
    }  # fmt: skip
    kernel, oracle = load(variant), load("numpy")
    assert_same(
        kernel.scan(kernel.view(segments), live, queries, weights, **arguments),
        oracle.scan(oracle.view(segments), live, queries, weights, **arguments),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), dim=DIMS, n=st.integers(1, 300), m=st.sampled_from([1, 4]), k=st.integers(1, 20))
def test_rescored_hits_carry_exact_cosines(variant: str, seed: int, dim: int, n: int, m: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    rows, vectors = unit_rows(rng, n, dim), unit_rows(rng, m, dim)
    codes, grades, lost = kernels.quantize(rows)
    kernel = load(variant)
    view = kernel.view([Segment(0, n, codes=codes, grades=grades, exact=rows)])
    hits = kernel.scan(
        view, bitmap(np.ones(n, bool)), Queries.build(vectors), Weights(min_related=0.1), k=k,
        margin=float(lost.max()), rescore=True,
    )  # fmt: skip
    exact = vectors.astype(np.float64) @ rows.astype(np.float64).T
    for i in range(m):
        got = hits.slots[i, : hits.counts[i]]
        np.testing.assert_allclose(hits.cosine[i, : len(got)], exact[i, got], atol=1e-5)
        assert (hits.cosine[i, : len(got)] >= 0.1).all()
        assert (np.diff(hits.fused[i, : len(got)]) <= 0).all()
        if k >= n:
            assert set(got.tolist()) >= set(np.flatnonzero(exact[i] > 0.1 + 1e-5).tolist()), "none was missed"


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_opposition_is_missed_among_many_rows(variant: str) -> None:
    """The Bloom words may let too much through, never too little: checked against dictionaries."""
    rng = np.random.default_rng(7)
    n, keys = 3000, [kernels_hash(i) for i in range(300)]
    states = [{keys[j]: int(rng.integers(1, 3)) for j in rng.permutation(300)[: rng.integers(0, 5)]} for _ in range(n)]
    subjects = rng.integers(0, 30, n).tolist()
    records = [build_record(state.items(), subject=subject) for state, subject in zip(states, subjects, strict=True)]
    words, starts = [0], []
    for record in records:
        starts.append(len(words) if record.words else 0)
        words += record.words
    segment = Segment(
        0, n, exact=unit_rows(rng, n, 8), keys=np.array([r.keys | r.subject for r in records], np.uint64),
        layers=np.zeros(n, np.uint64), record=np.array(starts, np.uint32), pool=np.array(words, np.uint64),
    )  # fmt: skip
    kernel = load(variant)
    state = dict.fromkeys(keys[:40], 9)
    queries = Queries.build(
        unit_rows(rng, 4, 8), records=[build_record(state.items(), subject=s) for s in (1, 2, 3, 4)]
    )
    hits = kernel.scan(kernel.view([segment]), bitmap(np.ones(n, bool)), queries, Weights(min_related=3.0), k=n)
    for i, subject in enumerate((1, 2, 3, 4)):
        expected = {
            row: sum(key in state for key in states[row])
            for row in range(n)
            if subjects[row] == subject and any(key in state for key in states[row])
        }
        count = int(hits.counts[i])
        assert dict(zip(hits.slots[i, :count].tolist(), hits.opposed[i, :count].tolist(), strict=True)) == expected
        assert len(expected) > 10


def kernels_hash(i: int) -> int:
    return (i * 0x9E37_79B9_7F4A_7C15 + 0x1234_5678) % 2**64


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_key_collision_can_add_an_opposition_but_never_hide_one(variant: str) -> None:
    kernel = load(variant)
    # two keys of the row share a hash; the query's value differs from one of them
    for values in ([(5, 1), (5, 2)], [(5, 2), (5, 1)], [(4, 9), (5, 1), (5, 1), (5, 7), (6, 9)]):
        row = build_record(values, subject=1)
        segment = Segment(
            0, 1, keys=np.array([row.keys | row.subject], np.uint64), layers=np.zeros(1, np.uint64),
            record=np.ones(1, np.uint32), pool=np.array([0, *row.words], np.uint64),
        )  # fmt: skip
        query = Queries.build(
            np.zeros((1, 4), np.float32), has_vector=[False], records=[build_record([(5, 1)], subject=1)]
        )
        hits = kernel.scan(kernel.view([segment]), bitmap(np.ones(1, bool)), query, Weights(), k=1)
        assert hits.opposed[0, 0] == 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("m", [1, 5])
def test_ties_go_to_the_lower_slot_whatever_the_threads(variant: str, m: int) -> None:
    n = 20_000
    rows = np.tile(unit_rows(np.random.default_rng(0), 1, 32), (n, 1))
    codes, grades, _ = kernels.quantize(rows)
    kernel = load(variant, threads=4)
    view = kernel.view([Segment(0, n, codes=codes, grades=grades)])
    for _ in range(3):
        hits = kernel.scan(view, bitmap(np.ones(n, bool)), Queries.build(np.repeat(rows[:1], m, 0)), Weights(), k=50)
        assert hits.slots.tolist() == [list(range(50))] * m


@pytest.mark.parametrize("variant", VARIANTS)
def test_scans_from_many_threads_share_one_kernel(variant: str) -> None:
    rng = np.random.default_rng(3)
    n, dim = 8_000, 48
    rows = unit_rows(rng, n, dim)
    codes, grades, _ = kernels.quantize(rows)
    kernel = load(variant, threads=3)
    view = kernel.view([Segment(0, n, codes=codes, grades=grades, exact=rows)])
    live = bitmap(np.ones(n, bool))
    wrong: list[int] = []

    def scan(start: int) -> None:
        for i in range(start, start + 20):
            hits = kernel.scan(view, live, Queries.build(rows[i : i + 1]), Weights(), k=5, rescore=True)
            if hits.slots[0, 0] != i:
                wrong.append(i)

    threads = [threading.Thread(target=scan, args=(100 * t,)) for t in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_filter_decides_what_is_looked_at(variant: str) -> None:
    rows = unit_rows(np.random.default_rng(0), 200, 16)
    kernel = load(variant)
    view = kernel.view([Segment(0, 200, exact=rows)])
    for mask in (np.zeros(200, bool), np.arange(200) % 7 == 3, np.arange(200) == 199):
        hits = kernel.scan(view, bitmap(mask), Queries.build(rows[:1]), Weights(), k=300)
        assert sorted(hits.slots[0, : hits.counts[0]].tolist()) == np.flatnonzero(mask).tolist()


class TestRefusals:
    """The face names what is wrong; the kernels never see it."""

    rows = unit_rows(np.random.default_rng(0), 70, 16)

    def scan(self, **changed: object) -> Hits:
        kernel = kernels.load()
        arguments: dict[str, object] = {
            "view": kernel.view([Segment(0, 70, exact=self.rows)]),
            "live": bitmap(np.ones(70, bool)),
            "queries": Queries.build(self.rows[:1]),
            "weights": Weights(),
            "k": 3,
        }
        return kernel.scan(**(arguments | changed))  # type: ignore[arg-type]

    def test_it_takes_what_is_right(self) -> None:
        assert self.scan().slots[0, 0] == 0

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_vector_must_be_finite(self, value: float) -> None:
        broken = self.rows[:2].copy()
        broken[1, 3] = value
        with pytest.raises(ValueError, match="vectors: expected finite"):
            Queries.build(broken)
        with pytest.raises(ValueError, match="vectors: expected finite"):
            kernels.quantize(broken)

    def test_live_must_cover_the_rows(self) -> None:
        with pytest.raises(ValueError, match="live: expected a bit for each of 70"):
            self.scan(live=np.zeros(1, np.uint64))
        with pytest.raises(TypeError, match="live: expected dtype uint64"):
            self.scan(live=np.zeros(4, np.int64))

    def test_queries_must_have_the_dimension_of_the_rows(self) -> None:
        with pytest.raises(ValueError, match="queries: expected vectors of"):
            self.scan(queries=Queries.build(np.ones((1, 17), np.float32)))

    @pytest.mark.parametrize("k", [0, -1])
    def test_k_must_be_positive(self, k: int) -> None:
        with pytest.raises(ValueError, match="k: expected"):
            self.scan(k=k)

    def test_weights_must_be_numbers(self) -> None:
        with pytest.raises(ValueError, match="NaN"):
            Weights(flag=float("nan"))
        with pytest.raises(ValueError, match="layer"):
            Weights(layer=-1.0)

    def test_rows_must_be_contiguous_and_typed(self) -> None:
        with pytest.raises(ValueError, match="exact: expected a C-contiguous"):
            Segment(0, 35, exact=self.rows[::2])
        with pytest.raises(TypeError, match="exact: expected dtype float32"):
            Segment(0, 70, exact=self.rows.astype(np.float64))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="exact: expected shape"):
            Segment(0, 71, exact=self.rows)
        with pytest.raises(ValueError, match="base that is a multiple of 64"):
            Segment(3, 70, exact=self.rows)
        with pytest.raises(TypeError, match="grades: expected a numpy array"):
            Segment(0, 70, codes=np.zeros((70, 64), np.uint8))
        with pytest.raises(ValueError, match="codes: expected rows of a multiple"):
            Segment(0, 70, codes=np.zeros((70, 60), np.uint8), grades=np.zeros(70, np.uint8))

    def test_segments_must_be_in_order(self) -> None:
        segment = Segment(0, 70, exact=self.rows)
        with pytest.raises(ValueError, match="segments"):
            kernels.load().view([segment, Segment(64, 70, exact=self.rows)])

    def test_unknown_variants_and_thread_counts_are_refused(self) -> None:
        with pytest.raises(ValueError, match="threads"):
            kernels.load(threads=0)
        if kernels.IMPLEMENTATION == "compiled":
            with pytest.raises(ValueError, match="variant: this machine runs"):
                kernels.load(variant="mmx")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("offset", [1, 4, 60])
def test_rows_need_not_be_aligned_to_cache_lines(variant: str, offset: int) -> None:
    rng = np.random.default_rng(1)
    n, dim = 150, 96
    rows = unit_rows(rng, n, dim)
    codes, grades, _ = kernels.quantize(rows)
    shifted = np.zeros(codes.nbytes + 64, np.uint8)[offset : offset + codes.nbytes].reshape(codes.shape)
    shifted[:] = codes
    floats = np.zeros(rows.nbytes // 4 + 16, np.float32)[1 : 1 + n * dim].reshape(n, dim)
    floats[:] = rows
    kernel = load(variant)
    queries, live = Queries.build(rows[:5]), bitmap(np.ones(n, bool))
    for segment, moved in (
        (Segment(0, n, codes=codes, grades=grades), Segment(0, n, codes=shifted, grades=grades)),
        (Segment(0, n, exact=rows), Segment(0, n, exact=floats)),
    ):
        plain = kernel.scan(kernel.view([segment]), live, queries, Weights(), k=9)
        other = kernel.scan(kernel.view([moved]), live, queries, Weights(), k=9)
        assert plain.slots.tolist() == other.slots.tolist()
