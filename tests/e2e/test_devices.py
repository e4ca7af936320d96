"""What encodes and verifies, as a real server tells of it on ``stats``: its health, its use, and what a service counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import msgspec
import numpy as np
import pytest

from kimera_stream.core.embedding import HashingProvider
from kimera_stream.core.embedding.remote import BREAKER_THRESHOLD
from kimera_stream.engines.verifier import CrossEncoderVerifier, weights_available
from kimera_stream.infrastructure.compute import DeviceFailedError
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.settings import Settings
from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server, peer, until, web

pytestmark = pytest.mark.anyio

DIMENSION = 32


class EmbeddingServer:
    """A service in OpenAI's form in a thread of the test; refuses while ``refusing``."""

    def __init__(self) -> None:
        self.refusing = False
        self.counted = 0
        provider = HashingProvider(DIMENSION)
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                texts = msgspec.json.decode(self.rfile.read(int(self.headers["Content-Length"])))["input"]
                rows = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(provider.encode_now(texts))]
                used = 1_000 * len(texts)
                service.counted += 0 if service.refusing else used
                body = msgspec.json.encode({"data": rows, "usage": {"prompt_tokens": used, "total_tokens": used}})
                self.send_response(401 if service.refusing else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def service() -> Iterator[EmbeddingServer]:
    made = EmbeddingServer()
    thread = Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


async def stats(server: Server, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first value that is enough; a value is up to an interval old."""
    found: dict[str, Any] = {}

    async def looked() -> bool:
        found.update((await http.get("/v1/stats")).json())
        return enough(found)

    async with web(server) as http:
        await until(looked)
    return found


async def test_a_service_that_encodes_is_told_of_and_so_is_what_it_counted(
    start_server: StartServer, service: EmbeddingServer
) -> None:
    server = start_server(
        KIMERA_EMBEDDING__PROVIDER="http",
        KIMERA_EMBEDDING__URL=service.url,
        KIMERA_EMBEDDING__DIMENSION=str(DIMENSION),
        KIMERA_STREAM__STATS_INTERVAL="0.1",
    )
    async with peer(server) as speaker, web(server) as http:
        for number in range(3):
            await speaker.publish(text=f"Pump {number} runs.")
        counted = service.counted
        told = await stats(server, lambda each: each["totals"]["published"] == 3)
        assert told["devices"]["embedding"]["http"] == {"state": "closed", "used": 3, "failed": 0}
        assert told["devices"]["verifier"] == {}
        assert told["totals"]["tokens"] == counted == 3_000
        assert told["totals"]["tokens_exact"] is False
        [day] = (await http.get("/v1/usage")).json()["items"]
        assert (day["statements"], day["tokens"]) == (3, counted)
        service.refusing = True
        for number in range(BREAKER_THRESHOLD):  # each is tried several times
            reply = await speaker.ask("publish", geoid={"text": f"Valve {number} is shut."})
            assert reply["code"] == "unavailable"
            told = await stats(server, lambda each: "devices" in each)
            if told["devices"]["embedding"]["http"]["state"] == "opened":
                break
        told = await stats(server, lambda each: each["devices"]["embedding"]["http"]["state"] == "opened")
        assert told["devices"]["embedding"]["http"]["used"] == 3
        assert told["devices"]["embedding"]["http"]["failed"] >= BREAKER_THRESHOLD
        seen = await speaker.ask("subscribe", channel="stats")
        assert seen["op"] == "subscribed"
        [event, *_] = await speaker.wait_events("stats", 1)
        assert event["data"]["devices"]["embedding"]["http"]["state"] == "opened"


class _Runtime:
    """What a verifier loads, on a device that is lost and on the processor."""

    name, precision = "pretended", "float32"

    def __init__(self, device: str) -> None:
        self.device = device
        self.operating_points: dict[str, float] = {}

    def judge(self, pairs: Any) -> Any:
        if self.device == "cuda":
            raise DeviceFailedError("verifier: the device failed (CUDA error: unspecified launch failure)")
        return np.zeros(len(pairs), dtype=np.float32)


@contextmanager
def device_lost(_services: Services, _settings: Settings) -> Iterator[None]:
    def build(_self: CrossEncoderVerifier, device: str) -> Any:
        return _Runtime("cpu" if device == "cpu" else "cuda")

    CrossEncoderVerifier._build = build  # type: ignore[assignment,method-assign]
    yield


@pytest.mark.skipif(not weights_available(), reason="this installation carries no verifier weights")
async def test_a_verifier_whose_device_is_lost_tells_that_the_cpu_stands_in(start_server: StartServer) -> None:
    server = start_server(tamper=device_lost, KIMERA_SCORING__VERIFIER="auto", KIMERA_STREAM__STATS_INTERVAL="0.1")
    before = await stats(server, lambda each: "devices" in each)
    assert list(before["devices"]["verifier"]) == ["cuda", "cpu"]
    async with peer(server) as speaker:
        for number in range(4):
            said = [f"The door of hall {number} is open.", f"The door of hall {number} is closed."]
            for text in said:
                await speaker.publish(text=text)
    told = (await stats(server, lambda each: each["totals"]["published"] == 8))["devices"]["verifier"]
    assert told["cuda"]["state"] == "opened"
    assert (told["cuda"]["failed"], told["cuda"]["used"]) == (3, 0)
    assert told["cpu"]["used"] >= 4
    assert told["cpu"]["state"] == "closed"
