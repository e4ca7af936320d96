"""Where an engine takes work from the bus: into the pipeline in the order of each partition, and the answers back.

    bus ──work──> Desk ──> Pipeline ──committed──> answer on the edge's topic, then the work is done and leaves the bus

Work comes at least once. The pipeline commits it once, by its request id; here it is only kept from being under way twice. What a
lost lease or a stop leaves undone is not answered: the next owner of the partition takes it up.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection

import anyio
import msgspec
import structlog

from kimera_stream.core.interfaces import Principal
from kimera_stream.core.vault.errors import LeaseLostError
from kimera_stream.engines.cluster import wire
from kimera_stream.engines.pipeline import Pipeline
from kimera_stream.engines.retrying import DefectError
from kimera_stream.engines.work import RequestId
from kimera_stream.infrastructure.bus.interface import Bus, Work, Worker, replies
from kimera_stream.protocol.errors import InternalError, OperationalError, OverloadedError, UnavailableError

log = structlog.get_logger(__name__)


class Desk:
    """Belongs to the event loop's thread. The coverage keeper says which partitions are this engine's (``gain``, ``lose``).

    Args:
        most: Pieces of work under way at once.
        forget_after: Seconds after which work is not begun any more: nobody waits for it, and the record that would tell that it
            was done before may be gone. The nodes' clocks may differ by as much.
        clock: Unix seconds.
    """

    def __init__(
        self,
        bus: Bus,
        pipeline: Pipeline,
        *,
        most: int,
        forget_after: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._pipeline = pipeline
        self._most = most
        self._forget_after = forget_after
        self._clock = clock
        self._owned: set[int] = set()
        self._worker: Worker | None = None
        self._under_way: dict[str, list[Work]] = {}
        self._room = anyio.Event()
        self._idle = anyio.Event()
        self._idle.set()
        self._answers: dict[str, list[wire.Answer]] = defaultdict(list)
        self._done: list[Work] = []
        self._finished = anyio.Event()
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests under way."""
        return len(self._under_way)

    # -- whose work it is

    async def gain(self, numbers: Collection[int]) -> None:
        """These partitions are this engine's now."""
        self._owned |= set(numbers)
        if self._worker is not None and not self._closed:
            for number in numbers:
                self._worker.take(number)

    async def lose(self, numbers: Collection[int]) -> None:
        """These partitions are to go, or are gone: nothing more is read of them when this returns."""
        self._owned -= set(numbers)
        if self._worker is not None:
            for number in numbers:
                await self._worker.give(number)

    # -- life

    async def run(self) -> None:
        """Carry out what comes until cancelled. May be called again after a crash."""
        self._under_way.clear()
        self._answers.clear()
        self._done.clear()
        try:
            async with self._bus.worker() as worker, anyio.create_task_group() as group:
                self._worker = worker
                for number in self._owned if not self._closed else ():
                    worker.take(number)
                group.start_soon(self._answer, worker, name="desk:answers")
                while True:
                    while len(self._under_way) >= self._most:
                        self._room = anyio.Event()
                        await self._room.wait()
                    for work in await worker.receive():
                        if self._is_new(work):
                            # Started in order, and the pipeline's intake is reached without waiting: a lane keeps its order.
                            group.start_soon(self._carry_out, work, worker, name="desk:work")
        finally:
            self._worker = None
            self._idle.set()

    def _is_new(self, work: Work) -> bool:
        """Whether it is to be started; the same request, added again meanwhile, is done with the one under way."""
        same = self._under_way.get(work.request)
        if same is not None:
            same.append(work)
            return False
        self._under_way[work.request] = [work]
        if self._idle.is_set():
            self._idle = anyio.Event()
        return True

    async def _carry_out(self, work: Work, worker: Worker) -> None:
        answer: wire.Answer | None
        try:
            answer = await self._ask_pipeline(work)
        except LeaseLostError:
            answer = None  # the new owner does it
        except UnavailableError as error:
            answer = None if self._closed else wire.Refused.of(work.request, error)
        except InternalError as error:
            # The pipeline has failed while this was under way, perhaps because of it: once more, then no more.
            known = work.again or isinstance(error, DefectError)
            answer = wire.Refused.of(work.request, error) if known else None
        except OperationalError as error:
            answer = wire.Refused.of(work.request, error)
        same = self._under_way.pop(work.request)
        self._room.set()
        if answer is None:
            worker.release(same)
        else:
            self._answers[work.reply_to].append(answer)
            self._done += same
            self._finished.set()
        if not self._under_way:
            self._idle.set()

    async def _ask_pipeline(self, work: Work) -> wire.Answer:
        try:
            asked: wire.Request = wire.decode_request(work.payload)
        except msgspec.MsgspecError as error:
            log.exception("work on the bus cannot be read", partition=work.partition)
            raise OperationalError("the request could not be read by the engine") from error
        if self._clock() - asked.at / 1000 > self._forget_after:
            raise OverloadedError("the request has waited too long", retry_after=1.0)
        request = RequestId(work.request, work.partition)
        principal = Principal(asked.principal, frozenset())
        match asked:
            case wire.PublishRequest():
                result = await self._pipeline.publish(
                    asked.body,
                    principal=principal,
                    session_id=asked.session_id,
                    key=asked.key,
                    priority=asked.priority,
                    merge=asked.merge,
                    must_exist=asked.must_exist,
                    request=request,
                )
                return wire.Committed(
                    request=work.request, geoid=result.geoid, offset=result.offset, duplicate=result.duplicate
                )
            case wire.DeleteRequest():
                offset = await self._pipeline.delete(
                    asked.geoid_id, principal=principal, session_id=asked.session_id, request=request
                )
                return wire.Removed(request=work.request, offset=offset)
            case wire.ResolveRequest():
                scar, offset = await self._pipeline.resolve(
                    asked.contradiction_id,
                    asked.decision,
                    asked.reason,
                    principal=principal,
                    session_id=asked.session_id,
                    request=request,
                )
                return wire.Settled(request=work.request, scar=scar, offset=offset)

    async def _answer(self, worker: Worker) -> None:
        """Send answers, many in one message where they come together, and let the work go."""
        while True:
            await self._finished.wait()
            self._finished = anyio.Event()
            answers, self._answers = self._answers, defaultdict(list)
            done, self._done = self._done, []
            for edge, told in answers.items():
                self._bus.publish(replies(edge), wire.encode(told))
            await worker.done(done)

    async def drain(self) -> None:
        """Take nothing more, and wait until what was taken is answered. What is not, the next owner takes up."""
        self._closed = True
        await self.lose(frozenset(self._owned))
        await self._idle.wait()
