"""What an edge has given to the engines, and who waits for what became of it.

    send ──add──> partition of the lane ──> an engine ──reply──> heard ──> the caller
              ^── again, with the same request id, where the bus may have lost the work or the reply

The bus may lose anything. A request that is carried out twice is committed once (the engines record its id with its result), so
adding it again is always right, and an answer always comes while any engine works.

A lane keeps its order whatever is lost: each request names the one before it that has no answer yet, an engine begins none whose
predecessor it has not begun (``Desk``), and what it sends back for that (``wire.Early``) is added again with its whole lane.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

import anyio
import msgspec
import structlog

from kimera_stream.core.slices import lane_slice
from kimera_stream.engines.cluster.patience import Patience
from kimera_stream.engines.cluster.wire import Answer, Early, Refused, Request, Result, encode
from kimera_stream.infrastructure.bus.interface import Bus
from kimera_stream.infrastructure.settings import BusSettings
from kimera_stream.protocol.errors import OperationalError, OverloadedError, UnavailableError

log = structlog.get_logger(__name__)

LOOK_EVERY = 0.25
"""Seconds between looks for requests that have waited too long."""
TOGETHER = 64
"""Requests added again without waiting for the bus to have each."""
AT_ONCE = 3
"""Times that an engine may send a request back and it is added again at once; then with the next look."""

Lane = tuple[str, str]


@dataclass(slots=True, eq=False)
class Errand:
    """One request under way.

    Attributes:
        since: When it came. Monotonic seconds, like the next.
        added_at: When it was last given to the bus; 0: it has to be.
        turn: Times that it had to be added again.
        before, behind: Its neighbours in the lane, as far as they have no answer.
    """

    request: str
    lane: Lane
    partition: int
    asked: Request
    since: float
    added_at: float = 0.0
    turn: int = 0
    before: "Errand | None" = None
    behind: "Errand | None" = None
    done: anyio.Event = field(default_factory=anyio.Event)
    answer: Result | None = None

    @property
    def payload(self) -> bytes:
        """As it goes to the bus now."""
        after = None if self.before is None else self.before.request
        return encode(msgspec.structs.replace(self.asked, after=after, turn=self.turn))


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
        """By partition, the requests that have not reached the bus, or have to be added again."""
        self._last: dict[Lane, Errand] = {}
        """By lane, the newest without an answer."""
        self._patience = Patience(settings.answer_within, at_most, clock)
        self._moved_at: dict[int, float] = {}
        """By partition, when the last answer came."""
        self._bytes = 0
        self._theirs: dict[str, tuple[int, int]] = {}
        """By principal, the items and bytes of what is under way."""
        self._added_again = 0
        self._due = anyio.Event()
        self._closed = False

    @property
    def numbers(self) -> ErrandNumbers:
        return ErrandNumbers(len(self._waiting), self._bytes, self._added_again)

    async def send(self, lane: Lane, request: Request) -> Result:
        """Have it carried out after everything of the same lane that was sent before; its answer. Waits as long as the engine
        gets on with the partition.

        Raises:
            TimeoutError: it does not.
            OverloadedError: too much is under way, here or in the partition.
            UnavailableError: the node is stopping.
            OperationalError: the engine refused it.
        """
        errand = Errand(
            uuid4().hex,
            lane,
            lane_slice(*lane, self._settings.slices),
            request,
            self._clock(),
            before=self._last.get(lane),
        )
        payload = errand.payload
        self._admit(lane[0], len(payload))
        self._waiting[errand.request] = errand
        self._line_up(errand)
        self._take_room(lane[0], 1, len(payload))
        try:
            if self._held.get(errand.partition):
                self._hold(errand)  # behind what has not reached the bus: a lane keeps its order
            else:
                await self._add(errand, payload)
            await self._patience.wait(
                errand.done, lambda: self._moved_at.get(errand.partition, 0.0), since=errand.since
            )
        finally:
            del self._waiting[errand.request]
            self._step_out(errand)
            self._unhold(errand)
            self._take_room(lane[0], -1, -len(payload))
        assert errand.answer is not None
        if isinstance(errand.answer, Refused):
            raise errand.answer.error()
        return errand.answer

    def _admit(self, principal: str, size: int) -> None:
        """A principal may hold as much as is free: whoever holds most leaves as much for others. The first of them fits where anything does."""
        if self._closed:
            raise UnavailableError("the server is stopping", retry_after=1.0)
        items, size_of_items = self._theirs.get(principal, (0, 0))
        if len(self._waiting) + items >= self._max_items or (
            self._waiting and self._bytes + size_of_items + size > self._max_bytes
        ):
            raise OverloadedError(
                f"{len(self._waiting)} statements ({self._bytes} bytes) are waiting already, {items} of them ({size_of_items} "
                "bytes) of this principal; try again later",
                retry_after=1.0,
            )

    def _take_room(self, principal: str, items: int, size: int) -> None:
        held, size_of_held = self._theirs.get(principal, (0, 0))
        self._bytes += size
        if held + items:
            self._theirs[principal] = held + items, size_of_held + size
        else:
            del self._theirs[principal]

    def _line_up(self, errand: Errand) -> None:
        """Behind what is under way in its lane."""
        if errand.before is not None:
            errand.before.behind = errand
        self._last[errand.lane] = errand

    def _step_out(self, errand: Errand) -> None:
        """It is not under way any more: what comes after it need not wait for it. Again is nothing."""
        if errand.before is not None:
            errand.before.behind = errand.behind
        if errand.behind is not None:
            errand.behind.before = errand.before
        elif self._last.get(errand.lane) is errand:
            if errand.before is None:
                del self._last[errand.lane]
            else:
                self._last[errand.lane] = errand.before
        errand.before = errand.behind = None

    async def _add(self, errand: Errand, payload: bytes) -> None:
        """Give it to the bus; where there is no contact it stays due, and ``run`` tries again."""
        errand.added_at, turn = self._clock(), errand.turn
        try:
            await self._bus.add(errand.partition, errand.request, payload, of=errand.lane[0])
        except UnavailableError as error:
            if not self._held:
                log.warning("work waits for the bus", reason=error.message)
            self._hold(errand)
        else:
            if errand.turn == turn:  # else it has to be added again already
                self._unhold(errand)

    def _hold(self, errand: Errand) -> None:
        """It has to be added, and what comes later to the partition waits for that."""
        if errand.added_at:
            errand.added_at = 0.0
            errand.turn += 1
        if errand.request in self._waiting:
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
            if errand is None or errand.answer is not None:
                continue
            if isinstance(answer, Early):
                if answer.turn == errand.turn:  # else it was held since
                    self._sent_back(errand)
                continue
            errand.answer = answer
            errand.done.set()
            self._step_out(errand)
            self._moved_at[errand.partition] = self._clock()

    def _sent_back(self, errand: Errand) -> None:
        """What it may not overtake is not where it was begun: the whole lane is added again."""
        each: Errand | None = errand
        while each is not None and each.before is not None:
            each = each.before
        while each is not None:
            self._hold(each)
            each = each.behind
        if errand.turn <= AT_ONCE:
            self._due.set()

    def lost(self) -> None:
        """Work or replies may be gone from the bus: everything is added again."""
        for errand in self._waiting.values():
            if not errand.done.is_set():
                self._hold(errand)
        self._due.set()

    async def run(self) -> None:
        """Add again what may have been lost, until cancelled."""
        while True:
            with anyio.move_on_after(min(LOOK_EVERY, self._settings.retry_after)):
                await self._due.wait()
            self._due = anyio.Event()
            for errand in await self._overdue():
                self._hold(errand)
            await self._add_held()

    async def _add_held(self) -> None:
        """Add what is held, in its order, as far as there is contact and room."""
        due = [errand for errand in self._waiting.values() if not errand.added_at]
        stuck: set[int] = set()
        """Partitions without room; all, where there is no contact."""
        for begin in range(0, len(due), TOGETHER):
            some = [
                errand
                for errand in due[begin : begin + TOGETHER]
                if errand.partition not in stuck and not errand.done.is_set()
            ]
            async with anyio.create_task_group() as group:
                for errand in some:
                    self._added_again += errand.turn > 0
                    group.start_soon(self._add_again, errand, name="errands:add")
            stuck |= {errand.partition for errand in some if not errand.added_at}

    async def _add_again(self, errand: Errand) -> None:
        try:
            await self._add(errand, errand.payload)
        except OverloadedError as error:
            log.info("work is added again later", partition=errand.partition, error=error.message)
            self._hold(errand)

    async def _overdue(self) -> list[Errand]:
        """What has waited long for an engine though its partition is empty."""
        before = self._clock() - self._settings.retry_after
        late = [errand for errand in self._waiting.values() if 0 < errand.added_at < before]
        empty: dict[int, bool] = {}
        for errand in late:
            if errand.partition not in empty:
                try:
                    empty[errand.partition] = await self._bus.depth(errand.partition) == 0
                except OperationalError:
                    empty[errand.partition] = False
        return [errand for errand in late if empty[errand.partition] and not errand.done.is_set()]

    def close(self) -> None:
        """Take nothing more."""
        self._closed = True
