"""An edge that has more connections than its share sends some to the other."""

from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest

from kimera_stream.api.nodes.rebalancing import to_send_away
from tests.e2e.harness import PATIENCE, Peer, Server, peer, show
from tests.e2e.nodes import Cluster

pytestmark = [pytest.mark.anyio, pytest.mark.postgres, pytest.mark.redis]


@pytest.fixture
def edges(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    made = Cluster(tmp_path)
    try:
        for name in ("full", "empty"):
            made.start(name, "edge", wait=False, KIMERA_BUS__REBALANCE_ABOVE="0.1")
        made.ready("full", "empty")
        yield made.nodes["full"], made.nodes["empty"]
    finally:
        made.close()
        for name, node in made.nodes.items():
            show(f"--- {name}", node.text)


async def test_connections_spread_over_the_edges_that_there_are(edges: tuple[Server, Server]) -> None:
    full, empty = edges
    moved: list[int] = []
    balanced = anyio.Event()

    async def live(number: int, stack: AsyncExitStack) -> None:
        """As a client behind a balancer that prefers the edge with the fewest connections."""
        one = await stack.enter_async_context(peer(full))
        position = {name: one.connected[name] for name in ("epoch", "offset")}
        await one.ws.wait_closed()
        assert (one.ws.close_code, one.ws.close_reason) == (4005, "rebalance")
        other: Peer = await stack.enter_async_context(peer(empty))
        reply = await other.done("subscribe", channel="geoids", since=position)
        assert (reply["was_recovering"], reply["recovered"]) == (True, True)
        moved.append(number)
        if len(moved) == 2:  # four and two: no more than a tenth above the average of three, rounded up
            balanced.set()

    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(live, number, stack)
        with anyio.fail_after(PATIENCE):
            await balanced.wait()
        group.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("here", "elsewhere", "above", "away"),
    [
        (1000, [0], 0.0, 0),  # not asked for
        (1000, [], 0.2, 0),  # nowhere to go
        (1000, [0], 0.2, 50),  # a twentieth at a time
        (630, [400], 0.2, 12),  # down to a fifth above the average
        (600, [400], 0.2, 0),
        (400, [600], 0.2, 0),
        (3, [0], 0.2, 1),
        (1, [0, 0, 0], 0.2, 0),  # one connection has to be somewhere
    ],
)
def test_how_many_go(here: int, elsewhere: list[int], above: float, away: int) -> None:
    assert to_send_away(here, elsewhere, above) == away
