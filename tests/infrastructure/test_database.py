"""The one way to a database: statements, the pool, cancellation, URLs."""

import re
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial

import anyio
import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from sqlalchemy import Column, Integer, LargeBinary, MetaData, Table, Text, bindparam, literal, select, text
from sqlalchemy.dialects.postgresql import asyncpg as postgres_dialect
from sqlalchemy.dialects.sqlite import aiosqlite as sqlite_dialect

from kimera_stream.infrastructure.database import (
    CommitCollector,
    CommitWatch,
    Database,
    Insert,
    Query,
    QueryIn,
    Transaction,
    async_url,
)
from kimera_stream.infrastructure.database.failures import failure_of, unavailable
from kimera_stream.infrastructure.database.statements import among, statements_of
from kimera_stream.infrastructure.settings import DatabaseSettings
from kimera_stream.protocol.errors import BadRequestError, UnavailableError
from tests.e2e.harness import until

item = Table(
    "item",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("hits", Integer, nullable=False),
    Column("raw", LargeBinary),
)
INSERT = Insert.whole(item)
ALL = Query(select(item.c.id, item.c.name, item.c.hits, item.c.raw).order_by(item.c.id))


def database_settings(**changes) -> DatabaseSettings:
    return DatabaseSettings.model_validate({"busy_timeout": 0.5, "pool_size": 2, **changes})


@pytest.fixture
async def database(tmp_path):
    opened = Database(f"sqlite:///{tmp_path / 'db.sqlite3'}", database_settings())
    create = Query(
        text("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT NOT NULL, hits INTEGER NOT NULL, raw BLOB)")
    )
    await opened.write(lambda tx: tx.run(create))
    yield opened
    await opened.close()


class TestUrls:
    @pytest.mark.parametrize(
        ("given_url", "driver"),
        [
            ("sqlite:///x.db", "sqlite+aiosqlite"),
            ("sqlite+aiosqlite:///x.db", "sqlite+aiosqlite"),
            ("postgresql://u@h/n", "postgresql+asyncpg"),
            ("postgres://u@h/n", "postgresql+asyncpg"),
            ("postgresql+asyncpg://u@h/n", "postgresql+asyncpg"),
        ],
    )
    def test_the_driver_is_filled_in(self, given_url, driver):
        assert async_url(given_url).drivername == driver

    @pytest.mark.parametrize(
        ("given_url", "message"),
        [
            ("not a url", "expected sqlite"),
            ("", "expected sqlite"),
            ("mysql://h/n", "mysql is not supported"),
            ("postgresql+psycopg://h/n", "not supported"),
            ("sqlite://", "needs a file"),
            ("sqlite:///:memory:", "needs a file"),
        ],
    )
    def test_anything_else_is_refused_by_name(self, given_url, message):
        with pytest.raises(BadRequestError, match=message) as caught:
            async_url(given_url)
        assert "KIMERA_DATABASE__URL" in caught.value.message

    def test_a_password_is_never_in_the_message(self):
        with pytest.raises(BadRequestError) as caught:
            async_url("mysql://me:hunter2@h/n")
        assert "hunter2" not in caught.value.message


other = Table("other", MetaData(), Column("id", Integer, primary_key=True), Column("item", Integer, nullable=False))
OTHERS = Insert.whole(other, conflict=("id",))


class TestInsertsTogether:
    @settings(max_examples=80, deadline=None)
    @given(
        counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
        dialect=st.sampled_from([sqlite_dialect, postgres_dialect]),
    )
    def test_every_value_is_bound_once_in_order(self, counts, dialect):
        inserts = [
            (INSERT, [(100 * n + i, f"n{i}", 0, None) for i in range(count)])
            if n % 2
            else (OTHERS, [(100 * n + i, i) for i in range(count)])
            for n, count in enumerate(counts)
        ]
        made = list(statements_of(dialect.dialect(), inserts))
        assert [value for _, values in made for value in values] == [
            value for _, rows in inserts for row in rows for value in row
        ]
        for sql, values in made:
            if dialect is postgres_dialect:
                assert [int(number) for number in re.findall(r"\$(\d+)", sql)] == list(range(1, len(values) + 1))
            else:
                assert sql.count("?") == len(values)
            assert sql.count("INSERT") == 1 or dialect is postgres_dialect

    def test_few_rows_of_several_tables_are_one_statement_on_postgresql(self):
        few = [(INSERT, [(1, "a", 0, None)]), (OTHERS, [(1, 1), (2, 1), (3, 1)])]
        many = [(INSERT, [(i, "a", 0, None) for i in range(8)])]
        assert len(list(statements_of(postgres_dialect.dialect(), few))) == 1
        assert len(list(statements_of(postgres_dialect.dialect(), [*few, *many, *few]))) == 3
        assert len(list(statements_of(sqlite_dialect.dialect(), few))) == 3


