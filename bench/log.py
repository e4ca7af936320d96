"""What the log costs: commits, each beside a bare loop over the same driver with the same rows, batches and sync; replay, out of the
vault and over a WebSocket.

``python -m bench.log --json`` prints one JSON object as its last line. Rounds of the vault and of the bare loop take
turns, and ratios are medians over rounds, because the speed of a shared machine and its disk drifts.
"""

import argparse
import json
import os
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import numpy as np
import structlog

from bench.publishes import committed, fill, statement
from bench.replay import served
from kimera_stream.core.interfaces import WriteBatch
from kimera_stream.core.vault import entries, rows, schema
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.database.engines import CHECKPOINT_PAGES
from kimera_stream.infrastructure.garbage import settle_garbage
from kimera_stream.infrastructure.settings import DatabaseSettings

POSTGRES = os.environ.get("KIMERA_TEST_POSTGRES_URL", "postgresql+asyncpg://postgres@127.0.0.1:5432/postgres")
SETTINGS = DatabaseSettings.model_validate({})
BATCHES = (1, 32, 512)
_VECTORS = np.random.default_rng(7).standard_normal((64, 384)).astype(np.float32)

TABLES = (
    schema.log_entry,
    schema.log_channel,
    schema.geoid,
    schema.geoid_version,
)
CHANGES = (
    "INSERT INTO session (id, principal, statements, created_at, updated_at) VALUES ({}) "
    "ON CONFLICT (id) DO UPDATE SET statements = session.statements + 1, updated_at = excluded.updated_at",
    "INSERT INTO usage (principal, day, statements, text_bytes) VALUES ({}) "
    "ON CONFLICT (principal, day) DO UPDATE SET statements = usage.statements + excluded.statements",
)


def write_batch(head: int, size: int) -> WriteBatch:
    """What the pipeline hands to the vault for ``size`` publishes of new geoids."""
    return committed([statement(offset, offset, _VECTORS[offset % 64]) for offset in range(head + 1, head + 1 + size)])


def bare_rows(batch: WriteBatch) -> list[list[Any]]:
    """The rows of the same batch, ready made: the bare loop has nothing to do but to write them."""
    return [
        [entries.entry_row(entry) for entry in batch.entries],
        [(channel, entry.offset) for entry in batch.entries for channel in entry.channels],
        [rows.geoid_row(stored) for stored in batch.geoids],
        [rows.version_row(stored) for stored in batch.geoids],
        [(name, "bench", 1, 1, 1) for name in {stored.geoid.session_id for stored in batch.geoids}],
        [("bench", 1, len(batch.geoids), 1)],
    ]


def _inserts(placeholder: Callable[[int], str]) -> list[str]:
    made = []
    for table in TABLES:
        names = ", ".join(f'"{column.name}"' for column in table.columns)
        marks = ", ".join(placeholder(i) for i in range(len(table.columns)))
        made.append(f"INSERT INTO {table.name} ({names}) VALUES ({marks})")
    made += [change.format(", ".join(map(placeholder, range(n)))) for change, n in zip(CHANGES, (5, 4), strict=True)]
    return made


class BareSqlite:
    """A loop over sqlite3 with executemany: WAL, full sync and everything else that the vault sets and that costs or saves time."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        checkpoint = f"wal_autocheckpoint = {CHECKPOINT_PAGES}"
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "cache_size = -16384",
            "foreign_keys = ON",
            checkpoint,
        ):
            self._connection.execute(f"PRAGMA {pragma}")
        self._inserts = _inserts(lambda _: "?")

    async def write(self, prepared: list[list[Any]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        for sql, values in zip(self._inserts, prepared, strict=True):
            self._connection.executemany(sql, values)
        self._connection.execute("UPDATE log_state SET head = ? WHERE id = 1", (prepared[0][-1][0],))
        self._connection.execute("COMMIT")

    async def close(self) -> None:
        self._connection.close()


class BarePostgres:
    """A loop over asyncpg with executemany."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._inserts = _inserts(lambda i: f"${i + 1}")

    async def write(self, prepared: list[list[Any]]) -> None:
        async with self._connection.transaction():
            for sql, values in zip(self._inserts, prepared, strict=True):
                await self._connection.executemany(sql, values)
            await self._connection.execute("UPDATE log_state SET head = $1 WHERE id = 1", prepared[0][-1][0])

    async def close(self) -> None:
        await self._connection.close()


