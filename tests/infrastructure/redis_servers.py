"""Redis servers of a test's own, which may be flushed, stopped and killed."""

import contextlib
import itertools
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from shutil import which

import anyio

HAS_SERVER = which("redis-server") is not None


class OwnRedis:
    """A Redis server of one test; keeps nothing on disk. Comes back at the same address."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = str(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def arguments(self) -> list[str]:
        """How it is spoken to."""
        return ["--port", self._port]

    async def start(self) -> None:
        """Returns when it answers."""
        command = ["redis-server", "--bind", "127.0.0.1", "--dir", str(self._directory), *self.arguments()]
        self._process = await anyio.to_thread.run_sync(
            lambda: subprocess.Popen([*command, "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
        )
        with anyio.fail_after(20):
            while await self.command("PING", check=False) != "PONG":  # noqa: ASYNC110 - another process
                await anyio.sleep(0.02)

    async def stop(self) -> None:
        """Kill it: what it held is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await anyio.to_thread.run_sync(process.wait)

    async def command(self, *words: str, check: bool = True) -> str:
        done = await anyio.run_process(["redis-cli", "-p", self._port, *words], check=check)
        return done.stdout.decode().strip()

    def freeze(self) -> None:
        """Connections stay, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class SecuredRedis(OwnRedis):
    """One that is spoken to through TLS and a socket in the file system alone, by one user.

    Args:
        certificate: PEM with its key; whoever trusts it as an authority trusts the server.
        rule: ACL rule of the user ``kimera``.
    """

    def __init__(self, directory: Path, certificate: Path, rule: str) -> None:
        super().__init__(directory)
        self._certificate = certificate
        self._users = directory / "users.acl"
        self._users.write_text(f"user default off\nuser admin on nopass ~* &* +@all\nuser kimera {rule}\n")
        # Not in the test's directory, whose name may be longer than that of a socket can be.
        self._place = tempfile.TemporaryDirectory()
        self._socket = str(Path(self._place.name) / "redis.sock")

    def url(self, way: str, user: str) -> str:  # type: ignore[override] # needs to know as whom
        if way == "unix":
            return f"unix://{user}@{self._socket}"
        return f"rediss://{user}@127.0.0.1:{self._port}/0?ssl_ca_certs={self._certificate}"

    def arguments(self) -> list[str]:
        tls = [part for name in ("cert", "key", "ca-cert") for part in (f"--tls-{name}-file", str(self._certificate))]
        return [
            *("--port", "0", "--tls-port", self._port, *tls, "--tls-auth-clients", "no"),
            *("--unixsocket", self._socket, "--aclfile", str(self._users)),
        ]

    async def command(self, *words: str, check: bool = True) -> str:
        return await self.as_user("admin", "any", *words, check=check)

    async def as_user(self, user: str, secret: str, *words: str, check: bool = False) -> str:
        """What ``redis-cli`` prints for a command of that user."""
        login = ["--user", user, "--pass", secret, "--no-auth-warning"]
        done = await anyio.run_process(["redis-cli", "-s", self._socket, *login, *words], check=check)
        return (done.stdout + done.stderr).decode().strip()

    async def refusals(self) -> list[str]:
        """The commands, keys and channels that users were refused."""
        lines = (await self.command("ACL", "LOG")).splitlines()
        return [value for name, value in itertools.pairwise(lines) if name == "object"]

    async def stop(self) -> None:
        await super().stop()
        await anyio.to_thread.run_sync(self._place.cleanup)