class TestInsert:
    @settings(max_examples=60, deadline=None)
    @given(count=st.integers(1, 400), dialect=st.sampled_from([sqlite_dialect, postgres_dialect]))
    def test_statements_cover_all_rows_in_order_with_few_texts(self, count, dialect):
        rows = [(i, f"n{i}", 0, None) for i in range(count)]
        made = list(INSERT.statements(dialect.dialect(), rows))
        assert [value for _, values in made for value in values] == [value for row in rows for value in row]
        assert len({sql for sql, _ in made}) <= 10
        for sql, values in made:
            assert sql.count("?") + sql.count("$") == len(values)

    def test_a_column_that_is_not_there_is_refused(self):
        with pytest.raises(ValueError, match="colour"):
            Insert(item, ("id", "colour"))

    @pytest.mark.anyio
    async def test_existing_rows_are_overwritten_or_added_to(self, database):
        upsert = Insert(item, ("id", "name", "hits"), conflict=("id",), update=("name",), add=("hits",))
        await database.write(lambda tx: tx.insert(upsert, [(1, "a", 1), (2, "b", 1)]))
        await database.write(lambda tx: tx.insert(upsert, [(2, "c", 5), (3, "d", 1)]))
        assert await database.read(lambda tx: tx.rows(ALL)) == [
            (1, "a", 1, None),
            (2, "c", 6, None),
            (3, "d", 1, None),
        ]

    @pytest.mark.anyio
    async def test_an_error_in_a_statement_of_many_rows_leaves_none(self, database):
        rows = [(i, "n", 0, None) for i in range(100)]
        rows[70] = (3, "again", 0, None)
        with pytest.raises(sqlite3.IntegrityError):
            await database.write(lambda tx: tx.insert(INSERT, rows))
        assert await database.read(lambda tx: tx.rows(ALL)) == []


class TestQuery:
    @pytest.mark.anyio
    async def test_parameters_are_bound_by_name(self, database):
        await database.write(lambda tx: tx.insert(INSERT, [(1, "a'; DROP TABLE item; --", 7, b"\x00\xff")]))
        query = Query(
            select(item.c.id, literal("fixed")).where(item.c.hits == bindparam("n"), item.c.name == bindparam("m"))
        )
        name = "a'; DROP TABLE item; --"
        assert await database.read(lambda tx: tx.row(query, n=7, m=name)) == (1, "fixed")
        assert await database.read(lambda tx: tx.row(query, n=8, m=name)) is None
        assert await database.read(lambda tx: tx.value(query, n=8, m=name)) is None

    @pytest.mark.anyio
    async def test_a_missing_parameter_is_a_defect(self, database):
        query = Query(select(item.c.id).where(item.c.hits == bindparam("n")))
        with pytest.raises(KeyError):
            await database.read(lambda tx: tx.rows(query))

    @pytest.mark.anyio
    @pytest.mark.parametrize("count", [0, 1, 2, 255, 256, 257, 700])
    async def test_lists_of_any_length(self, database, count):
        await database.write(lambda tx: tx.insert(INSERT, [(i, "n", 0, None) for i in range(800)]))
        query = QueryIn(lambda values: select(item.c.id).where(among(item.c.id, values)))
        found = await database.read(lambda tx: tx.rows_in(query, list(range(count))))
        assert sorted(row[0] for row in found) == list(range(count))


