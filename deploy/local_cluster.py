"""Two edges, two engines, PostgreSQL and Redis on this machine, in the foreground: ``make cluster``, or ``python -m deploy.local_cluster``.

PostgreSQL and Redis are, in this order: those that the addresses given name; servers of its own, started from the Debian packages ``postgresql``
and ``redis-server`` in a directory of the cluster's; what listens on the standard ports already (in a database of its own).
"""

import argparse
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import asyncpg
from sqlalchemy.engine import make_url

START = 120.0
"""Seconds for a node to listen: the first start of an engine loads its models."""
STOP = 20.0
"""Seconds for a process to end once told to."""
LOOPBACK = "127.0.0.1"


class ClusterError(Exception):
    """What keeps the cluster from standing, in one sentence."""


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


class Child:
    """A process of the cluster. In a session of its own, so that Ctrl-C reaches only us, and we stop things in order."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.log = directory / "log.txt"
        self.process: anyio.abc.Process | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, user: str | None = None
    ) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = await anyio.open_process(
                command, env=env, user=user, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.returncode is not None

    async def line(self, begin: str, seconds: float) -> str:
        """The first line of its output that begins so.

        Raises:
            ClusterError: it ended, or did not say so in time.
        """
        with anyio.move_on_after(seconds):
            while True:
                text = await anyio.Path(self.log).read_text(errors="replace")
                for line in text.splitlines(keepends=True):
                    if line.startswith(begin) and line.endswith("\n"):
                        return line.strip()
                if self.ended:
                    break
                await anyio.sleep(0.05)
        end = "\n".join((await anyio.Path(self.log).read_text(errors="replace")).splitlines()[-15:])
        raise ClusterError(f"{self.name} did not start; the end of {self.log}:\n{end}")

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it: told first, killed if it does not listen."""
        if self.process is None:
            return
        with anyio.CancelScope(shield=True):
            if self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self.process.send_signal(number)
            with anyio.move_on_after(STOP) as scope:
                await self.process.wait()
            if scope.cancelled_caught:
                self.process.kill()
                await self.process.wait()
            await self.process.aclose()

    def kill(self) -> None:
        """As a power cut would."""
        assert self.process is not None
        self.process.kill()


class Node(Child):
    """An edge or engine. ``url`` is known once it listens."""

    url = ""

    async def serve(self, env: Mapping[str, str], port: int = 0) -> None:
        self.log.unlink(missing_ok=True)  # of a former run: its line must not be taken for this one's
        await self.start(
            [sys.executable, "-m", "kimera_stream.api.cli.main", "serve", "--env-file", ""],
            {
                **clean_environment(),
                **env,
                "KIMERA_API__PORT": str(port),
                "KIMERA_PATHS__DATA_DIR": str(self.directory),
            },
        )

    async def listening(self) -> None:
        self.url = (await self.line("listening on ", START)).split()[-1]


def clean_environment() -> dict[str, str]:
    """Ours, without what is meant for one node."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KIMERA_")}


# -- PostgreSQL and Redis ----------------------------------------------------------------------------------------------


def postgres_binaries() -> Path | None:
    """Where Debian keeps the newest PostgreSQL, or what is on the path."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"),
        key=lambda path: int(path.parts[-3]) if path.parts[-3].isdigit() else 0,
    )
    if found:
        return found[-1].parent
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