class Scratch:
    """Databases to write to, thrown away at the end."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._kind = kind
        self._names: list[str] = []

    async def vault(self, name: str) -> SqlVault:
        vault = SqlVault(await self._url(name), SETTINGS)
        await vault.start()
        return vault

    async def bare(self, name: str) -> BareSqlite | BarePostgres:
        vault = await self.vault(name)  # makes the same tables
        await vault.close()
        if self._kind == "sqlite":
            return BareSqlite(self._folder / f"{name}.sqlite3")
        url = (await self._url(name, create=False)).replace("+asyncpg", "")
        return BarePostgres(await asyncpg.connect(url))

    async def _url(self, name: str, *, create: bool = True) -> str:
        if self._kind == "sqlite":
            return f"sqlite+aiosqlite:///{self._folder / name}.sqlite3"
        database = f"kimera_bench_{os.getpid()}_{name}"
        if create:
            await self._administer(f'CREATE DATABASE "{database}"')
            self._names.append(database)
        return POSTGRES.rpartition("/")[0] + "/" + database

    async def clean(self) -> None:
        for name in self._names:
            await self._administer(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    @staticmethod
    async def _administer(sql: str) -> None:
        connection = await asyncpg.connect(POSTGRES.replace("+asyncpg", ""))
        try:
            await connection.execute(sql)
        finally:
            await connection.close()


async def _rate(write: Callable[[Any], Awaitable[None]], work: list[Any], size: int) -> float:
    start = time.perf_counter()
    for item in work:
        await write(item)
    return len(work) * size / (time.perf_counter() - start)


async def commits(scratch: Scratch, rounds: int, seconds: float) -> dict[str, Any]:
    """Committed publishes a second by batch size, vault and bare in turns."""
    result: dict[str, Any] = {}
    single: dict[str, float] = {}
    for size in BATCHES:
        vault, bare = await scratch.vault(f"vault{size}"), await scratch.bare(f"bare{size}")
        head, ours, theirs = 0, [], []
        count = max(2, int(seconds * {1: 800, 32: 150, 512: 15}[size]))
        try:
            for _ in range(rounds):
                work = []
                for _ in range(count):
                    work.append(write_batch(head, size))
                    head += size
                prepared = [bare_rows(batch) for batch in work]
                ours.append(await _rate(vault.commit, work, size))
                theirs.append(await _rate(bare.write, prepared, size))
        finally:
            await vault.close()
            await bare.close()
        result[str(size)] = {
            "vault_per_s": round(statistics.median(ours)),
            "bare_per_s": round(statistics.median(theirs)),
            "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
        }
        if size == 1:
            single = {"vault": statistics.median(ours), "bare": statistics.median(theirs)}
    largest = result[str(BATCHES[-1])]["vault_per_s"]
    result["batched_over_single"] = round(largest / single["vault"], 1)
    result["batched_over_bare_single"] = round(largest / single["bare"], 1)
    return result


async def replay(scratch: Scratch, count: int) -> dict[str, Any]:
    """Entries a second read back in pages of 1,000 by one reader, checksums verified; and a restart's scan of geoids."""
    vault = await scratch.vault("replay")
    try:
        await fill(vault, count, write_batch)
        found: dict[str, float] = {}
        for name, channel in (("log", None), ("channel", "geoids")):
            start, after, seen, more = time.perf_counter(), 0, 0, True
            while more:
                page = await vault.read(channel, after=after, limit=1_000)
                after, more, seen = page.scanned, page.more, seen + len(page.entries)
            if seen != count:
                raise RuntimeError(f"read {seen} of {count} entries")
            found[f"{name}_per_s"] = round(count / (time.perf_counter() - start))
        start, seen = time.perf_counter(), 0
        async for columns in vault.scan_columns(batch=1_000, dimension=384):
            seen += len(columns)
        found["scan_columns_per_s"] = round(seen / (time.perf_counter() - start))
        found["page_under_load_ms"] = await _page_under_load(vault)
        return {"entries": count, **found}
    finally:
        await vault.close()


async def _page_under_load(vault: SqlVault) -> float:
    """A page of 1,000 while another thread keeps the interpreter busy, as a server at its limit does."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1_000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            await vault.read("geoids", after=0, limit=1_000)
            times.append(time.perf_counter() - start)
    finally:
        stop.set()
        thread.join()
    return round(statistics.median(times) * 1_000, 1)


async def measure(folder: Path, *, rounds: int, seconds: float, count: int, postgres: bool) -> dict[str, Any]:
    """All figures as one object."""
    settle_garbage()  # as the server has it
    result: dict[str, Any] = {"sqlite_version": sqlite3.sqlite_version, "synchronous": SETTINGS.synchronous}
    kinds = ["sqlite", "postgresql"] if postgres and await _answers() else ["sqlite"]
    for kind in kinds:
        scratch = Scratch(folder, kind)
        try:
            result[kind] = {
                "commit": await commits(scratch, rounds, seconds),
                "replay": await replay(scratch, count),
            }
        finally:
            await scratch.clean()
    return result


async def _answers() -> bool:
    try:
        connection = await asyncpg.connect(POSTGRES.replace("+asyncpg", ""), timeout=2)
    except (OSError, TimeoutError, asyncpg.PostgresError):
        return False
    await connection.close()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where the databases are made: the disk that is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long one round takes")
    parser.add_argument("--entries", type=int, default=100_000, help="entries to replay")
    parser.add_argument("--no-postgres", action="store_true")
    parser.add_argument("--served", type=int, default=1_000_000, help="entries to replay over a WebSocket; 0: none")
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = anyio.run(
            lambda: measure(
                Path(folder),
                rounds=options.rounds,
                seconds=options.seconds,
                count=options.entries,
                postgres=not options.no_postgres,
            ),
            backend_options={"use_uvloop": True},
        )
        if options.served:
            result["served"] = served(
                Path(folder) / "served", entries=options.served, geoids=max(1, options.served // 5), rounds=3
            )
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
