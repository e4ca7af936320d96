"""``make cluster``: the command behind it, as a person uses it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import httpx
import pytest

from deploy.local_cluster import postgres_binaries
from tests.e2e.harness import environment
from tests.infrastructure.redis_servers import HAS_SERVER

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.postgres,
    pytest.mark.redis,
    pytest.mark.timeout(240),
    pytest.mark.skipif(postgres_binaries() is None or not HAS_SERVER, reason="needs the Debian packages"),
]
ROOT = Path(__file__).parents[2]


async def until_said(output: Path, pattern: str) -> re.Match[str]:
    with anyio.fail_after(150):
        while True:
            text = await anyio.Path(output).read_text()
            if found := re.search(pattern, text, re.DOTALL):
                return found
            await anyio.sleep(0.1)


@contextlib.asynccontextmanager
async def made(directory: Path, output: Path) -> AsyncIterator[anyio.abc.Process]:
    with output.open("wb") as file:
        process = await anyio.open_process(
            [sys.executable, "-m", "deploy.local_cluster", "--light", "--port", "0", "--data", str(directory)],
            cwd=ROOT,
            env={**environment(), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.terminate()
                await process.wait()
            await process.aclose()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_it_stands_serves_survives_a_kill_and_stops_without_a_trace() -> None:
    async with anyio.TemporaryDirectory(prefix="kimera-make-") as name:
        directory, output = Path(name) / "cluster", Path(name) / "output.txt"
        Path(name).chmod(0o711)  # noqa: ASYNC240 - PostgreSQL's own user has to get in
        async with made(directory, output) as process, httpx.AsyncClient(timeout=60) as client:
            text = (await until_said(output, r".*Ctrl-C stops everything")).group()
            urls = dict(re.findall(r"^  (edge-\d|engine-\d) +(http://\S+)", text, re.MULTILINE))
            pids = {name: int(pid) for name, pid in re.findall(r"^  (e\w+-\d) .*?pid (\d+)", text, re.MULTILINE)}
            assert set(urls) == set(pids) == {"edge-1", "edge-2", "engine-1", "engine-2"}
            first = await client.post(f"{urls['edge-1']}/v1/geoids", json={"text": "The harbour opens at nine."})
            assert first.status_code in (200, 201)
            os.kill(pids["engine-2"], signal.SIGKILL)
            await until_said(output, "engine-2 ended with -9")
            second = await client.post(
                f"{urls['edge-2']}/v1/geoids", json={"text": "The harbour does not open at nine."}
            )
            assert len(second.json()["contradictions"]) == 1
            process.send_signal(signal.SIGINT)
            with anyio.fail_after(90):
                assert await process.wait() == 0
            assert (await anyio.Path(output).read_text()).rstrip().endswith("Stopped.")
            assert not any(alive(pid) for pid in pids.values())
            assert not list(directory.glob("postgresql/data/postmaster.pid"))
