"""Several real nodes on a database and a bus of their own."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import asyncpg

from tests.e2e.harness import START_PATIENCE, Server, web
from tests.postgres import own_database, run_apart, url_of

REDIS = os.environ.get("KIMERA_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")


class Cluster:
    """Starts nodes that share one database and one Redis, and ends them.

    Args:
        directory: Of the nodes' files.
        redis: URL of the bus; by default the server that runs here, under a prefix of this cluster's own.
    """

    def __init__(self, directory: Path, redis: str = REDIS) -> None:
        self.directory = directory
        self.redis = redis
        self.prefix = f"test-{uuid4().hex}:"
        self.nodes: dict[str, Server] = {}
        self._owned = ExitStack()
        self.database_url = url_of(self._owned.enter_context(own_database()))

    def start(self, name: str, role: str, *, wait: bool = True, **settings: str) -> Server:
        """One node; it is ready when this returns."""
        server = Server(
            self.directory / name / "data",
            wait=False,
            KIMERA_NODE=name,
            KIMERA_ROLE=role,
            KIMERA_DATABASE__URL=self.database_url,
            KIMERA_BUS__URL=self.redis,
            KIMERA_BUS__PREFIX=self.prefix,
            KIMERA_STREAM__STATS_INTERVAL="0.2",
            KIMERA_STREAM__FIELD_INTERVAL="0.2",
            KIMERA_API__COMMANDS_BURST="5000",
            **settings,
        )
        self.nodes[name] = server
        if wait:
            self.ready(name)
        return server

    def ready(self, *names: str) -> None:
        """Wait until these nodes listen."""
        for name in names:
            server = self.nodes[name]
            line = server.wait_for_line(lambda each: each.startswith("listening on "), START_PATIENCE)
            server.address = line.removeprefix("listening on http://").strip()
            server.url = f"http://{server.address}"
            server.ws_url = f"ws://{server.address}/v1/stream"

    def start_all(self, **roles: str) -> list[Server]:
        """Several nodes at once, by name and role."""
        for name, role in roles.items():
            self.start(name, role, wait=False)
        self.ready(*roles)
        return [self.nodes[name] for name in roles]

    async def query(self, statement: str, *arguments: Any) -> list[Any]:
        """Rows of the shared database, past every node."""
        connection = await asyncpg.connect(self.database_url.replace("+asyncpg", ""), timeout=5)
        try:
            rows: list[Any] = await connection.fetch(statement, *arguments)
            return rows
        finally:
            await connection.close()

    async def stats(self, edge: Server) -> dict[str, Any]:
        """What the edge says of the cluster."""
        async with web(edge) as http:
            answer = await http.get("/v1/stats")
            return answer.json()["cluster"] if answer.status_code == 200 else {}

    async def covered(self, edge: Server, engines: int | None = None, within: float = START_PATIENCE) -> float:
        """Wait until all slices are covered (by so many engines); returns the seconds it took."""
        began = time.monotonic()
        with anyio.fail_after(within):
            while True:
                seen = await self.stats(edge)
                slices = seen.get("slices", {})
                if slices and slices["covered"] == slices["total"] and engines in (None, len(slices["owners"])):
                    return time.monotonic() - began
                await anyio.sleep(0.05)

    def close(self) -> None:
        for server in self.nodes.values():
            if not server.over:
                server.terminate()
        for server in self.nodes.values():
            server.stop()
        self._owned.close()
        run_apart(self._forget)

    async def _forget(self) -> None:
        if self.redis != REDIS:
            return
        listed = await anyio.run_process(["redis-cli", "-u", REDIS, "--scan", "--pattern", f"{self.prefix}*"])
        if keys := listed.stdout.decode().split():
            await anyio.run_process(["redis-cli", "-u", REDIS, "DEL", *keys])
