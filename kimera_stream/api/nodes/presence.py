"""Who is connected and listens where, over all edges: asked of each when somebody wants to know, and counted for the limits."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import anyio
import msgspec
import structlog

from kimera_stream.infrastructure.bus.interface import Bus
from kimera_stream.protocol.errors import OperationalError, UnavailableError
from kimera_stream.streaming.hub import Hub

log = structlog.get_logger(__name__)

PRESENCE: Final = "presence"
"""Kind of question."""
CONNECTIONS: Final = "connections"
"""Space of shared values."""
ALL: Final = "all"
WITHIN: Final = 1.0
"""Seconds an edge may take to say who listens."""
MOST_PRINCIPALS: Final = 1_000
"""Principals whose connections an edge shares: those with the most."""
EVERY: Final = 0.5
"""Seconds between exchanges of counts."""


class _Here(msgspec.Struct, frozen=True):
    subscribers: int
    principals: dict[str, int]


_encode = msgspec.msgpack.Encoder().encode
_here = msgspec.msgpack.Decoder(_Here).decode
_counts = msgspec.msgpack.Decoder(dict[str, int]).decode


class PresenceEverywhere:
    """Args: edges: ids of the live nodes that serve connections."""

    def __init__(self, bus: Bus, hub: Hub, edges: Callable[[], Sequence[str]]) -> None:
        self._bus = bus
        self._hub = hub
        self._edges = edges
        self.complete = True
        """Whether every edge answered the last time; where not, what was given counts those that did."""

    def begin(self) -> None:
        """From now on other edges are answered."""
        self._bus.answer_with(PRESENCE, self._answer)

    async def _answer(self, question: bytes) -> bytes:
        return _encode(_Here(*self._hub.presence(question.decode())))

    async def of(self, channel: str) -> tuple[int, dict[str, int]]:
        """See ``core.interfaces.Presence``; over all edges that can be reached.

        Raises:
            BadChannelError: there is no such channel.
        """
        subscribers, principals = self._hub.presence(channel)
        total, by_principal, missing = subscribers, Counter(principals), 0

        async def ask(edge: str) -> None:
            nonlocal total, missing
            try:
                told = _here(await self._bus.ask(edge, PRESENCE, channel.encode(), within=WITHIN))
            except OperationalError:
                missing += 1
                return
            total += told.subscribers
            by_principal.update(told.principals)

        async with anyio.create_task_group() as group:
            for edge in self._edges():
                if edge != self._bus.node:
                    group.start_soon(ask, edge, name="presence:edge")
        self.complete = not missing
        return total, dict(by_principal)


class ConnectionsElsewhere:
    """How many connections principals have on other edges, half a second old at most; without the bus, none."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._elsewhere: Counter[str] = Counter()
        self._shared: bytes | None = None

    def __call__(self, principal: str) -> int:
        """Connections of a principal on other nodes."""
        return self._elsewhere[principal]

    async def run(self, here: Mapping[str, int]) -> None:
        """Exchange counts until cancelled.

        Args:
            here: Connections on this node by principal, as they are each time it is looked at.
        """
        while True:
            self._share(here)
            await self._gather()
            await anyio.sleep(EVERY)

    def _share(self, here: Mapping[str, int]) -> None:
        counts = sorted(here.items(), key=lambda each: (-each[1], each[0]))[:MOST_PRINCIPALS]
        value = _encode(dict(counts)) if counts else None
        if value != self._shared:
            self._shared = value
            self._bus.share(CONNECTIONS, ALL, value)

    async def _gather(self) -> None:
        try:
            shared = await self._bus.gather(CONNECTIONS, ALL)
        except UnavailableError:
            self._elsewhere = Counter()  # the limit of this node holds by itself
            return
        total: Counter[str] = Counter()
        for node, value in shared.items():
            if node != self._bus.node:
                total.update(_counts(value))
        self._elsewhere = total
