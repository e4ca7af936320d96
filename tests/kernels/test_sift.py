"""Scanning through a sieve, on every variant: against the exact scan, the bounds' own definition, and the numpy reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimera_stream import kernels
from kimera_stream.kernels import Hits, Queries, Segment, Sieve, Weights, bitmap
from kimera_stream.kernels.layout import NAMED_MASK
from kimera_stream.kernels.sieving import KINDS, LANES, SLACK_OF, UNUSED, kinds_of, most_level, pack, scaled, unpack
from tests.kernels.test_scan import VARIANTS, load, signatures, unit_rows

DIMS = st.sampled_from([8, 15, 33, 64, 130])


def random_sieve(rng: np.random.Generator, rows: np.ndarray, text: np.ndarray, slots: np.ndarray, axes: int) -> Sieve:
    """A right sieve, if not a good one: random axes, and each row in any cell of its kind."""
    dim = rows.shape[1]
    columns, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    kept = np.ascontiguousarray(columns[:, :axes], np.float32)
    short = rows @ kept
    steps = (np.abs(short).max(axis=0, initial=0.01) / 127).astype(np.float32)
    cell_kinds = np.concatenate([np.arange(KINDS), rng.integers(0, KINDS, 2 * LANES - KINDS)]).astype(np.uint8)
    own = kinds_of(text)
    cells = np.array([rng.choice(np.flatnonzero(cell_kinds == kind)) for kind in own], np.int64)
    codes = np.clip(np.rint(short / steps), -127, 127).astype(np.int8)
    left = np.linalg.norm(rows - (codes * steps) @ kept.T, axis=1)
    rest = np.minimum(255, np.ceil(255 * left)).astype(np.uint8)
    parts, rests, starts = [], [], [0]
    order, centres, spread = [], np.zeros((2 * LANES, axes), np.int8), np.zeros(2 * LANES, np.float32)
    for cell in range(2 * LANES):
        at = np.flatnonzero(cells == cell)
        groups = -(-len(at) // LANES)
        filled = np.full(groups * LANES, UNUSED, np.uint32)
        filled[: len(at)] = slots[at]
        order.append(filled)
        parts.append(pack(codes[at]))
        rests.append(np.concatenate([rest[at], np.zeros(groups * LANES - len(at), np.uint8)]))
        starts.append(starts[-1] + groups)
        if len(at):
            centres[cell] = np.rint(codes[at].mean(axis=0))
            spread[cell] = np.sqrt(
                np.square(short[at] - centres[cell] * steps).sum(axis=1) + (rest[at] / 255.0) ** 2
            ).max()
    return Sieve(
        kept, steps, pack(centres), spread, cell_kinds, np.array(starts, np.int64), np.concatenate(parts),
        np.concatenate(rests), np.concatenate(order),
    )  # fmt: skip


class World:
    """Segments with a gap between them, a sieve of some of their rows, and queries."""

    def __init__(self, seed: int, dim: int, n: int, m: int, form: str) -> None:
        rng = self.rng = np.random.default_rng(seed)
        rows, text = unit_rows(rng, n, dim), self.texts(n)
        split = n // 2
        base = -(-split // 64) * 64 + 64
        self.slots = np.concatenate([np.arange(split), base + np.arange(n - split)])
        self.segments = []
        self.lost = 0.0
        for start, end, at in ((0, split, 0), (split, n, base)):
            exact = np.ascontiguousarray(rows[start:end])
            codes, grades, lost = kernels.quantize(exact)
            coded = {"codes": codes, "grades": grades} if form != "exact" else {}
            self.lost = max(self.lost, float(lost.max(initial=0)))
            self.segments.append(
                Segment(at, end - start, exact=None if form == "codes" else exact, text=text[start:end], **coded)
            )
        self.sieve = random_sieve(rng, rows, text, self.slots, max(4, dim // 8 * 4))
        self.live = bitmap(rng.random(base + n) < 0.9)
        vectors = unit_rows(rng, m, dim)
        vectors[: m // 2] = rows[rng.integers(0, n, m // 2)]
        self.queries = Queries.build(
            vectors, text=self.texts(m).tolist(), has_vector=(rng.random(m) < 0.9).tolist(),
            exclude=rng.choice(self.slots, m).tolist(),
        )  # fmt: skip

    def texts(self, n: int) -> np.ndarray:
        return signatures(self.rng, n)


def listed(hits: Hits, i: int) -> list[tuple[int, float]]:
    n = int(hits.counts[i])
    return list(zip(hits.slots[i, :n].tolist(), hits.fused[i, :n].tolist(), strict=True))


@pytest.mark.parametrize("variant", [*VARIANTS, "numpy"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32), dim=DIMS, n=st.sampled_from([1, 15, 64, 200, 700]), m=st.sampled_from([1, 2, 5, 40]),
    k=st.sampled_from([1, 7, 900]), form=st.sampled_from(["exact", "codes", "both"]),
    flag=st.sampled_from([0.0, 0.5]), least=st.sampled_from([-2.0, 0.1]), rescore=st.booleans(),
    threads=st.sampled_from([1, 3]),
)  # fmt: skip
def test_with_large_slacks_it_is_the_exact_scan(
    variant: str, seed: int, dim: int, n: int, m: int, k: int, form: str, flag: float, least: float, rescore: bool, threads: int
) -> None:  # fmt: skip
    world = World(seed, dim, n, m, form)
    kernel = load(variant, threads)
    view = kernel.view(world.segments)
    weights = Weights(min_related=least, flag=flag)
    exact = kernel.scan(view, world.live, world.queries, weights, k=k, margin=world.lost, rescore=rescore)
    found, read = kernel.sift(
        view, world.live, world.queries, weights, world.sieve, k=k, row_slack=50, cell_slack=50, margin=world.lost,
        rescore=rescore,
    )  # fmt: skip
    for i in range(m):
        if not world.queries.has_vector[i]:
            assert found.counts[i] == 0
            continue
        mine, its = listed(found, i), listed(exact, i)
        assert [fused for _, fused in mine] == pytest.approx([fused for _, fused in its], abs=2e-5)
        assert len({slot for slot, _ in mine}) == len(mine)
        if k > n:
            assert {slot for slot, _ in mine} == {slot for slot, _ in its}
            assert read[i] >= len(mine)


@pytest.mark.parametrize("variant", [*VARIANTS, "numpy"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32), dim=DIMS, n=st.sampled_from([15, 64, 700]), m=st.sampled_from([1, 2, 40]),
    k=st.sampled_from([3, 30]), row_slack=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    cell_slack=st.sampled_from([0.0, 0.3, 1.0, 5.0]), least=st.sampled_from([-2.0, 0.2]),
)  # fmt: skip
def test_what_its_bounds_let_through_is_found_and_scored_as_the_scan_does(
    variant: str, seed: int, dim: int, n: int, m: int, k: int, row_slack: float, cell_slack: float, least: float
) -> None:
    world = World(seed, dim, n, m, "exact")
    kernel = load(variant)
    view, weights = kernel.view(world.segments), Weights(min_related=least, flag=0.5)
    everything = kernel.scan(view, world.live, world.queries, weights, k=2 * n + 200)
    found, _ = kernel.sift(
        view, world.live, world.queries, weights, world.sieve, k=k, row_slack=row_slack, cell_slack=cell_slack
    )
    sieve = world.sieve
    codes, steps, rest = sieve.ask(world.queries.vectors)
    cell_of = np.repeat(np.arange(sieve.cells), np.diff(sieve.starts) * LANES)
    for i in np.flatnonzero(world.queries.has_vector).tolist():
        scores, hits = dict(listed(everything, i)), listed(found, i)
        assert [scores[slot] for slot, _ in hits] == pytest.approx([fused for _, fused in hits], abs=2e-5)
        full = len(hits) == k
        floor = hits[-1][1] if full else float("-inf")
        lift = np.array([0.5 * most_level(int(kind), int(world.queries.text[i])) for kind in sieve.kinds])[cell_of]
        last = np.maximum(least, floor - lift)
        through = sieve.slots != UNUSED
        for between in (
            least,
            SLACK_OF,
            np.inf,
        ):  # the bar only rises; a bound is least at either end or where it bends
            bar = np.clip(between, least, last) + 1e-5
            row = (unpack(sieve.codes).astype(int) @ codes[i]) * steps[i]
            row += scaled(row_slack, bar) * rest[i] * sieve.rest / 255.0
            cell = ((unpack(sieve.centres).astype(int) @ codes[i]) * steps[i])[cell_of]
            cell += scaled(cell_slack, bar) * sieve.spread[cell_of]
            through = through & (row >= bar) & (cell >= bar)
        through = sieve.slots[through].tolist()
        wanted = {slot for slot in through if slot in scores and scores[slot] > floor + 1e-5}
        assert wanted <= {slot for slot, _ in hits}


@settings(max_examples=100, deadline=None)
@given(text=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1))
def test_a_kind_never_denies_a_level(text: int, other: int) -> None:
    from kimera_stream.kernels.reference import levels

    other |= other >> 15 & NAMED_MASK >> 15  # as in every signature: what is named by a number has numbers
    text |= text >> 15 & NAMED_MASK >> 15
    level = levels(text, np.array([other], np.uint32))[0]
    assert level <= most_level(int(kinds_of(np.array([other], np.uint32))[0]), text)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(0, 50), quarters=st.integers(1, 9))
def test_packing_loses_nothing(seed: int, n: int, quarters: int) -> None:
    rows = np.random.default_rng(seed).integers(-127, 128, (n, 4 * quarters)).astype(np.int8)
    packed = pack(rows)
    assert unpack(packed)[:n].tolist() == rows.tolist()
    assert not unpack(packed)[n:].any()


class TestRefusals:
    world = World(0, 16, 200, 2, "both")

    def sift(self, **changed: object) -> None:
        kernel = kernels.load()
        arguments: dict[str, object] = {
            "view": kernel.view(self.world.segments), "live": self.world.live, "queries": self.world.queries,
            "weights": Weights(), "sieve": self.world.sieve, "k": 3, "row_slack": 0.4, "cell_slack": 0.4,
        }  # fmt: skip
        kernel.sift(**(arguments | changed))  # type: ignore[arg-type]

    def test_it_takes_what_is_right(self) -> None:
        self.sift()

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"weights": Weights(l1=0.1)}, "weights: a sieve knows no L1"),
            ({"weights": Weights(layer=0.1)}, "weights: a sieve knows"),
            ({"weights": Weights(flag=-0.1)}, "weights: a sieve knows"),
            ({"row_slack": float("nan")}, "row_slack"),
            ({"cell_slack": -1.0}, "row_slack, cell_slack"),
            ({"queries": Queries.build(np.ones((1, 17), np.float32))}, "queries: expected vectors of"),
            ({"live": np.zeros(1, np.uint64)}, "live: expected a bit"),
            ({"k": 0}, "k: expected"),
        ],
    )
    def test_it_names_what_is_wrong(self, changed: dict[str, object], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            self.sift(**changed)

    def test_a_sieve_of_other_rows_is_refused(self) -> None:
        kernel = kernels.load()
        with pytest.raises(ValueError, match="sieve: holds slots that the view lacks"):
            self.sift(view=kernel.view(self.world.segments[:1]))

    def test_a_sieve_must_be_whole(self) -> None:
        good = self.world.sieve
        fields = {name: getattr(good, name) for name in Sieve.__slots__ if name != "end"}
        Sieve(**fields)
        with pytest.raises(ValueError, match="starts"):
            Sieve(**(fields | {"starts": good.starts[::-1].copy()}))
        with pytest.raises(ValueError, match="codes: expected numbers from"):
            Sieve(**(fields | {"codes": np.full_like(good.codes, -128)}))
        with pytest.raises(ValueError, match="steps"):
            Sieve(**(fields | {"steps": np.zeros_like(good.steps)}))
        with pytest.raises(ValueError, match="kinds"):
            Sieve(**(fields | {"kinds": np.full_like(good.kinds, 9)}))
        with pytest.raises(ValueError, match="rest: expected shape"):
            Sieve(**(fields | {"rest": good.rest[1:].copy()}))
