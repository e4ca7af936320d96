"""Redis for tests: the one that runs here, and servers of a test's own that may be flushed, stopped and killed."""

import os
import signal
import subprocess
from pathlib import Path
from shutil import which

import anyio

REDIS = os.environ.get("KIMERA_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
HAS_SERVER = which("redis-server") is not None


class OwnRedis:
    """A Redis server of one test, on a socket in ``directory``; keeps nothing on disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    async def start(self) -> None:
        command = ["redis-server", "--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._directory)]
        self._process = await anyio.to_thread.run_sync(
            lambda: subprocess.Popen([*command, "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
        )
        with anyio.fail_after(20):
            while await self.command("PING", check=False) != "PONG":
                await anyio.sleep(0.02)

    async def stop(self) -> None:
        """Kill it: what it held is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await anyio.to_thread.run_sync(process.wait)

    async def command(self, *words: str, check: bool = True) -> str:
        done = await anyio.run_process(["redis-cli", "-s", str(self._socket), *words], check=check, stderr=None)
        return done.stdout.decode().strip()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
