"""What nodes may ask of the bus.

Four kinds of traffic, each with its own promise:

* **Work** (``add``, ``worker``): one stream per partition, at least once, in the order of ``add``, kept until acknowledged. Bounded by refusal.
* **Topics** (``publish``, ``follow``): every follower hears every message from the moment it follows. Bounded by forgetting the oldest.
  Messages may be lost (trimmed, flushed, Redis away); a follower is always *told* that some may be missing (``Lost``) and then
  reads the truth from the database.
* **Questions** (``ask``, ``answer_with``): one answer from one named node within a deadline, or an error.
* **Shared values** (``share``, ``gather``): small facts of live nodes that vanish with them.

Payloads are bytes; their encoding is the caller's. Every coroutine ends within ``bus.timeout`` seconds (or the deadline it is given) whatever
Redis does, except ``Worker.receive`` and ``Follower.receive``, which wait for something to come and survive a loss of Redis.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from kimera_stream.infrastructure.tasks.service import Service

BusState = Literal["connecting", "connected", "away"]

LOG = "log"
"""Topic: entries just committed, as encoded by whoever announces them."""
PROGRESS = "progress"
"""Topic: how far slices are scored."""
NUDGE = "nudge"
"""Topic: something in the database changed and should be re-read (watches, keys, coverage)."""
FIELD = "field"
"""Topic: values of the field, by the leader."""

FULL = "as many statements wait in this slice already as may, in all or of one principal; try again shortly"
"""Why work is refused."""


def replies(node: str) -> str:
    """Topic with what ``node`` is waiting for; its stream expires when nobody writes to it for a while."""
    return f"reply:{node}"


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work handed to the owner of its partition.

    Attributes:
        partition: Where it was added.
        id: Position in the partition; grows with it. Names this delivery for ``Worker.done`` and nothing else: after Redis lost its data, or
            when the sender adds the work again, the same request comes with another id.
        request: What the sender calls it; the same for each time it is added. De-duplicate by this.
        reply_to: Node that waits for the result.
        payload: As added.
        of: Principal whose share of the partition it takes; empty: nobody's.
        again: Handed out before (to this worker or a former owner), so it may already be done.
    """

    partition: int
    id: str
    request: str
    reply_to: str
    payload: bytes
    of: str = ""
    again: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """Something said on a topic."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """Messages of ``topic`` may be missing before the next one: read the truth from the database."""

    topic: str


@dataclass(frozen=True, slots=True)
class BusNumbers:
    """For ``stats`` and metrics. Totals since the start.

    Attributes:
        state: ``connecting`` until the first contact, then ``connected`` or ``away``.
        outbox_items: Operations waiting to be sent.
        outbox_bytes: Their payload.
        sent: Operations that Redis confirmed.
        dropped: Messages to topics that were dropped because Redis was away or the outbox full (followers are told).
        refused: Work refused because its partition or the outbox was full, or Redis away.
        received: Messages and work received.
        lost: Times a follower was told that messages may be missing.
        reconnects: Times the contact was found again.
    """

    state: BusState
    outbox_items: int = 0
    outbox_bytes: int = 0
    sent: int = 0
    dropped: int = 0
    refused: int = 0
    received: int = 0
    lost: int = 0
    reconnects: int = 0


class Worker(Protocol):
    """Consumes the work of the partitions that this node owns. One task calls ``receive``; any may call the rest."""

    @property
    def partitions(self) -> frozenset[int]:
        """Those taken at present."""
        ...

    def take(self, partition: int) -> None:
        """Begin with a partition: first what former owners (or this node before a restart) left unacknowledged, in the order of ids, then what is new.

        Nothing when already taken. May be called while Redis is away.
        """
        ...

    async def give(self, partition: int) -> None:
        """Stop reading a partition; returns when nothing of it can be read here any more (at most ``bus.timeout`` seconds).

        What was handed out and is not done is for the next owner, which may be this worker again; ``done`` still works. Give before you let the next owner in: it
        then finds all that is left, in order. Otherwise it finds what was taken in between after ``bus.claim_after``.
        """
        ...

    async def receive(self) -> list[Work]:
        """The next work, one or more pieces, at most ``bus.work_batch``; per partition in the order of ids.

        Waits through losses of Redis. The caller bounds what it has under way by not calling. A piece that is under way in this worker (received,
        not ``done``) is not handed out twice. While the worker stands, what other consumers keep unacknowledged for longer than
        ``bus.claim_after`` (a former owner that woke up, took work and lost its lease) is claimed as well.
        """
        ...

    def release(self, work: Sequence[Work]) -> None:
        """Give up on pieces without doing them (temporary failure): they come again, soonest after ``bus.claim_after`` or to the next owner."""
        ...

    async def done(self, work: Sequence[Work]) -> None:
        """Acknowledge and delete: the result is durable (or a refusal was sent).

        Does not raise when Redis is away: it is acknowledged when Redis is back, unless Redis refuses that, or this worker ends or the next owner of the
        partition comes before. Such work comes again, ``again`` set.
        """
        ...


class Follower(Protocol):
    """Hears topics from the moment it was made. One task calls ``receive``."""

    async def receive(self) -> list[Message | Lost]:
        """What came, in order per topic; waits for at least one.

        A ``Lost`` stands where messages of a topic are or may be missing: trimmed before they were read, flushed, or never sent because the
        sender had no contact. It comes with the next message, or within about a second of Redis being in reach if nothing more is said.
        Without contact it waits.
        """
        ...


Answerer = Callable[[bytes], Awaitable[bytes]]


class Bus(Protocol):
    """One node's end of the bus."""

    @property
    def node(self) -> str:
        """This node's name: unique among live nodes."""
        ...

    @property
    def numbers(self) -> BusNumbers: ...

    @property
    def connected(self) -> bool:
        """Whether the last contact succeeded. A hint: the next operation may still fail."""
        ...

    async def serve(self, service: Service) -> None:
        """Keep the contact, send what is queued, hear answers, refresh shared values; until cancelled.

        Ready once there is contact, or after ``bus.timeout`` seconds without: a node starts without Redis. Operations outside a running
        ``serve`` raise ``UnavailableError``.
        """
        ...

    # work

    async def add(self, partition: int, request: str, payload: bytes, *, of: str = "") -> None:
        """Put work at the end of ``partition``; returns when Redis has it. Calls made in order arrive in order. ``reply_to`` is this node.

        Args:
            of: The principal whose it is, whatever node adds it. Of the ``bus.work_items`` of a partition one may hold as many as are still free: alone
                half of them, two such a third each, and others always find as much room as the greediest takes.

        Raises:
            OverloadedError: the partition holds ``bus.work_items`` already, or the principal its share (``retry_after`` set), or this node's outbox is
                full. Nothing was added, nor is anything of theirs that was given to the partition after it and before this was known.
            UnavailableError: no contact, or no confirmation within ``bus.timeout``. It may have been added.
        """
        ...

    async def depth(self, partition: int) -> int:
        """Pieces added and not yet done.

        Raises:
            UnavailableError: no contact.
        """
        ...

    def worker(self) -> AbstractAsyncContextManager[Worker]:
        """This node as a consumer of work; one at a time. Leaving it gives every partition back."""
        ...

    # topics

    def publish(self, topic: str, payload: bytes) -> None:
        """Say something to all followers. Never waits and never fails: what cannot be sent is dropped, and the followers learn ``Lost``.

        Sent in order, and after the ``add`` calls made before.
        """
        ...

    def follow(self, *topics: str) -> AbstractAsyncContextManager[Follower]:
        """Hear topics from now on. If there is no contact when it begins, ``Lost`` is the first word on each topic, and again when there is."""
        ...

    # questions

    async def ask(self, node: str, what: str, payload: bytes, *, within: float) -> bytes:
        """The answer of ``node`` (which may be this one).

        Args:
            what: Kind of question; the node answers with what it registered for it.
            within: Seconds.

        Raises:
            UnavailableError: no answer in time, no contact, or the node does not answer such questions.
            OverloadedError: the node has too many questions under way.
            OperationalError: the one that the answering side raised (same class, message, field and ``retry_after``).
        """
        ...

    def answer_with(self, what: str, answerer: Answerer) -> None:
        """From now on questions of kind ``what`` to this node are answered by ``answerer`` (concurrently, ``bus.questions`` at most).

        An ``OperationalError`` out of it is the answer; anything else is a defect: logged with its traceback, answered ``internal``.
        """
        ...

    # shared values

    def share(self, space: str, key: str, value: bytes | None) -> None:
        """Set (``None``: withdraw) this node's value; kept here, sent as soon as possible, again after a loss, and gone from the bus
        ``bus.presence_ttl`` seconds after this node is. The caller bounds how many it shares."""
        ...

    async def gather(self, space: str, key: str) -> dict[str, bytes]:
        """The values of all live nodes, by node. This node's own is always as it last said, without asking.

        Raises:
            OverloadedError: this node's outbox is full.
            UnavailableError: no contact (fall back to what this node knows).
        """
        ...
