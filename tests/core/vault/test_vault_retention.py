"""What is kept for how long."""

import msgspec
import pytest
from sqlalchemy import text

from kimera_stream.core.interfaces import WriteBatch
from kimera_stream.core.vault import retention, trimming
from kimera_stream.core.vault.retention import Retention
from kimera_stream.infrastructure.database import Query
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
def steps(monkeypatch):
    """What each transaction drops of the log, at most 7 entries: those that were asked to drop something."""
    made = []
    real = trimming.trim_step

    def step(tx, upto, *, now):
        count, trimmed = real(tx, upto, now=now)
        made.append(count)
        return count, trimmed

    monkeypatch.setattr(trimming, "STEP", 7)
    monkeypatch.setattr(trimming, "trim_step", step)
    return made


async def test_nothing_is_dropped_unless_asked(vault, make_settings, clock):
    await vault.commit(entries(30))
    assert await Retention(vault, make_settings(), clock=clock).run_once() == 0
    assert vault.trimmed == 0


async def test_by_count(vault, make_settings, clock, steps):
    await vault.commit(entries(30))
    made = Retention(vault, make_settings(retention_count=10), clock=clock)
    assert await made.run_once() == 20
    assert steps == [7, 7, 6]
    assert [e.offset for e in (await vault.read("watch:w", after=0, limit=99)).entries] == list(range(21, 31))
    assert await made.run_once() == 0


@pytest.mark.parametrize(("age", "kept"), [(0.010, 10), (0.0295, 30), (0.5, 30), (0.001, 1)])
async def test_by_age(vault, make_settings, clock, age, kept):
    await vault.commit(entries(30, first_ts=clock.now - 30))
    await Retention(vault, make_settings(retention_age=age), clock=clock).run_once()
    left = (await vault.read(None, after=0, limit=99)).entries
    assert all(entry.ts >= clock.now - int(age * 1000) for entry in left)
    assert len(left) in (kept, kept + 1)


async def test_by_bytes(vault, make_settings, clock, steps):
    await vault.commit(entries(300, size=100))
    assert await Retention(vault, make_settings(retention_bytes=5_000), clock=clock).run_once() == 250
    assert (await vault.retained()).payload_bytes == 5_000
    assert steps == [7] * 35 + [5]


async def test_what_is_to_be_freed_is_looked_for_no_further_than_one_step(vault):
    await vault.commit(entries(30, size=100))
    assert [await vault.offset_to_free(excess) for excess in (0, 1, 100, 101, 650, 700, 701, 3_000)] == [
        *(0, 1, 1, 2),
        *(7, 7, 7, 7),
    ]
    await vault.trim(20)
    assert [await vault.offset_to_free(excess) for excess in (0, 250, 900)] == [20, 23, 27]
    await vault.trim(30)
    assert await vault.offset_to_free(1) == 30


async def test_between_the_steps_others_write_and_what_they_write_is_kept(vault, make_settings, clock, monkeypatch):
    await vault.commit(entries(30))
    step, said = trimming.trim_step, []

    def interrupted(tx, upto, *, now):
        said.append(upto)
        return step(tx, upto, now=now)

    async def write_between(run, **how):
        done = await write(run, **how)
        if len(said) == 1:
            said.append(0)
            more = entries(31)
            more.entries = more.entries[30:]
            await vault.commit(more)
        return done

    write = vault._database.write
    monkeypatch.setattr(trimming, "trim_step", interrupted)
    monkeypatch.setattr(vault._database, "write", write_between)
    assert await Retention(vault, make_settings(retention_count=10), clock=clock).run_once() == 20
    assert [e.offset for e in (await vault.read(None, after=0, limit=99)).entries] == list(range(21, 32))


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


async def fill_the_audit_trail(vault, count: int, *, first_ts: int = 0) -> None:
    await vault.commit(WriteBatch(audit=[(first_ts + n, "ann", "delete", f"g{n}") for n in range(count)]))


@pytest.fixture
def _few_rows_a_step(monkeypatch):
    monkeypatch.setattr(retention, "_PER_STEP", 7)


@pytest.mark.usefixtures("_few_rows_a_step")
@pytest.mark.parametrize(("keep", "left"), [(10, 10), (29, 29), (30, 30), (31, 30), (0, 30)])
async def test_the_audit_trail_by_count(vault, make_settings, clock, keep, left):
    await fill_the_audit_trail(vault, 30)
    made = Retention(vault, make_settings(retention_audit_count=keep), clock=clock)
    for _ in range(2):
        await made.run_once()
        assert [each[3] for each in await vault.audit()] == [f"g{n}" for n in range(30 - left, 30)]
    await fill_the_audit_trail(vault, 1, first_ts=99)
    assert (await vault.audit())[-1][0] == 99


@pytest.mark.usefixtures("_few_rows_a_step")
async def test_the_audit_trail_by_count_where_numbers_have_gaps(vault, make_settings, clock):
    await fill_the_audit_trail(vault, 30)
    query = Query(text("DELETE FROM audit_entry WHERE id % 2 = 0"))
    await vault._database.write(lambda tx: tx.run(query))
    await Retention(vault, make_settings(retention_audit_count=15), clock=clock).run_once()
    assert len(await vault.audit()) == 15, "there are no more than may be"
    await Retention(vault, make_settings(retention_audit_count=5), clock=clock).run_once()
    assert len(await vault.audit()) == 5


@pytest.mark.usefixtures("_few_rows_a_step")
@pytest.mark.parametrize(("age", "keep", "left"), [(0.010, 0, 11), (0.010, 5, 5), (0.010, 20, 11), (9.0, 0, 30)])
async def test_the_audit_trail_by_age(vault, make_settings, clock, age, keep, left):
    await fill_the_audit_trail(vault, 30, first_ts=clock.now - 29)
    settings = make_settings(retention_audit_age=age, retention_audit_count=keep)
    await Retention(vault, settings, clock=clock).run_once()
    kept = await vault.audit()
    assert len(kept) == left
    assert kept[-1][3] == "g29"


async def test_nothing_of_a_short_audit_trail_is_dropped_unless_asked(vault, make_settings, clock):
    await Retention(vault, make_settings(), clock=clock).run_once()  # an empty one
    await fill_the_audit_trail(vault, 3)
    await Retention(vault, make_settings(), clock=clock).run_once()
    assert len(await vault.audit()) == 3
    assert make_settings().retention_audit_count == 100_000
