"""The bus over Redis Streams."""

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Protocol
from zlib import crc32

import anyio
from anyio.abc import TaskGroup

from kimera_stream.infrastructure.bus.following import RedisFollower
from kimera_stream.infrastructure.bus.interface import FULL, Answerer, BusNumbers, Follower, Worker
from kimera_stream.infrastructure.bus.link import Contact, Link
from kimera_stream.infrastructure.bus.questions import Questions, inbox
from kimera_stream.infrastructure.bus.scripts import ADD, HOLE, PUBLISH, Keys, expiry_of
from kimera_stream.infrastructure.bus.sharing import RedisShares
from kimera_stream.infrastructure.bus.working import RedisWorker
from kimera_stream.infrastructure.settings_model import BusSettings
from kimera_stream.infrastructure.tasks.service import Service
from kimera_stream.protocol.errors import OverloadedError, UnavailableError

BUCKETS = 64
"""Principals are told apart by so many where one of them finds no room: what bounds the memory of it."""
FULL_RETRY_AFTER = 1.0
"""Seconds after which work refused by a full partition is worth another try."""
HOLES_AFTER = 0.2
"""Seconds between attempts to tell followers of what was dropped."""


class Reader(Protocol):
    """A task with a connection of its own."""

    scope: anyio.CancelScope
    finished: anyio.Event

    async def run(self) -> None: ...


