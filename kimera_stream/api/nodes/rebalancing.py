"""Connections that go to other edges: one that was added, or came back, gets its share."""

import math
from collections.abc import Callable, Collection
from typing import Final

import anyio
import msgspec

from kimera_stream.infrastructure.bus.interface import Bus
from kimera_stream.protocol.errors import OverloadedError, UnavailableError

SPACE: Final = "connections"
TOTAL: Final = "total"
EVERY: Final = 2.0
"""Seconds between looks: time for clients to come back, so that one look sees what the one before has done."""
PACE: Final = 0.05
"""Share of its connections that an edge sends away at one look."""

_encode = msgspec.msgpack.encode
_count = msgspec.msgpack.Decoder(int).decode


def to_send_away(here: int, elsewhere: Collection[int], above: float) -> int:
    """How many connections an edge closes now.

    Args:
        here: Those that it has, without those that were asked to leave.
        elsewhere: Those of every other edge.
        above: Share by which it may exceed the average edge; 0: it may have any number.
    """
    if not above or not elsewhere:
        return 0
    average = (here + sum(elsewhere)) / (1 + len(elsewhere))
    surplus = here - math.ceil(average * (1 + above))
    return max(0, min(surplus, math.ceil(here * PACE)))


class Rebalancing:
    """Tells the other edges how many connections this one has, and sends some away where it has too many.

    Args:
        count: Connections here that stay; None: this edge takes none any more, so it is nowhere to send any.
        move: Closes so many of them.
        above: See ``to_send_away``.
    """

    def __init__(self, bus: Bus, *, count: Callable[[], int | None], move: Callable[[int], None], above: float) -> None:
        self._bus = bus
        self._count = count
        self._move = move
        self._above = above

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            here = self._count()
            self._bus.share(SPACE, TOTAL, None if here is None else _encode(here))
            if self._above and here is not None:
                try:
                    shared = await self._bus.gather(SPACE, TOTAL)
                except (UnavailableError, OverloadedError):
                    shared = {}  # who has how many is not known
                others = [_count(value) for node, value in shared.items() if node != self._bus.node]
                self._move(to_send_away(here, others, self._above))
            await anyio.sleep(EVERY)
