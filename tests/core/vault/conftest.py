"""Vaults on both databases, and made-up contents for them."""

import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
import numpy as np
import pytest

from kimera_stream.core.interfaces import StoredGeoid, WriteBatch
from kimera_stream.core.vault import schema
from kimera_stream.core.vault.migrate import migrate
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.settings import DatabaseSettings
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Components, Contradiction, Geoid, Scar
from tests.postgres import administer, own_database, run_apart, url_of


def database_settings(**changes: Any) -> DatabaseSettings:
    return DatabaseSettings.model_validate({"busy_timeout": 2.0, **changes})


class Samples:
    """Geoids, contradictions, scars and the batches that commit them."""

    @staticmethod
    def geoid(id_: str, offset: int, **changes: Any) -> Geoid:
        fields: dict[str, Any] = {
            "id": id_,
            "version": 1,
            "text": f"statement {id_}",
            "semantic_state": {},
            "symbolic_state": {},
            "metadata": {},
            "entropy": 0.0,
            "created_at": 1_000 + offset,
            "updated_at": 1_000 + offset,
            "offset": offset,
        }
        return Geoid(**{**fields, **changes})

    @staticmethod
    def vector(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(8).astype(np.float32)

    def entry(self, offset: int, geoid: Geoid, type_: str = "geoid.created", ts: int | None = None) -> LogEntry:
        channels = ["geoids", f"geoid:{geoid.id}"]
        if geoid.session_id:
            channels.append(f"session:{geoid.session_id}")
        if geoid.originator_agent_id:
            channels.append(f"agent:{geoid.originator_agent_id}")
        return LogEntry(
            offset,
            type_,
            1_000 + offset if ts is None else ts,
            tuple(channels),
            msgspec.Raw(msgspec.json.encode(geoid)),
        )

    def publish(self, head: int, *ids: str, principal: str = "ann", **changes: Any) -> WriteBatch:
        """One created geoid per id, from ``head + 1`` on."""
        batch = WriteBatch()
        for offset, id_ in enumerate(ids, head + 1):
            geoid = self.geoid(id_, offset, **changes)
            batch.entries.append(self.entry(offset, geoid))
            batch.geoids.append(StoredGeoid(geoid, self.vector(offset), principal, tokens=7))
        return batch

    @staticmethod
    def contradiction(id_: str, a: str, b: str, offset: int, **changes: Any) -> Contradiction:
        fields: dict[str, Any] = {
            "id": id_,
            "a": a,
            "b": b,
            "a_text": f"statement {a}",
            "score": 0.75,
            "components": Components(
                relatedness=0.1,
                semantic=0.2,
                embedding_misalignment=0.3,
                layer_conflict=0.4,
                symbolic_opposition=0.5,
                composite=0.6,
            ),
            "why": ["symbolic: status: 'up' vs 'down'", 'he said "no"'],
            "gradient_type": "symbolic",
            "pulse_strength": 0.9,
            "decision": "collapse",
            "state": "open",
            "model": "rules/1",
            "detected_at": 2_000 + offset,
            "offset": offset,
        }
        return Contradiction(**{**fields, **changes})

    @staticmethod
    def scar(id_: str, contradiction_id: str, offset: int, **changes: Any) -> Scar:
        fields: dict[str, Any] = {
            "id": id_,
            "contradiction_id": contradiction_id,
            "geoids": ("x", "y"),
            "decision": "surge",
            "reason": None,
            "resolved_by": "ann",
            "vault": "a",
            "pre_entropy": 1.5,
            "post_entropy": 1.0,
            "delta_entropy": -0.5,
            "weight": 0.25,
            "created_at": 3_000 + offset,
            "offset": offset,
        }
        return Scar(**{**fields, **changes})

    @staticmethod
    def found(found: Contradiction, type_: str = "contradiction.found") -> LogEntry:
        channels = ("contradictions", f"geoid:{found.a}", f"geoid:{found.b}")
        return LogEntry(found.offset, type_, 5, channels, msgspec.Raw(msgspec.json.encode(found)))

    @staticmethod
    def formed(scar: Scar) -> LogEntry:
        return LogEntry(scar.offset, "scar.formed", 5, ("scars",), msgspec.Raw(msgspec.json.encode(scar)))


@pytest.fixture(scope="session")
def samples() -> Samples:
    return Samples()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database file: copying it is faster than migrating again."""
    path = tmp_path_factory.mktemp("template") / "vault.sqlite3"
    run_apart(migrate, f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[str]:
    with ExitStack() as stack:
        try:
            name = stack.enter_context(own_database())
        except (OSError, TimeoutError) as error:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(f"no PostgreSQL answers: {error}")
        run_apart(migrate, url_of(name))
        yield name


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    path = tmp_path / "vault.sqlite3"
    shutil.copy(sqlite_template, path)
    with sqlite3.connect(path) as connection:  # an epoch of its own
        connection.execute("UPDATE log_state SET epoch = ?", (uuid4().hex,))
    connection.close()
    return f"sqlite+aiosqlite:///{path}"


@pytest.fixture(scope="session")
def shared_postgres(postgres_template: str) -> Iterator[str]:
    yield from _copied(postgres_template)


@pytest.fixture
def postgres_url(shared_postgres: str) -> str:
    """The one database of this session, emptied: making one takes a second."""
    run_apart(_empty, shared_postgres)
    return shared_postgres


async def _empty(url: str) -> None:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""), timeout=5)
    try:
        for table in reversed(schema.metadata.sorted_tables):
            if table is not schema.log_state:
                await connection.execute(f"DELETE FROM {table.name}")
        await connection.execute(
            "UPDATE log_state SET epoch = $1, head = 0, trimmed = 0, payload_bytes = 0, encoder = NULL", uuid4().hex
        )
    finally:
        await connection.close()


@pytest.fixture
def own_postgres_url(postgres_template: str) -> Iterator[str]:
    """A migrated database of the test's own."""
    yield from _copied(postgres_template)


def _copied(template: str) -> Iterator[str]:
    with own_database(template) as name:
        yield url_of(name)


BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture(params=BOTH)
def url(request: pytest.FixtureRequest) -> str:
    """A migrated, empty database, of each kind in turn."""
    return str(request.getfixturevalue(f"{request.param}_url"))


class Clock:
    """Unix ms, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def vault(url: str, clock: Clock) -> AsyncIterator[SqlVault]:
    opened = SqlVault(url, database_settings(), clock=clock)
    await opened.start()
    yield opened
    await opened.close()


@pytest.fixture
async def sqlite_vault(sqlite_url: str) -> AsyncIterator[SqlVault]:
    opened = SqlVault(sqlite_url, database_settings(busy_timeout=0.2))
    await opened.start()
    yield opened
    await opened.close()


@pytest.fixture
async def postgres_vault(postgres_url: str) -> AsyncIterator[SqlVault]:
    opened = SqlVault(postgres_url, database_settings())
    await opened.start()
    yield opened
    await opened.close()


@pytest.fixture
def make_settings() -> Callable[..., DatabaseSettings]:
    return database_settings


@pytest.fixture
def alter_postgres(own_postgres_url: str) -> Callable[[str], Awaitable[None]]:
    """Changes a setting of the test's own database, for sessions from then on."""

    async def alter(change: str) -> None:
        await administer(f"ALTER DATABASE {own_postgres_url.rpartition('/')[2]} {change}")

    return alter
