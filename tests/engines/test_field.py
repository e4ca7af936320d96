"""The field follows what is committed: clusters, temperature, activation, stability."""

import math

import anyio
import msgspec
import numpy as np
import pytest

from kimera_stream.core.columns import GeoidColumns
from kimera_stream.core.index.rows import columns_of
from kimera_stream.core.interfaces import StoredGeoid, WriteBatch
from kimera_stream.engines import field as module
from kimera_stream.engines.field import CALM, MOST_CLUSTERS, TAU, FieldDynamics
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Components, Contradiction, FieldState, Geoid


class Sink:
    def __init__(self) -> None:
        self.values: list[tuple[str, str, FieldState, int]] = []
        self.got = anyio.Event()

    def deliver(self, entries: object) -> None:
        raise AssertionError("the field delivers no entries")

    def latest(self, channel: str, type: str, data: bytes, *, offset: int) -> None:
        self.values.append((channel, type, msgspec.json.decode(data, type=FieldState), offset))
        self.got.set()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def stored(geoid_id: str, vector: list[float] | None) -> StoredGeoid:
    geoid = Geoid(
        id=geoid_id,
        version=1,
        semantic_state={},
        symbolic_state={},
        metadata={},
        entropy=0,
        created_at=1,
        updated_at=1,
        offset=1,
    )
    if vector is None:
        return StoredGeoid(geoid, None, "p")
    array = np.array(vector, np.float32)
    return StoredGeoid(geoid, array / np.linalg.norm(array), "p")


def columns(geoids: list[StoredGeoid]) -> GeoidColumns:
    return columns_of(geoids, 3)


def contradiction(name: str, a: str, b: str, state: str = "open") -> Contradiction:
    parts = Components(
        relatedness=1, semantic=1, embedding_misalignment=0, layer_conflict=0, symbolic_opposition=0, composite=0
    )
    return Contradiction(
        id=name, a=a, b=b, score=0.9, components=parts, why=[], gradient_type="semantic", pulse_strength=0.8,
        decision="collapse", state=state, model="m", detected_at=1, offset=1,
    )  # fmt: skip


