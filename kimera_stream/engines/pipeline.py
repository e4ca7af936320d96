"""The pipeline: what the doors ask, carried out by two supervised loops.

    publish() -> Intake -> [prepare: keys, encoding] -> [sequencer: detect, plan, commit, tell] -> the caller's answer

While one group commits, the next is being encoded: the two loops are joined by a stream of bounded length.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
import structlog

from kimera_stream.core.access import Principal
from kimera_stream.core.geoid import unit
from kimera_stream.core.interfaces import EmbeddingService, PublishResult, VaultService
from kimera_stream.core.validation import BodyLimits, check_key, check_reason, validate_body, validate_query
from kimera_stream.engines.checkpoint import KeptWork
from kimera_stream.engines.intake import Intake, Ticket
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.engines.queries import Queries
from kimera_stream.engines.retrying import Faults, NotBegunError, Patience, defect, may_pass
from kimera_stream.engines.sequencer import Sequencing
from kimera_stream.engines.work import DeleteWork, PublishWork, RequestId, RereadWork, ResolveWork, Work
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.protocol.channels import check_id
from kimera_stream.protocol.errors import BadRequestError, InternalError, OperationalError, UnavailableError
from kimera_stream.protocol.messages import Published
from kimera_stream.protocol.objects import (
    Decision,
    GeoidBody,
    Scar,
    ScoredGeoid,
    ScoreResult,
    Watch,
    WatchKind,
)

log = structlog.get_logger(__name__)

GROUPS_AHEAD = 2
"""Encoded groups that may wait for the sequencer."""
ENCODED_PER_GROUP = 2
"""Texts in one group, in batches of the encoder: more would make the first of them wait for the last."""
KEY_LOOKUPS = 8
"""Idempotency keys looked up at once."""
BODY_OVERHEAD = 512
"""Bytes counted for a statement besides its text and vector."""
KEEP_DEADLINE = 2.0
"""Seconds that a stop whose time is over may still take to keep what was accepted."""
REREADER = ("~verifier", "")
"""Lane of the verifier's later word."""

_Failure: TypeAlias = tuple[PublishWork, OperationalError]


