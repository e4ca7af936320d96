"""The schema, up and down, with data in place."""

import sys
from dataclasses import replace
from importlib.resources import files

import anyio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from kimera_stream.core.interfaces import IdempotencyRecord
from kimera_stream.core.kept import CheckpointRequest, DeadLetter, UsageRecord
from kimera_stream.core.vault import migrate as migration
from kimera_stream.core.vault.errors import VaultSchemaError
from kimera_stream.core.vault.migrate import HEAD, current_revision, migrate
from kimera_stream.core.vault.schema import metadata
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.database import async_url

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", pytest.param("own_postgres", marks=pytest.mark.postgres)])
def url(request):
    """A database of the test's own, migrated."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
async def empty_url(url):
    """The same before its first migration."""
    await migrate(url, "base")
    return url


def scripts() -> ScriptDirectory:
    return ScriptDirectory(str(files("kimera_stream.core.vault") / "migrations"))


def test_the_named_head_is_the_newest_revision():
    assert scripts().get_heads() == [HEAD]


@pytest.mark.allow_blocking
async def test_the_migrated_schema_is_the_declared_one(url):
    engine = create_async_engine(async_url(url))

    def here(thing, name, type_, reflected, compare_to):
        """Indexes that are for PostgreSQL alone are looked for there alone."""
        return type_ != "index" or url.startswith("postgresql") or name != "ix_geoid_text"

    def differences(connection):
        return compare_metadata(MigrationContext.configure(connection, opts={"include_object": here}), metadata)

    try:
        async with engine.connect() as connection:
            assert await connection.run_sync(differences) == []
    finally:
        await engine.dispose()


async def test_down_and_up_again_keeps_log_and_entities(url, samples, make_settings, clock):
    vault = SqlVault(url, make_settings(), clock=clock)
    await vault.start()
    try:
        await vault.commit(samples.publish(0, "a", "b", session_id="s1", semantic_state={"x": 1.0}))
        await vault.commit(samples.publish(2, "c"))
        await vault.save_checkpoint([CheckpointRequest("ann", b"{}")])
    finally:
        await vault.close()
    before = vault.epoch

    assert await migrate(url, "-8") == "0001"
    assert await current_revision(url) == "0001"
    assert await migrate(url) == HEAD

    vault = SqlVault(url, make_settings(), clock=clock)
    await vault.start()
    try:
        assert (vault.epoch, vault.head) == (before, 3)
        assert [e.offset for e in (await vault.read("session:s1", after=0, limit=9)).entries] == [1, 2]
        assert (await vault.geoid("b")).geoid.semantic_state == {"x": 1.0}
        session = await vault.session("s1")  # made again from the geoids
        assert (session.principal, session.statements, session.created_at, session.updated_at) == ("ann", 2, 1001, 1002)
        assert await vault.take_up(due=2**60, held_until=0, limit=9) == []
        await vault.commit(samples.publish(3, "d", session_id="s1"))
        assert (await vault.session("s1")).statements == 3
    finally:
        await vault.close()


async def test_tokens_come_and_go_beside_the_other_counts(url, samples, make_settings, clock):
    async def used() -> list[UsageRecord]:
        vault = SqlVault(url, make_settings(), clock=clock)
        await vault.start()
        try:
            return await vault.usage()
        finally:
            await vault.close()

    vault = SqlVault(url, make_settings(), clock=clock)
    await vault.start()
    try:
        await vault.commit(samples.publish(0, "a", "b"))
        await vault.commit(samples.publish(2, "c", principal="bob"))
    finally:
        await vault.close()
    day = clock.now // 86_400_000
    assert await used() == [UsageRecord("ann", day, 2, 22, 14, 22), UsageRecord("bob", day, 1, 11, 7, 11)]
    assert await migrate(url, "0002") == "0002"
    assert await used() == [UsageRecord("ann", day, 2, 22, 0), UsageRecord("bob", day, 1, 11, 0)]


async def test_dead_letters_come_beside_the_requests_that_are_kept(url, make_settings, clock):
    kept = CheckpointRequest("ann", b'{"text":"t"}', session_id="s", key="k", attempts=3, accepted_at=7)
    assert await migrate(url, "0003") == "0003"
    assert await migrate(url) == HEAD
    vault = SqlVault(url, make_settings(), clock=clock)
    await vault.start()
    try:
        await vault.save_checkpoint([kept, replace(kept, key="k2")])
        (first, _) = await vault.take_up(due=clock.now, held_until=clock.now + 1, limit=9)
        await vault.set_aside([DeadLetter(first, 9, "internal", "it failed")], most=5)
    finally:
        await vault.close()
    assert await migrate(url, "0003") == "0003"  # dead letters go, what is kept stays
    assert await migrate(url) == HEAD
    vault = SqlVault(url, make_settings(), clock=clock)
    await vault.start()
    try:
        assert await vault.count_dead_letters() == 0
        assert await vault.take_up(due=0, held_until=1, limit=9) == [replace(kept, key="k2", attempts=5)]
        await vault.set_aside([DeadLetter(first, 9, "internal", "it failed")], most=5)
        assert await vault.count_dead_letters() == 1
    finally:
        await vault.close()


async def test_revocations_come_and_go_beside_the_rest(url, samples, make_settings, clock):
    assert await migrate(url, "0005") == "0005"
    assert await migrate(url) == HEAD
    vault = SqlVault(url, make_settings(), clock=clock)
    await vault.start()
    try:
        await vault.commit(samples.publish(0, "a"))
        made = await vault.revoke("principal", "ann", by="root")
        assert await vault.revocations(after=0, limit=9) == [made]
    finally:
        await vault.close()
    assert await migrate(url, "0005") == "0005"
    assert await migrate(url) == HEAD
    vault = SqlVault(url, make_settings(), clock=clock)
    await vault.start()
    try:
        assert await vault.revocations(after=0, limit=9) == []
        assert (await vault.geoid("a")).geoid.id == "a"
        await vault.revoke("key", "x", by="root")
    finally:
        await vault.close()


async def test_first_results_outlive_their_checksums(url, samples, make_settings, clock):
    async def given() -> bytes:
        vault = SqlVault(url, make_settings(), clock=clock)
        await vault.start()
        try:
            return (await vault.idempotent("ann", "k", not_before=0)).result
        finally:
            await vault.close()

    vault = SqlVault(url, make_settings(), clock=clock)
    await vault.start()
    try:
        batch = samples.publish(0, "a")
        batch.idempotency.append(IdempotencyRecord("ann", "k", b'{"offset":1}', clock.now))
        await vault.commit(batch)
    finally:
        await vault.close()
    assert await given() == b'{"offset":1}'
    assert await migrate(url, "0007") == "0007"
    assert await migrate(url) == HEAD
    assert await given() == b'{"offset":1}'


async def test_all_the_way_down_and_up_is_a_new_log(url, samples, make_settings):
    vault = SqlVault(url, make_settings())
    await vault.start()
    try:
        await vault.commit(samples.publish(0, "a"))
    finally:
        await vault.close()
    assert await migrate(url, "base") == "base"
    again = SqlVault(url, make_settings())
    await again.start()
    try:
        assert again.head == 0
        assert again.epoch != vault.epoch
        assert await again.geoid("a") is None
    finally:
        await again.close()


async def test_step_by_step(empty_url):
    assert await migrate(empty_url, "0001") == "0001"
    assert await migrate(empty_url, "+1") == "0002"
    assert await migrate(empty_url, HEAD) == HEAD


@pytest.mark.allow_blocking
async def test_a_newer_schema_is_refused_with_the_next_step(url, make_settings):
    engine = create_async_engine(async_url(url))
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await engine.dispose()
    vault = SqlVault(url, make_settings())
    with pytest.raises(VaultSchemaError, match=r"9999.*upgrade Kimera Stream"):
        await vault.start()
    await vault.close()


async def test_an_unknown_revision_is_refused_and_changes_nothing(url):
    with pytest.raises(VaultSchemaError, match="expected head, base or one of 0001, 0002, 0003, 0004"):
        await migrate(url, "0777")
    assert await current_revision(url) == HEAD


async def test_a_migration_that_fails_leaves_the_schema_as_it_was(empty_url, monkeypatch):
    loaded = scripts()
    monkeypatch.setattr(migration, "_load_scripts", lambda: loaded)
    broken = loaded.get_revision("0002").module

    def upgrade() -> None:
        original()
        raise RuntimeError("half way")

    original = broken.upgrade
    await migrate(empty_url, "0001")
    monkeypatch.setattr(broken, "upgrade", upgrade)
    with pytest.raises(RuntimeError, match="half way"):
        await migrate(empty_url)
    monkeypatch.setattr(broken, "upgrade", original)
    assert await current_revision(empty_url) == "0001"
    assert await migrate(empty_url) == HEAD


async def described(url: str) -> list[tuple[str, ...]]:
    """Everything that the database says of its tables, indexes and constraints."""
    engine = create_async_engine(async_url(url))
    sqlite = """SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"""
    columns = """SELECT table_name, column_name, ordinal_position::text, data_type, is_nullable, column_default
        FROM information_schema.columns WHERE table_schema = current_schema()"""
    indexes = "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()"
    constraints = """SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = current_schema()::regnamespace"""
    queries = [sqlite] if engine.dialect.name == "sqlite" else [columns, indexes, constraints]
    try:
        async with engine.connect() as connection:
            rows = [row for query in queries for row in (await connection.execute(text(query))).all()]
    finally:
        await engine.dispose()
    return sorted(tuple(" ".join(str(each).split()) for each in row) for row in rows)


@pytest.mark.allow_blocking
async def test_a_new_database_made_at_once_is_the_one_that_migrations_make(empty_url):
    await migrate(empty_url, "0001")
    await migrate(empty_url, "head")
    by_steps = await described(empty_url)
    await migrate(empty_url, "base")
    assert await migrate(empty_url) == HEAD
    assert await described(empty_url) == by_steps
    assert len(by_steps) > 20


async def test_a_new_database_starts_without_alembic(tmp_path):
    url = f"sqlite:///{tmp_path / 'vault.sqlite3'}"
    code = (
        "import anyio, sys; from kimera_stream.core.vault.migrate import migrate; "
        f"anyio.run(migrate, {url!r}); print('alembic' in sys.modules)"
    )
    done = await anyio.run_process([sys.executable, "-c", code])
    assert done.stdout.split()[-1] == b"False"
    assert await current_revision(url) == HEAD


async def test_a_directory_that_is_missing_is_made(tmp_path, make_settings):
    vault = SqlVault(f"sqlite:///{tmp_path / 'a' / 'b' / 'vault.sqlite3'}", make_settings())
    await vault.start()
    assert vault.head == 0
    await vault.close()
