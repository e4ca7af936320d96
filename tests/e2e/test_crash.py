"""A defect in a service: logged once, counted, the service restarted, the rest unharmed; too many end the process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from kimera_stream.api.stats import StatsService
from kimera_stream.engines.sequencer import Sequencer
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.settings import Settings
from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server, free_port, metric, offsets, peer, until, web

pytestmark = pytest.mark.anyio

BOOM = "a defect put in by a test"


class CrashingStats:
    """The stats service, which fails its first ``failures`` runs."""

    def __init__(self, failures: int) -> None:
        self.left = failures

    async def run(self) -> None:
        if self.left:
            self.left -= 1
            raise KeyError(BOOM)
        await anyio.sleep_forever()


@contextmanager
def stats_crash_twice(services: Services, _settings: Settings) -> Iterator[None]:
    with services.override(StatsService, instance=CrashingStats(2)):  # type: ignore[arg-type]
        yield


@contextmanager
def stats_always_crash(services: Services, _settings: Settings) -> Iterator[None]:
    with services.override(StatsService, instance=CrashingStats(1_000_000)):  # type: ignore[arg-type]
        yield


@contextmanager
def sequencer_crashes_after_commit(_services: Services, _settings: Settings) -> Iterator[None]:
    """Committed and not yet told: what is on the disk then has to be told after the restart."""
    original = Sequencer._apply
    crashed: set[str] = set()

    def apply(self: Sequencer, batch: Any) -> None:
        for stored in batch.geoids:
            if "crash here" in (stored.geoid.text or "") and stored.geoid.id not in crashed:
                crashed.add(stored.geoid.id)
                raise ZeroDivisionError(BOOM)
        original(self, batch)

    Sequencer._apply = apply  # type: ignore[method-assign]
    yield


async def defects(server: Server, service: str) -> float:
    async with web(server) as http:
        return await metric(http, "kimera_service_failures_total", service=service, kind="defect")


async def test_a_crash_is_logged_once_counted_and_the_service_restarted(start_server: StartServer) -> None:
    server = start_server(tamper=stats_crash_twice)
    async with peer(server) as client:
        await client.publish(text="The rest goes on.")

    async def crashed_twice() -> bool:
        return await defects(server, "stats") == 2

    await until(crashed_twice)
    crashes = [each for each in server.errors() if each["event"] == "service crashed"]
    assert [each["service"] for each in crashes] == ["stats", "stats"]
    assert all(BOOM in each["error"] and "Traceback" in each["exception"] for each in crashes)
    assert server.text.count("Traceback") == 2
    async with web(server) as http:

        async def ready_again() -> bool:
            ready = await http.get("/readyz")
            state = ready.json()["services"]["stats"]
            assert (ready.status_code == 200) is (state == "ready"), state
            return state == "ready"

        await until(ready_again)
    assert await crashed_twice()
    server.terminate()
    assert server.wait() == 0


async def test_too_many_crashes_end_the_process(start_server: StartServer) -> None:
    server = start_server(wait=False, port=free_port(), tamper=stats_always_crash)
    assert server.wait() == 1
    crashes = [each for each in server.errors() if each["event"] == "service crashed"]
    assert len(crashes) > 3
    assert any(line.startswith("kimera-stream: service stats failed for good") for line in server.lines)
    assert BOOM in next(line for line in server.lines if line.startswith("kimera-stream: service stats"))


async def test_what_was_committed_before_a_crash_is_told_after_it(start_server: StartServer) -> None:
    server = start_server(tamper=sequencer_crashes_after_commit)
    async with peer(server) as speaker, peer(server, "msgpack") as listener:
        await listener.done("subscribe", channel="geoids")
        await listener.done("subscribe", channel="field")
        first = await speaker.publish(id="one", symbolic_state={"subject": "s", "n": 1}, session_id="crash")
        for number in range(2):
            fields = {"text": "crash here", "symbolic_state": {"subject": "s", "n": number + 2}}
            lost = await speaker.ask("publish", geoid=fields, key=f"key-{number}")
            assert (lost["op"], lost["code"], lost["temporary"]) == ("error", "internal", True)
            again = await speaker.done("publish", geoid=fields, key=f"key-{number}")
            assert again["duplicate"], "it had been committed"
            assert len(again["contradictions"]) == number + 1
        last = await speaker.publish(symbolic_state={"subject": "s", "n": 9})
        assert len(last["contradictions"]) == 3, "what was committed during the crash is compared with as well"
        assert offsets(await listener.wait_events("geoids", 4)) == [first["offset"], 2, 4, last["offset"]]
        field = await listener.events_until("field", lambda found: found[-1]["offset"] >= last["offset"] + 3)
        assert (field[-1]["data"]["geoids"], field[-1]["data"]["open_contradictions"]) == (4, 6)
    assert await defects(server, "pipeline") == 2
