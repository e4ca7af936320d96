"""Filling the index at start: what a snapshot spares, when one is written, and what happens when it cannot be used."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import anyio
import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from kimera_stream.core.columns import GeoidColumns
from kimera_stream.core.index import FlatIndex, SnapshotKeeper
from kimera_stream.core.index.rows import columns_of
from kimera_stream.core.interfaces import LogPage, Page, StoredGeoid, VaultService
from kimera_stream.engines.field import FieldDynamics
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.errors import LimitExceededError, UnavailableError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Components, Contradiction, ContradictionState, Geoid

DIM = 8
_COMPONENTS = Components(
    relatedness=0.5, semantic=0, embedding_misalignment=0, layer_conflict=0, symbolic_opposition=1, composite=0.5
)

pytestmark = [pytest.mark.anyio, pytest.mark.allow_blocking]


class Threads:
    async def run(self, purpose: str, fn: Any, *args: Any) -> Any:
        return fn(*args)


class Sink:
    def deliver(self, entries: Sequence[LogEntry]) -> None:
        raise AssertionError("nothing is told at the start")

    def latest(self, channel: str, type: str, data: bytes, *, offset: int) -> None:
        raise AssertionError("nothing is told at the start")


class Vault:
    """A log and what it leads to, in memory."""

    def __init__(self) -> None:
        self.epoch = "e"
        self.trimmed = 0
        self.held: dict[str, StoredGeoid] = {}
        self.contradictions: dict[str, Contradiction] = {}
        self.entries: list[LogEntry] = []
        self.scans = 0
        self.fault: Exception | None = None

    @property
    def head(self) -> int:
        return len(self.entries)

    def _log(self, type: str, value: Any) -> None:
        data = msgspec.Raw(msgspec.json.encode(value))
        self.entries.append(LogEntry(self.head + 1, type, 1_000 + self.head, ("geoids",), data))

    def put(self, id: str, seed: int) -> None:
        vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
        geoid = Geoid(
            id=id, version=1, text=f"said {seed}", semantic_state={}, symbolic_state={"subject": id, "a key": seed},
            metadata={}, entropy=0.0, created_at=0, updated_at=0, offset=self.head + 1,
        )  # fmt: skip
        self.held[id] = StoredGeoid(geoid, vector / np.linalg.norm(vector), "p")
        self._log("geoid.created", geoid)

    def delete(self, id: str) -> None:
        del self.held[id]
        self._log("geoid.deleted", {"id": id, "version": 2})

    def clash(self, a: str, b: str, state: ContradictionState = "open") -> None:
        found = Contradiction(
            id=f"{a}-{b}", version=1, state=state, a=a, b=b, score=0.9, components=_COMPONENTS,
            gradient_type="symbolic", pulse_strength=0.5, decision="collapse", model="m", provisional=False,
            detected_at=0, why=[], a_text=None, b_text=None, offset=self.head + 1,
        )  # fmt: skip
        self.contradictions[found.id] = found
        self._log("contradiction.detected", found)

    async def read(self, channel: str | None, *, after: int, limit: int, until: int | None = None) -> LogPage:
        assert channel is None
        self._fail()
        low = max(after, self.trimmed)
        page = self.entries[low : min(self.head if until is None else until, low + min(limit, 7))]  # small: it goes on
        scanned = page[-1].offset if page else max(after, self.head)
        return LogPage(page, scanned, more=scanned < self.head)

    def _fail(self) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    async def geoids(self, ids: list[str]) -> dict[str, StoredGeoid]:
        return {id: self.held[id] for id in ids if id in self.held}

    async def count_geoids(self) -> int:
        return len(self.held)

    async def scan_columns(self, *, batch: int, dimension: int) -> AsyncIterator[GeoidColumns]:
        self.scans += 1
        held = sorted(self.held.values(), key=lambda stored: stored.geoid.offset)
        for start in range(0, len(held), 7):
            yield columns_of(held[start : start + 7], dimension)
            self._fail()

    async def list_contradictions(self, *, after: int, limit: int, state: str) -> Page[Contradiction]:
        return Page([each for each in self.contradictions.values() if each.state == state], None)


class World:
    """One process: an index, a field and their keeper on a vault that outlives it."""

    def __init__(self, vault: Vault, directory: Path, *, model: str = "m", **performance: Any) -> None:
        settings = PerformanceSettings(scan_threads=1, **performance)
        self.vault = vault
        self.now = 1_000.0
        self.index = FlatIndex(DIM, threads=Threads(), performance=settings, scoring=ScoringSettings())
        self.field = FieldDynamics(DIM, Sink(), interval=1.0, head=lambda: vault.head, clock=lambda: self.now)
        self.registry = CollectorRegistry()
        self.keeper = SnapshotKeeper(
            self.index, self.field, cast("VaultService", vault), Threads(), directory, settings,
            model=model, registry=self.registry, clock=lambda: self.now,
        )  # fmt: skip

    async def restored(self) -> "World":
        await self.keeper.restore(lambda _: None)
        return self

    async def assert_holds_everything(self) -> None:
        assert self.index.size == len(self.vault.held)
        for id, stored in self.vault.held.items():
            assert stored.vector is not None
            ((first, *_),) = await self.index.related(stored.vector[None], k=1)
            assert first.geoid_id == id
        state = self.field.state()
        assert state.geoids == len(self.vault.held)
        assert sum(cluster["size"] for cluster in state.clusters) == len(self.vault.held)
        opened = [each for each in self.vault.contradictions.values() if each.state == "open"]
        assert state.open_contradictions == len(opened)
        assert state.temperature == pytest.approx(100 * 0.5 * len(opened) / len(self.vault.held))


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_the_snapshot_and_the_tail_of_the_log_make_the_whole(tmp_path: Path) -> None:
    vault = Vault()
    for i in range(30):
        vault.put(f"g{i}", i)
    vault.clash("g1", "g2")
    vault.clash("g5", "g6")
    world = await World(vault, tmp_path).restored()
    assert (world.keeper.statistics.source, vault.scans) == ("vault", 1)
    await world.assert_holds_everything()
    assert await world.keeper.save()
    vault.delete("g3")
    vault.put("g4", 400)
    for i in range(30, 60):
        vault.put(f"g{i}", i)
    vault.delete("g40")
    vault.clash("g5", "g6", "resolved")
    vault.clash("g30", "g31")
    again = await World(vault, tmp_path).restored()
    assert (again.keeper.statistics.source, again.keeper.statistics.replayed, vault.scans) == ("snapshot", 35, 1)
    assert again.registry.get_sample_value("kimera_index_restored", {"source": "snapshot"}) == 1
    await again.assert_holds_everything()


async def test_the_snapshot_reaches_as_far_as_what_was_told_and_no_further(tmp_path: Path) -> None:
    vault = Vault()
    for i in range(5):
        vault.put(f"g{i}", i)
    world = await World(vault, tmp_path).restored()
    vault.put("committed, not told", 9)
    world.keeper.follow(lambda: 5)
    assert await world.keeper.save()
    assert world.keeper.statistics.offset == 5
    again = await World(vault, tmp_path).restored()
    assert (again.keeper.statistics.source, again.keeper.statistics.replayed) == ("snapshot", 1)
    await again.assert_holds_everything()


def _spoil(path: Path, trouble: str, vault: Vault) -> dict[str, Any]:
    if trouble == "cut short":
        path.write_bytes(path.read_bytes()[:-7])
    elif trouble == "flipped":
        content = bytearray(path.read_bytes())
        half = len(content) // 2
        content[next(i for i in range(half, len(content)) if content[i])] ^= 1  # not in what fills up a page
        path.write_bytes(content)
    elif trouble == "not ours":
        path.write_bytes(b"something else" * 1_000)
    elif trouble == "earlier version":
        with path.open("r+b") as file:
            file.write(b"KIMIDX\x00\x03")
    elif trouble == "ahead":  # a backup of the database, copied over it
        del vault.entries[5:]
        vault.held = {f"g{i}": vault.held[f"g{i}"] for i in range(5)}
    elif trouble == "another past":  # and then the server went on: the same offsets mean other things
        del vault.entries[5:]
        vault.held = {f"g{i}": vault.held[f"g{i}"] for i in range(5)}
        for i in range(20):
            vault.put(f"h{i}", 100 + i)
    elif trouble == "trimmed":
        vault.trimmed = 12
    elif trouble == "other log":
        vault.epoch = "another"
    return {"model": "another"} if trouble == "other encoder" else {}


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("cut short", "damaged"),
        ("flipped", "damaged"),
        ("not ours", "foreign"),
        ("earlier version", "foreign"),
        ("other encoder", "foreign"),
        ("other log", "foreign"),
        ("ahead", "ahead"),
        ("another past", "diverged"),
        ("trimmed", "behind"),
    ],
)
async def test_a_snapshot_that_cannot_be_used_is_told_of_deleted_and_done_without(
    tmp_path: Path, trouble: str, reason: str
) -> None:
    vault = Vault()
    for i in range(10):
        vault.put(f"g{i}", i)
    world = await World(vault, tmp_path).restored()
    await world.keeper.save()
    path = tmp_path / files(tmp_path)[0]
    if trouble == "trimmed":
        for i in range(10, 15):
            vault.put(f"g{i}", i)
    changes = _spoil(path, trouble, vault)
    again = await World(vault, tmp_path, **changes).restored()
    stats = again.keeper.statistics
    assert (stats.source, vault.scans) == ("vault", 2)
    assert stats.rejected.startswith(reason)
    assert again.keeper.trouble == stats.rejected
    assert again.registry.get_sample_value("kimera_index_snapshots_total", {"outcome": "rejected"}) == 1
    await again.assert_holds_everything()
    assert files(tmp_path) == []


async def test_where_the_newest_is_damaged_the_one_before_it_serves(tmp_path: Path) -> None:
    vault = Vault()
    world = await World(vault, tmp_path).restored()
    for upto in (10, 20, 30):
        for i in range(upto - 10, upto):
            vault.put(f"g{i}", i)
        assert await (await World(vault, tmp_path).restored()).keeper.save()
    assert files(tmp_path) == [f"index-{20:020d}.snapshot", f"index-{30:020d}.snapshot"], "no more than two are kept"
    _spoil(tmp_path / f"index-{30:020d}.snapshot", "flipped", vault)
    world = await World(vault, tmp_path).restored()
    stats = world.keeper.statistics
    assert (stats.source, stats.replayed, stats.offset) == ("snapshot", 10, 20)
    await world.assert_holds_everything()


async def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "index-00000000000000000009.snapshot.partial").write_bytes(b"half of it")
    await World(Vault(), tmp_path).restored()
    assert files(tmp_path) == []


async def test_switched_off_none_is_written_or_used(tmp_path: Path) -> None:
    vault = Vault()
    vault.put("g", 1)
    await (await World(vault, tmp_path).restored()).keeper.save()
    world = await World(vault, tmp_path, snapshots_kept=0).restored()
    assert (world.keeper.statistics.source, vault.scans) == ("vault", 2)
    vault.put("h", 2)
    await world.keeper.finish(5.0)
    assert len(files(tmp_path)) == 1


async def test_one_is_due_by_time_or_by_number_and_not_too_often(tmp_path: Path) -> None:
    vault = Vault()
    world = World(vault, tmp_path, snapshot_interval=60.0, snapshot_entries=5)
    keeper = (await world.restored()).keeper
    world.now += 1_000
    assert not keeper._is_due(), "nothing has changed"
    for i in range(4):
        vault.put(f"g{i}", i)
    assert keeper._is_due(), "the interval is over"
    await keeper.save()
    vault.put("g4", 4)
    assert not keeper._is_due()
    for i in range(5, 9):
        vault.put(f"g{i}", i)
    assert keeper._is_due(), "there are five new entries"
    keeper._not_before = world.now + 1
    assert not keeper._is_due(), "the one before took long"


async def test_a_failure_is_told_and_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = Vault()
    world = await World(vault, tmp_path, snapshot_entries=1).restored()
    vault.put("g", 1)
    told: list[str] = []
    world.keeper.on_change(lambda: told.append(world.keeper.trouble))
    with monkeypatch.context() as patch:
        patch.setattr("kimera_stream.core.index.snapshot.RESERVE", 1 << 62)
        assert not await world.keeper.save()
    vault.fault = UnavailableError("the database is away")
    assert not await world.keeper.save()
    assert world.keeper.statistics.failed == 2
    assert not world.keeper._is_due()
    world.now += 61
    assert world.keeper._is_due()
    assert await world.keeper.save()
    assert [("No space" in each, "away" in each) for each in told] == [
        (False, False), (True, False), (False, True), (False, False),
    ]  # fmt: skip
    assert world.registry.get_sample_value("kimera_index_snapshots_total", {"outcome": "failed"}) == 2


async def test_a_stop_that_has_no_time_left_gives_up(tmp_path: Path) -> None:
    vault = Vault()
    world = await World(vault, tmp_path).restored()
    vault.put("g", 1)
    began = anyio.Event()

    class Slow(Threads):
        async def run(self, purpose: str, fn: Any, *args: Any) -> Any:
            began.set()
            with anyio.CancelScope(shield=True):  # as a thread: it ends by itself
                for _ in range(3):
                    await anyio.lowlevel.checkpoint()
            return fn(*args)

    world.keeper._threads = Slow()
    async with anyio.create_task_group() as group:
        group.start_soon(world.keeper.finish, 60.0)
        await began.wait()
        group.cancel_scope.cancel()
    assert files(tmp_path) == []
    assert world.keeper.statistics.written == 0


async def test_a_load_that_fails_half_way_starts_anew(tmp_path: Path) -> None:
    vault = Vault()
    for i in range(20):
        vault.put(f"g{i}", i)
    world = World(vault, tmp_path)
    vault.fault = UnavailableError("the database is away")
    with pytest.raises(UnavailableError):
        await world.restored()
    vault.delete("g0")
    await (await world.restored()).assert_holds_everything()


async def test_more_than_fits_is_an_error_or_the_newest(tmp_path: Path) -> None:
    vault = Vault()
    for i in range(20):
        vault.put(f"g{i}", i)
    await (await World(vault, tmp_path).restored()).keeper.save()
    with pytest.raises(LimitExceededError, match="KIMERA_PERFORMANCE__MAX_GEOIDS"):
        await World(vault, tmp_path, max_geoids=10).restored()
    world = await World(vault, tmp_path, max_geoids=5, index_full="evict_oldest").restored()
    assert [i for i in range(20) if f"g{i}" in world.index] == [15, 16, 17, 18, 19]
    assert world.field.state().geoids == 5, "the field holds what the index holds"
