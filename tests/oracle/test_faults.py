"""The faults are what they are said to be: without that a run proves nothing."""

from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import anyio
import asyncpg
import pytest

from tests.oracle import faults
from tests.oracle.deployments import Deployment, Node
from tests.oracle.faults import FAULTS, World
from tests.oracle.model import Ledger
from tests.oracle.plan import Step
from tests.oracle.processes import Postgres, Server, free_port
from tests.oracle.proxy import Proxy

pytestmark = pytest.mark.anyio


@pytest.fixture
async def postgres(tmp_path: Path) -> AsyncIterator[list[Postgres]]:
    """A server; what takes its place is added."""
    with TemporaryDirectory(prefix="oracle-postgres-") as home:
        lives = [Postgres(Path(home), tmp_path / "postgres.txt", {})]
        try:
            await lives[0].prepare()
            yield lives
        finally:
            for life in lives:
                life.proceed()
                await life.kill()


async def connected(postgres: Postgres) -> asyncpg.Connection:
    return await asyncpg.connect(postgres.url().replace("+asyncpg", ""))


@pytest.mark.postgres
async def test_a_paused_postgres_answers_nobody(postgres: list[Postgres]) -> None:
    (server,) = postgres
    connection = await connected(server)
    server.pause()
    async with anyio.create_task_group() as group:
        answered = anyio.Event()

        async def ask() -> None:
            assert await connection.fetchval("SELECT 1") == 1
            answered.set()

        group.start_soon(ask)
        with anyio.move_on_after(0.3):
            await answered.wait()
        assert not answered.is_set()
        server.proceed()
    assert answered.is_set()
    await connection.close()


@pytest.mark.postgres
async def test_a_standby_has_what_was_acknowledged(postgres: list[Postgres]) -> None:
    (server,) = postgres
    connection = await connected(server)
    await connection.execute("CREATE TABLE said (word text)")
    standby = await server.stand_by()
    postgres.append(standby)
    await connection.execute("INSERT INTO said VALUES ('acknowledged')")
    standby.pause()
    lost = anyio.Event()

    async def say() -> None:
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.execute("INSERT INTO said VALUES ('not acknowledged')")
        lost.set()

    async with anyio.create_task_group() as group:
        group.start_soon(say)
        with anyio.move_on_after(0.3):
            await lost.wait()
        assert not lost.is_set()  # it waits for the standby
        await server.kill_all()
    standby.proceed()
    await standby.promote()
    after = await connected(standby)
    assert "acknowledged" in [row["word"] for row in await after.fetch("SELECT word FROM said")]
    await after.execute("INSERT INTO said VALUES ('afterwards')")
    await after.close()


class Recorded(Proxy):
    """A proxy that writes down when nothing passes."""

    def __init__(self, name: str, cuts: list[tuple[str, bool]]) -> None:
        super().__init__(name)
        self.cuts = cuts

    def partition(self, on: bool) -> None:
        self.cuts.append((self.name, on))


def nodes_apart(tmp_path: Path, cuts: list[tuple[str, bool]]) -> World:
    """Two nodes that nobody has started, each with a way of its own to Redis and PostgreSQL."""
    deployment = Deployment("cluster", tmp_path)
    for name in ("one", "other"):
        server = Server(tmp_path / name, {}, tmp_path / f"{name}.txt", {})
        server.port = free_port()
        deployment.nodes.append(Node(name, server, None, Proxy(name)))
        for part in ("redis", "postgres"):
            deployment.between[part, name] = Recorded(f"{part}:{name}", cuts)
    return World(deployment, [], [], Ledger(), [])


@pytest.mark.parametrize("part", ["redis", "postgres"])
async def test_one_node_alone_is_cut_off_and_another_has_to_serve(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "OTHERS_SERVE", 0.2)
    cuts: list[tuple[str, bool]] = []
    world = nodes_apart(tmp_path, cuts)
    kind = {"redis": "redis_cut_off", "postgres": "database_cut_off"}[part]
    await FAULTS[kind](world, Step(1, kind, 0.0, 0.0, 1), Random(1))
    ((name, on), (again, off)) = cuts
    assert (name.partition(":")[0], again, on, off) == (part, name, True, False)
    (wrong,) = world.wrong
    assert "nothing is acknowledged" in wrong
    assert [op.outcome for op in world.ledger.ops] == ["unknown"]