def _unprivileged() -> str | None:
    """PostgreSQL refuses to run as root: who runs it instead."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


async def start_postgres(directory: Path, binaries: Path) -> tuple[Child, str]:
    """A PostgreSQL of our own in ``directory`` and its URL."""
    child, data, user, port = Child("PostgreSQL", directory), directory / "data", _unprivileged(), free_port()
    await anyio.Path(directory).mkdir(parents=True, exist_ok=True)
    if user is not None:
        shutil.chown(directory, user)
    if not (data / "PG_VERSION").exists():
        await anyio.run_process(
            [
                str(binaries / "initdb"),
                "-D",
                str(data),
                "-U",
                "kimera",
                "--auth=trust",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
            ],
            user=user,
            cwd=directory,
        )
    await child.start(
        [str(binaries / "postgres"), "-D", str(data), "-p", str(port), "-h", LOOPBACK, "-k", ""], user=user
    )
    url = f"postgresql+asyncpg://kimera@{LOOPBACK}:{port}/postgres"
    with anyio.move_on_after(30):
        while not child.ended:
            try:
                await (await _connect(url)).close()
            except (OSError, asyncpg.PostgresError):
                await anyio.sleep(0.1)
            else:
                return child, url
    raise ClusterError(f"PostgreSQL did not start; see {child.log}")


async def _connect(url: str) -> "asyncpg.Connection[Any]":
    address = make_url(url)
    return await asyncpg.connect(
        host=address.host,
        port=address.port,
        user=address.username,
        password=address.password,
        database=address.database,
    )


async def make_database(url: str, name: str) -> str:
    """A database of that name on the server that ``url`` names, made if it is not there; its URL."""
    connection = await _connect(url)
    try:
        if await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name) is None:
            await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()
    return make_url(url).set(database=name).render_as_string(hide_password=False)


async def start_redis(directory: Path, binary: str) -> tuple[Child, str]:
    """A Redis of our own and its URL. It keeps nothing on disk: it does not have to."""
    child, port = Child("Redis", directory), free_port()
    await child.start([binary, "--bind", LOOPBACK, "--port", str(port), "--save", "", "--appendonly", "no"])
    with anyio.move_on_after(30):
        while not child.ended:
            if await _answers(port):
                return child, f"redis://{LOOPBACK}:{port}/0"
            await anyio.sleep(0.05)
    raise ClusterError(f"Redis did not start; see {child.log}")


async def _answers(port: int) -> bool:
    try:
        await (await anyio.connect_tcp(LOOPBACK, port)).aclose()
    except OSError:
        return False
    return True


@contextlib.asynccontextmanager
async def ground(directory: Path, postgres: str, redis: str) -> AsyncIterator[tuple[str, str]]:
    """The URLs of PostgreSQL and Redis while the block lasts; what is empty is found or started.

    Raises:
        ClusterError: there is neither an address nor a package nor a server.
    """
    async with contextlib.AsyncExitStack() as stack:
        if not postgres:
            if (binaries := postgres_binaries()) is not None:
                child, postgres = await start_postgres(directory / "postgresql", binaries)
                stack.push_async_callback(child.stop, signal.SIGINT)  # a "fast" stop: whoever is connected is sent away
            elif await _answers(5432):
                postgres = await make_database(
                    f"postgresql+asyncpg://postgres@{LOOPBACK}:5432/postgres", "kimera_cluster"
                )
            else:
                raise ClusterError("no PostgreSQL: apt-get install postgresql, or name one with --postgres")
        if not redis:
            if (binary := shutil.which("redis-server")) is not None:
                child, redis = await start_redis(directory / "redis", binary)
                stack.push_async_callback(child.stop)
            elif await _answers(6379):
                redis = f"redis://{LOOPBACK}:6379/0"
            else:
                raise ClusterError("no Redis: apt-get install redis-server, or name one with --redis")
        yield postgres, redis


# -- the cluster -------------------------------------------------------------------------------------------------------


class Cluster:
    """Edges and engines.

    Args:
        directory: Theirs; one folder a node.
        settings: ``KIMERA_*`` of every node.
    """

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        self._directory = directory
        self._settings = dict(settings)
        self.nodes: list[Node] = []

    @property
    def edges(self) -> list[Node]:
        return [node for node in self.nodes if node.name.startswith("edge")]

    @property
    def engines(self) -> list[Node]:
        return [node for node in self.nodes if node.name.startswith("engine")]

    async def add(self, name: str, role: str, port: int = 0) -> Node:
        """Start a node; it does not listen yet."""
        node = Node(name, self._directory / name)
        self.nodes.append(node)
        await node.serve({**self._settings, "KIMERA_NODE": name, "KIMERA_ROLE": role}, port)
        return node

    async def stop(self) -> None:
        """Edges first, so that what they accepted is answered; then engines."""
        for some in (self.edges, self.engines):
            async with anyio.create_task_group() as group:
                for node in some:
                    group.start_soon(node.stop, name=f"stop:{node.name}")


@contextlib.asynccontextmanager
async def cluster(
    directory: Path, settings: Mapping[str, str], *, edges: int = 2, engines: int = 2, port: int = 0
) -> AsyncIterator[Cluster]:
    """Edges and engines that listen, for as long as the block lasts.

    Args:
        directory: Theirs.
        settings: ``KIMERA_*`` of every node: database, bus, and what else.
        edges: How many; the first on ``port``, the next on the following one. 0: any free ports.
        engines: How many.
        port: Of the first edge.
    """
    made = Cluster(directory, settings)
    try:
        # The first node alone: it brings the schema up to date, which is no race then.
        await (await made.add("engine-1", "engine")).listening()
        for number in range(1, engines):
            await made.add(f"engine-{number + 1}", "engine")
        for number in range(edges):
            await made.add(f"edge-{number + 1}", "edge", port + number if port else 0)
        for node in made.nodes[1:]:
            await node.listening()
        yield made
    finally:
        with anyio.CancelScope(shield=True):
            await made.stop()


def picture(made: Cluster, postgres: str, redis: str, directory: Path) -> str:
    """What runs where, and what to try."""
    shown = make_url(postgres).render_as_string(hide_password=True)
    first, second = made.edges[0].url, made.edges[-1].url
    rows = [(node.name, node.url, f"pid {node.pid}, log {node.log}") for node in (*made.edges, *made.engines)]
    width = max(len(url) for _, url, _ in rows)
    lines = "\n".join(f"  {name:<12}{url:<{width}}  {rest}" for name, url, rest in rows)
    return f"""
