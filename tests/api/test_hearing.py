"""What an edge makes of what it hears."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from kimera_stream.api.nodes import hearing
from kimera_stream.api.nodes.hearing import Hearing, keep_watches
from kimera_stream.core.interfaces import Vector
from kimera_stream.engines.cluster.watchlist import WatchList
from kimera_stream.infrastructure.bus.memory import MemoryBroker, MemoryBus
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.objects import Watch

pytestmark = pytest.mark.anyio


async def test_watches_that_cannot_be_read_are_read_again_without_another_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearing, "AGAIN", 0.001)
    refusals, read = 2, anyio.Event()

    async def watches() -> Sequence[tuple[Watch, Vector | None]]:
        nonlocal refusals
        await anyio.lowlevel.checkpoint()
        if refusals:
            refusals -= 1
            raise UnavailableError("the database is away")
        read.set()
        return []

    made = WatchList(watches)
    async with anyio.create_task_group() as group:
        group.start_soon(keep_watches, made)
        made.stale()
        with anyio.fail_after(5):
            await read.wait()
        group.cancel_scope.cancel()


async def test_of_what_was_said_before_it_began_everything_is_asked_for() -> None:
    """A watch that was removed between the reading of the watches and the first word heard would stay known here."""
    asked: list[str] = []

    def part(name: str) -> Any:
        def lost() -> None:
            asked.append(name)

        return cast("Any", SimpleNamespace(lost=lost, stale=lost))

    parts = ("log", "errands", "scored", "watches", "field")
    made = Hearing(MemoryBus(MemoryBroker(), "edge"), *(part(name) for name in parts))
    async with anyio.create_task_group() as group:
        group.start_soon(made.run)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert set(asked) == set(parts)
