"""The log: order, pages, channels, durability of what is read."""

import sqlite3
from contextlib import closing

import anyio
import anyio.from_thread
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import asyncpg

from kimera_stream.core.interfaces import FramePage, FrameReader, LogPage, VaultService, WriteBatch
from kimera_stream.core.vault import entries as vault_entries
from kimera_stream.core.vault.errors import DamagedLogError
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.core.vault.writing import write_batch
from kimera_stream.infrastructure.database import Query, Transaction
from kimera_stream.protocol.codec import EventEncoder
from kimera_stream.protocol.errors import ConflictError
from kimera_stream.protocol.log import LogEntry

pytestmark = pytest.mark.anyio


async def test_is_a_vault_service(vault):
    assert isinstance(vault, VaultService)


async def test_an_empty_log_has_an_epoch_and_no_entries(vault):
    assert vault.epoch
    assert (vault.head, vault.trimmed) == (0, 0)
    assert await vault.read(None, after=0, limit=10) == LogPage([], 0, more=False)
    assert await vault.read("geoids", after=0, limit=10, reverse=True) == LogPage([], 0, more=False)


async def test_entries_come_back_as_they_were_committed(vault, samples):
    batch = samples.publish(
        0, "a", "b", text='Grüße, "quoted" \x1e\x1f \\ 語', session_id="s1", originator_agent_id="g1"
    )
    await vault.commit(batch)
    assert vault.head == 2
    for channel in (None, "geoids", "session:s1", "agent:g1"):
        page = await vault.read(channel, after=0, limit=10)
        assert [entry.value() for entry in page.entries] == [entry.value() for entry in batch.entries]
        assert [(e.offset, e.type, e.ts, e.channels) for e in page.entries] == [
            (e.offset, e.type, e.ts, e.channels) for e in batch.entries
        ]
        assert bytes(page.entries[0].data) == bytes(batch.entries[0].data)
    only = await vault.read("geoid:b", after=0, limit=10)
    assert [entry.offset for entry in only.entries] == [2]
    assert (only.scanned, only.more) == (2, False)


class CountingCursor:
    """A driver's cursor that only takes down what it is given."""

    rowcount = 1

    def __init__(self) -> None:
        self.statements: list[str] = []

    def execute(self, sql, parameters):
        self.statements.append(sql)

    def fetchall(self):
        return []


def test_on_postgresql_a_new_statement_goes_to_the_server_in_two_parts(samples):
    """The head first, whose lock orders writers, then everything else at once: each part is a round trip."""
    cursor = CountingCursor()
    write_batch(Transaction(asyncpg.dialect(), cursor), samples.publish(4, "a", session_id="s1"), 0)
    head, rest = cursor.statements
    assert head.startswith("UPDATE log_state")
    for table in ("log_entry", "log_channel", "geoid", "geoid_version", "session", "usage"):
        assert f"INSERT INTO {table} " in rest


async def test_offsets_and_epoch_continue_after_a_restart(vault, url, samples, make_settings):
    await vault.commit(samples.publish(0, "a", "b"))
    again = SqlVault(url, make_settings())
    await again.start()
    try:
        assert (again.epoch, again.head) == (vault.epoch, 2)
        await again.commit(samples.publish(2, "c"))
        assert again.head == 3
    finally:
        await again.close()


async def test_a_batch_that_does_not_follow_the_head_is_refused_and_leaves_nothing(vault, samples):
    await vault.commit(samples.publish(0, "a"))
    for head in (0, 2):
        with pytest.raises(ConflictError):
            await vault.commit(samples.publish(head, "b"))
    assert vault.head == 1
    assert await vault.geoid("b") is None
    assert len((await vault.read(None, after=0, limit=10)).entries) == 1


async def test_a_batch_with_a_hole_is_a_defect_of_the_caller(vault, samples):
    batch = samples.publish(0, "a", "b", "c")
    del batch.entries[1]
    with pytest.raises(ValueError, match="consecutive"):
        await vault.commit(batch)
    assert vault.head == 0


async def test_the_slower_of_two_writers_learns_the_head_and_plans_again(vault, url, samples, make_settings):
    other = SqlVault(url, make_settings())
    await other.start()
    try:
        await other.commit(samples.publish(0, "a", "b"))
        with pytest.raises(ConflictError):
            await vault.commit(samples.publish(vault.head, "c"))
        assert vault.head == 2
        await vault.commit(samples.publish(vault.head, "c"))
        assert await other.refresh() == 3
    finally:
        await other.close()


async def test_a_page_ahead_of_this_nodes_head_reads_what_others_committed(vault, url, samples, make_settings):
    other = SqlVault(url, make_settings())
    await other.start()
    try:
        await other.commit(samples.publish(0, "a", "b"))
        assert (await vault.read("geoids", after=0, limit=10)).scanned == 0
        page = await vault.read("geoids", after=0, limit=10, until=9)
        assert [entry.offset for entry in page.entries] == [1, 2]
        assert page.scanned == 2
    finally:
        await other.close()


