"""Brings a database to a revision of the schema, in one transaction, with the packaged migrations.

Alembic is loaded where there is something to migrate: a new database is made from the declared tables at once, and a test
compares what comes of it with what the migrations make.
"""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import structlog
from sqlalchemy import URL, Connection, inspect, text
from sqlalchemy.ext.asyncio import AsyncConnection

from kimera_stream.core.vault import schema
from kimera_stream.core.vault.errors import VaultSchemaError
from kimera_stream.infrastructure.database import async_url
from kimera_stream.infrastructure.database.engines import make_engine
from kimera_stream.infrastructure.database.failures import failure_of, unavailable
from kimera_stream.infrastructure.settings import DatabaseSettings

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory

log = structlog.get_logger(__name__)

HEAD = "0009"
"""The newest revision, which ``schema`` declares; a test compares this with the migrations."""
_LOCK_KEY = 5_135_072_301
"""Any number: the advisory lock under which PostgreSQL migrates."""
_VERSION_TABLE = (
    "CREATE TABLE IF NOT EXISTS alembic_version "
    "(version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)
"""As Alembic makes it."""


async def migrate(url: str, revision: str = "head", *, settings: DatabaseSettings | None = None) -> str:
    """Migrate the database at ``url`` up or down to ``revision``; returns the revision it is at now.

    Raises:
        VaultSchemaError: the database is of a newer version, or there is no such revision.
        UnavailableError: unreachable, locked or not writable.
    """
    target = async_url(url)
    if target.get_backend_name() == "sqlite" and target.database is not None:
        await anyio.Path(target.database).parent.mkdir(parents=True, exist_ok=True)
    async with _connected(target, settings) as connection:
        before = await connection.run_sync(_revision_of)
        await connection.rollback()
        if before == HEAD and revision in ("head", HEAD):
            return HEAD
        if before is None and revision in ("head", HEAD):
            made = await connection.run_sync(_create_locked)
            await connection.commit()
            if made:
                log.info("database created", revision=HEAD)
                return HEAD
        scripts = await anyio.to_thread.run_sync(_load_scripts)
        after = await connection.run_sync(_migrate_locked, scripts, revision)
        await connection.commit()
    log.info("database migrated", before=before, after=after)
    return after


async def current_revision(url: str, *, settings: DatabaseSettings | None = None) -> str | None:
    """The revision that the database at ``url`` is at; None before the first.

    Raises:
        UnavailableError: unreachable, or not a database.
    """
    async with _connected(async_url(url), settings) as connection:
        return await connection.run_sync(_revision_of)


@asynccontextmanager
async def _connected(url: URL, settings: DatabaseSettings | None) -> AsyncIterator[AsyncConnection]:
    """A connection of its own, closed without a commit; its driver's errors come out as ours."""
    engine = make_engine(url, settings or DatabaseSettings.model_validate({}), write=True)
    try:
        async with engine.connect() as connection:
            yield connection
    except Exception as error:
        failure = failure_of(error)
        if failure is None:
            raise
        raise unavailable(failure) from error
    finally:
        with anyio.CancelScope(shield=True):
            await engine.dispose()


def _load_scripts() -> "ScriptDirectory":
    """Alembic and the packaged revisions: files are read here, and not while they run."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(__file__).with_name("migrations")))
    scripts.get_heads()
    return scripts


def _revision_of(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _lock(connection: Connection) -> None:
    """Begin, and keep other nodes from changing the schema meanwhile."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})


def _create_locked(connection: Connection) -> bool:
    """Make the tables of a new database and begin its log; False if another node was faster."""
    _lock(connection)
    if _revision_of(connection) is not None:
        return False
    schema.metadata.create_all(connection, checkfirst=False)
    first = {"epoch": secrets.token_urlsafe(12), "created_at": time.time_ns() // 1_000_000}
    connection.execute(schema.log_state.insert(), {"id": 1, "head": 0, "trimmed": 0, "payload_bytes": 0, **first})
    connection.execute(text(_VERSION_TABLE))
    connection.execute(text("INSERT INTO alembic_version (version_num) VALUES (:head)"), {"head": HEAD})
    return True


def _migrate_locked(connection: Connection, scripts: "ScriptDirectory", revision: str) -> str:
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.util import CommandError

    _lock(connection)
    before = _revision_of(connection)
    known = [script.revision for script in scripts.walk_revisions()]
    if before is not None and before not in known:
        raise VaultSchemaError(
            f"the database is at schema revision {before}, this version of Kimera Stream knows up to {known[0]}: "
            "upgrade Kimera Stream, or restore a backup made before the database was upgraded"
        )
    down = revision == "base" or revision.startswith("-") or (revision in known and (before or "") > revision)
    steps = scripts._downgrade_revs if down else scripts._upgrade_revs  # noqa: SLF001 - as Alembic's own cookbook does
    try:
        context = MigrationContext.configure(
            connection, opts={"fn": lambda current, _context: steps(revision, current), "transactional_ddl": True}
        )
        with Operations.context(context):
            context.run_migrations()
    except CommandError as error:
        raise VaultSchemaError(
            f"revision: there is no schema revision {revision!r}; expected head, base or one of {', '.join(reversed(known))}"
        ) from error
    return _revision_of(connection) or "base"
