"""Before it is ready the server says so, at every door; and it says what it waits for."""

import sqlite3
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server, free_port, peer, web

pytestmark = pytest.mark.anyio


async def test_doors_before_ready(start_server: StartServer, tmp_path: Path) -> None:
    """Another program holds the database: the server is up, says what it waits for, and gets ready when it may."""
    data = tmp_path / "data"
    data.mkdir()
    first = start_server(data)
    first.terminate()
    assert first.wait() == 0
    (file,) = data.glob("*.sqlite3")
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        server = start_server(data, wait=False, port=free_port(), KIMERA_DATABASE__BUSY_TIMEOUT="0.2")
        async with web(server) as http:
            await _accepting(server, http)
            ready = await http.get("/readyz")
            assert (ready.status_code, ready.json()["ready"]) == (503, False)
            assert ready.json()["services"]["vault"] != "ready"
            assert "retry-after" in ready.headers
            assert (await http.get("/livez")).status_code == 200
            refused = await http.post("/v1/geoids", json={"text": "too early"})
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            assert "vault" in refused.json()["detail"]
            assert (await http.get("/health")).json()["status"] == "starting"
            with pytest.raises(InvalidStatus) as early:
                async with peer(server):
                    pass
            assert early.value.response.status_code == 503
            assert not any(line.startswith("listening on") for line in server.lines)
            holder.execute("ROLLBACK")
            holder.close()
            await server.line(lambda line: line.startswith("listening on"))
            assert (await http.get("/readyz")).json()["ready"]
            async with peer(server) as client:
                await client.publish(text="Now it is open.")
    finally:
        holder.close()


async def _accepting(server: Server, http: httpx.AsyncClient) -> None:
    import anyio

    with anyio.fail_after(20):
        while True:
            try:
                await http.get("/livez")
            except httpx.TransportError:
                await anyio.sleep(0.05)
            else:
                return


async def test_a_used_port_is_said_in_one_line(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server()
    port = int(server.address.rpartition(":")[2])
    other = start_server(tmp_path / "other", wait=False, port=port)
    assert other.wait() == 1
    assert any("KIMERA_API__PORT" in line and str(port) in line for line in other.lines)
    assert not any("Traceback" in line for line in other.lines)


async def test_a_wrong_setting_is_said_in_one_line(start_server: StartServer) -> None:
    server = start_server(wait=False, KIMERA_STREAM__TICK="soon")
    assert server.wait() == 1
    (line,) = [line for line in server.lines if "KIMERA_STREAM__TICK" in line]
    assert "soon" in line


async def test_production_needs_authentication(start_server: StartServer) -> None:
    server = start_server(wait=False, KIMERA_ENVIRONMENT="production", KIMERA_API__HOST="0.0.0.0")
    assert server.wait() == 1
    assert any("KIMERA_SECURITY__AUTH" in line for line in server.lines)
