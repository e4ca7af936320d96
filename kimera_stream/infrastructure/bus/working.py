"""Consuming work from Redis: a consumer group per partition, and this node as the one consumer of those it owns."""

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import anyio
import structlog
from coredis.exceptions import StreamConsumerGroupError, StreamDuplicateConsumerGroupError

from kimera_stream.infrastructure.bus.interface import Work
from kimera_stream.infrastructure.bus.link import AWAY, TROUBLE, Argument, Connection, Contact, Link, Waits
from kimera_stream.infrastructure.bus.scripts import DONE, GROUP, TIDY, Keys
from kimera_stream.protocol.errors import OverloadedError, UnavailableError

log = structlog.get_logger(__name__)

BLOCK = 0.5
"""Seconds that one read waits in Redis for something to come."""
TIDY_AFTER = 60.0
"""Seconds after which a consumer that does nothing and holds nothing is forgotten."""
DONE_IDS = 500
"""Ids acknowledged by one operation."""


@dataclass(slots=True, eq=False)
class Hold:
    """One taking of a partition; taken again it is another.

    Attributes:
        cursor: Where to go on claiming what others left; None when that is through.
        look_at: Clock time of the next look for what another consumer keeps.
    """

    look_at: float
    cursor: str | None = "0-0"


class RedisWorker:
    """Consumes the work of some partitions. ``run`` reads; see ``Worker``.

    Args:
        contact: How to reach Redis.
        link: Sends acknowledgements, and ends a waiting read early.
        keys: Names of keys.
        node: The consumer's name.
        batch: Pieces read at once, and handed out at once.
        claim_after: Seconds after which what another consumer keeps is claimed.
        count: Told of pieces received.
    """

    def __init__(
        self,
        contact: Contact,
        link: Link,
        keys: Keys,
        node: str,
        *,
        batch: int,
        claim_after: float,
        count: Callable[[int], None],
    ) -> None:
        self._contact = contact
        self._link = link
        self._keys = keys
        self._node = node
        self._batch = batch
        self._claim_after = claim_after
        self._count = count
        self._holds: dict[int, Hold] = {}
        self._under_way: set[tuple[int, str]] = set()
        self._owed: dict[int, list[tuple[str, str]]] = {}
        """Done while the link had no contact: not acknowledged yet. Ids, and whose they are."""
        self._ready: deque[Work] = deque()
        self._reading: frozenset[int] = frozenset()
        self._client_id: int | None = None
        self._came = anyio.Event()
        self._taken = anyio.Event()
        self._changed = anyio.Event()
        self._read_ended = anyio.Event()
        self.scope = anyio.CancelScope()
        self.finished = anyio.Event()

    @property
    def partitions(self) -> frozenset[int]:
        return frozenset(self._holds)

    def take(self, partition: int) -> None:
        if partition not in self._holds:
            self._holds[partition] = Hold(anyio.current_time() + self._claim_after)
            self._wake()

    async def give(self, partition: int) -> None:
        self._holds.pop(partition, None)
        # Whoever takes it next, this worker included, is handed all that is not done.
        self._ready = deque(work for work in self._ready if work.partition != partition)
        self._under_way = {key for key in self._under_way if key[0] != partition}
        self._taken.set()
        self._wake()
        with anyio.move_on_after(self._contact.timeout):
            while partition in self._reading and partition not in self._holds:
                self._read_ended = anyio.Event()
                await self._read_ended.wait()

    async def receive(self) -> list[Work]:
        while not self._ready:
            self._came = anyio.Event()
            await self._came.wait()
        works = [self._ready.popleft() for _ in range(min(self._batch, len(self._ready)))]
        self._taken.set()
        self._count(len(works))
        return works

    def release(self, work: Sequence[Work]) -> None:
        self._under_way.difference_update((piece.partition, piece.id) for piece in work)

    async def done(self, work: Sequence[Work]) -> None:
        by_partition: dict[int, list[tuple[str, str]]] = {}
        for piece in work:
            by_partition.setdefault(piece.partition, []).append((piece.id, piece.of))
        try:
            for partition, ids in by_partition.items():
                for begin in range(0, len(ids), DONE_IDS):
                    some = ids[begin : begin + DONE_IDS]
                    try:
                        command, arguments = self._done(partition, some)
                        await self._link.call(command, *arguments)
                    except (UnavailableError, OverloadedError):
                        self._owed.setdefault(partition, []).extend(some)
        finally:
            self.release(work)
            if self._owed:
                self._wake()

    def _done(self, partition: int, ids: Sequence[tuple[str, str]]) -> tuple[bytes, list[Argument]]:
        """The operation that lets work go, and what it is given."""
        keys = self._keys
        return b"EVAL", [DONE, 2, keys.work(partition), keys.share(partition), *chain.from_iterable(ids)]

    async def run(self) -> None:
        """Read until cancelled, through losses of contact."""
        waits = Waits()
        while True:
            try:
                async with self._contact.open() as connection:
                    self._client_id = connection.client_id
                    waits.succeeded()
                    while True:
                        await self._step(connection)
            except TROUBLE as error:
                log.debug("reading work from Redis broke off", error=str(error) or type(error).__name__)
            finally:
                self._client_id = None
                self._end_read()
            await waits.pause()

    async def _step(self, connection: Connection) -> None:
        self._changed = anyio.Event()
        if self._owed:  # before anything is claimed: it would be handed out again
            await self._acknowledge_owed(connection)
        elif len(self._ready) >= self._batch:
            self._taken = anyio.Event()
            await self._taken.wait()
        elif not self._holds:
            await self._changed.wait()
        else:
            try:
                await self._claim_or_read(connection)
            except StreamConsumerGroupError:
                await self._make_groups(connection)
            finally:
                self._end_read()

    async def _acknowledge_owed(self, connection: Connection) -> None:
        while self._owed:
            partition, ids = self._owed.popitem()
            for begin in range(0, len(ids), DONE_IDS):
                try:
                    command, arguments = self._done(partition, ids[begin : begin + DONE_IDS])
                    await self._ask(connection, command, *arguments)
                except AWAY:
                    self._owed.setdefault(partition, []).extend(ids[begin:])
                    raise

    async def _claim_or_read(self, connection: Connection) -> None:
        """One operation: what former owners left comes before anything new of the same partition."""
        now = anyio.current_time()
        for partition, hold in self._holds.items():
            if hold.cursor is not None:
                self._reading = frozenset((partition,))
                hold.cursor = await self._claim(connection, partition, hold, hold.cursor, idle=0.0)
                if hold.cursor is None:
                    await self._ask(
                        connection, b"EVAL", TIDY, 1, self._keys.work(partition), self._node, int(TIDY_AFTER * 1000)
                    )
                return
            if now >= hold.look_at:
                self._reading = frozenset((partition,))
                await self._claim(connection, partition, hold, "0-0", idle=self._claim_after)
                hold.look_at = now + self._claim_after / 2
                return
        self._reading = frozenset(self._holds)
        await self._read(connection, dict(sorted(self._holds.items())))

    async def _read(self, connection: Connection, holds: Mapping[int, Hold]) -> None:
        streams = [self._keys.work(partition) for partition in holds]
        count = max(1, self._batch // len(holds))
        block = max(1, int(BLOCK * 1000))
        answer = await self._ask(
            connection,
            b"XREADGROUP",
            *(b"GROUP", GROUP, self._node, b"COUNT", count, b"BLOCK", block, b"STREAMS"),
            *streams,
            *([b">"] * len(streams)),
        )
        if not answer:
            return
        assert isinstance(answer, Mapping)
        partition_of = {stream.encode(): partition for stream, partition in zip(streams, holds, strict=True)}
        for stream, entries in answer.items():
            partition = partition_of[bytes(stream)]
            self._hand_out(partition, holds[partition], entries, again=False)

    async def _claim(
        self, connection: Connection, partition: int, hold: Hold, cursor: str, *, idle: float
    ) -> str | None:
        """Take over what is unacknowledged. Where to go on, None at the end."""
        following, entries, *_ = await self._ask(
            connection,
            b"XAUTOCLAIM",
            *(self._keys.work(partition), GROUP, self._node, int(idle * 1000), cursor, b"COUNT", self._batch),
        )
        self._hand_out(partition, hold, entries, again=True)
        return None if following == b"0-0" else following.decode()

    def _hand_out(self, partition: int, hold: Hold, entries: Sequence[Any], *, again: bool) -> None:
        if self._holds.get(partition) is not hold:
            return  # given back meanwhile: whoever takes it next, this worker included, claims it first
        for entry_id, fields in entries:
            key = (partition, entry_id.decode())
            if fields is None or key in self._under_way:
                continue
            self._under_way.add(key)
            request, reply_to, payload = fields[1].decode(), fields[3].decode(), bytes(fields[5])
            # An edge of an older version does not say whose it is.
            of = fields[7].decode() if len(fields) > 7 else ""
            self._ready.append(Work(partition, key[1], request, reply_to, payload, of, again))
        if self._ready:
            self._came.set()

    async def _make_groups(self, connection: Connection) -> None:
        """Make the groups that are not there: a new partition, or Redis lost its data. From the beginning, so that nothing added meanwhile is missed."""
        for partition in sorted(self._holds):
            with contextlib.suppress(StreamDuplicateConsumerGroupError):  # this one is there
                await self._ask(connection, b"XGROUP", b"CREATE", self._keys.work(partition), GROUP, b"0", b"MKSTREAM")

    async def _ask(self, connection: Connection, command: bytes, *arguments: Argument) -> Any:
        with anyio.fail_after(self._contact.timeout + BLOCK):
            return await connection.create_request(command, *arguments)

    def _end_read(self) -> None:
        self._reading = frozenset()
        self._read_ended.set()

    def _wake(self) -> None:
        """Have the reader look again at what is taken."""
        self._changed.set()
        if self._reading and self._client_id is not None:
            with contextlib.suppress(UnavailableError, OverloadedError):  # else the read ends by itself after BLOCK
                self._link.post(b"CLIENT UNBLOCK", self._client_id)