class Pipeline:
    """Implements ``core.interfaces.KnowledgeService``.

    ``run`` is the supervised service; the methods may be called from any task of its event loop.

    Args:
        admit: Called before a statement is accepted; raises OverloadedError above the memory limit.
        admit_write: Called before anything is accepted that did not come from another node; raises UnavailableError while nothing
            can be written.
        clock: Unix seconds.
    """

    def __init__(
        self,
        vault: VaultService,
        embedder: EmbeddingService,
        sequencer: Sequencing,
        queries: Queries,
        settings: Settings,
        metrics: PipelineMetrics,
        *,
        admit: Callable[[], None] = lambda: None,
        admit_write: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._vault = vault
        self._embedder = embedder
        self._sequencer = sequencer
        self._queries = queries
        self._metrics = metrics
        self._admit = admit
        self._admit_write = admit_write
        self._clock = clock
        self._intake = Intake(settings.performance.queue_items, settings.performance.queue_bytes)
        self._limits = BodyLimits.from_settings(settings.api, embedder.dimension)
        self._window = settings.performance.idempotency_window
        self._group = settings.database.group_commit_max
        self._encoded = settings.embedding.batch_size * ENCODED_PER_GROUP
        self._patience = Patience(settings.performance.retry_within)
        self._faults = Faults("prepare", metrics.fault)
        self._kept = KeptWork(
            vault,
            self._limits,
            settings.performance,
            metrics,
            cost=_cost,
            alone=not settings.bus.url.get_secret_value(),
            clock=clock,
        )
        self._keyed: dict[tuple[str, str], PublishWork] = {}
        """What is under way by its key, of this node's own."""
        self._under_way: dict[Ticket[Any], None] = {}
        self._processing: set[Ticket[Any]] = set()
        """Of those under way, what may be in the log already."""
        self._stopped = False

    # -- commands ----------------------------------------------------------------------------------------------------

    async def publish(
        self,
        body: GeoidBody,
        *,
        principal: Principal,
        session_id: str | None = None,
        key: str | None = None,
        priority: int = 5,
        merge: bool = False,
        must_exist: bool = False,
        request: RequestId | None = None,
    ) -> PublishResult:
        """See ``KnowledgeService.publish``. ``request``: where it came from another node."""
        validate_body(body, self._limits, merge=merge)
        if key is not None:
            check_key(key)
            under_way = self._keyed.get((principal.id, key))
            # Another node's request takes its place in its lane at once. The log knows which of those of one key was the first.
            if under_way is not None and request is None:
                return _again(await under_way.ticket.outcome())
        if request is None:
            self._admit_write()
        self._admit()
        session = body.session_id or session_id or ""
        ticket: Ticket[PublishResult] = Ticket(
            (principal.id, session), priority=priority, cost=_cost(body), admitted_at=time.monotonic()
        )
        work = PublishWork(ticket, body, principal, session_id, key, merge, must_exist, request=request)
        if body.vector is not None:
            work.vector = unit(body.vector)
        self._accept(work)
        if key is not None and request is None:
            self._keyed[principal.id, key] = work
        return await ticket.outcome()

    async def delete(
        self,
        geoid_id: str,
        *,
        principal: Principal,
        session_id: str | None = None,
        request: RequestId | None = None,
    ) -> int:
        """Delete a geoid; returns the offset of its ``geoid.deleted``."""
        check_id(geoid_id, "geoid_id")
        if request is None:
            self._admit_write()
        ticket: Ticket[int] = self._ticket(principal, session_id)
        self._accept(DeleteWork(ticket, geoid_id, principal, request))
        return await ticket.outcome()

    async def resolve(
        self,
        contradiction_id: str,
        decision: Decision,
        reason: str | None,
        *,
        principal: Principal,
        session_id: str | None = None,
        request: RequestId | None = None,
    ) -> tuple[Scar, int]:
        """Resolve a contradiction; returns its scar and the offset of ``scar.formed``."""
        if decision not in ("collapse", "surge", "buffer"):
            raise BadRequestError("decision: expected collapse, surge or buffer", field="decision")
        if reason is not None:
            check_reason(reason)
        if request is None:
            self._admit_write()
        ticket: Ticket[tuple[Scar, int]] = self._ticket(principal, session_id)
        self._accept(ResolveWork(ticket, contradiction_id, decision, reason, principal, request))
        return await ticket.outcome()

    async def reread(self, geoid_ids: Sequence[str]) -> int:
        """Have the verifier read stored statements that were decided without it, after everything else that waits.

        Raises:
            UnavailableError: it cannot read at present, nothing can be written, or the server is stopping.
        """
        self._admit_write()
        ticket: Ticket[int] = Ticket(REREADER, priority=0, cost=BODY_OVERHEAD, admitted_at=time.monotonic())
        self._accept(RereadWork(ticket, list(geoid_ids)))
        return await ticket.outcome()

    # -- questions -----------------------------------------------------------------------------------------------------

    async def score(self, a: GeoidBody, b: GeoidBody, *, explain: bool = False) -> ScoreResult:
        """How ``a`` (older) and ``b`` stand to each other; nothing is stored."""
        validate_body(a, self._limits, where="a")
        validate_body(b, self._limits, where="b")
        return await self._queries.score(a, b, explain=explain)

    async def search(
        self,
        *,
        text: str | None,
        vector: list[float] | None,
        relation: WatchKind,
        k: int,
        filter: Mapping[str, Any] | None = None,
    ) -> list[ScoredGeoid]:
        """Stored geoids that relate to, or contradict, a statement; the best first."""
        validate_query(text, vector, self._limits, where="query")
        return await self._queries.search(text=text, vector=vector, relation=relation, k=k, filter=filter)

    async def watch(
        self,
        name: str,
        *,
        principal: Principal,
        text: str | None,
        vector: list[float] | None,
        kinds: list[WatchKind],
        min_score: float | None,
        filter: Mapping[str, Any] | None,
    ) -> Watch:
        """Keep a standing query; see ``WatchRegistry``."""
        validate_query(text, vector, self._limits, where="watch")
        return await self._queries.watch(
            name, principal=principal, text=text, vector=vector, kinds=kinds, min_score=min_score, filter=filter
        )

    async def unwatch(self, name: str, *, principal: Principal) -> None:
        """End a standing query."""
        await self._queries.unwatch(name, principal=principal)

    async def watches(self, *, principal: Principal) -> list[Watch]:
        """The standing queries of a principal."""
        return self._queries.watches(principal)

    def watch_owner(self, watch_id: str) -> str | None:
        """See ``core.interfaces.KnowledgeService``."""
        return self._queries.watch_owner(watch_id)

    async def find_watch(self, watch_id: str) -> str | None:
        """See ``core.interfaces.KnowledgeService``."""
        return self._queries.watch_owner(watch_id)

    # -- life ------------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Statements accepted and not yet answered."""
        return self._intake.statistics.items

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Carry out what is accepted until cancelled. May be called again after a crash.

        Args:
            ready: Called once the vault has been read.

        Raises:
            UnavailableError: before ``ready``; what had been accepted is refused.
        """
        lost: OperationalError = InternalError(
            "the server failed while it worked on this; repeat the request, with its idempotency key if it had one",
            retry_after=1.0,
        )
        try:
            try:
                await self._sequencer.catch_up()
            except UnavailableError as error:
                lost = error
                raise
            await self._kept.begin(self._accept_kept)
            ready()
            send, receive = anyio.create_memory_object_stream[list[Work]](GROUPS_AHEAD)
            async with anyio.create_task_group() as group, send, receive:
                group.start_soon(self._sequence, receive, name="pipeline:sequence")
                group.start_soon(self._kept.run, self._accept_kept, name="pipeline:kept")
                await self._prepare(send)
        finally:
            self._processing = set()
            await self._end_with(lost)

    async def _end_with(self, lost: OperationalError) -> None:
        """Refuse what is under way, and what must not be done before what comes again of it."""
        lanes = {each.lane for each in self._under_way if not each.finished and _comes_again(each)}
        self._send_back(lanes)
        for ticket in list(self._under_way):
            ticket.refuse(lost)
            self._finish(ticket)
        if lanes:
            # Who brought it hears of it now, and may have brought what comes after it until then.
            await anyio.lowlevel.cancel_shielded_checkpoint()
            self._send_back(lanes)

    def _send_back(self, lanes: Iterable[tuple[str, str]]) -> None:
        """Refuse what waits in these lanes: it came from another node, as what is before it, and comes again as that does."""
        waiting = self._intake.withdraw(lanes)
        self._under_way |= dict.fromkeys(waiting)
        for ticket in waiting:
            ticket.refuse(
                NotBegunError("the server failed before it came to this; repeat the request", retry_after=1.0)
            )
            self._finish(ticket)

    async def drain(self) -> None:
        """Accept nothing more and wait until everything accepted is answered. Cancelled, it refuses the rest itself."""
        self._intake.close()
        try:
            await self._intake.idle()
        finally:
            await self._leave_behind()

    async def _leave_behind(self) -> None:
        """Keep what can be kept of what is still to be done, and refuse the rest."""
        self._stopped = True
        waiting = self._intake.withdraw()
        ahead = [ticket for ticket in self._under_way if ticket not in self._processing]
        with anyio.move_on_after(KEEP_DEADLINE, shield=True):
            await self._kept.keep(ticket.work for ticket in [*ahead, *waiting])
        stopping = UnavailableError(
            "the server stopped before this was done; repeat the request, with its idempotency key if it had one",
            retry_after=1.0,
        )
        for ticket in waiting:
            ticket.refuse(stopping)
            self._intake.finished(ticket)
        for ticket in self._under_way:
            ticket.refuse(stopping)

    def _accept_kept(self, work: PublishWork) -> bool:
        """Take in what the vault keeps, if there is room and the same key is not under way."""
        assert work.key is not None
        if (work.principal.id, work.key) in self._keyed:
            return False
        try:
            self._accept(work)
        except OperationalError:
            return False
        self._keyed[work.principal.id, work.key] = work
        return True

    async def _prepare(self, send: anyio.abc.ObjectSendStream[list[Work]]) -> None:
        while True:
            group: list[Work] = await self._take()
            began = time.perf_counter()
            await self._patiently("keys", group, self._look_up_keys)
            await self._patiently("encode", group, self._encode)
            self._metrics.stage("prepare", time.perf_counter() - began)
            group = [work for work in group if not work.ticket.finished or self._finish(work.ticket)]
            if group:
                await send.send(group)

    async def _take(self) -> list[Work]:
        tickets = await self._intake.take(self._group, heavy_limit=self._encoded, heavy=_is_heavy)
        works = [ticket.work for ticket in tickets]
        for ticket in tickets:
            self._under_way[ticket] = None
        return works

    async def _patiently(
        self, stage: str, group: Sequence[Work], step: Callable[[list[PublishWork]], Awaitable[list[_Failure]]]
    ) -> None:
        """Do one step for the publishes of a group; what fails by a cause that may pass is tried again for a while."""
        todo = [work for work in group if isinstance(work, PublishWork) and not work.ticket.finished]
        tries = 0
        while todo and not self._stopped:
            failed = await step(todo)
            todo = [work for work, error in failed if may_pass(error) and self._patience.lasts(work.ticket)]
            again = set(map(id, todo))
            for work, error in failed:
                if id(work) not in again:
                    work.ticket.refuse(error)
            if todo:
                tries += 1
                _count_try(todo)
                self._metrics.retried(stage)
                await self._patience.pause(tries)

    async def _look_up_keys(self, works: list[PublishWork]) -> list[_Failure]:
        """Answer what has been done before; returns whose key could not be looked up."""
        # What came from another node is looked up where it is committed, under the log's lock.
        keyed = [work for work in works if work.key is not None and work.request is None]
        failed: list[_Failure] = []
        if not keyed:
            return failed
        not_before = int((self._clock() - self._window) * 1000)
        limiter = anyio.CapacityLimiter(KEY_LOOKUPS)

        async def look_up(work: PublishWork) -> None:
            assert work.key is not None
            async with limiter:
                try:
                    record = await self._vault.idempotent(work.principal.id, work.key, not_before=not_before)
                except OperationalError as error:
                    failed.append((work, error))
                    return
                except Exception as error:  # noqa: BLE001 - one key must not take the others along; Faults logs, and raises it in the end
                    self._faults.blame(work.ticket, error)
                    work.at_fault = True
                    failed.append((work, defect()))
                    return
            if record is not None:
                work.ticket.answer(_again(_first_result(record.result)))

        async with anyio.create_task_group() as lookups:
            for work in keyed:
                lookups.start_soon(look_up, work, name="pipeline:key")
        return failed

    async def _encode(self, works: list[PublishWork]) -> list[_Failure]:
        """Fill in the vectors; returns whose text could not be encoded."""
        todo = deque([[work for work in works if work.text is not None]])
        failed: list[_Failure] = []
        while todo:
            part = todo.popleft()
            if not part:
                continue
            try:
                rows, tokens = await self._embedder.embed_counted([work.text for work in part if work.text is not None])
            except OperationalError as error:
                if not isinstance(error, InternalError):
                    failed += [(work, error) for work in part]
                elif len(part) > 1:  # the encoder has singled out the text, and keeps the vectors of the others
                    todo.extendleft([[work] for work in reversed(part)])
                else:
                    part[0].at_fault = True
                    failed.append((part[0], defect()))
                continue
            except Exception as error:  # noqa: BLE001 - one text must not take the others along; Faults logs, and raises it in the end
                if len(part) > 1:
                    todo.extendleft((part[len(part) // 2 :], part[: len(part) // 2]))
                else:
                    self._faults.blame(part[0].ticket, error)
                    part[0].at_fault = True
                    failed.append((part[0], defect()))
                continue
            self._faults.passed()
            for work, row, count in zip(part, rows, tokens, strict=True):
                work.tokens = count
                work.vector = row.copy()  # a row of its own: keeping one must not keep the whole batch
        return failed

    async def _sequence(self, receive: anyio.abc.ObjectReceiveStream[list[Work]]) -> None:
        async for group in receive:
            if self._stopped:
                continue  # it was kept or refused
            began = time.perf_counter()
            await self._carry_out(group)
            self._metrics.stage("sequence", time.perf_counter() - began)
            for work in group:
                self._finish(work.ticket)

    async def _carry_out(self, group: list[Work]) -> None:
        """Have a group committed. What fails by a cause that may pass is tried again for a while, and what comes after it waits."""
        todo, tries = group, 0
        while todo and not self._stopped:
            self._processing = {work.ticket for work in todo}
            stuck = await self._sequencer.process(todo)
            self._processing = set()
            if stuck is None:
                return
            patient: list[Work] = []
            for work in stuck.segment:
                if self._patience.lasts(work.ticket):
                    patient.append(work)
                else:
                    self._sequencer.refuse([work], stuck.error)
            todo = [*patient, *stuck.rest]
            for work in group:
                if work.ticket.finished:
                    self._finish(work.ticket)
            if patient:
                tries += 1
                _count_try(patient)
                self._metrics.retried("commit")
                await self._patience.pause(tries)

    def _ticket(self, principal: Principal, session_id: str | None) -> Ticket[Any]:
        return Ticket((principal.id, session_id or ""), priority=5, cost=BODY_OVERHEAD, admitted_at=time.monotonic())

    def _accept(self, work: Work) -> None:
        work.ticket.work = work
        self._intake.admit(work.ticket)

    def _finish(self, ticket: Ticket[Any]) -> bool:
        """Its place is free. Always False, to drop it from a group."""
        if self._under_way.pop(ticket, ticket) is None:
            self._intake.finished(ticket)
            self._metrics.answered(time.monotonic() - ticket.admitted_at)
            work = ticket.work
            if isinstance(work, PublishWork):
                if work.key is not None and self._keyed.get((work.principal.id, work.key)) is work:
                    del self._keyed[work.principal.id, work.key]
                self._kept.finished(work)
            # Ticket and work name each other: let go of here, statement and vector need not wait for the collector of garbage.
            ticket.work = None
        return False


def _count_try(works: Iterable[Work]) -> None:
    """They failed by a cause that may pass, and are begun again."""
    for work in works:
        if isinstance(work, PublishWork):
            work.tries += 1


def _is_heavy(ticket: Ticket[Any]) -> bool:
    return isinstance(ticket.work, PublishWork) and ticket.work.text is not None


def _comes_again(ticket: Ticket[Any]) -> bool:
    return not isinstance(ticket.work, RereadWork) and ticket.work.request is not None


def _cost(body: GeoidBody) -> int:
    cost = BODY_OVERHEAD + 4 * len(body.text or "") + 8 * len(body.vector or ())
    for state in (body.semantic_state, body.symbolic_state):
        if state:
            cost += 64 * len(state) + sum(map(len, state))
    if body.symbolic_state:
        cost += sum(len(value) for value in body.symbolic_state.values() if isinstance(value, str))
    if body.metadata:
        cost += 4 * len(msgspec.json.encode(body.metadata))  # nested objects take several times their text
    return cost


def _first_result(encoded: bytes) -> PublishResult:
    published = msgspec.json.decode(encoded, type=Published)
    return PublishResult(published.geoid, published.offset, published.contradictions, duplicate=True)


def _again(result: PublishResult) -> PublishResult:
    return PublishResult(result.geoid, result.offset, result.contradictions, duplicate=True)
