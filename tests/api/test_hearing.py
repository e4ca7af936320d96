"""What an edge makes of what it hears."""

from collections.abc import Sequence

import anyio
import pytest

from kimera_stream.api.nodes import hearing
from kimera_stream.api.nodes.hearing import keep_watches
from kimera_stream.core.interfaces import Vector
from kimera_stream.engines.cluster.watchlist import WatchList
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
