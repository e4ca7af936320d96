"""What goes wrong underneath: killed processes, full and damaged disks, locks, lost connections."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import anyio
import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection

from kimera_stream.core.vault import tools
from kimera_stream.core.vault.errors import DamagedLogError
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.database import Query
from kimera_stream.protocol.errors import UnavailableError

pytestmark = pytest.mark.anyio


def pragma(vault: SqlVault, statement: str):
    """Set something on the vault's writing connection."""
    query = Query(text(f"PRAGMA {statement}"))
    return vault._database.write(lambda tx: tx.rows(query))


def run_until_killed(url: str, acks: int) -> int:
    """Start a writer, kill it -9 after so many acks; the last head that it said was committed."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killed_writer.py")), url], stdout=subprocess.PIPE, text=True
    )
    try:
        acked = 0
        for _ in range(acks):
            line = process.stdout.readline()
            assert line, "the writer ended by itself"
            acked = int(line)
    finally:
        process.kill()
        rest = process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
    whole = [line for line in rest if line.strip()]
    return int(whole[-1]) if whole else acked


async def test_a_process_killed_in_the_middle_of_commits_loses_nothing_acked(url, make_settings):
    acked = 0
    for acks in (1, 4, 23):
        acked = await anyio.to_thread.run_sync(run_until_killed, url, acks)
    vault = SqlVault(url, make_settings())
    await vault.start()
    try:
        assert vault.head >= acked
        assert vault.head % 5 == 0  # whole batches only
        page = await vault.read("geoids", after=0, limit=1_000)
        assert [entry.offset for entry in page.entries] == list(range(1, vault.head + 1))
        found = await vault.geoids([f"g{offset}" for offset in range(1, vault.head + 1)])
        assert [found[f"g{o}"].geoid.symbolic_state for o in range(1, vault.head + 1)] == [
            {"n": o} for o in range(1, vault.head + 1)
        ]
    finally:
        await vault.close()
    report = await tools.check(url)
    assert (report.problems, report.entries) == ([], vault.head)


async def test_a_locked_database_refuses_and_recovers_by_itself(sqlite_vault, sqlite_url, samples):
    await sqlite_vault.commit(samples.publish(0, "a"))
    locker = await anyio.to_thread.run_sync(
        lambda: sqlite3.connect(sqlite_url.partition("///")[2], isolation_level=None, check_same_thread=False)
    )
    try:
        await anyio.to_thread.run_sync(locker.execute, "BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match="locked") as caught:
            await sqlite_vault.commit(samples.publish(1, "b"))
        assert caught.value.retry_after
        assert sqlite_vault.head == 1
        assert [e.offset for e in (await sqlite_vault.read(None, after=0, limit=9)).entries] == [1]
        await anyio.to_thread.run_sync(locker.execute, "ROLLBACK")
        await sqlite_vault.commit(samples.publish(1, "b"))
        assert sqlite_vault.head == 2
    finally:
        await anyio.to_thread.run_sync(locker.close)


async def test_a_full_database_refuses_whole_batches_and_recovers(sqlite_vault, samples):
    await sqlite_vault.commit(samples.publish(0, "a"))
    (size,) = (await pragma(sqlite_vault, "page_count"))[0]
    await pragma(sqlite_vault, f"max_page_count = {size + 2}")
    big = [f"g{i}" for i in range(200)]
    for _ in range(2):
        with pytest.raises(UnavailableError, match="full"):
            await sqlite_vault.commit(samples.publish(1, *big, text="x" * 500))
    assert sqlite_vault.head == 1
    assert await sqlite_vault.count_geoids() == 1
    assert (await sqlite_vault.read("geoids", after=0, limit=9)).scanned == 1
    await pragma(sqlite_vault, "max_page_count = 1000000")
    await sqlite_vault.commit(samples.publish(1, *big, text="x" * 500))
    assert sqlite_vault.head == 201


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here; the page limit test covers SQLite's side of it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096) == 4096:
            pass


async def commit_until_refused(vault, samples) -> None:
    while True:
        await vault.commit(samples.publish(vault.head, f"g{vault.head}", text="x" * 5_000))


async def test_a_full_disk_refuses_serves_reads_and_recovers(tiny_disk, sqlite_template, samples, make_settings):
    shutil.copy(sqlite_template, tiny_disk / "vault.sqlite3")
    vault = SqlVault(f"sqlite:///{tiny_disk / 'vault.sqlite3'}", make_settings())
    await vault.start()
    try:
        filler = tiny_disk / "filler"
        await vault.commit(samples.publish(0, "a"))
        fill(filler)
        with pytest.raises(UnavailableError, match="full"):
            await commit_until_refused(vault, samples)
        head = vault.head
        assert len((await vault.read("geoids", after=0, limit=99)).entries) == head
        filler.unlink()
        await vault.commit(samples.publish(head, "after"))
        assert [e.offset for e in (await vault.read(None, after=head, limit=9)).entries] == [head + 1]
        assert await vault.count_geoids() == head + 1
    finally:
        await vault.close()


async def test_a_read_only_database_refuses_and_recovers(sqlite_vault, samples):
    await sqlite_vault.commit(samples.publish(0, "a"))
    await pragma(sqlite_vault, "query_only = ON")
    with pytest.raises(UnavailableError, match="read-only"):
        await sqlite_vault.commit(samples.publish(1, "b"))
    assert sqlite_vault.head == 1
    await sqlite_vault.commit(samples.publish(1, "b"))  # on a new connection
    assert sqlite_vault.head == 2


def flip(url: str, needle: bytes) -> None:
    """Flip one bit inside ``needle`` in the database file."""
    path = Path(url.partition("///")[2])
    content = bytearray(path.read_bytes())
    content[content.index(needle) + 10] ^= 0x04
    path.write_bytes(content)


def overwrite_page(url: str, needle: bytes) -> None:
    """Spoil the beginning of the page that holds ``needle``."""
    path = Path(url.partition("///")[2])
    content = bytearray(path.read_bytes())
    start = content.index(needle) // 4096 * 4096
    content[start : start + 200] = os.urandom(200)
    path.write_bytes(content)


async def test_a_bit_flipped_in_the_file_is_found_by_read_and_by_check(sqlite_url, samples, make_settings, tmp_path):
    vault = SqlVault(sqlite_url, make_settings())
    await vault.start()
    await vault.commit(samples.publish(0, "a", "b", "c"))
    await vault.close()
    flip(sqlite_url, b'"text":"statement b"')  # as JSON it stands in the log alone

    vault = SqlVault(sqlite_url, make_settings())
    await vault.start()
    try:
        with pytest.raises(DamagedLogError) as caught:
            await vault.read("geoids", after=0, limit=9)
        assert caught.value.offset == 2
        assert not caught.value.message.startswith("statement")
    finally:
        await vault.close()
    report = await tools.check(sqlite_url)
    assert not report.ok
    assert any("log entry 2 is damaged" in problem for problem in report.problems)
    assert report.entries == 2  # those on either side were verified
    with pytest.raises(DamagedLogError):
        await tools.export(sqlite_url, tmp_path / "dump.gz")
    assert not list(tmp_path.glob("dump*"))


async def test_a_file_that_is_no_database_is_refused_with_the_next_step(tmp_path, make_settings):
    path = tmp_path / "vault.sqlite3"
    path.write_bytes(b"certainly not a database" * 100)
    vault = SqlVault(f"sqlite:///{path}", make_settings())
    with pytest.raises(UnavailableError, match="KIMERA_DATABASE__URL"):
        await vault.start()
    await vault.close()


async def test_a_damaged_page_is_unavailable_to_reads_and_a_finding_of_check(sqlite_url, samples, make_settings):
    vault = SqlVault(sqlite_url, make_settings())
    await vault.start()
    await vault.commit(samples.publish(0, *[f"g{i}" for i in range(300)]))
    await vault.close()
    overwrite_page(sqlite_url, b'"text":"statement g150"')
    report = await tools.check(sqlite_url)
    assert not report.ok
    assert any("SQLite" in problem or "damaged" in problem for problem in report.problems)


async def test_an_unreachable_server_is_unavailable(make_settings):
    vault = SqlVault("postgresql+asyncpg://postgres@127.0.0.1:1/none", make_settings())
    with pytest.raises(UnavailableError, match="reached"):
        await vault.start()
    with pytest.raises(UnavailableError):
        await vault.ping()
    await vault.close()


async def test_ping(vault):
    await vault.ping()


async def test_a_closed_vault_is_unavailable(url, samples, make_settings):
    vault = SqlVault(url, make_settings())
    await vault.start()
    await vault.close()
    with pytest.raises(UnavailableError):
        await vault.read(None, after=0, limit=1)
    with pytest.raises(UnavailableError):
        await vault.commit(samples.publish(0, "a"))


async def end_connections(url: str) -> None:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    finally:
        await connection.close()


@pytest.mark.postgres
@pytest.mark.allow_blocking
async def test_lost_connections_are_replaced(postgres_vault, postgres_url, samples):
    await postgres_vault.commit(samples.publish(0, "a"))
    await postgres_vault.read(None, after=0, limit=9)
    for head in (1, 2):
        await end_connections(postgres_url)
        await postgres_vault.commit(samples.publish(head, f"g{head}"))
        await end_connections(postgres_url)
        assert len((await postgres_vault.read(None, after=0, limit=9)).entries) == head + 1


@pytest.mark.postgres
@pytest.mark.parametrize("happened", [True, False])
async def test_a_commit_whose_answer_is_lost_is_settled(postgres_vault, samples, monkeypatch, happened):
    await postgres_vault.commit(samples.publish(0, "a"))
    commit = AsyncAdapt_asyncpg_connection.commit
    losses = 0

    def lose(connection):
        nonlocal losses
        if losses or connection._transaction is None or connection.isolation_level != "read_committed":
            return commit(connection)
        losses += 1
        if happened:
            commit(connection)
        else:
            connection.rollback()
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    monkeypatch.setattr(AsyncAdapt_asyncpg_connection, "commit", lose)
    if happened:
        await postgres_vault.commit(samples.publish(1, "b"))
        assert postgres_vault.head == 2
    else:
        with pytest.raises(UnavailableError, match="nothing was written"):
            await postgres_vault.commit(samples.publish(1, "b"))
        assert postgres_vault.head == 1
        await postgres_vault.commit(samples.publish(1, "b"))
    assert losses == 1
    entries = (await postgres_vault.read(None, after=0, limit=9)).entries
    assert [entry.value()["id"] for entry in entries] == ["a", "b"]


@pytest.mark.postgres
@pytest.mark.allow_blocking
async def test_a_writer_that_holds_the_lock_is_waited_for_and_then_refused(postgres_url, samples, make_settings):
    vault = SqlVault(postgres_url, make_settings(busy_timeout=0.2))
    holder = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
    try:
        await vault.start()
        async with holder.transaction():
            await holder.execute("SELECT head FROM log_state FOR UPDATE")
            with pytest.raises(UnavailableError, match="nothing was written"):
                await vault.commit(samples.publish(0, "a"))
        await vault.commit(samples.publish(0, "a"))
        assert vault.head == 1
    finally:
        await holder.close()
        await vault.close()


@pytest.mark.postgres
@pytest.mark.allow_blocking
async def test_a_read_only_server_is_unavailable_and_recovers(own_postgres_url, samples, make_settings, alter_postgres):
    vault = SqlVault(own_postgres_url, make_settings())
    try:
        await vault.start()
        await vault.commit(samples.publish(0, "a"))
        await alter_postgres("SET default_transaction_read_only = on")
        await end_connections(own_postgres_url)
        with pytest.raises(UnavailableError, match="read-only") as caught:
            await vault.commit(samples.publish(1, "b"))
        assert caught.value.retry_after
        assert [e.offset for e in (await vault.read(None, after=0, limit=9)).entries] == [1]
        await alter_postgres("RESET default_transaction_read_only")
        await vault.commit(samples.publish(1, "b"))
        assert vault.head == 2
    finally:
        await vault.close()


async def test_defects_are_not_dressed_up_as_operational_errors(vault, samples):
    twice = samples.publish(0, "a", "b")
    twice.geoids.append(twice.geoids[0])  # the same version of a geoid twice
    with pytest.raises(Exception, match=r"UNIQUE|duplicate") as caught:
        await vault.commit(twice)
    assert not isinstance(caught.value, UnavailableError)
    assert vault.head == 0
    await vault.commit(samples.publish(0, "a"))
