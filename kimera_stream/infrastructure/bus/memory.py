"""The bus within one process, for tests: the same promises, and a broker that can lose contact or its memory on demand."""

import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import anyio

from kimera_stream.infrastructure.bus.interface import FULL, Answerer, BusNumbers, Follower, Lost, Message, Work, Worker
from kimera_stream.infrastructure.bus.questions import Questions, inbox
from kimera_stream.infrastructure.settings_model import BusSettings
from kimera_stream.infrastructure.tasks.service import Service
from kimera_stream.protocol.errors import OverloadedError, UnavailableError


@dataclass(slots=True, eq=False)
class Piece:
    """Work that is not done. ``owner``: the worker that has it."""

    work: Work
    owner: "MemoryWorker | None" = None
    since: float = 0.0


class MemoryBroker:
    """What the nodes of one test share. ``away``: no node has contact."""

    def __init__(self) -> None:
        self.away = False
        self.pieces: dict[int, dict[str, Piece]] = {}
        self.followers: set[MemoryFollower] = set()
        self.shared: dict[str, dict[tuple[str, str], bytes]] = {}
        self.ids = itertools.count(1)
        self.changed = anyio.Event()

    def announce(self) -> None:
        """Wake who waits for a change."""
        self.changed.set()
        self.changed = anyio.Event()

    def flush(self) -> None:
        """Forget everything, as Redis after FLUSHALL."""
        self.pieces.clear()
        for follower in self.followers:
            follower.lose()
        self.announce()

    def cut(self) -> None:
        """No node has contact until ``mend``."""
        self.away = True

    def mend(self) -> None:
        """Contact is back; what was said meanwhile is missing."""
        self.away = False
        for follower in self.followers:
            if follower.missed:
                follower.lose()
        self.announce()


class MemoryFollower:
    """See ``Follower``."""

    def __init__(self, topics: Sequence[str]) -> None:
        self.topics = frozenset(topics)
        self.missed: set[str] = set()
        self._held: deque[Message | Lost] = deque()
        self._came = anyio.Event()

    async def receive(self) -> list[Message | Lost]:
        while not self._held:
            self._came = anyio.Event()
            await self._came.wait()
        heard = list(self._held)
        self._held.clear()
        return heard

    def hear(self, item: Message | Lost) -> None:
        self._held.append(item)
        self._came.set()

    def lose(self) -> None:
        """Tell that anything may be missing."""
        self.missed.clear()
        for topic in sorted(self.topics):
            self.hear(Lost(topic))


class MemoryWorker:
    """See ``Worker``."""

    def __init__(self, broker: MemoryBroker, settings: BusSettings) -> None:
        self._broker = broker
        self._settings = settings
        self._taken: set[int] = set()

    @property
    def partitions(self) -> frozenset[int]:
        return frozenset(self._taken)

    def take(self, partition: int) -> None:
        if partition in self._taken:
            return
        self._taken.add(partition)
        for piece in self._broker.pieces.get(partition, {}).values():
            if piece.owner is not self:
                piece.owner, piece.since = None, 0.0
        self._broker.announce()

    async def give(self, partition: int) -> None:
        self._taken.discard(partition)
        for piece in self._broker.pieces.get(partition, {}).values():
            if piece.owner is self:
                piece.owner, piece.since = None, 0.0

    async def receive(self) -> list[Work]:
        while True:
            changed = self._broker.changed
            if not self._broker.away and (works := self._next()):
                return works
            with anyio.move_on_after(self._settings.claim_after / 2):
                await changed.wait()

    def _next(self) -> list[Work]:
        now, works = anyio.current_time(), []
        for partition in sorted(self._taken):
            for piece in self._broker.pieces.get(partition, {}).values():
                stale = piece.owner is not self and now - piece.since >= self._settings.claim_after
                if (piece.owner is None and piece.since == 0.0) or stale:
                    works.append(piece.work)
                    piece.owner, piece.since = self, now
                    piece.work = Work(*_fields(piece.work), again=True)
                    if len(works) >= self._settings.work_batch:
                        return works
        return works

    def release(self, work: Sequence[Work]) -> None:
        for piece in self._mine(work):
            piece.owner = None

    async def done(self, work: Sequence[Work]) -> None:
        if self._broker.away:
            self.release(work)
            return
        for piece in work:
            self._broker.pieces.get(piece.partition, {}).pop(piece.id, None)

    def _mine(self, work: Sequence[Work]) -> list[Piece]:
        pieces = [self._broker.pieces.get(piece.partition, {}).get(piece.id) for piece in work]
        return [piece for piece in pieces if piece is not None and piece.owner is self]


