"""Who is connected and listens where, over all edges: asked of each when somebody wants to know, and counted for the limits."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import anyio
import msgspec
import structlog

from kimera_stream.infrastructure.bus.interface import Bus
from kimera_stream.protocol.errors import OperationalError, OverloadedError, UnavailableError
from kimera_stream.streaming.hub import Hub

log = structlog.get_logger(__name__)

PRESENCE: Final = "presence"
"""Kind of question."""
CONNECTIONS: Final = "connections"
"""Space of shared values, and kind of question."""
ALL: Final = "all"
WITHIN: Final = 1.0
"""Seconds an edge may take to answer."""
MOST_PRINCIPALS: Final = 1_000
"""Principals whose connections an edge shares: those with the most."""
EVERY: Final = 0.5
"""Seconds between exchanges of counts."""


class _Here(msgspec.Struct, frozen=True):
    subscribers: int
    principals: dict[str, int]


_encode = msgspec.msgpack.Encoder().encode
_here = msgspec.msgpack.Decoder(_Here).decode
_number = msgspec.msgpack.Decoder(int).decode
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
        """See ``Hub.presence``; over all edges that can be reached.

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


class _Counting:
    """Counts of one principal's connections on other edges, one after the other."""

    __slots__ = ("begun", "done", "lock", "total", "waiting")

    def __init__(self) -> None:
        self.begun = 0
        self.done = 0
        """Number of the newest that was finished; ``total`` is what it found."""
        self.total = 0
        self.waiting = 0
        self.lock = anyio.Lock()


class ConnectionsElsewhere:
    """How many connections principals have on other edges; without the bus, none. See ``streaming.hub.Elsewhere``.

    Args:
        bus: Carries counts and questions.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._here: Mapping[str, int] = {}
        self._by_edge: dict[str, dict[str, int]] = {}
        self._total: Counter[str] = Counter()
        self._shared: bytes | None = None
        self._counting: dict[str, _Counting] = {}

    def known(self, principal: str) -> int:
        """Connections of a principal on other edges, as exchanged: a second old at most."""
        return self._total[principal]

    async def count(self, principal: str) -> int:
        """The same as they are now: the edges that are known to have some are asked. One that does not answer is gone, and its connections with it."""
        counting = self._counting.setdefault(principal, _Counting())
        counting.waiting += 1
        # One that has begun may have been told of connections that have gone since: only the next one will do, for all who wait by then.
        wanted = counting.begun + 1
        try:
            async with counting.lock:
                if counting.done < wanted:
                    counting.begun += 1
                    counting.total = await self._ask_all(principal)
                    counting.done = counting.begun
            return counting.total
        finally:
            counting.waiting -= 1
            if not counting.waiting:
                del self._counting[principal]

    async def _ask_all(self, principal: str) -> int:
        total = 0

        async def ask(edge: str, shared: int) -> None:
            nonlocal total
            try:
                told = _number(await self._bus.ask(edge, CONNECTIONS, principal.encode(), within=WITHIN))
            except UnavailableError:
                told = 0
            except OperationalError:  # it is there and has no time
                told = shared
            total += told

        async with anyio.create_task_group() as group:
            for edge, counts in self._by_edge.items():
                if shared := counts.get(principal):
                    group.start_soon(ask, edge, shared, name="connections:edge")
        return total

    def begin(self, here: Mapping[str, int]) -> None:
        """From now on other edges are answered.

        Args:
            here: Connections on this node by principal, as they are each time it is looked at.
        """
        self._here = here
        self._bus.answer_with(CONNECTIONS, self._answer)

    async def _answer(self, question: bytes) -> bytes:
        return _encode(self._here.get(question.decode(), 0))

    async def run(self) -> None:
        """Exchange counts until cancelled."""
        while True:
            self._share()
            await self._gather()
            await anyio.sleep(EVERY)

    def _share(self) -> None:
        counts = sorted(self._here.items(), key=lambda each: (-each[1], each[0]))[:MOST_PRINCIPALS]
        value = _encode(dict(counts)) if counts else None
        if value != self._shared:
            self._shared = value
            self._bus.share(CONNECTIONS, ALL, value)

    async def _gather(self) -> None:
        try:
            shared = await self._bus.gather(CONNECTIONS, ALL)
        except OverloadedError:
            return
        except UnavailableError:
            shared = {}  # the limit of this node holds by itself
        self._by_edge = {edge: _counts(value) for edge, value in shared.items() if edge != self._bus.node}
        self._total = Counter()
        for counts in self._by_edge.values():
            self._total.update(counts)
