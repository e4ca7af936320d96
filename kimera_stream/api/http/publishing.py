"""Many statements of one request: admitted in order, at work together so that they batch, answered in order."""

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Final, Self

import anyio
import anyio.abc
import msgspec
from msgspec import Meta

from kimera_stream.api.http.content import decode
from kimera_stream.api.problems import Problem, problem_of
from kimera_stream.core.access import Principal
from kimera_stream.core.interfaces import KnowledgeService, PublishResult
from kimera_stream.protocol.errors import BadRequestError, OperationalError, OverloadedError, RateLimitedError
from kimera_stream.protocol.messages import Encoding
from kimera_stream.protocol.objects import Contradiction, Geoid, GeoidBody

IN_FLIGHT: Final = 256
"""Statements of one request that are published and not yet answered at most."""
OVERLOAD_PATIENCE: Final = 30.0
"""Seconds that a statement waits for an overloaded server before its error is the answer."""
_OVERLOAD_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0

IdempotencyKey = Annotated[str, Meta(min_length=1, max_length=255)]
Priority = Annotated[int, Meta(ge=0, le=9)]


class PublishItem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A statement with what goes with it, where it is one of several: as the WebSocket's ``publish``."""

    geoid: GeoidBody
    key: IdempotencyKey | None = None
    priority: Priority | None = None


class _Peek(msgspec.Struct):
    geoid: msgspec.Raw = msgspec.Raw()


class PublishedAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a publish led to. ``line`` only in NDJSON answers."""

    geoid: Geoid
    offset: int
    contradictions: list[Contradiction]
    duplicate: bool
    line: int | None = None


class LineProblem(Problem, frozen=True, kw_only=True, omit_defaults=True):
    """The error of one statement of several. ``line`` only in NDJSON answers."""

    line: int | None = None


def parse_item(data: bytes, encoding: Encoding, where: str) -> PublishItem:
    """One statement of several: a geoid body, or ``{"geoid": body, "key"?, "priority"?}``.

    Raises:
        BadRequestError: names the field and what was expected.
    """
    try:
        return PublishItem(geoid=decode(data, GeoidBody, encoding, where=where))
    except BadRequestError:
        try:
            peek = decode(data, _Peek, encoding)
        except BadRequestError:
            peek = _Peek()
        if not memoryview(peek.geoid).nbytes:
            raise
    return decode(data, PublishItem, encoding, where=where)


def published_answer(result: PublishResult, *, line: int | None = None) -> PublishedAnswer:
    """The answer that tells of a publish."""
    return PublishedAnswer(
        geoid=result.geoid,
        offset=result.offset,
        contradictions=result.contradictions,
        duplicate=result.duplicate,
        line=line,
    )


def line_problem(error: OperationalError, *, line: int | None = None) -> LineProblem:
    """The answer that tells of an error."""
    told = problem_of(error)
    return LineProblem(**{name: getattr(told, name) for name in Problem.__struct_fields__}, line=line)


@dataclass(eq=False, slots=True)
class _Slot:
    done: anyio.Event
    answer: PublishedAnswer | LineProblem | None = None


Emit = Callable[[PublishedAnswer | LineProblem], Awaitable[None]]


class OrderedPublisher:
    """Publishes statements as they are submitted and hands the answers on in the order of submission.

    ``submit`` waits while ``in_flight`` statements are unanswered, and while the server is overloaded: that is the back-pressure
    on whoever sends them. Leaving the block waits for every answer; leaving it by cancellation tears nothing, since what the
    service has admitted it finishes or refuses as a whole.

    Args:
        emit: Takes the answers, one at a time.
        in_flight: Statements under way at most.
    """

    def __init__(
        self, knowledge: KnowledgeService, principal: Principal, emit: Emit, *, in_flight: int = IN_FLIGHT
    ) -> None:
        self._knowledge = knowledge
        self._principal = principal
        self._emit = emit
        self._limit = in_flight
        self._slots: deque[_Slot] = deque()
        self._group: anyio.abc.TaskGroup | None = None
        self._room = anyio.Event()
        self._news = anyio.Event()
        self._all_submitted = False
        self._held_up = 0
        self._flowing = anyio.Event()

    async def __aenter__(self) -> Self:
        self._group = await anyio.create_task_group().__aenter__()
        self._group.start_soon(self._answer_in_order, name="publish:answers")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._group is not None
        self._all_submitted = True
        self._news.set()
        return await self._group.__aexit__(kind, error, traceback)

    @property
    def under_way(self) -> int:
        return len(self._slots)

    async def submit(self, item: PublishItem, *, line: int | None = None) -> None:
        """Publish one statement; returns when it is under way."""
        assert self._group is not None
        slot = await self._next_slot()
        self._group.start_soon(self._publish, slot, item, line, name="publish:statement")
        await anyio.lowlevel.checkpoint()  # admission in order: the statement reaches the service before the next one

    async def refuse(self, error: OperationalError, *, line: int | None = None) -> None:
        """Answer in the place of a statement that cannot be published."""
        slot = await self._next_slot()
        slot.answer = line_problem(error, line=line)
        slot.done.set()

    async def _next_slot(self) -> _Slot:
        while self._held_up:
            self._flowing = anyio.Event()
            await self._flowing.wait()
        while len(self._slots) >= self._limit:
            self._room = anyio.Event()
            await self._room.wait()
        slot = _Slot(anyio.Event())
        self._slots.append(slot)
        self._news.set()
        return slot

    async def _publish(self, slot: _Slot, item: PublishItem, line: int | None) -> None:
        try:
            slot.answer = published_answer(await self._admitted(item), line=line)
        except OperationalError as error:
            slot.answer = line_problem(error, line=line)
        slot.done.set()

    async def _admitted(self, item: PublishItem) -> PublishResult:
        """Publish, and where the server has too much work hold up the statements behind this one until it has not."""
        give_up = anyio.current_time() + OVERLOAD_PATIENCE
        held_up = False
        try:
            while True:
                try:
                    return await self._knowledge.publish(
                        item.geoid,
                        principal=self._principal,
                        key=item.key,
                        priority=5 if item.priority is None else item.priority,
                    )
                except (OverloadedError, RateLimitedError) as error:
                    pause = min(max(error.retry_after or 0.0, _OVERLOAD_PAUSE), _LONGEST_PAUSE)
                    if anyio.current_time() + pause > give_up:
                        raise
                    if not held_up:
                        held_up = True
                        self._held_up += 1
                    await anyio.sleep(pause)
        finally:
            if held_up:
                self._held_up -= 1
                if not self._held_up:
                    self._flowing.set()

    async def _answer_in_order(self) -> None:
        while True:
            while not self._slots:
                if self._all_submitted:
                    return
                self._news = anyio.Event()
                await self._news.wait()
            slot = self._slots[0]
            await slot.done.wait()
            assert slot.answer is not None
            await self._emit(slot.answer)
            self._slots.popleft()
            self._room.set()