@pytest.mark.anyio
class TestTransactions:
    async def test_an_error_rolls_back(self, database):
        def half(tx):
            tx.insert(INSERT, [(1, "a", 0, None)])
            raise RuntimeError("half way")

        with pytest.raises(RuntimeError, match="half way"):
            await database.write(half)
        assert await database.read(lambda tx: tx.rows(ALL)) == []
        await database.write(lambda tx: tx.insert(INSERT, [(1, "a", 0, None)]))

    async def test_steps_commit_together_or_not_at_all(self, database):
        async def fail_between() -> None:
            async with database.transaction(write=True) as steps:
                await steps.step(lambda tx: tx.insert(INSERT, [(1, "a", 0, None)]))
                raise RuntimeError("between")

        with pytest.raises(RuntimeError, match="between"):
            await fail_between()
        async with database.transaction(write=True) as steps:
            for i in (5, 6):
                await steps.step(partial(lambda tx, i: tx.insert(INSERT, [(i, "a", 0, None)]), i=i))
        assert [row[0] for row in await database.read(lambda tx: tx.rows(ALL))] == [5, 6]

    async def test_steps_of_a_read_see_one_snapshot(self, database):
        async with database.transaction(write=False) as steps:
            assert await steps.step(lambda tx: tx.rows(ALL)) == []
            await database.write(lambda tx: tx.insert(INSERT, [(1, "a", 0, None)]))
            assert await steps.step(lambda tx: tx.rows(ALL)) == []
        assert len(await database.read(lambda tx: tx.rows(ALL))) == 1

    async def test_readers_cannot_write(self, database):
        with pytest.raises(UnavailableError, match="read-only"):
            await database.read(lambda tx: tx.insert(INSERT, [(1, "a", 0, None)]))

    async def test_every_statement_runs_off_the_event_loop(self, database):
        here = threading.get_ident()
        assert await database.read(lambda tx: threading.get_ident()) != here
        assert await database.write(lambda tx: threading.get_ident()) != here


