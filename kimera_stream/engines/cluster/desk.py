"""Where an engine takes work from the bus: into the pipeline in the order of each partition, and the answers back.

    bus ──work──> Desk ──> Pipeline ──committed──> answer on the edge's topic, then the work is done and leaves the bus

Work comes at least once. The pipeline commits it once, by its request id; here it is only kept from being under way twice. What a
lost lease or a stop leaves undone is not answered: the next owner of the partition takes it up.

The bus may lose some of a lane's work and keep what comes after it. So work names what it may not overtake, and is begun only where that
was begun before it, under the same ownership; else it goes back to its edge (``wire.Early``), which adds the lane again in its order.
"""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import anyio
import anyio.abc
import msgspec
import structlog

from kimera_stream.core.access import Principal
from kimera_stream.core.coverage import SliceState
from kimera_stream.core.vault.errors import LeaseLostError
from kimera_stream.engines.cluster import wire
from kimera_stream.engines.pipeline import Pipeline
from kimera_stream.engines.retrying import DefectError, NotBegunError
from kimera_stream.engines.work import RequestId
from kimera_stream.infrastructure.bus.interface import Bus, Work, Worker, replies
from kimera_stream.protocol.errors import InternalError, OperationalError, OverloadedError, UnavailableError

log = structlog.get_logger(__name__)

BEGUN = 1_024
"""Requests per partition that are remembered as begun: what is forgotten costs its successor another way to the edge, and another
copy of what was refused is asked of the pipeline."""


class Desk:
    """Belongs to the event loop's thread. The coverage keeper says which partitions are this engine's (``gain``, ``lose``).

    Args:
        most: Pieces of work under way at once.
        forget_after: Seconds after which work is not begun any more: nobody waits for it, and the record that would tell that it
            was done before may be gone. The nodes' clocks may differ by as much.
        admit_write: Called for work that nobody has begun before; raises UnavailableError while nothing can be written. Work that came
            once more may have been done: it waits.
        clock: Unix seconds.
    """

    def __init__(
        self,
        bus: Bus,
        pipeline: Pipeline,
        *,
        most: int,
        forget_after: float,
        admit_write: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._pipeline = pipeline
        self._most = most
        self._forget_after = forget_after
        self._admit_write = admit_write
        self._clock = clock
        self._owned: dict[int, int] = {}
        """Partitions, and the generation of their ownership."""
        self._begun: dict[int, OrderedDict[str, wire.Refused | None]] = {}
        """By partition, what was begun under this ownership and not left undone; and how it was refused, where it was."""
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

    async def gain(self, slices: Mapping[int, SliceState]) -> None:
        """These partitions are this engine's now."""
        for number, state in slices.items():
            self._owned[number] = state.generation
            self._begun[number] = OrderedDict()
            if self._worker is not None and not self._closed:
                self._worker.take(number)

    async def lose(self, numbers: Collection[int]) -> None:
        """These partitions are to go, or are gone: nothing more is read of them when this returns."""
        for number in numbers:
            self._owned.pop(number, None)
            self._begun.pop(number, None)
        if self._worker is not None:
            for number in numbers:
                await self._worker.give(number)

    # -- life

    async def run(self) -> None:
        """Carry out what comes until cancelled. May be called again after a crash."""
        self._under_way.clear()
        self._answers.clear()
        self._done.clear()
        for begun in self._begun.values():
            begun.clear()
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
                        self._begin(work, worker, group)
        finally:
            self._worker = None
            self._idle.set()

    def _begin(self, work: Work, worker: Worker, group: anyio.abc.TaskGroup) -> None:
        """Start it, where it is new and its turn has come."""
        same = self._under_way.get(work.request)
        if same is not None:  # added again meanwhile: it is done with the one under way
            same.append(work)
            return
        generation = self._owned.get(work.partition)
        if generation is None:
            worker.release([work])
            return
        try:
            asked: wire.Request = wire.decode_request(work.payload)
        except msgspec.MsgspecError:
            log.exception("work on the bus cannot be read", partition=work.partition)
            unreadable = OperationalError("the request could not be read by the engine")
            self._reply(work.reply_to, wire.Refused.of(work.request, unreadable), [work])
            return
        begun = self._begun[work.partition]
        if (
            refused := begun.get(work.request)
        ) is not None:  # another copy: who waited for it has heard that it is not done
            self._reply(work.reply_to, refused, [work])
            return
        if asked.after is not None and asked.after not in begun:
            self._reply(work.reply_to, wire.Early(request=work.request, turn=asked.turn), [work])
            return
        is_new = not work.again and asked.turn == 0 and work.request not in begun
        begun[work.request] = None
        begun.move_to_end(work.request)
        if len(begun) > BEGUN:
            begun.popitem(last=False)
        self._under_way[work.request] = [work]
        if self._idle.is_set():
            self._idle = anyio.Event()
        request = RequestId(work.request, work.partition, generation)
        # Started in order, and the pipeline's intake is reached without waiting: a lane keeps its order.
        group.start_soon(self._carry_out, work, asked, request, worker, is_new, name="desk:work")

    async def _carry_out(
        self, work: Work, asked: wire.Request, request: RequestId, worker: Worker, is_new: bool
    ) -> None:
        answer: wire.Answer | None
        try:
            if is_new:
                self._admit_write()
            answer = await self._ask_pipeline(asked, request)
        except LeaseLostError:
            answer = None  # the new owner does it
        except NotBegunError:
            answer = None  # it comes again behind what was under way
        except UnavailableError as error:
            answer = None if self._closed else wire.Refused.of(work.request, error)
        except InternalError as error:
            # The pipeline has failed while this was under way, perhaps because of it: once more, then no more.
            known = work.again or asked.turn > 0 or isinstance(error, DefectError)
            answer = wire.Refused.of(work.request, error) if known else None
        except OperationalError as error:
            answer = wire.Refused.of(work.request, error)
        same = self._under_way.pop(work.request)
        self._room.set()
        begun = self._begun[work.partition] if self._owned.get(work.partition) == request.generation else {}
        if answer is not None:
            self._reply(work.reply_to, answer, same)
            if isinstance(answer, wire.Refused) and work.request in begun:
                begun[work.request] = answer
        else:
            worker.release(same)
            begun.pop(work.request, None)
        if not self._under_way:
            self._idle.set()

    def _reply(self, edge: str, answer: wire.Answer, done: Sequence[Work]) -> None:
        """Have the edge told, and the work let go."""
        self._answers[edge].append(answer)
        self._done += done
        self._finished.set()

    async def _ask_pipeline(self, asked: wire.Request, request: RequestId) -> wire.Result:
        if self._clock() - asked.at / 1000 > self._forget_after:
            raise OverloadedError("the request has waited too long", retry_after=1.0)
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
                    request=request.id, geoid=result.geoid, offset=result.offset, duplicate=result.duplicate
                )
            case wire.DeleteRequest():
                offset = await self._pipeline.delete(
                    asked.geoid_id, principal=principal, session_id=asked.session_id, request=request
                )
                return wire.Removed(request=request.id, offset=offset)
            case wire.ResolveRequest():
                scar, offset = await self._pipeline.resolve(
                    asked.contradiction_id,
                    asked.decision,
                    asked.reason,
                    principal=principal,
                    session_id=asked.session_id,
                    request=request,
                )
                return wire.Settled(request=request.id, scar=scar, offset=offset)

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
