"""Processes that a run owns: the server, PostgreSQL, Redis. Started, killed, stopped and continued like real ones, as they are."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread
import asyncpg

START_PATIENCE = 240.0
"""Seconds that a process may take until it is ready, on a busy machine."""
STOP_PATIENCE = 30.0
REPOSITORY = Path(__file__).parents[2]


class NotStarted(Exception):
    """A process ended, or said nothing, instead of becoming ready; what it wrote is the message."""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Process:
    """One process at a time; its output goes to a file.

    Args:
        command: Program and arguments.
        environment: The whole of it.
        output: File that everything is appended to.
        user: Run as that user where we are root.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], output: Path, *, user: str | None = None
    ) -> None:
        self.command = command
        self.environment = dict(environment)
        self.output = output
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Of the present life, or the last one."""
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def said(self) -> str:
        """What it has written since its last start."""
        with self.output.open("rb") as file:
            file.seek(self._began)
            return file.read().decode(errors="replace")

    def launch(self) -> None:
        """Start it; returns at once."""
        assert not self.running
        self._began = self.output.stat().st_size if self.output.exists() else 0
        file: IO[bytes]
        with self.output.open("ab") as file:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment,
                cwd=self.output.parent if self._user is None else "/",
                user=self._user,
                group=self._user,
                extra_groups=[] if self._user is not None else None,
                start_new_session=True,
            )
        self.starts += 1

    async def wait_until(self, ready: Callable[[str], bool], patience: float = START_PATIENCE) -> None:
        """Wait for the output to be as wanted.

        Raises:
            NotStarted: it ended, or took too long.
        """
        with anyio.move_on_after(patience):
            while True:
                over = not self.running
                if ready(self.said):
                    return
                if over:
                    break
                await anyio.sleep(0.02)
        raise NotStarted(self.said[-4000:])

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def pause(self) -> None:
        self.send(signal.SIGSTOP)

    def proceed(self) -> None:
        self.send(signal.SIGCONT)

    async def kill(self) -> None:
        """As a power cut would."""
        self.send(signal.SIGKILL)
        await self.ended()

    async def end(self, number: signal.Signals = signal.SIGTERM, patience: float = STOP_PATIENCE) -> int | None:
        """Ask it to end; None: it did not, and was killed."""
        self.send(number)
        if await self.ended(patience):
            return self.code
        await self.kill()
        return None

    async def ended(self, patience: float = STOP_PATIENCE) -> bool:
        """Whether it ends within that time."""
        process = self._process
        if process is None:
            return True
        with anyio.move_on_after(patience):
            while process.poll() is None:  # noqa: ASYNC110 - another process's end is no event of this loop
                await anyio.sleep(0.01)
        return process.poll() is not None


def base_environment() -> dict[str, str]:
    """Of every child: what the machine sets about Kimera left out."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KIMERA_", "OTEL_", "ORACLE_"))}
    kept.pop("LD_PRELOAD", None)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH")]))
    return kept


PROGRAM = [sys.executable, "-m", "kimera_stream.api.cli.main"]
LISTENING = "listening on http://"


class Server(Process):
    """The server program.

    Args:
        settings: ``KIMERA_...`` variables.
        preload: Environment of a shim.
    """

    def __init__(self, data: Path, settings: Mapping[str, str], output: Path, preload: Mapping[str, str]) -> None:
        command = [*PROGRAM, "serve", "--port", "0", "--data-dir", str(data), "--env-file", ""]
        super().__init__(command, {**base_environment(), **settings, **preload}, output)
        self.host, self.port = "127.0.0.1", 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://{self.host}:{self.port}/v1/stream"

    async def start(self, patience: float = START_PATIENCE) -> None:
        """Start it and wait until it is ready.

        Raises:
            NotStarted: it ended, or took too long.
        """
        self.launch()
        await self.wait_until(lambda said: LISTENING in said, patience)
        address = next(line for line in self.said.splitlines() if line.startswith(LISTENING)).removeprefix(LISTENING)
        host, _, port = address.strip().rpartition(":")
        self.host, self.port = host, int(port)

    def defects(self) -> list[str]:
        """Lines of its output, over all its lives, that tell of a programming error."""
        if not self.output.exists():
            return []
        lines = self.output.read_text(errors="replace").splitlines()
        return [
            line[:600]
            for line in lines
            if line.startswith("Traceback") or '"Traceback' in line or "Traceback (most" in line
        ]


async def run_program(*arguments: str, settings: Mapping[str, str]) -> tuple[int, str]:
    """``kimera-stream ARGUMENTS``: exit code and output."""
    with anyio.fail_after(START_PATIENCE):
        done = await anyio.run_process(
            [*PROGRAM, *arguments],
            env={**base_environment(), **settings},
            check=False,
            stderr=subprocess.STDOUT,
            cwd=tempfile.gettempdir(),
        )
    return done.returncode, done.stdout.decode(errors="replace")