async def test_a_cancelled_caller_does_not_tear_a_commit(vault, samples):
    async with anyio.create_task_group() as group:
        group.start_soon(vault.commit, samples.publish(0, *[f"g{i}" for i in range(200)]))
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    await vault.refresh()
    count = len((await vault.read(None, after=0, limit=1000)).entries)
    assert count == vault.head
    assert count in (0, 200)
    assert await vault.count_geoids() == count
    await vault.commit(samples.publish(vault.head, "after"))


async def test_commits_from_many_tasks_are_taken_one_at_a_time(vault, samples):
    conflicts = 0

    async def publish(name: str) -> None:
        nonlocal conflicts
        while True:
            try:
                await vault.commit(samples.publish(vault.head, name))
            except ConflictError:
                conflicts += 1
            else:
                return

    async with anyio.create_task_group() as group:
        for i in range(8):
            group.start_soon(publish, f"g{i}")
    assert vault.head == 8
    assert [e.offset for e in (await vault.read("geoids", after=0, limit=100)).entries] == list(range(1, 9))


async def test_reading_along_while_others_commit_skips_and_repeats_nothing(vault, samples):
    seen: list[int] = []
    total = 300

    async def write() -> None:
        while vault.head < total:
            size = min(7, total - vault.head)
            await vault.commit(samples.publish(vault.head, *[f"g{vault.head + i}" for i in range(size)]))

    async def follow() -> None:
        after = 0
        while after < total:
            page = await vault.read("geoids", after=after, limit=5)
            seen.extend(entry.offset for entry in page.entries)
            after = page.scanned
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(write)
        group.start_soon(follow)
    assert seen == list(range(1, total + 1))


async def test_a_page_ends_early_at_its_bound_in_bytes_and_says_so(vault, samples, monkeypatch):
    monkeypatch.setattr(vault_entries, "PAGE_BYTES", 2_000)
    monkeypatch.setattr(vault_entries, "_STEP", 4)
    await vault.commit(samples.publish(0, *[f"g{i}" for i in range(40)]))
    offsets, after, pages, more = [], 0, 0, True
    while more:
        page = await vault.read("geoids", after=after, limit=1_000)
        offsets += [entry.offset for entry in page.entries]
        after, more, pages = page.scanned, page.more, pages + 1
    assert offsets == list(range(1, 41))
    assert pages > 1


async def test_a_channel_named_twice_by_an_entry_shows_it_once(vault):
    entry = LogEntry(1, "watch.matched", 1, ("watch:w", "watch:w"), msgspec.Raw(b"{}"))
    await vault.commit(WriteBatch(entries=[entry]))
    assert len((await vault.read("watch:w", after=0, limit=5)).entries) == 1


async def test_white_space_in_a_channel_is_refused(vault):
    entry = LogEntry(1, "watch.matched", 1, ("watch:a b",), msgspec.Raw(b"{}"))
    with pytest.raises(ValueError, match="white space"):
        await vault.commit(WriteBatch(entries=[entry]))
    assert (vault.head, (await vault.retained()).head) == (0, 0)


async def test_limit_must_be_positive(vault):
    with pytest.raises(ValueError, match="limit"):
        await vault.read(None, after=0, limit=0)


@pytest.mark.parametrize("column", ["data", "ts", "type", "channels", "checksum"])
async def test_a_changed_byte_is_noticed_by_every_read(vault, samples, column):
    await vault.commit(samples.publish(0, "a", "b", "c"))
    changed = {
        "data": 'data = (SELECT data FROM log_entry WHERE "offset" = 1)',
        "ts": "ts = ts + 1",
        "type": "type = 'geoid.updated'",
        "channels": "channels = channels || 'x'",
        "checksum": "checksum = checksum + 1",
    }[column]
    damage = Query(text(f'UPDATE log_entry SET {changed} WHERE "offset" = 2'))
    await vault._database.write(lambda tx: tx.run(damage))
    for channel in (None, "geoids", "geoid:b"):
        for reverse in (False, True):
            with pytest.raises(DamagedLogError) as caught:
                await vault.read(channel, after=0, limit=10, reverse=reverse)
            assert caught.value.offset == 2
    for channel in ("geoids", "geoid:b"):
        with pytest.raises(DamagedLogError, match=r"entry 2 is damaged .checksum"):
            await vault.read_frames(channel, head=b"", after=0, limit=10, until=3)
    assert (await vault.read_frames("geoids", head=b"", after=2, limit=10, until=3)).count == 1
    assert [e.offset for e in (await vault.read("geoids", after=0, limit=10, until=1)).entries] == [1]
    assert [e.offset for e in (await vault.read(None, after=2, limit=10)).entries] == [3]


