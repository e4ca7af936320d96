"""How a server process goes down."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kimera_stream.api.runtime import Runtime
from kimera_stream.infrastructure.settings import Settings

pytestmark = pytest.mark.anyio


class Container:
    """Has everything, and nothing of it does anything."""

    def get(self, _key: object) -> Any:
        return SimpleNamespace(service_failed=lambda _name, _error: None)


async def test_a_drain_that_fails_does_not_keep_the_next_from_its_turn(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    async def failing(_seconds: float) -> None:
        raise RuntimeError("a defect")

    async def closing(seconds: float) -> None:
        assert seconds > 0
        done.append("subscribers")

    runtime = Runtime(
        Settings(), cast("Any", Container()), lambda _: (cast("Any", None), [], [("work", failing), ("hub", closing)])
    )
    await runtime.drain()
    assert done == ["subscribers"]