def postgres_binaries() -> Path | None:
    """Where PostgreSQL's programs are, the newest; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    program = shutil.which("postgres")
    return None if program is None else Path(program).parent


class Postgres(Process):
    """A PostgreSQL server of the run's own.

    Args:
        folder: Its data are in there; owned by a user that may run PostgreSQL.
        life: Counts the servers that took each other's place.
    """

    def __init__(self, folder: Path, output: Path, preload: Mapping[str, str], *, life: int = 1) -> None:
        binaries = postgres_binaries()
        assert binaries is not None
        self.binaries = binaries
        self.folder = folder
        self._data = folder / f"data-{life}"
        self._life = life
        self._preload = preload
        self.port = free_port()
        self._owner = "postgres" if os.getuid() == 0 else None
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": folder, "shared_buffers": "32MB"}  # fmt: skip
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        super().__init__(
            [str(binaries / "postgres"), "-D", str(self._data), *arguments],
            {**base_environment(), **preload},
            output,
            user=self._owner,
        )

    def url(self, port: int | None = None) -> str:
        """For the server; ``port`` of a proxy in between."""
        return f"postgresql+asyncpg://postgres@127.0.0.1:{port or self.port}/oracle"

    @property
    def _plain(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}"

    async def prepare(self) -> None:
        """Make a cluster in ``folder`` and start it with an empty database."""
        if self._owner is not None:
            owner = pwd.getpwnam(self._owner)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        initdb = [str(self.binaries / "initdb"), "-D", str(self._data), "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"]  # fmt: skip
        await self._run(initdb)
        await self.start()
        connection = await asyncpg.connect(f"{self._plain}/postgres")
        try:
            await connection.execute("CREATE DATABASE oracle")
        finally:
            await connection.close()

    async def _run(self, command: list[str]) -> None:
        await anyio.to_thread.run_sync(
            lambda: subprocess.run(command, check=True, capture_output=True, user=self._owner, cwd="/")
        )

    async def stand_by(self) -> "Postgres":
        """A second server that follows this one, which acknowledges nothing from now on before the other has it, too."""
        standby = Postgres(self.folder, self.output.with_name(f"postgres-{self._life + 1}.txt"), self._preload, life=self._life + 1)  # fmt: skip
        await self._run([str(self.binaries / "pg_basebackup"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-D", str(standby._data), "-R", "-X", "stream", "-c", "fast", "--no-sync"])  # fmt: skip
        standby.launch()
        try:
            await standby.wait_until(lambda said: "database system is ready to accept read-only connections" in said)
            await self._wait_for_it()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await standby.kill()
            raise
        return standby

    async def _wait_for_it(self) -> None:
        """From now on a commit is acknowledged once a standby has it."""
        connection = await asyncpg.connect(f"{self._plain}/postgres")
        try:
            await connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            await connection.execute("SELECT pg_reload_conf()")
            followed = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
            with anyio.fail_after(START_PATIENCE):
                while not await connection.fetchval(followed):  # noqa: ASYNC110 - another process's state
                    await anyio.sleep(0.02)
        finally:
            await connection.close()

    async def promote(self) -> None:
        """Let a standby be a server in its own right."""
        connection = await asyncpg.connect(f"{self._plain}/postgres")
        try:
            assert await connection.fetchval("SELECT pg_promote(true, $1)", int(START_PATIENCE))
        finally:
            await connection.close()

    async def kill_all(self) -> None:
        """As the power cut of a whole machine would: a first process alone leaves its children to themselves for a moment."""
        super().pause()
        self._send_children(signal.SIGKILL)
        await self.kill()

    async def vanish(self) -> None:
        """Remove what it has written, once it is over."""
        await anyio.to_thread.run_sync(shutil.rmtree, self._data, True)

    async def start(self) -> None:
        """Start it and wait until it takes connections; again if the last life's children still hold on.

        Raises:
            NotStarted: it does not come up.
        """
        with anyio.move_on_after(START_PATIENCE):
            while True:
                self.launch()
                try:
                    await self.wait_until(lambda said: "database system is ready to accept connections" in said)
                except NotStarted:
                    if not self.running:
                        await anyio.sleep(0.2)
                        continue
                    raise
                return
        raise NotStarted(self.said[-4000:])

    def pause(self) -> None:
        """Stop the first process, which then makes no others, and all that it has made: each has a session of its own."""
        super().pause()
        self._send_children(signal.SIGSTOP)

    def proceed(self) -> None:
        self._send_children(signal.SIGCONT)
        super().proceed()

    def _send_children(self, number: signal.Signals) -> None:
        if not self.running:
            return
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(int(child), number)

    async def look_after(self) -> None:
        """Wait until it takes writes again; start it again where it has ended itself.

        Raises:
            NotStarted: it does not come back.
        """
        with anyio.move_on_after(START_PATIENCE):
            while True:
                if not self.running:
                    await self.start()
                try:
                    connection = await asyncpg.connect(f"{self._plain}/postgres", timeout=2)
                    try:
                        await connection.execute("SELECT txid_current()")
                    finally:
                        await connection.close(timeout=2)
                except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                    await anyio.sleep(0.1)
                    continue
                return
        raise NotStarted(self.said[-4000:])

    async def terminate_connections(self) -> int:
        """End every session of the database; returns how many."""
        connection = await asyncpg.connect(f"{self._plain}/postgres")
        try:
            return int(
                await connection.fetchval(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE datname = 'oracle' AND pid <> pg_backend_pid()"
                )
            )
        finally:
            await connection.close()


class Redis(Process):
    """A Redis server of the run's own. Nothing is kept over a restart: that is the fault."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.port = free_port()
        program = shutil.which("redis-server")
        assert program is not None
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]  # fmt: skip
        super().__init__(command, base_environment(), output)

    async def start(self) -> None:
        """Start it and wait until it takes connections."""
        self.launch()
        await self.wait_until(lambda said: "Ready to accept connections" in said)

    async def flush(self) -> None:
        """Forget everything."""
        stream = await anyio.connect_tcp("127.0.0.1", self.port)
        async with stream:
            await stream.send(b"FLUSHALL\r\n")
            await stream.receive()
