"""What is kept for how long."""

import msgspec
import pytest

from kimera_stream.core.interfaces import WriteBatch
from kimera_stream.core.vault import trimming
from kimera_stream.core.vault.retention import Retention
from kimera_stream.protocol.log import LogEntry

pytestmark = pytest.mark.anyio


def entries(count: int, *, size: int = 10, first_ts: int = 0) -> WriteBatch:
    return WriteBatch(
        entries=[
            LogEntry(o, "watch.matched", first_ts + o, ("watch:w",), msgspec.Raw(b'"' + b"x" * (size - 2) + b'"'))
            for o in range(1, count + 1)
        ]
    )


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    monkeypatch.setattr(trimming, "STEP", 7)


async def test_nothing_is_dropped_unless_asked(vault, make_settings, clock):
    await vault.commit(entries(30))
    assert await Retention(vault, make_settings(), clock=clock).run_once() == 0
    assert vault.trimmed == 0


async def test_by_count(vault, make_settings, clock):
    await vault.commit(entries(30))
    retention = Retention(vault, make_settings(retention_count=10), clock=clock)
    assert await retention.run_once() == 20
    assert [e.offset for e in (await vault.read("watch:w", after=0, limit=99)).entries] == list(range(21, 31))
    assert await retention.run_once() == 0


@pytest.mark.parametrize(("age", "kept"), [(0.010, 10), (0.0295, 30), (0.5, 30), (0.001, 1)])
async def test_by_age(vault, make_settings, clock, age, kept):
    await vault.commit(entries(30, first_ts=clock.now - 30))
    await Retention(vault, make_settings(retention_age=age), clock=clock).run_once()
    left = (await vault.read(None, after=0, limit=99)).entries
    assert all(entry.ts >= clock.now - int(age * 1000) for entry in left)
    assert len(left) in (kept, kept + 1)


async def test_by_bytes(vault, make_settings, clock):
    await vault.commit(entries(300, size=100))
    assert await Retention(vault, make_settings(retention_bytes=5_000), clock=clock).run_once() == 250
    assert (await vault.retained()).payload_bytes == 5_000


async def test_the_strictest_counts_and_everything_may_go(vault, make_settings, clock):
    await vault.commit(entries(30))
    settings = make_settings(retention_count=20, retention_age=1.0, retention_bytes=1_000_000)
    assert await Retention(vault, settings, clock=clock).run_once() == 30
    assert (vault.trimmed, vault.head) == (30, 30)
    assert (await vault.retained()).payload_bytes == 0


async def test_records_of_quiet_sessions_go_and_their_geoids_stay(vault, make_settings, clock, samples):
    await vault.commit(samples.publish(0, "a", session_id="quiet"))
    quiet = await vault.session("quiet")
    await Retention(vault, make_settings(), clock=lambda: quiet.updated_at + 86_400_000).run_once()
    assert await vault.session("quiet") is not None
    late = quiet.updated_at + 2_592_000_001
    await Retention(vault, make_settings(retention_sessions=0), clock=lambda: late).run_once()
    assert await vault.session("quiet") is not None
    await Retention(vault, make_settings(), clock=lambda: late).run_once()
    assert await vault.session("quiet") is None
    assert await vault.geoid("a") is not None