class RedisBus:
    """See ``Bus``.

    Args:
        settings: Where Redis is, and every bound.
        node: This node's name; unique among live nodes.
    """

    def __init__(self, settings: BusSettings, node: str) -> None:
        self._settings = settings
        self._node = node
        self._keys = Keys(settings.prefix)
        self._contact = Contact(settings.url.get_secret_value(), timeout=settings.timeout, name=f"kimera-stream:{node}")
        self._link = Link(
            self._contact,
            max_items=settings.outbox_items,
            max_bytes=settings.outbox_bytes,
            on_contact=self._contact_made,
            probe=self._keys.probe,
        )
        self._shares = RedisShares(self._link, self._keys, node, ttl=settings.presence_ttl)
        self._questions = Questions(node, self.publish, limit=settings.questions, message_bytes=settings.message_bytes)
        self._readers: set[Reader] = set()
        self._group: TaskGroup | None = None
        self._holes: set[str] = set()
        self._hole_made = anyio.Event()
        self._working = False
        self._volleys: dict[tuple[int, int], int] = {}
        """By partition and bucket of principals, how often it was found full."""
        self._dropped = self._refused = self._received = self._lost = 0

    @property
    def node(self) -> str:
        return self._node

    @property
    def connected(self) -> bool:
        return self._link.connected

    @property
    def numbers(self) -> BusNumbers:
        link = self._link
        return BusNumbers(
            "connected" if link.connected else "away" if link.contacts else "connecting",
            outbox_items=link.items,
            outbox_bytes=link.bytes,
            sent=link.confirmed,
            dropped=self._dropped,
            refused=self._refused,
            received=self._received,
            lost=self._lost,
            reconnects=max(0, link.contacts - 1),
        )

    async def serve(self, service: Service) -> None:
        # The link outlives the rest by a moment, in which this node takes back what it shared.
        link_scope = anyio.CancelScope(shield=True)
        async with anyio.create_task_group() as outer:
            outer.start_soon(self._run_link, link_scope, name="bus:link")
            try:
                await self._serve(service)
            finally:
                with anyio.move_on_after(self._settings.timeout, shield=True):
                    await self._shares.withdraw()
                link_scope.cancel()

    async def _run_link(self, scope: anyio.CancelScope) -> None:
        with scope:
            await self._link.run()

    async def _serve(self, service: Service) -> None:
        async with anyio.create_task_group() as group:
            self._group = group
            try:
                group.start_soon(self._shares.run, name="bus:shares")
                group.start_soon(self._tell_of_holes, name="bus:holes")
                for reader in self._readers:
                    group.start_soon(self._read, reader, name="bus:read")
                await self._answer(service)
            finally:
                self._group = None

    async def _answer(self, service: Service) -> None:
        async with self.follow(inbox(self._node)) as follower:
            service.ready()  # from here on a question to this node is heard, if there is contact
            await self._questions.serve(follower)

    def _contact_made(self) -> None:
        """Before anything else is sent: let followers see what they missed, and have the shared values written anew."""
        self._shares.copy_again()
        self._mark_holes()

    # work

    async def add(self, partition: int, request: str, payload: bytes, *, of: str = "") -> None:
        bucket = crc32(of.encode()) % BUCKETS
        volley = self._volleys.get((partition, bucket), 0)
        keys = self._keys
        try:
            added = await self._link.call(
                *(b"EVAL", ADD, 3, keys.work(partition), keys.full(partition), keys.share(partition)),
                *(self._settings.work_items, request, self._node, payload, volley, bucket, of),
            )
        except (OverloadedError, UnavailableError):
            self._refused += 1
            raise
        if added is None:
            self._refused += 1
            self._volleys[partition, bucket] = max(volley + 1, self._volleys.get((partition, bucket), 0))
            raise OverloadedError(FULL, retry_after=FULL_RETRY_AFTER)

    async def depth(self, partition: int) -> int:
        return int(await self._link.call(b"XLEN", self._keys.work(partition)))

    @contextlib.asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        if self._working:
            raise RuntimeError("one worker at a time per node")
        worker = RedisWorker(
            self._contact,
            self._link,
            self._keys,
            self._node,
            batch=self._settings.work_batch,
            claim_after=self._settings.claim_after,
            count=self._count_received,
        )
        self._working = True
        try:
            async with self._reading(worker):
                yield worker
        finally:
            self._working = False

    # topics

    def publish(self, topic: str, payload: bytes) -> None:
        if topic in self._holes:
            self._mark_holes()
        if len(payload) > self._settings.message_bytes:
            self._drop(topic)
            self._mark_holes()
            return
        try:
            self._link.post(
                *(b"EVAL", PUBLISH, 2, self._keys.topic(topic), self._keys.number(topic)),
                *(self._settings.topic_items, self._settings.topic_bytes, expiry_of(topic), payload),
                failed=partial(self._drop, topic),
            )
        except (UnavailableError, OverloadedError):
            self._drop(topic)

    def _drop(self, topic: str) -> None:
        self._dropped += 1
        self._holes.add(topic)
        self._hole_made.set()

    async def _tell_of_holes(self) -> None:
        """Marks the holes that no contact made and no further message of the topic mark: of a full outbox."""
        while True:
            await self._hole_made.wait()
            self._hole_made = anyio.Event()
            while self._holes:
                await anyio.sleep(HOLES_AFTER)
                self._mark_holes()

    def _mark_holes(self) -> None:
        while self._holes:
            topic = self._holes.pop()
            try:
                self._link.post(
                    b"EVAL", HOLE, 1, self._keys.number(topic), expiry_of(topic), failed=partial(self._holes.add, topic)
                )
            except (UnavailableError, OverloadedError):
                self._holes.add(topic)
                return

    @contextlib.asynccontextmanager
    async def follow(self, *topics: str) -> AsyncIterator[Follower]:
        follower = RedisFollower(self._contact, self._keys, topics, count=self._count_heard)
        async with self._reading(follower):
            with anyio.move_on_after(self._settings.timeout):
                await follower.placed.wait()
            if not follower.placed.is_set():
                follower.lose()
            yield follower

    def _count_heard(self, messages: int, lost: int) -> None:
        self._received += messages - lost
        self._lost += lost

    def _count_received(self, pieces: int) -> None:
        self._received += pieces

    @contextlib.asynccontextmanager
    async def _reading(self, reader: Reader) -> AsyncIterator[None]:
        """``reader`` runs in this bus's task group for as long as the block lasts and the bus serves."""
        self._readers.add(reader)
        if self._group is not None:
            self._group.start_soon(self._read, reader, name="bus:read")
        try:
            yield
        finally:
            self._readers.discard(reader)
            reader.scope.cancel()

    async def _read(self, reader: Reader) -> None:
        if reader not in self._readers:
            return
        reader.scope = anyio.CancelScope()
        with reader.scope:
            await reader.run()

    # questions

    async def ask(self, node: str, what: str, payload: bytes, *, within: float) -> bytes:
        if not self._link.connected:
            raise UnavailableError("the bus has no contact with Redis", retry_after=1.0)
        return await self._questions.ask(node, what, payload, within=within)

    def answer_with(self, what: str, answerer: Answerer) -> None:
        self._questions.answer_with(what, answerer)

    # shared values

    def share(self, space: str, key: str, value: bytes | None) -> None:
        self._shares.share(space, key, value)

    async def gather(self, space: str, key: str) -> dict[str, bytes]:
        return await self._shares.gather(space, key)
