"""Hearing topics from Redis: read on where one was, and know when something is missing.

Each message has a number, and the numbers of a topic go up by one. A follower knows the id and the number of what it heard last; another number
than the next means that something is missing: trimmed before it was read, flushed, or never sent (the sender left a hole in the numbers).
Every now and then, however much is said on other topics, the follower compares its number with the topic's, so a hole that no message follows is
noticed too; and whether Redis is still the one it was, with the data it had: if not, anything may be missing, also from a topic where nothing was
ever said.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import anyio
import structlog

from kimera_stream.infrastructure.bus.interface import Lost, Message
from kimera_stream.infrastructure.bus.link import TROUBLE, Argument, Connection, Contact, Waits
from kimera_stream.infrastructure.bus.scripts import PLACE, Keys, expiry_of

log = structlog.get_logger(__name__)

BLOCK = 0.5
"""Seconds that one read waits in Redis for something to come."""
LOOK_EVERY = 0.5
"""Seconds after which the places are compared, also where one topic keeps the reads busy and another is quiet."""
READ_ITEMS = 256
"""Messages of one topic taken by one read at most."""
READ_BYTES = 4 << 20
"""Bytes that one read of one topic is to bring: it asks for as many messages as they would hold if all were as large as the largest of
the read before."""
HELD_ITEMS = 512
"""Messages read and not yet received, above which nothing more is read."""
HELD_BYTES = 16 << 20
"""And their bytes."""


class Place:
    """Where a follower is in one topic. ``number`` None: nothing was ever said there."""

    __slots__ = ("id", "known", "number")

    def __init__(self) -> None:
        self.id = ""
        self.number: int | None = None
        self.known = False


class RedisFollower:
    """Hears topics. ``run`` reads; see ``Follower``.

    Args:
        contact: How to reach Redis.
        keys: Names of keys.
        topics: Each once.
        count: Told of messages received and of losses.
    """

    def __init__(
        self, contact: Contact, keys: Keys, topics: Sequence[str], *, count: Callable[[int, int], None]
    ) -> None:
        self._contact = contact
        self._keys = keys
        self._places = {topic: Place() for topic in topics}
        self._topic_of = {keys.topic(topic).encode(): topic for topic in topics}
        self._count = count
        self._run_id = b""
        self._origin: tuple[bytes, bytes] | None = None
        self._late = False
        self._look_at = 0.0
        self._held: deque[Message | Lost] = deque()
        self._held_bytes = 0
        self._items = READ_ITEMS
        """Messages of one topic that the next read asks for."""
        self._came = anyio.Event()
        self._taken = anyio.Event()
        self.placed = anyio.Event()
        self.scope = anyio.CancelScope()
        self.finished = anyio.Event()

    @property
    def held_bytes(self) -> int:
        """Bytes read and not yet received."""
        return self._held_bytes

    async def receive(self) -> list[Message | Lost]:
        while not self._held:
            self._came = anyio.Event()
            await self._came.wait()
        heard = list(self._held)
        self._held.clear()
        self._held_bytes = 0
        self._taken.set()
        return heard

    def lose(self) -> None:
        """Say that anything may be missing: it was to begin and there is no contact. Said again when there is."""
        self._late = True
        self._hold([Lost(topic) for topic in self._places])

    async def run(self) -> None:
        """Read until cancelled, through losses of contact."""
        waits = Waits()
        while True:
            try:
                async with self._contact.open() as connection:
                    self._run_id = await self._run_of(connection)
                    await self._place(connection)
                    waits.succeeded()
                    while True:
                        await self._read(connection)
            except TROUBLE as error:
                log.debug("reading topics from Redis broke off", error=str(error) or type(error).__name__)
            await waits.pause()

    async def _read(self, connection: Connection) -> None:
        # Whoever receives is behind: what it misses meanwhile is trimmed, and told.
        while len(self._held) >= HELD_ITEMS or self._held_bytes >= HELD_BYTES:
            self._taken = anyio.Event()
            await self._taken.wait()
        ids = [place.id for place in self._places.values()]
        streams = [self._keys.topic(topic) for topic in self._places]
        answer = await self._ask(
            connection, BLOCK, b"XREAD", b"COUNT", self._items, b"BLOCK", int(BLOCK * 1000), b"STREAMS", *streams, *ids
        )
        if answer:
            assert isinstance(answer, Mapping)
            begun = len(self._held)
            for stream, entries in answer.items():
                self._heard(self._topic_of[bytes(stream)], entries)
            self._pace([len(each.payload) for each in islice(self._held, begun, None) if isinstance(each, Message)])
        if not answer or anyio.current_time() >= self._look_at:
            await self._place(connection)

    def _pace(self, sizes: Sequence[int]) -> None:
        """How many messages to ask for next, after a read that brought some of these sizes."""
        self._items = max(1, min(READ_ITEMS, READ_BYTES // max([1, *sizes])))

    def _heard(self, topic: str, entries: Sequence[Any]) -> None:
        place = self._places[topic]
        news: list[Message | Lost] = []
        for entry_id, fields in entries:
            place.id = entry_id.decode()
            if fields is None:  # deleted by hand
                continue
            number = int(fields[1])
            if place.number is None or number != place.number + 1:
                news.append(Lost(topic))
            place.number = number
            news.append(Message(topic, bytes(fields[3])))
        self._hold(news)

    async def _place(self, connection: Connection) -> None:
        """Compare each place with the topic: at first take the end of it, later notice what will never come."""
        names = [self._keys.born]
        arguments: list[Argument] = []
        for topic, place in self._places.items():
            names += [self._keys.topic(topic), self._keys.number(topic)]
            arguments += [place.id if place.known else "", expiry_of(topic)]
        born, *answer = await self._ask(connection, 0, b"EVAL", PLACE, len(names), *names, *arguments)
        origin = (self._run_id, bytes(born))
        other = self._origin is not None and origin != self._origin
        self._origin = origin
        lost: list[Message | Lost] = []
        for (topic, place), (last_id, number, more) in zip(self._places.items(), answer, strict=True):
            current = None if number is None else int(number)
            if place.known and not other and (more or current == place.number):
                continue  # the next read brings it, and the numbers tell whether something is missing
            if place.known or self._late:
                lost.append(Lost(topic))
            place.id, place.number, place.known = last_id.decode(), current, True
        self._late = False
        self._look_at = anyio.current_time() + LOOK_EVERY
        self._hold(lost)
        self.placed.set()

    async def _run_of(self, connection: Connection) -> bytes:
        """Names one run of a Redis server."""
        info = bytes(await self._ask(connection, 0, b"INFO", b"server"))
        return next((line for line in info.splitlines() if line.startswith(b"run_id:")), b"")

    async def _ask(self, connection: Connection, blocks: float, command: bytes, *arguments: Argument) -> Any:
        with anyio.fail_after(self._contact.timeout + blocks):
            return await connection.create_request(command, *arguments)

    def _hold(self, news: Sequence[Message | Lost]) -> None:
        if news:
            self._held.extend(news)
            self._held_bytes += sum(len(item.payload) for item in news if isinstance(item, Message))
            self._count(len(news), sum(isinstance(item, Lost) for item in news))
            self._came.set()