def _fields(work: Work) -> tuple[int, str, str, str, bytes, str]:
    return work.partition, work.id, work.request, work.reply_to, work.payload, work.of


class MemoryBus:
    """See ``Bus``.

    Args:
        broker: Shared by the nodes that hear each other.
        node: This node's name.
        settings: Its bounds; None: the defaults.
    """

    def __init__(self, broker: MemoryBroker, node: str, settings: BusSettings | None = None) -> None:
        self._broker = broker
        self._node = node
        self._settings = settings or BusSettings()  # type: ignore[call-arg]
        self._questions = Questions(
            node, self.publish, limit=self._settings.questions, message_bytes=self._settings.message_bytes
        )
        self._values: dict[tuple[str, str], bytes] = {}
        self._serving = False
        self._working = False

    @property
    def node(self) -> str:
        return self._node

    @property
    def connected(self) -> bool:
        return self._serving and not self._broker.away

    @property
    def numbers(self) -> BusNumbers:
        return BusNumbers("connected" if self.connected else "away")

    async def serve(self, service: Service) -> None:
        self._serving = True
        self._broker.shared[self._node] = self._values
        try:
            async with self.follow(inbox(self._node)) as follower:
                service.ready()
                await self._questions.serve(follower)
        finally:
            self._serving = False
            self._broker.shared.pop(self._node, None)

    def _check(self) -> None:
        if not self.connected:
            raise UnavailableError("the bus has no contact", retry_after=1.0)

    async def add(self, partition: int, request: str, payload: bytes, *, of: str = "") -> None:
        self._check()
        pieces = self._broker.pieces.setdefault(partition, {})
        own = sum(piece.work.of == of for piece in pieces.values()) if of else 0
        if len(pieces) + own >= self._settings.work_items:
            raise OverloadedError(FULL, retry_after=1.0)
        piece_id = f"{next(self._broker.ids):012}"
        pieces[piece_id] = Piece(Work(partition, piece_id, request, self._node, payload, of))
        self._broker.announce()

    async def depth(self, partition: int) -> int:
        self._check()
        return len(self._broker.pieces.get(partition, {}))

    @contextlib.asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        if self._working:
            raise RuntimeError("one worker at a time per node")
        self._working = True
        try:
            yield MemoryWorker(self._broker, self._settings)
        finally:
            self._working = False

    def publish(self, topic: str, payload: bytes) -> None:
        lost = len(payload) > self._settings.message_bytes
        for follower in self._broker.followers:
            if topic in follower.topics:
                if not self.connected:
                    follower.missed.add(topic)
                else:
                    follower.hear(Lost(topic) if lost else Message(topic, payload))

    @contextlib.asynccontextmanager
    async def follow(self, *topics: str) -> AsyncIterator[Follower]:
        follower = MemoryFollower(topics)
        self._broker.followers.add(follower)
        if self._broker.away:
            follower.lose()
        try:
            yield follower
        finally:
            self._broker.followers.discard(follower)

    async def ask(self, node: str, what: str, payload: bytes, *, within: float) -> bytes:
        self._check()
        return await self._questions.ask(node, what, payload, within=within)

    def answer_with(self, what: str, answerer: Answerer) -> None:
        self._questions.answer_with(what, answerer)

    def share(self, space: str, key: str, value: bytes | None) -> None:
        if value is None:
            self._values.pop((space, key), None)
        else:
            self._values[space, key] = value

    async def gather(self, space: str, key: str) -> dict[str, bytes]:
        self._check()
        found = {node: values.get((space, key)) for node, values in self._broker.shared.items()}
        return {node: value for node, value in found.items() if value is not None}
