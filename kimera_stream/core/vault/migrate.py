"""Brings a database to a revision of the schema, in one transaction, with the packaged migrations."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import structlog
from sqlalchemy import Connection, inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine

from kimera_stream.core.vault.errors import VaultSchemaError
from kimera_stream.infrastructure.database import async_url
from kimera_stream.infrastructure.database.engines import make_engine
from kimera_stream.infrastructure.database.failures import failure_of, unavailable
from kimera_stream.infrastructure.settings import DatabaseSettings

T = TypeVar("T")
log = structlog.get_logger(__name__)

HEAD = "0002"
"""The newest revision. A database that is there already starts without loading Alembic; a test compares this with it."""
_LOCK_KEY = 5_135_072_301
"""Any number: the advisory lock under which PostgreSQL migrates."""


async def migrate(url: str, revision: str = "head", *, settings: DatabaseSettings | None = None) -> str:
    """Migrate the database at ``url`` up or down to ``revision``; returns the revision it is at now.

    Works in a worker thread with an event loop of its own: reading and running migrations blocks.

    Raises:
        VaultSchemaError: the database is of a newer version, or there is no such revision.
        UnavailableError: unreachable, locked or not writable.
    """
    return await anyio.to_thread.run_sync(
        _in_thread,
        url,
        settings or DatabaseSettings.model_validate({}),
        lambda connection: _migrate_locked(connection, revision),
    )


async def current_revision(url: str, *, settings: DatabaseSettings | None = None) -> str | None:
    """The revision that the database at ``url`` is at; None before the first.

    Raises:
        UnavailableError: unreachable, or not a database.
    """
    return await anyio.to_thread.run_sync(
        _in_thread, url, settings or DatabaseSettings.model_validate({}), _revision_of
    )


def _in_thread(url: str, settings: DatabaseSettings, fn: Callable[[Connection], T]) -> T:
    target = async_url(url)
    try:
        if target.get_backend_name() == "sqlite" and target.database is not None:
            Path(target.database).absolute().parent.mkdir(parents=True, exist_ok=True)
        return anyio.run(_on_connection, make_engine(target, settings, write=True), fn)
    except Exception as error:
        failure = failure_of(error)
        if failure is None:
            raise
        raise unavailable(failure) from error


async def _on_connection(engine: AsyncEngine, fn: Callable[[Connection], T]) -> T:
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(fn)
    finally:
        await engine.dispose()


def _migrate_locked(connection: Connection, revision: str) -> str:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    before = _revision_of(connection)
    if before == HEAD and revision in ("head", HEAD):
        connection.rollback()
        return HEAD
    after = _run(connection, before, revision)
    connection.commit()
    log.info("database migrated", before=before, after=after)
    return after


def _revision_of(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _run(connection: Connection, before: str | None, revision: str) -> str:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    if before is not None and before not in known:
        raise VaultSchemaError(
            f"the database is at schema revision {before}, this version of Kimera Stream knows up to {known[0]}: "
            "upgrade Kimera Stream, or restore a backup made before the database was upgraded"
        )
    down = (
        revision == "base"
        or revision.startswith("-")
        or (revision in known and before is not None and revision < before)
    )
    try:
        (command.downgrade if down else command.upgrade)(config, revision)
    except CommandError as error:
        raise VaultSchemaError(
            f"revision: there is no schema revision {revision!r}; expected head, base or one of {', '.join(reversed(known))}"
        ) from error
    return _revision_of(connection) or "base"