@pytest.mark.anyio
class TestPool:
    async def test_readers_are_bounded_and_the_next_is_refused_in_time(self, database):
        release = threading.Event()
        reading = 0

        async def hold() -> None:
            nonlocal reading
            reading += 1
            await database.read(lambda tx: release.wait(30))

        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(hold)
            await anyio.wait_all_tasks_blocked()
            assert reading == 2
            with pytest.raises(UnavailableError, match="busy"):
                await database.read(lambda tx: tx.rows(ALL))
            await database.write(lambda tx: tx.insert(INSERT, [(1, "a", 0, None)]))  # the writer is not concerned
            release.set()
        assert len(await database.read(lambda tx: tx.rows(ALL))) == 1

    async def test_a_cancelled_read_is_given_up_at_once_and_its_connection_is_used_again(self, database):
        endless = Query(text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"))
        for _ in range(5):  # more often than there are readers
            async with anyio.create_task_group() as group:
                group.start_soon(partial(database.read, lambda tx: tx.rows(endless)))
                await anyio.wait_all_tasks_blocked()
                group.cancel_scope.cancel()
        assert await database.read(lambda tx: tx.rows(ALL)) == []

    async def test_a_cancelled_write_is_finished(self, database):
        started, release = threading.Event(), threading.Event()

        def slow(tx) -> None:
            started.set()
            release.wait(30)
            tx.insert(INSERT, [(1, "a", 0, None)])

        async with anyio.create_task_group() as group:
            group.start_soon(database.write, slow)
            await anyio.to_thread.run_sync(started.wait, 30)
            group.cancel_scope.cancel()
            release.set()
        assert len(await database.read(lambda tx: tx.rows(ALL))) == 1

    async def test_ping_answers_within_its_deadline(self, database):
        await database.ping()
        release = threading.Event()
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(database.read, lambda tx: release.wait(30))
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(UnavailableError):
                await database.ping(deadline=0.05)
            release.set()

    async def test_close_waits_for_a_write_and_refuses_what_comes_later(self, tmp_path):
        database = Database(f"sqlite:///{tmp_path / 'db.sqlite3'}", database_settings())
        started, release = threading.Event(), threading.Event()
        done = []

        async def write() -> None:
            await database.write(lambda tx: (started.set(), release.wait(30)))
            done.append("written")

        async with anyio.create_task_group() as group:
            group.start_soon(write)
            await anyio.to_thread.run_sync(started.wait, 30)
            group.start_soon(database.close)
            await anyio.wait_all_tasks_blocked()
            release.set()
        assert done == ["written"]
        with pytest.raises(UnavailableError, match="closed"):
            await database.write(lambda tx: None)


@pytest.mark.anyio
class TestSlowCommits:
    async def test_while_one_lasts_too_long_new_writes_are_refused_and_nothing_else(self, tmp_path):
        made = Database(f"sqlite:///{tmp_path / 'db.sqlite3'}", database_settings(commit_within=0.05, busy_timeout=30))
        registry = CollectorRegistry()
        CommitCollector(registry).add("vault", made.commits)
        started, release = threading.Event(), threading.Event()
        done: list[str] = []

        async def write(name: str, fn: Callable[[Transaction], object], *, accepted: bool) -> None:
            await made.write(fn, accepted=accepted)
            done.append(name)

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(partial(write, "slow", lambda tx: (started.set(), release.wait(30)), accepted=False))
                await anyio.to_thread.run_sync(started.wait, 30)
                await until(lambda: made.commits.trouble)
                for refused in (1, 2):
                    with pytest.raises(UnavailableError, match="KIMERA_DATABASE__COMMIT_WITHIN") as caught:
                        await made.write(lambda tx: None)
                    assert caught.value.retry_after
                    numbers = {"writer": "vault"}
                    assert registry.get_sample_value("kimera_slow_commit_refusals_total", numbers) == refused
                assert registry.get_sample_value("kimera_commit_lasting_seconds", {"writer": "vault"}) > 0.05
                group.start_soon(partial(write, "accepted", lambda tx: None, accepted=True))
                await made.ping()
                assert done == []
                release.set()
            assert done == ["slow", "accepted"]
            assert made.commits.trouble == ""
            assert registry.get_sample_value("kimera_commit_lasting_seconds", {"writer": "vault"}) == 0
            await made.write(lambda tx: None)
        finally:
            release.set()
            await made.close()

    def test_each_write_has_a_time_of_its_own(self):
        now = 100.0
        commits = CommitWatch(3.0, clock=lambda: now)
        commits.began()
        now += 3.0
        commits.admit()
        now += 0.1
        assert commits.lasting == pytest.approx(3.1)
        with pytest.raises(UnavailableError):
            commits.admit()
        commits.ended()
        assert commits.lasting == 0
        commits.began()
        commits.admit()
        assert commits.refused == 1


class TestFailures:
    @pytest.mark.parametrize("error", [RuntimeError("x"), KeyError("x"), sqlite3.IntegrityError("x"), ValueError("x")])
    def test_defects_are_no_failures(self, error):
        assert failure_of(error) is None

    @pytest.mark.parametrize("error", [ConnectionRefusedError(), TimeoutError(), OSError(5, "io")])
    def test_the_network_is(self, error):
        assert failure_of(error).disconnected

    def test_a_text_that_is_no_text_any_more_is_damage(self):
        with closing(sqlite3.connect(":memory:")) as connection, pytest.raises(sqlite3.OperationalError) as caught:
            connection.execute("SELECT CAST(x'80' AS TEXT)").fetchall()
        failure = failure_of(caught.value)
        assert failure is not None
        assert "damaged" in failure.message

    @pytest.mark.parametrize(
        ("error", "lasting"),
        [
            (asyncpg.InvalidPasswordError("x"), True),
            (asyncpg.InvalidAuthorizationSpecificationError("x"), True),
            (asyncpg.InvalidCatalogNameError("x"), True),
            (asyncpg.TooManyConnectionsError("x"), False),
            (asyncpg.CannotConnectNowError("x"), False),
        ],
    )
    def test_a_wrong_user_password_or_database_does_not_pass_by_itself(self, error, lasting):
        failure = failure_of(error)
        assert failure.lasting is lasting
        assert (unavailable(failure).retry_after is None) is lasting
        assert ("KIMERA_DATABASE__URL" in failure.message) is lasting

    def test_a_connection_that_ended_as_a_statement_began_is_lost(self):
        # What asyncpg raised, once in many runs, when the server had just ended the connection.
        error = asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress")
        failure = failure_of(error)
        assert failure is not None
        assert (failure.disconnected, failure.answered) == (True, False)
        assert failure_of(asyncpg.InternalClientError("got an unexpected message")) is None
