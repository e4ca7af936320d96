"""``make cluster``: the command behind it, as a person uses it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from shutil import which
from uuid import uuid4

import anyio
import asyncpg
import httpx
import pytest

from deploy import local_cluster
from deploy.local_cluster import ClusterError, ground, make_database, postgres_binaries
from tests.e2e.harness import environment
from tests.infrastructure.redis_servers import HAS_SERVER, OwnRedis
from tests.postgres import POSTGRES, administer, own_database, url_of

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


@pytest.mark.skipif(which("make") is None, reason="needs make")
async def test_the_target_uses_the_services_that_are_named() -> None:
    """Of them it starts and stops none. One edge and one engine, and of the target all but the installation before it."""
    async with anyio.TemporaryDirectory(prefix="kimera-make-") as name, AsyncExitStack() as stack:
        directory, output = Path(name) / "cluster", Path(name) / "output.txt"
        postgres = url_of(stack.enter_context(own_database()))
        redis = OwnRedis(Path(name))
        await redis.start()
        stack.push_async_callback(redis.stop)
        options = f"--light --edges 1 --engines 1 --port 0 --data {directory} --postgres {postgres} --redis {redis.url}"
        with output.open("wb") as file:
            process = await anyio.open_process(
                ["make", "cluster", f"BIN={Path(sys.executable).parent}", "STAMP=", f"CLUSTER={options}"],
                cwd=ROOT,
                env={**environment(), "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            text = (await until_said(output, r".*Ctrl-C stops everything")).group()
            (edge,) = re.findall(r"^  edge-1 +(http://\S+)", text, re.MULTILINE)
            pids = [int(pid) for pid in re.findall(r"^  e\w+-\d .*?pid (\d+)", text, re.MULTILINE)]
            assert len(pids) == 2
            assert f"Redis       {redis.url}" in text
            async with httpx.AsyncClient(timeout=60) as client:
                said = await client.post(f"{edge}/v1/geoids", json={"text": "The harbour opens at nine."})
                assert said.status_code in (200, 201)
            assert sorted(path.name for path in directory.iterdir()) == ["edge-1", "engine-1"]
            connection = await asyncpg.connect(postgres.replace("+asyncpg", ""))
            try:
                assert await connection.fetchval("SELECT text FROM geoid") == "The harbour opens at nine."
            finally:
                await connection.close()
        finally:
            with anyio.CancelScope(shield=True):
                os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
                with anyio.move_on_after(60):
                    await until_said(output, r"Stopped\.")
                await process.wait()
                await process.aclose()
        assert not any(alive(pid) for pid in pids)
        await administer("SELECT 1")
        assert await redis.command("PING") == "PONG"


async def test_what_listens_on_the_standard_ports_is_used_where_there_are_no_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a database of its own, which is made once."""
    asked: list[int] = []
    made: list[tuple[str, str]] = []

    async def answers(port: int) -> bool:
        asked.append(port)
        return True

    async def make(url: str, name: str) -> str:
        made.append((url, name))
        return "made"

    monkeypatch.setattr(local_cluster, "postgres_binaries", lambda: None)
    monkeypatch.setattr(local_cluster.shutil, "which", lambda _name: None)
    monkeypatch.setattr(local_cluster, "_answers", answers)
    monkeypatch.setattr(local_cluster, "make_database", make)
    async with ground(tmp_path, "", "") as (postgres, redis):
        assert (postgres, redis) == ("made", "redis://127.0.0.1:6379/0")
    assert made == [("postgresql+asyncpg://postgres@127.0.0.1:5432/postgres", "kimera_cluster")]
    assert asked == [5432, 6379]
    async with ground(tmp_path, "named", "too") as named:
        assert named == ("named", "too")
    assert asked == [5432, 6379]


@pytest.mark.parametrize("missing", ["PostgreSQL", "Redis"])
async def test_where_there_is_nothing_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    async def answers(_port: int) -> bool:
        return False

    monkeypatch.setattr(local_cluster, "postgres_binaries", lambda: None)
    monkeypatch.setattr(local_cluster.shutil, "which", lambda _name: None)
    monkeypatch.setattr(local_cluster, "_answers", answers)
    with pytest.raises(ClusterError, match=f"no {missing}: apt-get install"):
        async with ground(tmp_path, "" if missing == "PostgreSQL" else "named", ""):
            pass


async def test_a_database_is_made_where_it_is_not_there() -> None:
    name = f"kimera_test_{uuid4().hex}"
    try:
        for _ in range(2):
            assert await make_database(POSTGRES, name) == url_of(name)
        connection = await asyncpg.connect(url_of(name).replace("+asyncpg", ""))
        await connection.close()
    finally:
        await administer(f"DROP DATABASE IF EXISTS {name}")
