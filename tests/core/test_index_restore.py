"""Filling the index at start: what a snapshot spares, and what happens when it cannot be used."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from kimera_stream.core.index import FlatIndex, Restored, restore_index
from kimera_stream.core.interfaces import LogPage, StoredGeoid, VaultService
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Geoid

DIM = 8


class Threads:
    async def run(self, purpose: str, fn: Any, *args: Any) -> Any:
        return fn(*args)


class Vault:
    """Geoids and the channel ``geoids`` of a log, in memory."""

    epoch = "e"
    trimmed = 0

    def __init__(self) -> None:
        self.held: dict[str, StoredGeoid] = {}
        self.entries: list[LogEntry] = []
        self.scans = 0

    @property
    def head(self) -> int:
        return len(self.entries)

    def _log(self, type: str, id: str) -> None:
        self.entries.append(LogEntry(self.head + 1, type, 0, ("geoids",), msgspec.Raw(msgspec.json.encode({"id": id}))))

    def put(self, id: str, seed: int) -> None:
        vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
        geoid = Geoid(
            id=id, version=1, semantic_state={}, symbolic_state={}, metadata={}, entropy=0.0, created_at=0,
            updated_at=0, offset=self.head + 1,
        )  # fmt: skip
        self.held[id] = StoredGeoid(geoid, vector / np.linalg.norm(vector), "p")
        self._log("geoid.created", id)

    def delete(self, id: str) -> None:
        del self.held[id]
        self._log("geoid.deleted", id)

    async def read(self, channel: str, *, after: int, limit: int) -> LogPage:
        assert channel == "geoids"
        page = self.entries[after : after + min(limit, 7)]  # small pages: the replay has to go on
        scanned = page[-1].offset if page else self.head
        return LogPage(page, scanned, more=scanned < self.head)

    async def geoids(self, ids: list[str]) -> dict[str, StoredGeoid]:
        return {id: self.held[id] for id in ids if id in self.held}

    async def scan_geoids(self, *, batch: int) -> AsyncIterator[list[StoredGeoid]]:
        self.scans += 1
        yield list(self.held.values())


def make() -> FlatIndex:
    return FlatIndex(DIM, threads=Threads(), performance=PerformanceSettings(scan_threads=1), scoring=ScoringSettings())


async def restored(vault: Vault, path: Path, model: str = "m") -> tuple[FlatIndex, Restored]:
    index = make()
    return index, await restore_index(index, cast("VaultService", vault), path, model=model)


async def assert_holds(index: FlatIndex, vault: Vault) -> None:
    assert index.size == len(vault.held)
    for id, stored in vault.held.items():
        assert stored.vector is not None
        ((first, *_),) = await index.related(stored.vector[None], k=1)
        assert first.geoid_id == id


@pytest.mark.anyio
@pytest.mark.allow_blocking
async def test_the_snapshot_and_the_tail_of_the_log_make_the_whole(tmp_path: Path) -> None:
    vault, path = Vault(), tmp_path / "index.snapshot"
    for i in range(30):
        vault.put(f"g{i}", i)
    index, how = await restored(vault, path)
    assert how == Restored("vault", 30)
    await index.save(path, model="m", epoch="e", offset=vault.head)
    vault.delete("g3")
    vault.put("g4", 400)
    for i in range(30, 60):
        vault.put(f"g{i}", i)
    vault.delete("g40")
    again, how = await restored(vault, path)
    assert how.source == "snapshot"
    assert vault.scans == 1
    await assert_holds(again, vault)


@pytest.mark.anyio
@pytest.mark.allow_blocking
@pytest.mark.parametrize("trouble", ["damaged", "foreign", "ahead", "trimmed", "other log"])
async def test_a_snapshot_that_cannot_be_used_is_rebuilt_from_the_vault(tmp_path: Path, trouble: str) -> None:
    vault, path = Vault(), tmp_path / "index.snapshot"
    for i in range(10):
        vault.put(f"g{i}", i)
    index, _ = await restored(vault, path)
    await index.save(path, model="m", epoch="e", offset=99 if trouble == "ahead" else 5)
    if trouble == "damaged":
        path.write_bytes(path.read_bytes()[:-7])
    vault.trimmed = 7 if trouble == "trimmed" else 0
    vault.epoch = "another" if trouble == "other log" else "e"
    again, how = await restored(vault, path, model="another" if trouble == "foreign" else "m")
    assert how == Restored("vault", 10)
    await assert_holds(again, vault)
