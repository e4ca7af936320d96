"""A real server whose verifier is away or has fallen behind: the cheap stage decides, the verifier's word comes later."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from kimera_stream.engines.verifier import CrossEncoderVerifier, weights_available
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.protocol.errors import UnavailableError
from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server, peer, until, web

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not weights_available(), reason="this installation carries no verifier weights"),
]

CLASH = ("The door of hall 3 is open.", "The door of hall 3 is closed.")
WITH_VERIFIER = {"KIMERA_SCORING__VERIFIER": "auto", "KIMERA_STREAM__STATS_INTERVAL": "0.1"}


@contextmanager
def verifier_away(_services: Services, _settings: Settings) -> Iterator[None]:
    async def judge(self: CrossEncoderVerifier, pairs: Any) -> Any:
        raise UnavailableError("verifier: put out of order by a test")

    CrossEncoderVerifier.judge = judge  # type: ignore[method-assign]
    yield


@contextmanager
def verifier_disagrees(_services: Services, _settings: Settings) -> Iterator[None]:
    async def judge(self: CrossEncoderVerifier, pairs: Any) -> Any:
        return np.zeros(len(pairs), dtype=np.float32)

    CrossEncoderVerifier.judge = judge  # type: ignore[method-assign]
    yield


async def verification(server: Server) -> dict[str, int]:
    async with web(server) as http:
        found: dict[str, int] = (await http.get("/v1/stats")).json()["verification"]
    return found


async def provisional(server: Server) -> dict[str, Any]:
    """Publish a plain clash; returns the contradiction of the reply."""
    async with peer(server) as speaker:
        await speaker.publish(text=CLASH[0])
        [told] = (await speaker.publish(text=CLASH[1]))["contradictions"]
    assert told["provisional"]
    assert told["model"] != "kimera-verifier-6"
    found: dict[str, Any] = told
    return found


async def test_what_was_provisional_when_the_process_was_killed_is_verified_after_the_restart(
    start_server: StartServer,
) -> None:
    server = start_server(tamper=verifier_away, **WITH_VERIFIER)
    told = await provisional(server)

    async def waiting() -> bool:
        return (await verification(server))["pending"] > 0

    await until(waiting)
    server.kill()
    server = start_server(**WITH_VERIFIER)
    async with peer(server) as listener:
        await listener.done(
            "subscribe", channel="contradictions", since={"epoch": listener.connected["epoch"], "offset": 0}
        )
        first, word = (event["data"] for event in await listener.wait_events("contradictions", 2))
    assert first == told
    assert (word["id"], word["version"], word["state"]) == (told["id"], 2, "open")
    assert not word.get("provisional", False)
    assert word["model"] == "kimera-verifier-6"

    async def caught_up() -> bool:
        numbers = await verification(server)
        return numbers["pending"] == 0 and numbers["confirmed"] == 1

    await until(caught_up)


async def test_a_verifier_that_has_fallen_behind_is_left_out_and_may_disagree_later(start_server: StartServer) -> None:
    server = start_server(tamper=verifier_disagrees, KIMERA_SCORING__VERIFY_WITHIN="0.000001", **WITH_VERIFIER)
    async with peer(server) as listener:
        await listener.done("subscribe", channel="contradictions")
        told = await provisional(server)
        found, dissolved = await listener.wait_events("contradictions", 2)
        assert [found["type"], dissolved["type"]] == ["contradiction.found", "contradiction.dissolved"]
        assert (dissolved["data"]["id"], dissolved["data"]["state"]) == (told["id"], "dissolved")

    async def told_on_stats() -> bool:
        numbers = await verification(server)
        return numbers["dissolved"] == 1 and numbers["put_off"] >= 1 and numbers["pending"] == 0

    await until(told_on_stats)