@pytest.mark.parametrize("missing", [1, 2, 3])
async def test_a_missing_entry_is_noticed_and_never_skipped(vault, samples, missing):
    await vault.commit(samples.publish(0, "a", "b", "c"))
    damage = Query(text(f'DELETE FROM log_entry WHERE "offset" = {missing}'))
    await vault._database.write(lambda tx: tx.run(damage))
    for channel in (None, "geoids"):
        for reverse in (False, True):
            with pytest.raises(DamagedLogError) as caught:
                await vault.read(channel, after=0, limit=10, reverse=reverse)
            assert caught.value.offset == missing
    with pytest.raises(DamagedLogError, match=f"entry {missing} is damaged .it is missing"):
        await vault.read_frames("geoids", head=b"", after=0, limit=10, until=3)


async def test_frames_are_the_events_that_a_page_holds(vault, samples):
    assert isinstance(vault, FrameReader)
    encoder = EventEncoder(vault.epoch)
    head = encoder.head("geoids")
    assert await vault.read_frames("geoids", head=head, after=0, limit=5, until=0) == FramePage(b"", 0, 0, more=False)
    await vault.commit(samples.publish(0, *"abcdefg", text='Grüße, "quoted" \x1e\x1f \\ 語', session_id="s"))
    await vault.commit(samples.publish(7, "h"))
    everything = (await vault.read("geoids", after=0, limit=99)).entries
    for after in range(9):
        for until in range(after, 9):
            for limit in (1, 3, 99):
                page = await vault.read_frames("geoids", head=head, after=after, limit=limit, until=until)
                wanted = [entry for entry in everything if after < entry.offset <= until][:limit]
                assert page.frames == b"".join(encoder.frame(entry, "geoids", "json") for entry in wanted)
                assert page.count == len(wanted)
                assert page.more == (after + len(wanted) < until)
                assert page.scanned == (after + len(wanted) if page.more else until)
    only = await vault.read_frames("session:s", head=encoder.head("session:s"), after=0, limit=99, until=8)
    assert (only.count, only.scanned, only.more) == (7, 8, False)
    await vault.trim(3)
    assert (await vault.read_frames("geoids", head=head, after=0, limit=99, until=8)).count == 5


async def test_no_page_holds_more_bytes_than_it_may_however_large_entries_are(vault):
    """Small ones first: what came before says nothing of what comes next."""
    sizes = [10] * 20 + [700_000] * 20 + [10] * 20
    batch = [
        LogEntry(offset, "geoid.created", 1, ("geoids",), msgspec.Raw(b'"%b"' % (b"x" * size)))
        for offset, size in enumerate(sizes, 1)
    ]
    await vault.commit(WriteBatch(entries=batch))
    head = EventEncoder(vault.epoch).head("geoids")
    frames, after, count = [], 0, 0
    while after < 60:
        page = await vault.read_frames("geoids", head=head, after=after, limit=256, until=60)
        frames.append(len(page.frames))
        after, count = page.scanned, count + page.count
    assert count == 60
    assert max(frames) < 800_000, "one that is larger than a page comes alone"
    for channel in ("geoids", None):
        after, seen = 0, []
        while after < 60:
            read = await vault.read(channel, after=after, limit=256)
            assert sum(len(bytes(entry.data)) for entry in read.entries) < 9_000_000
            seen += [entry.offset for entry in read.entries]
            after = read.scanned
        assert seen == list(range(1, 61))
        backwards: list[int] = []
        until = 60
        while until:
            read = await vault.read(channel, after=0, limit=256, until=until, reverse=True)
            assert sum(len(bytes(entry.data)) for entry in read.entries) < 9_000_000
            backwards += [entry.offset for entry in read.entries]
            until = read.scanned - 1 if read.more else 0
        assert backwards == list(range(60, 0, -1))


@pytest.mark.parametrize("channel", ["geoids", None])
@pytest.mark.parametrize("reverse", [False, True])
async def test_what_a_page_would_hold_is_known_without_reading_it(sqlite_vault, sqlite_url, channel, reverse):
    entry = LogEntry(1, "geoid.created", 1, ("geoids",), msgspec.Raw(b'"%b"' % (b"x" * 700_000)))
    await sqlite_vault.commit(WriteBatch(entries=[entry, msgspec.structs.replace(entry, offset=2)]))

    def fitting() -> list[int]:
        asked = {"after": 0, "until": 2, "limit": 2, "reverse": reverse}
        with closing(sqlite3.connect(sqlite_url.partition(":///")[2])) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)  # it can hold nothing as large as an entry
            with pytest.raises(sqlite3.DataError):
                connection.execute("SELECT data FROM log_entry").fetchone()

            class Frugal:
                def value(self, query: Query, **params: object) -> object:
                    return connection.execute(*query.bind(sqlite.dialect(), params)).fetchone()[0]

            return [vault_entries._fitting(Frugal(), channel, most=most, **asked) for most in (1_400_004, 1_400_003)]

    assert await anyio.to_thread.run_sync(fitting) == [2, 1]


