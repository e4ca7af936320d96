"""What an engine answers when an edge asks: scores, searches of its own slices, and the keeping of watches."""

from collections.abc import Awaitable, Callable

from kimera_stream.core.access import Principal
from kimera_stream.engines.cluster import wire
from kimera_stream.engines.queries import Queries
from kimera_stream.infrastructure.bus.interface import NUDGE, Bus


class Answering:
    """Args:
    owned: Numbers of the slices that the index holds whole.
    reload: Reads the watches again: the one to be replaced may have been made by another engine.
    """

    def __init__(
        self,
        bus: Bus,
        queries: Queries,
        *,
        owned: Callable[[], frozenset[int]],
        reload: Callable[[], Awaitable[None]],
    ) -> None:
        self._bus = bus
        self._queries = queries
        self._owned = owned
        self._reload = reload

    def begin(self) -> None:
        """From now on questions of these kinds are answered."""
        self._bus.answer_with(wire.SCORE, self._score)
        self._bus.answer_with(wire.SEARCH, self._search)
        self._bus.answer_with(wire.WATCH, self._watch)
        self._bus.answer_with(wire.UNWATCH, self._unwatch)

    async def _score(self, question: bytes) -> bytes:
        asked = wire.decode_score(question)
        return wire.encode(await self._queries.score(asked.a, asked.b, explain=asked.explain))

    async def _search(self, question: bytes) -> bytes:
        asked = wire.decode_search(question)
        before = self._owned()
        hits = await self._queries.search(
            text=asked.text, vector=asked.vector, relation=asked.relation, k=asked.k, filter=asked.filter
        )
        # A slice that came or went meanwhile may have been looked through in part.
        return wire.encode(wire.SearchAnswer(hits=hits, slices=sorted(before & self._owned())))

    async def _watch(self, question: bytes) -> bytes:
        asked = wire.decode_watch(question)
        await self._reload()
        watch = await self._queries.watch(
            asked.name,
            principal=Principal(asked.principal, frozenset()),
            text=asked.text,
            vector=asked.vector,
            kinds=asked.kinds,
            min_score=asked.min_score,
            filter=asked.filter,
        )
        self._bus.publish(NUDGE, b"watches")
        return wire.encode(watch)

    async def _unwatch(self, question: bytes) -> bytes:
        asked = wire.decode_unwatch(question)
        await self._queries.unwatch(asked.name, principal=Principal(asked.principal, frozenset()))
        self._bus.publish(NUDGE, b"watches")
        return b""
