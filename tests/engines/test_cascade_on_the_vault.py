"""The cascade over the real vault, cache and index: what was committed is found, also after a restart."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from kimera_stream.core.embedding import HashingProvider
from kimera_stream.core.geoid import built
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.index import FlatIndex
from kimera_stream.core.interfaces import StoredGeoid, WriteBatch
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.engines.contradiction import CascadeEngine
from kimera_stream.infrastructure.settings import DatabaseSettings, PerformanceSettings, ScoringSettings
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import GeoidBody

pytestmark = pytest.mark.anyio
T = TypeVar("T")
DIMENSION = 128
encoder = HashingProvider(DIMENSION)


class OneThread:
    """``Threads`` without limits."""

    async def run(self, purpose: str, fn: Callable[..., T], *args: Any) -> T:
        return await anyio.to_thread.run_sync(fn, *args)


@pytest.fixture
async def vault(tmp_path: Path) -> AsyncIterator[SqlVault]:
    opened = SqlVault(f"sqlite+aiosqlite:///{tmp_path / 'log.sqlite3'}", DatabaseSettings())
    await opened.start()
    yield opened
    await opened.close()


def geoid(geoid_id: str, text: str, offset: int, **state: Any) -> StoredGeoid:
    body = GeoidBody(text=text, symbolic_state=state)
    made = built(body, geoid_id=geoid_id, session_id=None, now=1_700_000_000_000, offset=offset, previous=None)
    return StoredGeoid(made, encoder.encode_now([text])[0], "tester")


async def commit(vault: SqlVault, *stored: StoredGeoid) -> None:
    entries = [
        LogEntry(
            each.geoid.offset,
            "geoid.created",
            each.geoid.created_at,
            ("geoids", f"geoid:{each.geoid.id}"),
            msgspec.Raw(msgspec.json.encode(each.geoid)),
        )
        for each in stored
    ]
    await vault.commit(WriteBatch(entries=entries, geoids=list(stored)))


async def engine_over(vault: SqlVault) -> CascadeEngine:
    """As a start does it: the index is rebuilt from the vault, and the cache is empty."""
    scoring = ScoringSettings(min_relatedness=0.3)
    index = FlatIndex(DIMENSION, threads=OneThread(), performance=PerformanceSettings(), scoring=scoring)
    async for columns in vault.scan_columns(batch=100, dimension=DIMENSION):
        index.put_many(columns)
    return CascadeEngine(index, GeoidCache(vault, 1_000_000), None, scoring, OneThread(), CollectorRegistry())


async def test_what_was_committed_is_found_after_a_restart(vault: SqlVault) -> None:
    await commit(
        vault,
        geoid("door", "The door of the lab is open.", 1),
        geoid("state", "Boiler two, morning round", 2, subject="boiler-2", status="on"),
        geoid("other", "Paris is the capital of France.", 3),
    )
    engine = await engine_over(vault)
    fresh = [
        geoid("new", "The door of the lab is closed.", 4),
        geoid("round", "A wholly different wording", 5, subject="boiler-2", status="off"),
    ]
    first, second = await engine.detect(fresh)
    assert [older.geoid.id for older, _ in first] == ["door"]
    assert [(older.geoid.id, judged.gradient_type) for older, judged in second] == [("state", "symbolic")]
    assert first[0][0].geoid.text == "The door of the lab is open."
