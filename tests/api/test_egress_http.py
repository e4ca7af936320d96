"""The bounded HTTP protocol lets ordinary requests through."""

from typing import Any

import anyio
import httpx
import pytest
import uvicorn

from kimera_stream.api.egress import uvicorn_options
from tests.streaming.fakes import QuietServer, settings_with, until

pytestmark = pytest.mark.anyio


async def echo_length(scope: Any, receive: Any, send: Any) -> None:
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


async def test_requests_on_one_connection_with_bodies_of_any_size() -> None:
    options = uvicorn_options(settings_with(stream={"connect_timeout": 0.3}))
    server = QuietServer(
        uvicorn.Config(echo_length, port=0, lifespan="off", log_level="critical", access_log=False, **options)
    )
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve)
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for size in (0, 10, 70_000, 1_000_000):
                response = await client.post("/", content=b"x" * size)
                assert response.text == str(size)
            response = await client.post("/", content=b"x" * 70_000, headers={"x-long": "y" * 5000})
            assert response.text == "70000"

            async def slowly() -> Any:
                for _ in range(6):
                    yield b"x" * 1000
                    await anyio.sleep(0.1)

            # Only the head has a deadline here; how long a body may take is the route's affair.
            assert (await client.post("/", content=slowly())).text == "6000"
        server.should_exit = True
