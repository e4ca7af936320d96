"""Intake: what was accepted and waits for its turn, bounded in items and bytes.

A lane is one session of one principal; what it holds leaves in the order in which it came. Between lanes the most urgent
head goes first (priority 9 before 0, 5 by default), equal ones take turns by principal, then by session. One pick in
``PATIENCE`` goes to the least urgent instead, so that a flood of urgent work delays the rest but never stops it.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio

from kimera_stream.protocol.errors import OperationalError, OverloadedError, UnavailableError

T = TypeVar("T")
PRIORITIES = 10
PATIENCE = 8
RETRY_AFTER = 1.0
"""Seconds after which a refused caller may find room."""


class Ticket(Generic[T]):
    """One accepted piece of work. The pipeline owns it; its caller only waits for the answer.

    Attributes:
        cost: Bytes counted against the intake's bound.
        admitted_at: Monotonic seconds, for the latency.
        work: What is to be done; set by who admits it.
    """

    __slots__ = ("_done", "_error", "_result", "admitted_at", "cost", "lane", "priority", "work")

    def __init__(self, lane: tuple[str, str], *, priority: int, cost: int, admitted_at: float) -> None:
        self.lane = lane
        self.priority = priority
        self.cost = cost
        self.admitted_at = admitted_at
        self.work: Any = None
        self._done = anyio.Event()
        self._result: T | None = None
        self._error: OperationalError | None = None

    @property
    def finished(self) -> bool:
        return self._done.is_set()

    @property
    def result(self) -> T | None:
        """What it was answered with; None before, and where it was refused."""
        return self._result

    @property
    def error(self) -> OperationalError | None:
        """Why it was refused; None before, and where it was done."""
        return self._error

    def answer(self, result: T) -> None:
        """The work is done; the first answer counts."""
        if not self._done.is_set():
            self._result = result
            self._done.set()

    def refuse(self, error: OperationalError) -> None:
        """The work was not done, and why; the first answer counts."""
        if not self._done.is_set():
            self._error = error
            self._done.set()

    async def outcome(self) -> T:
        """Wait for the answer. May be awaited by several; cancelling a waiter leaves the work alone.

        Raises:
            OperationalError: the work was refused.
        """
        await self._done.wait()
        if self._error is not None:
            # A fresh object per waiter: a traceback grows on what is raised.
            error = type(self._error)(self._error.message, field=self._error.field, retry_after=self._error.retry_after)
            raise error from self._error
        return self._result  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class IntakeStatistics:
    items: int
    bytes: int
    lanes: int


class Intake:
    """The bounded queue of tickets, with lanes.

    Args:
        max_items: Tickets accepted and not yet finished.
        max_bytes: Their bytes.
    """

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._items = 0
        self._bytes = 0
        self._waiting = 0
        self._lanes: dict[tuple[str, str], deque[Ticket[Any]]] = {}
        self._turns: list[OrderedDict[str, deque[tuple[str, str]]]] = [OrderedDict() for _ in range(PRIORITIES)]
        self._picks = 0
        self._arrived = anyio.Event()
        self._idle = anyio.Event()
        self._idle.set()
        self._closed = False

    @property
    def statistics(self) -> IntakeStatistics:
        return IntakeStatistics(self._items, self._bytes, len(self._lanes))

    def admit(self, ticket: Ticket[Any]) -> None:
        """Accept a ticket.

        Raises:
            OverloadedError: no room.
            UnavailableError: the server is stopping.
        """
        if self._closed:
            raise UnavailableError("the server is stopping", retry_after=RETRY_AFTER)
        if self._items >= self._max_items or (self._items and self._bytes + ticket.cost > self._max_bytes):
            raise OverloadedError(
                f"{self._items} statements ({self._bytes} bytes) are waiting already; try again later",
                retry_after=RETRY_AFTER,
            )
        self._items += 1
        self._bytes += ticket.cost
        self._waiting += 1
        if self._idle.is_set():
            self._idle = anyio.Event()
        lane = self._lanes.get(ticket.lane)
        if lane is None:
            self._lanes[ticket.lane] = deque([ticket])
            self._queue_up(ticket.lane, ticket.priority)
        else:
            lane.append(ticket)
        self._arrived.set()

    def finished(self, ticket: Ticket[Any]) -> None:
        """A ticket that was taken has been answered: its place is free."""
        self._items -= 1
        self._bytes -= ticket.cost
        if not self._items:
            self._idle.set()

    async def take(self, limit: int, *, heavy_limit: int, heavy: Callable[[Ticket[Any]], bool]) -> list[Ticket[Any]]:
        """Wait for work and take what is there: at most ``limit`` tickets, of them at most ``heavy_limit`` heavy ones."""
        while not self._waiting:
            self._arrived = anyio.Event()
            await self._arrived.wait()
        taken: list[Ticket[Any]] = []
        weight = 0
        while len(taken) < limit and self._waiting:
            lane = self._next_lane()
            ticket = self._lanes[lane][0]
            if heavy(ticket):
                if weight == heavy_limit:
                    self._queue_up(lane, ticket.priority, first=True)
                    break
                weight += 1
            self._pop(lane)
            taken.append(ticket)
        return taken

    def close(self) -> None:
        """Accept nothing more; what was accepted is still handed out."""
        self._closed = True

    async def idle(self) -> None:
        """Wait until everything accepted has been answered."""
        await self._idle.wait()

    def withdraw(self, lanes: Iterable[tuple[str, str]] | None = None) -> list[Ticket[Any]]:
        """Everything that still waits, lane by lane, or what waits in some lanes; it is not handed out any more. Tell ``finished``
        of each."""
        waiting: list[Ticket[Any]] = []
        for lane in list(self._lanes) if lanes is None else self._lanes.keys() & set(lanes):
            tickets = self._lanes.pop(lane)
            turns = self._turns[tickets[0].priority]
            turns[lane[0]].remove(lane)
            if not turns[lane[0]]:
                del turns[lane[0]]
            waiting += tickets
        self._waiting -= len(waiting)
        return waiting

    def abandon(self, error: OperationalError) -> int:
        """Refuse everything that still waits; returns how many."""
        waiting = self.withdraw()
        for ticket in waiting:
            ticket.refuse(error)
            self.finished(ticket)
        return len(waiting)

    def _queue_up(self, lane: tuple[str, str], priority: int, *, first: bool = False) -> None:
        turns = self._turns[priority]
        mine = turns.setdefault(lane[0], deque())
        if first:
            mine.appendleft(lane)
            turns.move_to_end(lane[0], last=False)
        else:
            mine.append(lane)

    def _next_lane(self) -> tuple[str, str]:
        self._picks += 1
        order = range(PRIORITIES) if self._picks % PATIENCE == 0 else range(PRIORITIES - 1, -1, -1)
        for priority in order:
            turns = self._turns[priority]
            if turns:
                principal, lanes = next(iter(turns.items()))
                lane = lanes.popleft()
                if lanes:
                    turns.move_to_end(principal)
                else:
                    del turns[principal]
                return lane
        raise AssertionError("work is waiting but no lane has a turn")

    def _pop(self, lane: tuple[str, str]) -> None:
        waiting = self._lanes[lane]
        waiting.popleft()
        self._waiting -= 1
        if waiting:
            self._queue_up(lane, waiting[0].priority)
        else:
            del self._lanes[lane]
