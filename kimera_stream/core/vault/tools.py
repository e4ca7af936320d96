"""What an operator does to a vault: check, usage, dead letters, export, import, backup, new epoch, migrate. Each but a new epoch may
run beside a server.

Every error is a KimeraError whose message names the next step.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio

from kimera_stream.core.kept import DeadLetter, UsageRecord
from kimera_stream.core.vault import records, requests
from kimera_stream.core.vault.checking import CheckReport, Progress, check_database
from kimera_stream.core.vault.entries import read_state
from kimera_stream.core.vault.errors import VaultFormatError, VaultSchemaError
from kimera_stream.core.vault.migrate import HEAD, current_revision, migrate
from kimera_stream.core.vault.transfer import export_rows, import_rows, restamp
from kimera_stream.core.vault.vault import unix_ms
from kimera_stream.infrastructure.database import Database, async_url
from kimera_stream.infrastructure.settings import DatabaseSettings
from kimera_stream.protocol.errors import BadRequestError

__all__ = [
    "CheckReport",
    "Progress",
    "backup",
    "check",
    "dead_letters",
    "drop_dead_letters",
    "export",
    "import_",
    "migrate",
    "new_epoch",
    "retry_dead_letters",
    "usage",
]


_LOOKS = 20
"""How often it is looked who has a database open, 0.05 s apart: PostgreSQL shows a connection a little longer than it is there."""


def _quiet(_stage: str, _done: int, _total: int) -> None:
    """No progress wanted."""


def _defaults(settings: DatabaseSettings | None) -> DatabaseSettings:
    return settings or DatabaseSettings.model_validate({})


@asynccontextmanager
async def _opened(url: str, settings: DatabaseSettings | None) -> AsyncIterator[Database]:
    """A database that exists and is at our revision of the schema."""
    parsed = async_url(url)
    if parsed.get_backend_name() == "sqlite" and not await anyio.Path(parsed.database or "").exists():
        raise BadRequestError(
            f"KIMERA_DATABASE__URL: there is no database at {parsed.database}; check the path, or start the server once",
            field="database.url",
        )
    revision = await current_revision(url, settings=_defaults(settings))
    if revision != HEAD:
        raise VaultSchemaError(
            f"the database is at schema revision {revision or 'base'}, expected {HEAD}: run `kimera-stream db migrate`"
            if revision is None or revision < HEAD
            else f"the database is at schema revision {revision}, newer than {HEAD}: upgrade Kimera Stream"
        )
    database = Database(url, _defaults(settings))
    try:
        yield database
    finally:
        await database.close()


async def check(url: str, progress: Progress = _quiet, *, settings: DatabaseSettings | None = None) -> CheckReport:
    """Verify every checksum, the offsets, the channel index, entities against log, and the file itself.

    Raises:
        BadRequestError: no such database.
        VaultSchemaError: it is of another revision.
        UnavailableError: it cannot be reached.
    """
    async with _opened(url, settings) as database:
        return await check_database(database, progress)


async def usage(url: str, *, since_day: int = 0, settings: DatabaseSettings | None = None) -> list[UsageRecord]:
    """What each principal published per day, from ``since_day`` (days since 1970, UTC) on.

    Raises:
        BadRequestError: there is no database.
        VaultSchemaError: it is behind.
    """
    async with _opened(url, settings) as database:
        return await database.read(partial(records.usage_since, day=since_day))


async def dead_letters(
    url: str, *, after: int = 0, limit: int = 1_000, settings: DatabaseSettings | None = None
) -> list[DeadLetter]:
    """Work that was set aside, the oldest first: those with a greater id than ``after``.

    Raises:
        BadRequestError: there is no database.
        VaultSchemaError: it is behind.
    """
    async with _opened(url, settings) as database:
        return await database.read(partial(requests.dead_letters, after=after, limit=limit))


async def retry_dead_letters(url: str, ids: Sequence[int], *, settings: DatabaseSettings | None = None) -> list[int]:
    """Have dead letters tried again: by a running server within its ``performance.retry_poll``, else by its next start.

    Returns:
        The ids of those that there were.
    """
    async with _opened(url, settings) as database:
        return await database.write(
            partial(requests.retry_letters, ids=ids, checkpoint_id=secrets.token_urlsafe(12), now=unix_ms())
        )


async def drop_dead_letters(url: str, ids: Sequence[int], *, settings: DatabaseSettings | None = None) -> list[int]:
    """Forget dead letters; returns the ids of those that there were."""
    async with _opened(url, settings) as database:
        return await database.write(partial(requests.drop_letters, ids=ids))


async def export(
    url: str, path: str | Path, progress: Progress = _quiet, *, settings: DatabaseSettings | None = None
) -> int:
    """Write one consistent snapshot as gzipped JSON lines; returns how many rows.

    Raises:
        VaultFormatError: ``path`` exists or cannot be written.
        DamagedLogError: an entry of the log is damaged.
    """
    await _refuse_existing(path)
    async with _opened(url, settings) as database:
        return await export_rows(database, Path(path), progress)


async def import_(
    path: str | Path, url: str, progress: Progress = _quiet, *, settings: DatabaseSettings | None = None
) -> int:
    """Read an export into a new database, all of it or nothing, under a new epoch; returns how many rows.

    Raises:
        VaultFormatError: the target is not empty, or the file is not a whole export.
    """
    if not await anyio.Path(path).is_file():
        raise VaultFormatError(f"there is no file {path}")
    await migrate(url, settings=settings)
    async with _opened(url, settings) as database:
        return await import_rows(database, Path(path), progress)


async def backup(
    url: str, path: str | Path, progress: Progress = _quiet, *, settings: DatabaseSettings | None = None
) -> None:
    """Copy a SQLite vault that is in use. The copy has a new epoch, as its log and the original's part ways.

    Raises:
        VaultFormatError: ``path`` exists.
        BadRequestError: not SQLite.
    """
    await _refuse_existing(path)
    unfinished = anyio.Path(f"{path}.partial")
    async with _opened(url, settings) as database:
        try:
            await database.backup(str(unfinished), lambda done, total: progress("backup", done, total))
            copy = Database(f"sqlite+aiosqlite:///{unfinished}", _defaults(settings))
            try:
                await copy.write(restamp)
            finally:
                await copy.close()
            await unfinished.replace(path)
        finally:
            with anyio.CancelScope(shield=True):
                await unfinished.unlink(missing_ok=True)


async def new_epoch(url: str, *, settings: DatabaseSettings | None = None) -> tuple[str, str]:
    """Give the log of a database another identity, as a copy needs that was made by other means than ``backup`` or ``import_``.

    Positions and cursors of the log that was copied then mean nothing in this one: who comes with them is told so, and
    does not take what this log says from now on for what the other one says.

    Returns:
        The epoch before and the one now.

    Raises:
        BadRequestError: there is no database, or a server (or another command) has it open.
        VaultSchemaError: it is of another revision.
    """
    async with _opened(url, settings) as database:
        for _ in range(_LOOKS):
            if await database.alone():
                break
            await anyio.sleep(0.05)
        else:
            raise BadRequestError(
                "new-epoch: another process has this database open, and would go on in the old epoch: "
                "stop every server and command on it first",
                field="database.url",
            )
        before = (await database.read(read_state)).epoch
        await database.write(restamp)
        return before, (await database.read(read_state)).epoch


async def _refuse_existing(path: str | Path) -> None:
    if await anyio.Path(path).exists():
        raise VaultFormatError(f"{path} exists already: choose another name, or remove it")
