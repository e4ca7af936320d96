"""A database that is away while the server starts: it is waited for, however often it refuses, and the server says so."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import anyio
import anyio.to_thread
import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import free_port, metric, peer, until, web
from tests.oracle.proxy import Proxy
from tests.postgres import POSTGRES

pytestmark = [pytest.mark.anyio, pytest.mark.postgres]

UPSTREAM = (urlsplit(POSTGRES).hostname or "127.0.0.1", urlsplit(POSTGRES).port or 5432)
MORE_THAN_THE_BUDGET = 7


@asynccontextmanager
async def between(database: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy in front of PostgreSQL that refuses at first; and the URL through it."""
    proxy = Proxy("postgres")
    await proxy.open()
    parts = urlsplit(POSTGRES)
    user = parts.netloc.rpartition("@")[0]
    async with anyio.create_task_group() as group:
        group.start_soon(proxy.run, name="proxy")
        yield proxy, urlunsplit(parts._replace(netloc=f"{user}@{proxy.address}", path=f"/{database}"))
        group.cancel_scope.cancel()


async def failures(http: httpx.AsyncClient, service: str) -> float:
    try:
        return await metric(http, "kimera_service_failures_total", service=service)
    except httpx.TransportError:  # it does not listen yet
        return 0.0


@contextmanager
def encoder_waits_for_a_file(_services: Any, settings: Any) -> Iterator[None]:
    """What comes after the encoder does not start before the test makes the file ``go``."""
    from kimera_stream.core.embedding import BatchingEmbedder

    start = BatchingEmbedder.start

    async def start_later(self: BatchingEmbedder) -> None:
        await until(anyio.Path(settings.paths.data_dir.parent / "go").exists)
        await start(self)

    BatchingEmbedder.start = start_later  # type: ignore[method-assign]
    yield


@pytest.mark.slow
async def test_a_database_that_goes_away_between_the_steps_of_a_start_is_waited_for(
    start_server: StartServer, tmp_path: Path, database: str
) -> None:
    async with between(database) as (proxy, url):
        port = free_port()
        server = start_server(wait=False, port=port, tamper=encoder_waits_for_a_file, KIMERA_DATABASE__URL=url)
        async with web(server) as http:

            async def state(service: str) -> str:
                ready = await http.get("/readyz")
                assert ready.status_code == 503
                return str(ready.json()["services"][service])

            async def twice_refused() -> bool:
                return await failures(http, "vault") >= 2

            async def vault_is_read() -> bool:
                return (await state("vault"), await state("conversation")) == ("ready", "ended")

            async def index_refused_often() -> bool:
                assert not server.over, "it has given up"
                return await failures(http, "index") >= MORE_THAN_THE_BUDGET

            # 1. From the first moment on.
            await server.line(lambda line: "service failed" in line)
            await until(twice_refused)
            assert "cannot be reached" in await state("vault")
            proxy.upstream = UPSTREAM
            await until(vault_is_read)
            # 2. Again, when what reads the database at its start has not done so yet.
            proxy.upstream = None
            proxy.cut(list(proxy.links.values()), reset=True)
            (tmp_path / "go").touch()
            await until(index_refused_often)
            assert (await state("index")).removeprefix("backing off: ").startswith(("waits: ", "starting"))
            assert not any(line.startswith("listening on") for line in server.lines)
            proxy.upstream = UPSTREAM
            await server.line(lambda line: line.startswith("listening on"))
            assert (await http.get("/readyz")).status_code == 200
            warned = [line for line in server.lines if '"service failed"' in line and '"index"' in line]
            assert len(warned) < MORE_THAN_THE_BUDGET, "a warning now and then, not with each attempt"
        async with peer(server) as client:
            await client.publish(text="It is back.")
        server.terminate()
        assert await anyio.to_thread.run_sync(server.wait) == 0  # the proxy runs on
        assert not server.errors()