def entry(offset: int) -> LogEntry:
    return LogEntry(offset, "geoid.created", 1, ("geoids",), msgspec.Raw(b"{}"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def field(clock: Clock) -> FieldDynamics:
    return FieldDynamics(3, Sink(), interval=0.01, head=lambda: 7, clock=clock)


def test_an_empty_field_is_calm_and_stable(field: FieldDynamics) -> None:
    state = field.state()
    assert (state.geoids, state.entropy, state.temperature, state.activation, state.stability) == (0, 0, 0, 0, 1)
    assert state.clusters == []


def test_statements_that_mean_alike_gather(field: FieldDynamics) -> None:
    field.observe(
        WriteBatch(
            entries=[entry(1), entry(2), entry(3), entry(4)],
            geoids=[stored("a", [1, 0, 0]), stored("b", [1, 0.1, 0]), stored("c", [0, 1, 0]), stored("d", [0, 1, 0.1])],
        )
    )
    state = field.state()
    assert [cluster["size"] for cluster in state.clusters] == [2, 2]
    assert {cluster["exemplar"] for cluster in state.clusters} == {"a", "c"}
    assert state.entropy == pytest.approx(1.0)
    assert state.activation == pytest.approx(1 - math.exp(-4 / CALM))


def test_updates_and_deletes_leave_the_old_cluster(field: FieldDynamics) -> None:
    field.restore(columns([stored("a", [1, 0, 0]), stored("b", [1, 0, 0]), stored("none", None)]))
    field.observe(WriteBatch(entries=[entry(1)], geoids=[stored("b", [0, 1, 0])]))
    assert sorted(cluster["size"] for cluster in field.state().clusters) == [1, 1]
    field.observe(WriteBatch(entries=[entry(2)], deleted=[("a", 2), ("unknown", 2)]))
    state = field.state()
    assert [cluster["size"] for cluster in state.clusters] == [1]
    assert state.geoids == 2


def test_a_load_that_starts_anew_counts_nothing_twice(field: FieldDynamics) -> None:
    loaded = [stored("a", [1, 0, 0]), stored("b", [1, 0.1, 0]), stored("c", [0, 1, 0])]
    for part in (loaded[:2], loaded):  # the first attempt ended half-way
        field.restore(columns(part))
        field.restore_contradictions([contradiction("x", "a", "b")])
    state = field.state()
    assert (state.geoids, state.open_contradictions) == (3, 1)
    assert sorted(cluster["size"] for cluster in state.clusters) == [1, 2]


def test_open_contradictions_heat_and_resolved_ones_cool(field: FieldDynamics) -> None:
    field.restore(columns([stored(name, [1, 0, 0]) for name in "abcd"]))
    field.restore_contradictions([contradiction("x", "a", "b")])
    field.observe(WriteBatch(entries=[entry(1)], contradictions=[contradiction("y", "a", "c")]))
    hot = field.state()
    assert hot.temperature == pytest.approx(100 * 1.6 / 4)
    assert hot.stability == pytest.approx(1 / 4)
    assert hot.clusters[0]["open_contradictions"] == 2
    field.observe(WriteBatch(entries=[entry(2)], contradictions=[contradiction("x", "a", "b", "resolved")]))
    assert field.state().stability == pytest.approx(2 / 4)
    field.observe(WriteBatch(entries=[entry(3)], contradictions=[contradiction("y", "a", "c", "dissolved")]))
    cool = field.state()
    assert (cool.temperature, cool.stability, cool.open_contradictions) == (0, 1, 0)


@pytest.mark.parametrize("frozen", [False, True])
def test_more_open_contradictions_than_are_known_one_by_one_count_all_the_same(
    monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    """What is kept of them is bounded, and nothing is told otherwise for it; over a snapshot, too."""
    bounded, plain = (FieldDynamics(3, Sink(), interval=0.01, head=lambda: 7, clock=Clock()) for _ in range(2))
    names = [f"g{number}" for number in range(12)]
    pairs = [contradiction(f"c{number}", names[number], names[(number * 5 + 1) % 12]) for number in range(10)]
    ended = [msgspec.structs.replace(pairs[number], state="resolved") for number in (0, 9, 3, 1, 8, 2, 4, 5, 7, 6)]
    batches = [WriteBatch(entries=[entry(1)], contradictions=[each]) for each in (*pairs, pairs[9], *ended)]
    for field in (bounded, plain):
        field.restore(columns([stored(name, [1, number % 2 * 9, 0]) for number, name in enumerate(names)]))
    for batch in batches:
        plain.observe(batch)
        with monkeypatch.context() as patch:
            patch.setattr(module, "MOST_OPEN", 3)
            bounded.observe(batch)
        if frozen:
            kept, bounded = bounded, FieldDynamics(3, Sink(), interval=0.01, head=lambda: 7, clock=Clock())
            bounded.thaw(kept.freeze()())
        assert len(bounded._open) <= 3
        found, wanted = (
            msgspec.structs.replace(each.state(), temperature=0.0, activation=0.0) for each in (bounded, plain)
        )
        assert found == wanted
        assert bounded.state().temperature == pytest.approx(plain.state().temperature)
    assert (bounded.state().open_contradictions, bounded.state().temperature, len(bounded._involved)) == (0, 0, 0)


def test_activation_decays(field: FieldDynamics, clock: Clock) -> None:
    field.observe(WriteBatch(entries=[entry(i) for i in range(50)]))
    clock.now += TAU
    assert field.state().activation == pytest.approx(1 - math.exp(-math.exp(-1)))


def test_clusters_are_bounded() -> None:
    field = FieldDynamics(128, Sink(), interval=1, head=lambda: 0, clock=Clock())
    field.restore(columns_of([stored(f"g{i}", list(np.eye(128)[i])) for i in range(128)], 128))
    state = field.state()
    assert state.geoids == 128
    assert state.entropy <= math.log2(MOST_CLUSTERS)
    field.observe(WriteBatch(entries=[entry(1)], geoids=[stored("g0", list(np.eye(128)[127]))]))
    assert field.state().geoids == 128


@pytest.mark.anyio
async def test_values_go_out_only_when_something_changed(clock: Clock) -> None:
    sink = Sink()
    field = FieldDynamics(3, sink, interval=0.001, head=lambda: 7, clock=clock)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(field.run)
            await sink.got.wait()
            assert sink.values[0][:2] == ("field", "field.updated")
            assert sink.values[0][3] == 7
            assert len(sink.values) == 1
            assert not field.emit()
            sink.got = anyio.Event()
            field.observe(WriteBatch(entries=[entry(1)], geoids=[stored("a", [1, 0, 0])]))
            await sink.got.wait()
            assert sink.values[1][2].geoids == 1
            group.cancel_scope.cancel()