Kimera Stream on several nodes

{lines}
  {"PostgreSQL":<12}{shown}
  {"Redis":<12}{redis}
  {"directory":<12}{directory}

Dashboards: {first}  {second}
Publish on one edge, hear on the other:

  kimera-stream tail --url {second} contradictions
  kimera-stream publish --url {first} "The harbour opens at nine."
  kimera-stream publish --url {first} "The harbour does not open at nine."

Who covers what: curl {first}/health      Try: kill -9 {made.engines[-1].pid} (the other engine takes over within seconds)
Ctrl-C stops everything.
"""


async def run(arguments: argparse.Namespace, directory: Path) -> None:
    """Until SIGINT or SIGTERM."""
    light = {"KIMERA_EMBEDDING__PROVIDER": "hashing", "KIMERA_SCORING__VERIFIER": "off"} if arguments.light else {}
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as group:

            async def stand() -> None:
                async with ground(directory, arguments.postgres, arguments.redis) as (postgres, redis):
                    settings = {"KIMERA_DATABASE__URL": postgres, "KIMERA_BUS__URL": redis, **light}
                    print("Starting; the engines load their models ...", flush=True)
                    async with cluster(
                        directory, settings, edges=arguments.edges, engines=arguments.engines, port=arguments.port
                    ) as made:
                        print(picture(made, postgres, redis, directory), flush=True)
                        try:
                            async with anyio.create_task_group() as watching:
                                for node in made.nodes:
                                    watching.start_soon(watch, node, name=f"watch:{node.name}")
                                await anyio.sleep_forever()
                        finally:
                            print("Stopping ...", flush=True)

            group.start_soon(stand, name="cluster")
            async for _ in signals:
                group.cancel_scope.cancel()
                break
        print("Stopped.", flush=True)


async def watch(node: Node) -> None:
    """Says so when a node ends before its time; the others go on."""
    assert node.process is not None
    code = await node.process.wait()
    print(f"{node.name} ended with {code}; the others go on. Its log: {node.log}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.local_cluster", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--edges", type=int, default=2, help="how many edges")
    parser.add_argument("--engines", type=int, default=2, help="how many engines")
    parser.add_argument(
        "--port", type=int, default=8765, help="port of the first edge, the next follow; 0: any free ones"
    )
    parser.add_argument(
        "--data", type=Path, help="keep everything in this directory; else a temporary one is removed at the end"
    )
    parser.add_argument(
        "--postgres", default=os.environ.get("KIMERA_DATABASE__URL", ""), help="postgresql+asyncpg://... to use"
    )
    parser.add_argument("--redis", default=os.environ.get("KIMERA_BUS__URL", ""), help="redis://... to use")
    parser.add_argument("--light", action="store_true", help="no models: the hashing encoder and the rules alone")
    arguments = parser.parse_args()
    if min(arguments.edges, arguments.engines) < 1:
        parser.error("at least one edge and one engine")
    failed = False
    with contextlib.ExitStack() as stack:
        if arguments.data is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kimera-cluster-")))
        else:
            directory = arguments.data.absolute()
            directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o711)  # PostgreSQL's own user has to get to its part
        try:
            anyio.run(run, arguments, directory)
        except* ClusterError as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            print(f"make cluster: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
