"""Redis servers of a test's own, which may be flushed, stopped and killed."""

import contextlib
import signal
import socket
import subprocess
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

    async def start(self) -> None:
        """Returns when it answers."""
        command = ["redis-server", "--bind", "127.0.0.1", "--port", self._port, "--dir", str(self._directory)]
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