async def test_trimming_drops_entries_and_keeps_entities(vault, samples):
    await vault.commit(samples.publish(0, "a", "b", "c", "d", session_id="s"))
    before = await vault.retained()
    assert await vault.trim(2) == 2
    assert (vault.trimmed, vault.head) == (2, 4)
    for channel in (None, "geoids", "session:s"):
        page = await vault.read(channel, after=0, limit=10)
        assert [entry.offset for entry in page.entries] == [3, 4]
    assert (await vault.read("geoid:a", after=0, limit=10)).entries == []
    assert await vault.geoid("a") is not None
    assert (await vault.retained()).payload_bytes < before.payload_bytes
    assert await vault.trim(1) == 0
    assert await vault.trim(99) == 2
    assert (vault.trimmed, vault.head, (await vault.retained()).payload_bytes) == (4, 4, 0)
    assert await vault.read(None, after=0, limit=10, reverse=True) == LogPage([], 0, more=False)
    await vault.commit(samples.publish(4, "e"))
    assert [entry.offset for entry in (await vault.read(None, after=0, limit=10)).entries] == [5]


async def test_a_read_tells_of_a_trim_by_another_node(vault, url, samples, make_settings):
    await vault.commit(samples.publish(0, "a", "b", "c"))
    other = SqlVault(url, make_settings())
    await other.start()
    try:
        await other.trim(2)
    finally:
        await other.close()
    assert vault.trimmed == 0
    page = await vault.read("geoids", after=0, limit=10)
    assert [entry.offset for entry in page.entries] == [3]
    assert vault.trimmed == 2  # so the reader at 0 knows that it lost its place


CHANNELS = ("geoids", "contradictions", "session:s", "geoid:x")
Pattern = list[tuple[bool, ...]]


@pytest.fixture(scope="module")
def model() -> list[tuple[int, tuple[str, ...]]]:
    """300 entries on channels of different density; the first 20 are to be trimmed."""
    return [
        (
            offset,
            tuple(
                name
                for name, every in zip(CHANNELS, (1, 3, 7, 60), strict=True)
                if offset % every == 0 or (offset * 7) % 11 == every
            ),
        )
        for offset in range(1, 301)
    ]


@pytest.fixture(scope="module")
def portal():
    with anyio.from_thread.start_blocking_portal("asyncio") as opened:
        yield opened


@pytest.fixture(scope="module")
def logged(model, portal, sqlite_template, tmp_path_factory, request):
    """A vault that holds the model, on a loop of its own."""
    from shutil import copy

    from kimera_stream.infrastructure.settings import DatabaseSettings

    path = tmp_path_factory.mktemp("model") / "vault.sqlite3"
    copy(sqlite_template, path)
    vault = SqlVault(f"sqlite:///{path}", DatabaseSettings.model_validate({}))
    portal.call(vault.start)
    batch = WriteBatch(
        entries=[LogEntry(o, "watch.matched", o, names, msgspec.Raw(b'{"n":%d}' % o)) for o, names in model]
    )
    portal.call(vault.commit, batch)
    portal.call(vault.trim, 20)
    yield vault
    portal.call(vault.close)


class TestPaging:
    """Pages against a list, over every combination of bounds."""

    @settings(max_examples=150, deadline=None)
    @given(
        channel=st.sampled_from([None, *CHANNELS, "agent:nobody"]),
        after=st.integers(0, 310),
        until=st.none() | st.integers(0, 320),
        limit=st.integers(1, 60),
        reverse=st.booleans(),
    )
    def test_pages_joined_are_the_range(self, logged, portal, model, channel, after, until, limit, reverse):
        top = 300 if until is None else min(until, 300)
        wanted = [o for o, names in model if after < o <= top and o > 20 and (channel is None or channel in names)]
        if reverse:
            wanted.reverse()
        got: list[int] = []
        low, high = after, until
        while True:
            page = portal.call(
                lambda low=low, high=high: logged.read(channel, after=low, until=high, limit=limit, reverse=reverse)
            )
            offsets = [entry.offset for entry in page.entries]
            assert len(offsets) <= limit
            assert all(bytes(entry.data) == b'{"n":%d}' % entry.offset for entry in page.entries)
            got += offsets
            assert page.more == (len(got) < len(wanted))
            if not page.more:
                assert page.scanned == (after if reverse else max(low, top))
                break
            assert offsets
            assert page.scanned == offsets[-1]
            if reverse:
                high = page.scanned - 1
            else:
                low = page.scanned
        assert got == wanted
