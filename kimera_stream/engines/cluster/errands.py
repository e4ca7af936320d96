"""What an edge has given to the engines, and who waits for what became of it.

    send ──add──> partition of the lane ──> an engine ──reply──> heard ──> the caller
              ^── again, with the same request id, where the bus may have lost the work or the reply

The bus may lose anything. A request that is carried out twice is committed once (the engines record its id with its result), so
adding it again is always right, and an answer always comes while any engine works.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

import anyio
import structlog

from kimera_stream.core.slices import lane_slice
from kimera_stream.engines.cluster.patience import Patience
from kimera_stream.engines.cluster.wire import Answer, Refused, Request, encode
from kimera_stream.infrastructure.bus.interface import Bus
from kimera_stream.infrastructure.settings import BusSettings
from kimera_stream.protocol.errors import OperationalError, OverloadedError, UnavailableError

log = structlog.get_logger(__name__)

LOOK_EVERY = 0.25
"""Seconds between looks for requests that have waited too long."""


@dataclass(slots=True, eq=False)
class Errand:
    """One request under way, ``since`` when. ``added_at``: when it was last given to the bus; 0: it has to be. Monotonic seconds."""

    request: str
    partition: int
    payload: bytes
    since: float
    added_at: float = 0.0
    done: anyio.Event = field(default_factory=anyio.Event)
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class ErrandNumbers:
    """``waiting`` at present, ``added_again`` in all."""

    waiting: int
    waiting_bytes: int
    added_again: int


class Errands:
    """Requests under way, in the order in which they came. Belongs to the event loop's thread.

    Args:
        bus: This node's end.
        max_items, max_bytes: Requests under way at once.
        at_most: Seconds after which no request is waited for any more.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        bus: Bus,
        settings: BusSettings,
        *,
        max_items: int,
        max_bytes: int,
        at_most: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._settings = settings
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._clock = clock
        self._waiting: dict[str, Errand] = {}
        self._held: dict[int, set[str]] = {}
        """By partition, the requests that have not reached the bus."""
        self._patience = Patience(settings.answer_within, at_most, clock)
        self._moved_at: dict[int, float] = {}
        """By partition, when the last answer came."""
        self._bytes = 0
        self._added_again = 0
        self._lost = anyio.Event()
        self._idle = anyio.Event()
        self._idle.set()
        self._closed = False

    @property
    def numbers(self) -> ErrandNumbers:
        return ErrandNumbers(len(self._waiting), self._bytes, self._added_again)

    async def send(self, lane: tuple[str, str], request: Request) -> Answer:
        """Have it carried out after everything of the same lane that was sent before; its answer. Waits as long as the engine
        gets on with the partition.

        Raises:
            TimeoutError: it does not.
            OverloadedError: too much is under way, here or in the partition.
            UnavailableError: the node is stopping.
            OperationalError: the engine refused it.
        """
        payload = encode(request)
        self._admit(len(payload))
        errand = Errand(uuid4().hex, lane_slice(*lane, self._settings.slices), payload, self._clock())
        self._waiting[errand.request] = errand
        self._bytes += len(payload)
        if self._idle.is_set():
            self._idle = anyio.Event()
        try:
            if self._held.get(errand.partition):
                self._hold(errand)  # behind what has not reached the bus: a lane keeps its order
            else:
                await self._add(errand)
            await self._patience.wait(
                errand.done, lambda: self._moved_at.get(errand.partition, 0.0), since=errand.since
            )
        finally:
            del self._waiting[errand.request]
            self._unhold(errand)
            self._bytes -= len(payload)
            if not self._waiting:
                self._idle.set()
        assert errand.answer is not None
        if isinstance(errand.answer, Refused):
            raise errand.answer.error()
        return errand.answer

    def _admit(self, size: int) -> None:
        if self._closed:
            raise UnavailableError("the server is stopping", retry_after=1.0)
        if len(self._waiting) >= self._max_items or (self._waiting and self._bytes + size > self._max_bytes):
            raise OverloadedError(
                f"{len(self._waiting)} statements ({self._bytes} bytes) are waiting already; try again later",
                retry_after=1.0,
            )

    async def _add(self, errand: Errand) -> None:
        """Give it to the bus; where there is no contact it stays due, and ``run`` tries again."""
        errand.added_at = self._clock()
        try:
            await self._bus.add(errand.partition, errand.request, errand.payload)
        except UnavailableError as error:
            if not self._held:
                log.warning("work waits for the bus", reason=error.message)
            self._hold(errand)
        else:
            self._unhold(errand)

    def _hold(self, errand: Errand) -> None:
        errand.added_at = 0.0
        self._held.setdefault(errand.partition, set()).add(errand.request)

    def _unhold(self, errand: Errand) -> None:
        held = self._held.get(errand.partition)
        if held is not None:
            held.discard(errand.request)
            if not held:
                del self._held[errand.partition]

    def heard(self, answers: list[Answer]) -> None:
        """What engines say has become of requests; those of callers who have gone are passed over."""
        for answer in answers:
            errand = self._waiting.get(answer.request)
            if errand is not None and errand.answer is None:
                errand.answer = answer
                errand.done.set()
                self._moved_at[errand.partition] = self._clock()

    def lost(self) -> None:
        """Work or replies may be gone from the bus: everything is added again."""
        self._lost.set()

    async def run(self) -> None:
        """Add again what may have been lost, until cancelled."""
        while True:
            with anyio.move_on_after(min(LOOK_EVERY, self._settings.retry_after)):
                await self._lost.wait()
            if self._lost.is_set():
                self._lost = anyio.Event()
                due = list(self._waiting.values())
            else:
                due = await self._overdue()
            for errand in due:
                if errand.done.is_set():
                    continue
                if errand.added_at:
                    self._added_again += 1
                try:
                    await self._add(errand)
                except OverloadedError as error:
                    log.info("work is added again later", partition=errand.partition, error=error.message)
                    break
                if not errand.added_at:
                    break  # no contact: the rest waits as well, in its order

    async def _overdue(self) -> list[Errand]:
        """What never reached the bus, and what has waited long for an engine though its partition is empty."""
        before = self._clock() - self._settings.retry_after
        late = [errand for errand in self._waiting.values() if errand.added_at < before]
        empty: dict[int, bool] = {}
        for errand in late:
            if errand.added_at and errand.partition not in empty:
                try:
                    empty[errand.partition] = await self._bus.depth(errand.partition) == 0
                except OperationalError:
                    empty[errand.partition] = False
        return [errand for errand in late if not errand.added_at or empty[errand.partition]]

    def close(self) -> None:
        """Take nothing more."""
        self._closed = True

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        await self._idle.wait()
