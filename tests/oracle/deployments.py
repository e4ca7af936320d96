"""What is put to the test: one server on SQLite, one on PostgreSQL, several nodes with a bus. All behind proxies of ours."""

import shutil
import signal
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread

from tests.oracle import passes
from tests.oracle.processes import Postgres, Redis, Server, run_program
from tests.oracle.proxy import Proxy
from tests.oracle.shim import Shim, build_shim

SETTINGS = {
    **passes.SETTINGS,
    # Deterministic and quick: no weights, and every candidate is looked at, however many were published together.
    "KIMERA_EMBEDDING__PROVIDER": "hashing",
    "KIMERA_SCORING__VERIFIER": "off",
    "KIMERA_SCORING__CANDIDATES": "512",
    "KIMERA_TELEMETRY__LOG_FORMAT": "json",
    "KIMERA_API__COMMANDS_PER_SECOND": "100000",
    "KIMERA_API__COMMANDS_BURST": "100000",
    "KIMERA_API__SHUTDOWN_DEADLINE": "5",
    # Small bounds, so that a stalled subscriber is felt within seconds.
    "KIMERA_STREAM__OUTBOX_BYTES": "32768",
    "KIMERA_STREAM__OUTBOX_AGE": "2",
    "KIMERA_STREAM__TAIL_BYTES": "131072",
    "KIMERA_STREAM__PING_INTERVAL": "1",
    "KIMERA_STREAM__PONG_TIMEOUT": "2",
    "KIMERA_PERFORMANCE__SNAPSHOT_ENTRIES": "400",
    # A clock that jumps by hours must not make a key forget its first result.
    "KIMERA_PERFORMANCE__IDEMPOTENCY_WINDOW": "86400",
    "KIMERA_DATABASE__BUSY_TIMEOUT": "1.5",
    "KIMERA_DATABASE__COMMIT_WITHIN": "3",
    "KIMERA_PERFORMANCE__RETRY_WITHIN": "1",
}
CLUSTER_SETTINGS = {
    # Two engines wait for one lock, through a proxy: on a busy machine longer than a second.
    "KIMERA_DATABASE__BUSY_TIMEOUT": "5",
    # A commit waits for that lock, too: where waiting alone made new work be refused, a busy machine would refuse all of it.
    "KIMERA_DATABASE__COMMIT_WITHIN": "10",
}
"""Of several nodes, beside and instead of the others."""


@dataclass
class Node:
    """A server process, its shim and the proxy before its door."""

    name: str
    server: Server
    shim: Shim | None
    door: Proxy | None
    role: str = "all"

    async def start(self) -> None:
        await self.server.start()
        if self.door is not None:
            self.door.upstream = (self.server.host, self.server.port)

    async def kill(self) -> None:
        if self.door is not None:
            self.door.upstream = None
        await self.server.kill()

    async def restart(self, *, gracefully: bool) -> int | None:
        """End it, by a kill or as an operator would, and start it again; the exit code of a graceful stop."""
        code: int | None = 0
        if gracefully:
            code = await self.server.end()
            if self.door is not None:
                self.door.upstream = None
        else:
            await self.kill()
        await self.start()
        return code


@dataclass
class Deployment:
    """Everything that runs.

    Attributes:
        between: Proxies between the parts, by what they lead to (``redis``, ``postgres``) and whose they are (a node's name): one node
            can be cut off while the others are not.
        standby: Is to take the place of ``postgres`` soon.
        at_once: Contradictions are committed together with the statement that causes them.
    """

    name: str
    folder: Path
    nodes: list[Node] = field(default_factory=list)
    postgres: Postgres | None = None
    standby: Postgres | None = None
    redis: Redis | None = None
    postgres_shim: Shim | None = None
    between: dict[tuple[str, str], Proxy] = field(default_factory=dict)
    at_once: bool = True
    library: Path | None = None

    @property
    def doors(self) -> list[Proxy]:
        return [node.door for node in self.nodes if node.door is not None]

    @property
    def proxies(self) -> list[Proxy]:
        return [*self.doors, *self.between.values()]

    def leading_to(self, part: str, node: str | None = None) -> list[Proxy]:
        """Proxies before ``redis`` or ``postgres``: of all nodes, or of one."""
        return [
            proxy for (leads_to, whose), proxy in self.between.items() if leads_to == part and node in (None, whose)
        ]

    @property
    def database(self) -> Path:
        """The file of a deployment on SQLite."""
        return self.folder / "data" / "kimera.sqlite3"

    @property
    def database_url(self) -> str:
        """Of the database, without a proxy."""
        return _url(self.database) if self.postgres is None else self.postgres.url()

    @property
    def on_sqlite(self) -> bool:
        return self.postgres is None

    @property
    def shims(self) -> list[Shim]:
        """Of the processes that write to a disk."""
        found = [node.shim for node in self.nodes] if self.on_sqlite else [self.postgres_shim]
        return [shim for shim in found if shim is not None]

    @property
    def clocks(self) -> list[Shim]:
        return [node.shim for node in self.nodes if node.shim is not None]

    @property
    def reader(self) -> str:
        """Base address of a node that readers can ask, without a proxy."""
        return next(node.server.url for node in self.nodes if node.door is not None)

    async def start(self) -> None:
        """Start the nodes; what they need runs already."""
        async with anyio.create_task_group() as group:
            for node in self.nodes:
                group.start_soon(node.start, name=f"start:{node.name}")

    async def stop(self) -> None:
        for node in self.nodes:
            node.server.proceed()
            await node.server.kill()
        for postgres in (self.postgres, self.standby):
            if postgres is not None:
                postgres.proceed()
                await postgres.end(signal.SIGQUIT)
        if self.redis is not None:
            self.redis.proceed()
            await self.redis.kill()


