"""What migrations keep of the rows of every table, from every revision up and down to every revision."""

import pytest

from kimera_stream.core.vault import tools
from kimera_stream.core.vault.migrate import HEAD, migrate
from kimera_stream.core.vault.schema import metadata
from kimera_stream.core.vault.vault import SqlVault
from tests.core.vault.rows import DEFAULTS, NEW, ROWS, contents, in_order, insert, later_than, rows_after, rows_at

pytestmark = pytest.mark.anyio

OLDER = [revision for revision in NEW if revision != HEAD]


@pytest.fixture(params=["sqlite", pytest.param("own_postgres", marks=pytest.mark.postgres)])
def url(request):
    """A database of the test's own, migrated."""
    return request.getfixturevalue(f"{request.param}_url")


def test_every_table_and_column_is_covered():
    """A new one needs rows here, the revision that brings it, and what it says in rows that are older."""
    assert set(ROWS) == {table.name for table in metadata.sorted_tables}
    assert max(NEW) == HEAD
    brought = sorted(name for names in NEW.values() for name in names)
    assert brought == sorted([*ROWS, *DEFAULTS])
    for table in metadata.sorted_tables:
        for column in table.columns:
            values = [row[column.name] for row in ROWS[table.name]]
            assert any(value != DEFAULTS.get(f"{table.name}.{column.name}") for value in values), column
        assert set(ROWS[table.name][0]) == {column.name for column in table.columns}


@pytest.mark.allow_blocking
@pytest.mark.parametrize("revision", OLDER)
async def test_going_down_keeps_what_the_revision_has_and_coming_up_again_the_same(url, revision):
    await insert(url, ROWS)
    assert in_order(await contents(url)) == in_order(ROWS)
    assert await migrate(url, revision) == revision
    assert in_order(await contents(url)) == in_order(rows_at(revision))
    assert await migrate(url) == HEAD
    assert in_order(await contents(url)) == in_order(rows_after(revision))


@pytest.mark.allow_blocking
@pytest.mark.parametrize("revision", OLDER)
async def test_a_database_of_an_older_revision_is_upgraded_with_all_its_rows_and_served(
    url, revision, make_settings, samples, clock
):
    await migrate(url, "base")
    assert await migrate(url, revision) == revision
    await insert(url, rows_at(revision))
    assert await migrate(url) == HEAD
    assert in_order(await contents(url)) == in_order(rows_after(revision))

    assert (await tools.check(url)).problems == []
    vault = SqlVault(url, make_settings(), clock=clock)
    await vault.start()
    try:
        assert (vault.epoch, vault.head, vault.trimmed) == ("an-older-epoch-1", 8, 1)
        assert [e.offset for e in (await vault.read("geoid:a", after=1, limit=9)).entries] == [5, 7]
        stored = await vault.geoid("a")
        assert (stored.geoid.text, stored.geoid.semantic_state) == ("statement a", {"x": 0.5})
        assert (await vault.contradiction("c1")).why[1] == 'he said "no"'
        assert [each.id for each in (await vault.list_scars(after=0, limit=9)).items] == ["s1"]
        assert [watch.id for watch, _ in await vault.watches()] == ["w"]
        assert await vault.cursor("ann", "reader", "geoids") == 5
        assert (await vault.idempotent("ann", "k", not_before=0)).result == b'{"ok":1}'
        assert [each[3] for each in await vault.audit()] == ["a"]
        later = later_than(revision)
        assert await vault.count_dead_letters() == ("dead_letter" not in later)
        assert len(await vault.usage()) == 2 * ("usage" not in later)
        assert len(await vault.take_up(due=2**50, held_until=2**51, limit=9)) == ("checkpoint_request" not in later)
        assert len(await vault.revocations(after=0, limit=9)) == ("revocation" not in later)
        await vault.commit(samples.publish(8, "e", session_id="s"))
        assert (await vault.session("s")).statements == (3 if "session" in later else 4)
    finally:
        await vault.close()