def settings_of(extra: dict[str, str]) -> dict[str, str]:
    return {**SETTINGS, **extra}


async def _make(kind: str, folder: Path, library: Path | None, keep: int | None) -> Deployment:
    made = Deployment(kind, folder, library=library)
    shared = {} if keep is None else {"KIMERA_DATABASE__RETENTION_COUNT": str(keep)}
    if kind != "sqlite":
        # PostgreSQL refuses to run as root, and its user has to reach the folder.
        home = Path(tempfile.mkdtemp(prefix="oracle-postgres-"))
        if library is not None:
            made.postgres_shim = Shim(shutil.copy(library, home / "shim.so"), home / "postgres.shim", home)
            await anyio.Path(home).chmod(0o755)
        preload = {} if made.postgres_shim is None else made.postgres_shim.environment
        made.postgres = Postgres(home, folder / "postgres.txt", preload)
        await made.postgres.prepare()
    roles = {"edge-1": "edge", "edge-2": "edge", "engine-1": "engine", "engine-2": "engine"}
    if kind == "cluster":
        made.at_once = False
        made.redis = Redis(folder, folder / "redis.txt")
        await made.redis.start()
        shared |= CLUSTER_SETTINGS
    else:
        roles = {"server": "all"}
    for name, role in roles.items():
        data = folder / ("data" if kind != "cluster" else f"data-{name}")
        own = {"KIMERA_NODE": name, **({"KIMERA_ROLE": role} if kind == "cluster" else {})}
        if made.postgres is not None:
            proxy = made.between["postgres", name] = await _opened(f"postgres:{name}", made.postgres.port)
            own["KIMERA_DATABASE__URL"] = made.postgres.url(int(proxy.address.rpartition(":")[2]))
        if made.redis is not None:
            proxy = made.between["redis", name] = await _opened(f"redis:{name}", made.redis.port)
            own["KIMERA_BUS__URL"] = f"redis://{proxy.address}/0"
        shim = None if library is None else Shim(library, folder / f"{name}.shim", data)
        preload = {} if shim is None else shim.environment
        server = Server(data, settings_of({**shared, **own}), folder / f"{name}.txt", preload)
        door = Proxy(name) if role != "engine" else None
        if door is not None:
            await door.open()
        made.nodes.append(Node(name, server, shim, door, role))
    return made


async def _opened(name: str, port: int) -> Proxy:
    proxy = Proxy(name)
    await proxy.open()
    proxy.upstream = ("127.0.0.1", port)
    return proxy


@asynccontextmanager
async def deployed(kind: str, folder: Path, *, keep: int | None = None) -> AsyncIterator[Deployment]:
    """A running deployment of the kind ``sqlite``, ``postgres`` or ``cluster``, which keeps so many entries of the log; it ends with
    the block, and what a run leaves in ``folder`` stays."""
    library = await anyio.to_thread.run_sync(build_shim, folder)
    made = await _make(kind, folder, library, keep)
    try:
        async with anyio.create_task_group() as group:
            for proxy in made.proxies:
                group.start_soon(proxy.run, name=f"proxy:{proxy.name}")
            await made.start()
            yield made
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await made.stop()
            if made.postgres is not None:
                await anyio.to_thread.run_sync(shutil.rmtree, made.postgres.folder, True)


# -- what an operator does with a database on SQLite ------------------------------------------------------------------------


async def backup(made: Deployment, file: Path) -> None:
    """A copy while the server runs."""
    code, said = await run_program("db", "backup", str(file), "--database", _url(made.database), settings={})
    assert code == 0, said


async def check(url: str) -> tuple[int, str]:
    """``kimera-stream db check``: exit code and output."""
    return await run_program("db", "check", "--database", url, "--env-file", "", settings={})


def restore(made: Deployment, file: Path) -> None:
    """Put a copy in the place of the database; the server is down."""
    for path in made.database.parent.glob(made.database.name + "*"):
        path.unlink()
    shutil.copy(file, made.database)


def head_of(file: Path) -> int:
    """Where the log of a copy ends, read behind the server's back."""
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT head FROM log_state").fetchone()[0])


def _url(file: Path) -> str:
    return f"sqlite+aiosqlite:///{file}"
